"""OpenAI's own client works against the server, and what it gets is what the model says offline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from running import NAME, Served

openai = pytest.importorskip("openai", reason="OpenAI's client")

QUESTION = [{"role": "user", "content": "red cat one"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=3600)


def offline(served: Served, prompt: Any, **settings: Any) -> Any:
    return served.model.generate(prompt, **settings)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


@pytest.mark.parametrize("speculative", [True, False])
def test_a_greedy_chat_is_the_offline_answer(client: Any, served: Served, speculative: bool) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=24, extra_body={"speculative": speculative}
    )
    expected = offline(served, QUESTION, max_new_tokens=24)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == {"eos": "stop"}.get(expected.finish_reasons[0], "length")
    assert answer.usage.completion_tokens == len(expected.tokens[0])
    assert answer.usage.prompt_tokens == len(expected.prompts[0])
    did = answer.usage.model_extra["speculation"]
    assert (0 < did["accepted_tokens"] < did["drafted_tokens"]) == speculative
    assert did["tau"] > 1.2 if speculative else did["tau"] == 1


def test_a_streamed_chat_is_the_same_text(client: Any, served: Served) -> None:
    settings: dict[str, Any] = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("length") == 1
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {
            "temperature": 1.2,
            "top_k": 7,
            "min_p": 0.02,
            "repetition_penalty": 1.3,
            "logit_bias": {"70": 3.0, "71": -100},
        },
    ],
)
def test_sampling_with_a_seed_is_the_offline_sample(client: Any, served: Served, settings: dict[str, Any]) -> None:
    expected = offline(served, ["ab", "ab", "ab"], max_new_tokens=20, seed=5, **settings)
    own = {name: settings.pop(name) for name in ("top_k", "min_p", "repetition_penalty") if name in settings}
    answer = client.completions.create(model=NAME, prompt="ab", n=3, seed=5, max_tokens=20, extra_body=own, **settings)
    assert [choice.text for choice in answer.choices] == expected.texts
    assert len(set(expected.texts)) > 1, "the choices differ"


def test_several_prompts_and_token_ids(client: Any, served: Served) -> None:
    prompts = ["red", "blue sun", "x"]
    expected = offline(served, prompts, max_new_tokens=8).texts
    answer = client.completions.create(model=NAME, prompt=prompts, temperature=0, max_tokens=8)
    assert [choice.text for choice in answer.choices] == expected
    ids = [served.model.tokenizer(prompt)["input_ids"] for prompt in prompts]  # type: ignore[misc]
    answer = client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=8)
    assert [choice.text for choice in answer.choices] == expected
    echoed = client.completions.create(model=NAME, prompt="red", temperature=0, max_tokens=8, echo=True)
    assert echoed.choices[0].text == "red" + expected[0]


def test_stop_strings_end_the_text_before_them(client: Any, served: Served) -> None:
    text = offline(served, "red cat", max_new_tokens=40).text
    stop = next(text[i : i + 2] for i in range(6, len(text)) if text[i : i + 2].isascii())
    for stream in (False, True):
        given = client.completions.create(
            model=NAME, prompt="red cat", temperature=0, max_tokens=40, stop=[stop, "never"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in given] if stream else given.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_law_of_a_plain_forward(client: Any, served: Served, stream: bool) -> None:
    settings = {"temperature": 0.7, "seed": 3, "max_tokens": 16, "frequency_penalty": 0.5}
    expected = offline(served, QUESTION, seed=3, temperature=0.7, max_new_tokens=16, frequency_penalty=0.5)
    given = client.chat.completions.create(
        model=NAME, messages=QUESTION, logprobs=True, top_logprobs=3, stream=stream, **settings
    )
    choices = [chunk.choices[0] for chunk in given] if stream else given.choices
    found = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    prompt, tokens = expected.prompts[0], expected.tokens[0]
    with torch.inference_mode():
        model: Any = served.model.target.model
        laws = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(found) == len(tokens) > 8
    for entry, law, token in zip(found, laws, tokens, strict=True):
        assert entry.logprob == pytest.approx(law[token].item(), abs=1e-9)
        best = law.topk(3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-9)
    text = "".join(choice.delta.content or "" if stream else choice.message.content for choice in choices)
    said = [
        entry for entry, token in zip(found, tokens, strict=True) if token not in served.model.tokenizer.all_special_ids
    ]
    assert text == expected.text and text.removesuffix("\ufffd") == "".join(entry.token for entry in said)
    assert b"".join(bytes(entry.bytes) for entry in said).decode(errors="replace") == text


def test_logprobs_of_completions(client: Any) -> None:
    given = client.completions.create(model=NAME, prompt="red", temperature=0, max_tokens=6, logprobs=2, echo=False)
    logprobs = given.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert all(len(top) in (1, 2) for top in logprobs.top_logprobs) and logprobs.text_offset[0] == 0
    assert all(
        max(top.values()) == own for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )


def test_pieces_say_what_was_drafted(served: Served) -> None:
    body = {"prompt": "red cat", "temperature": 0, "max_tokens": 20, "return_pieces": True}
    with served.client() as http:
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
    expected = offline(served, "red cat", max_new_tokens=20)
    assert "".join(text for text, _ in choice["pieces"]) == choice["text"] == expected.text
    assert {accepted for _, accepted in choice["pieces"]} == {True, False}
    known = {True: {"drafter", "ngram"}, False: {None}}
    assert all(
        source in known[accepted]
        for (_, accepted), source in zip(choice["pieces"], choice["piece_sources"], strict=True)
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": QUESTION, "max_tokens": 4000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
        ({"messages": QUESTION, "logit_bias": {"100000": 1}}, "logit_bias"),
        ({"messages": QUESTION, "temperature": -1}, "temperature"),
        ({"messages": QUESTION, "temperature": True}, "temperature"),
        ({"messages": QUESTION, "temperature": 1e-20}, "temperature"),
        ({"messages": QUESTION, "n": 0}, "n"),
        ({"messages": QUESTION, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"messages": QUESTION, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": QUESTION, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": QUESTION, "tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": QUESTION, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": QUESTION, "guided_regex": "a*"}, "guided_regex"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": []}, "messages"),
        ({}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: Any, body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.post("/chat/completions", body={"model": NAME, **body}, cast_to=object)
    error = refusal.value.body
    assert error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_parameters_that_ask_for_nothing_are_accepted(client: Any) -> None:
    client.chat.completions.create(
        model=NAME,
        messages=QUESTION,
        max_tokens=2,
        user="me",
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        service_tier="auto",
        metadata={"a": "b"},
        modalities=["text"],
        extra_body={"echo": False, "add_special_tokens": False},
    )


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_spelled_out_on_request(client: Any, served: Served, stream: bool) -> None:
    tokenizer: Any = served.model.tokenizer
    mark, end = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    asked = {"model": NAME, "prompt": "red", "max_tokens": 3, "temperature": 0, "stream": stream}

    def text(skip: bool | None, **settings: Any) -> str:
        answer = client.completions.create(**asked, extra_body={"skip_special_tokens": skip}, **settings)
        return "".join(chunk.choices[0].text for chunk in (answer if stream else [answer]))

    for skip, expected in ((False, "<|im_start|>" * 3), (True, ""), (None, "")):
        assert text(skip, logit_bias={str(mark): 100}) == expected
    assert text(False, logit_bias={str(mark): 100}, stop=["im_start|><"]) == "<|"
    assert text(False, logit_bias={str(end): 100}) == "", "what ended it is no part of it"


def test_a_length_given_under_both_names_is_one(client: Any) -> None:
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": 2, "max_completion_tokens": 2, "temperature": 0}
    assert client.chat.completions.create(**asked).usage.completion_tokens <= 2


def test_every_chunk_has_the_usage_so_far_on_request(client: Any) -> None:
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": True}
    for options, every in (({"continuous_usage_stats": True}, True), ({}, False)):
        chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True, **options}))
        counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
        assert len(counts) == (len(chunks) if every else 1)
        assert counts == sorted(counts) and counts[-1] > 0 and not chunks[-1].choices
    chunks = list(client.chat.completions.create(**asked, stream_options={"continuous_usage_stats": True}))
    assert all(chunk.usage is None for chunk in chunks)


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="a")
