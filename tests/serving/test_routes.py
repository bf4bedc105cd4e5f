"""The smaller routes, other sites' pages, the chat template's switches, and what clients send back to the server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from running import NAME, Served, tiny_model

import outdraft
from outdraft.errors import UserError

ASKED = {"role": "user", "content": "red"}
SWITCHED = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
)


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    with served.client() as http:
        yield http


def chat(client: Any, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": NAME, "max_tokens": 3, "temperature": 0, **body})


def test_one_model_by_its_name(client: Any) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{NAME}").json() == listed[0]
    missing = client.get("/v1/models/some/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_a_name_with_a_slash(starting: Callable[..., Served]) -> None:
    served = starting(served_model_name=["org/model"])
    with served.client() as http:
        assert http.get("/v1/models/org/model").json()["id"] == "org/model"


def test_the_version(client: Any) -> None:
    assert client.get("/version").json() == {"version": outdraft.__version__}


def test_tokens_of_a_text_and_back(client: Any, served: Served) -> None:
    tokenizer: Any = served.model.tokenizer
    ids = tokenizer("red é")["input_ids"]
    said = client.post("/tokenize", json={"model": NAME, "prompt": "red é", "return_token_strs": True}).json()
    assert said["tokens"] == ids and said["count"] == len(ids)
    assert said["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    assert said["max_model_len"] == served.model.target.context_length
    assert client.post("/detokenize", json={"model": NAME, "tokens": ids}).json() == {"prompt": "red é"}
    asked = client.post("/tokenize", json={"messages": [ASKED]}).json()
    assert asked["tokens"] == served.model.generate([ASKED], max_new_tokens=1).prompts[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [ASKED]}),
        ("/tokenize", {"prompt": "a", "other": 1}),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}),
        ("/tokenize", {"messages": [ASKED], "add_generation_prompt": False}),
        ("/detokenize", {"tokens": [2**30]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_what_cannot_be_tokenised_is_refused(client: Any, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_pages_of_other_sites_may_ask_where_that_is_allowed(starting: Callable[..., Served], client: Any) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.get("/version", headers=asked).headers
    served = starting(allow_origin=["https://a.example"], api_key="k")
    with served.client() as http:
        before = http.options(
            "/v1/chat/completions", headers={**asked, "access-control-request-headers": "authorization"}
        )
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://a.example"
        refused = http.get("/v1/models", headers=asked)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        other = http.get("/version", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_its_own_message_can_be_sent_back(client: Any) -> None:
    message = chat(client, messages=[ASKED]).json()["choices"][0]["message"]
    empty = {"tool_calls": None, "function_call": None, "audio": None, "annotations": [], "reasoning_content": ""}
    for back in (message, {**message, **empty}, {"role": "assistant", "content": None, "tool_calls": []}):
        answer = chat(client, messages=[ASKED, back, ASKED], **{"unheard_of": None, "extra": {}})
        assert answer.status_code == 200, answer.text


def test_openais_client_can_send_it_back(served: Served) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
    settings: dict[str, Any] = {"model": NAME, "max_tokens": 3, "temperature": 0}
    message = client.chat.completions.create(messages=[ASKED], **settings).choices[0].message
    for back in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        again = client.chat.completions.create(messages=[ASKED, back, ASKED], **settings)
        assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, "messages.1.tool_calls"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages.1.refusal"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "takes no reasoning_content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
            "unknown parameter 'messages.1.content.0.cache_control'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text: Field required"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({"role": "bogus", "content": "red"}, "messages.1.role: Input should be 'system', "),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user"}, "content"),
    ],
)
def test_what_has_content_and_is_not_understood_is_refused_by_name(
    client: Any, message: dict[str, Any], named: str
) -> None:
    answer = chat(client, messages=[ASKED, message])
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [], "tool_choice": "auto"},
        {"top_logprobs": 0},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"reasoning_effort": "none", "verbosity": "medium", "length_penalty": 1.0, "priority": 0, "min_tokens": 0},
        {"add_generation_prompt": True, "continue_final_message": False},
        {
            "messages": [ASKED, {"role": "assistant", "content": "blue"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(client: Any, body: dict[str, Any]) -> None:
    answer = chat(client, **{"messages": [ASKED], **body})
    assert answer.status_code == 200, answer.text


def test_a_prompt_that_is_not_what_was_asked_for_is_refused(client: Any) -> None:
    for messages in ([ASKED], [ASKED, {"role": "assistant", "content": "blue"}]):
        for name, value in (
            ("add_generation_prompt", len(messages) == 2),
            ("continue_final_message", len(messages) < 2),
        ):
            answer = chat(client, messages=messages, **{name: value})
            assert answer.status_code == 400 and name in answer.json()["error"]["message"]


def test_no_end_before_so_many_tokens(client: Any, served: Served) -> None:
    first = served.model.generate("red", max_new_tokens=1).tokens[0]
    asked = {"model": NAME, "prompt": "red", "max_tokens": 6, "temperature": 0, "stop_token_ids": first}
    for least in (0, 3):
        said = client.post("/v1/completions", json={**asked, "min_tokens": least}).json()
        expected = served.model.generate("red", max_new_tokens=6, eos_token_id=first, min_new_tokens=least)
        assert said["usage"]["completion_tokens"] == len(expected.tokens[0]) >= max(1, least)


def test_head_is_get_without_a_body(client: Any) -> None:
    for path, code in (("/health", 200), ("/v1/models", 200), ("/", 200), ("/nowhere", 404), ("/v1/completions", 405)):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (code, b"")
        assert answer.headers["content-type"] == client.get(path).headers["content-type"]


def test_thoughts_and_tools_reach_a_template_that_takes_them(starting: Callable[..., Served]) -> None:
    model = tiny_model()
    model.tokenizer.chat_template = (  # type: ignore[union-attr]
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "add"}}
    with starting(model=model).client() as http:

        def text(messages: list[Any], **body: Any) -> str:
            tokens = http.post("/tokenize", json={"messages": messages, **body}).json()["tokens"]
            return str(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])

        said = {"role": "assistant", "content": "a", "reasoning_content": "why "}
        assert text([ASKED, said, ASKED]) == f"{ASKED['content']}why a{ASKED['content']}"
        assert text([ASKED], tools=[tool]) == f"add{ASKED['content']}"
        used = chat(http, messages=[ASKED, said, ASKED]).json()["usage"]["prompt_tokens"]
        assert used == len(text([ASKED, said, ASKED]))


def test_the_chat_template_can_be_switched(starting: Callable[..., Served]) -> None:
    model = tiny_model()
    model.target.tokenizer = copy.deepcopy(model.target.tokenizer)
    model.target.tokenizer.chat_template = SWITCHED  # type: ignore[union-attr]
    off = {"enable_thinking": False}
    served, without = starting(model=model), starting(model=model, chat_template_kwargs=off)

    def counted(served: Served, **body: Any) -> Any:
        with served.client() as http:
            answer = chat(http, messages=[ASKED], **body)
        return (
            answer.json()["usage"]["prompt_tokens"] if answer.status_code == 200 else answer.json()["error"]["message"]
        )

    plain, switched = counted(served), counted(served, chat_template_kwargs=off)
    assert (
        switched
        == plain + len("no thoughts")
        == len(model.generate([ASKED], max_new_tokens=1, chat_template_kwargs=off).prompts[0])
    )
    assert counted(without) == switched and counted(without, chat_template_kwargs={"enable_thinking": True}) == plain
    with served.client() as http:
        tokens = http.post("/tokenize", json={"messages": [ASKED], "chat_template_kwargs": off}).json()["tokens"]
    assert len(tokens) == switched
    for name in ("tokenize", "chat_template", "add_generation_prompt", "messages"):
        assert f"cannot set '{name}'" in counted(served, chat_template_kwargs={name: False})
        with pytest.raises(UserError, match=f"cannot set '{name}'"):
            model.generate([ASKED], chat_template_kwargs={name: False})


def test_the_folder_s_bans_are_the_server_s(starting: Callable[..., Served]) -> None:
    free = tiny_model()
    first = free.generate("red", max_new_tokens=1).tokens[0][0]
    banning = tiny_model()
    banning.target.model.generation_config.update(suppress_tokens=[first])
    asked = {"model": NAME, "prompt": "red", "max_tokens": 8, "temperature": 0}
    with starting(model=banning).client() as http:
        text = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert text == free.generate("red", max_new_tokens=8, suppress_tokens=[first]).text
    assert text != free.generate("red", max_new_tokens=8).text
    banning.target.ignores_generation_config = True
    with starting(model=banning).client() as http:
        assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"] != text


def test_further_stop_tokens_end_an_answer(client: Any, served: Served) -> None:
    tokens = served.model.generate("red cat", max_new_tokens=20).tokens[0]
    end = tokens[7]
    count = tokens.index(end) + 1
    asked = {"model": NAME, "prompt": "red cat", "max_tokens": 20, "temperature": 0, "stop_token_ids": [end]}
    said = client.post("/v1/completions", json=asked).json()
    assert (said["usage"]["completion_tokens"], said["choices"][0]["finish_reason"]) == (count, "stop")
    assert served.model.generate("red cat", max_new_tokens=20, eos_token_id=[end]).tokens[0] == tokens[:count]
