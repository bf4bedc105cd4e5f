"""Logprobs of prompts and answers: what a plain forward says, under names and offsets that fit the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import NAME, Served

import outdraft
from models import tiny
from tokenizers_of_all_types import ALL

PROMPTS = ["red cat", "日本 é", " lead"]


def post(served: Served, path: str, **body: Any) -> Any:
    with served.client() as http:
        answer = http.post(path, json={"model": NAME, "temperature": 0, **body})
    return answer.status_code, answer.json()


def laws(served: Served, tokens: list[int]) -> torch.Tensor:
    model: Any = served.model.target.model
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_echo_with_logprobs_scores_the_prompt(served: Served, prompt: str, as_ids: bool) -> None:
    ids = served.model.tokenizer(prompt)["input_ids"]  # type: ignore[misc]
    given = ids if as_ids else prompt
    status, said = post(served, "/v1/completions", prompt=given, max_tokens=3, echo=True, logprobs=2)
    assert status == 200, said
    (choice,) = said["choices"]
    found = choice["logprobs"]
    expected = served.model.generate(prompt, max_new_tokens=3)
    tokens = ids + expected.tokens[0]
    assert choice["text"] == prompt + expected.text
    assert len({len(found[name]) for name in found}) == 1 and len(found["tokens"]) == len(tokens)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    plain = laws(served, tokens)
    own = [plain[place, token].item() for place, token in enumerate(tokens[1:])]
    assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-9)
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(
        plain[:-1].max(-1).values.tolist(), abs=1e-9
    )
    assert choice["text"].startswith("".join(found["tokens"]).removesuffix("\ufffd"))
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][start:].startswith(token), "names stand where the offset says"


def test_an_echoed_prompt_that_ends_within_a_character_is_shown_once(served: Served) -> None:
    ids = served.model.tokenizer("red 日")["input_ids"][:-1]  # type: ignore[misc]
    status, said = post(served, "/v1/completions", prompt=ids, max_tokens=5, echo=True)
    assert status == 200, said
    tokens = ids + served.model.generate(ids, max_new_tokens=5).tokens[0]
    assert said["choices"][0]["text"] == served.model.tokenizer.decode(tokens, skip_special_tokens=True)


def test_texts_come_without_special_tokens_on_request(served: Served) -> None:
    tokenizer: Any = served.model.tokenizer
    usual, kept = type(tokenizer).__call__, []
    for special in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(tokenizer), "__call__", lambda self, text, **how: (kept.append(how), usual(self, text, **how))[1]
            )
            status, said = post(served, "/v1/completions", prompt="red", max_tokens=1, add_special_tokens=special)
        assert status == 200, said
        assert kept.pop() == {"add_special_tokens": special}


def test_no_new_token_scores_the_prompt_alone(served: Served) -> None:
    status, said = post(served, "/v1/completions", prompt=["red cat", "blue"], max_tokens=0, echo=True, logprobs=0)
    assert status == 200, said
    assert [choice["text"] for choice in said["choices"]] == ["red cat", "blue"]
    assert [len(choice["logprobs"]["tokens"]) for choice in said["choices"]] == [7, 4]
    assert said["usage"]["completion_tokens"] == 0 and said["choices"][0]["finish_reason"] == "length"
    status, said = post(served, "/v1/completions", prompt="red", max_tokens=0)
    assert status == 400 and "max_tokens of 0 is for echo" in said["error"]["message"]


def test_streamed_echo_has_the_same_logprobs(served: Served) -> None:
    asked = {"prompt": "red cat", "max_tokens": 6, "echo": True, "logprobs": 2, "temperature": 0}
    _, whole = post(served, "/v1/completions", **asked)
    with served.client() as http:
        lines = http.post("/v1/completions", json={**asked, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == whole["choices"][0]["text"]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values, name


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_prompt_logprobs_are_vllms(served: Served, chat: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "red"}]} if chat else {"prompt": "red cat"}
    status, said = post(served, f"/v1/{'chat/' if chat else ''}completions", max_tokens=2, prompt_logprobs=2, **asked)
    assert status == 200, said
    found = said["prompt_logprobs"] if chat else said["choices"][0]["prompt_logprobs"]
    prompt = served.model.generate(asked["messages"] if chat else asked["prompt"], max_new_tokens=1).prompts[0]
    assert len(found) == len(prompt) and found[0] is None
    for token, place, law in zip(prompt[1:], found[1:], laws(served, prompt), strict=False):
        own = place[str(token)]
        assert own["logprob"] == pytest.approx(law[token].item(), abs=1e-9)
        assert own["rank"] == int((law > law[token]).sum()) + 1
        assert sorted(one["rank"] for one in place.values())[:2] == [1, 2] and len(place) <= 3
    assert said["choices"][0]["logprobs"] is None
    status, said = post(served, "/v1/completions", prompt="red", prompt_logprobs=1, stream=True)
    assert status == 400 and said["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("kind", [name for name in ALL if name != "WordPiece that cleans up"])
def test_names_and_offsets_fit_the_text_of_every_tokenizer(starting: Callable[..., Served], kind: str) -> None:
    tokenizer = ALL[kind]()
    model = outdraft.load(
        tiny("llama-gqa", vocab_size=len(tokenizer)), tokenizer=tokenizer, method="prompt-lookup", backend="eager"
    )
    served = starting(model=model)
    prompt = "a cat 中文 \U0001f600 été a" if "byte" in kind else "a cat a"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    status, said = post(served, "/v1/completions", prompt=ids, max_tokens=12, echo=True, logprobs=3, ignore_eos=True)
    assert status == 200, said
    (choice,) = said["choices"]
    tokens = ids + model.generate(ids, max_new_tokens=12, eos_token_id=[]).tokens[0]
    assert choice["text"] == tokenizer.decode(tokens, skip_special_tokens=True), "no space is lost, none is added"
    begun = tokenizer.decode(ids, skip_special_tokens=True)
    names = choice["logprobs"]["tokens"][: len(ids)]
    assert "".join(names) == begun
    for name, start in zip(names, choice["logprobs"]["text_offset"], strict=False):
        assert begun[start : start + len(name)] == name
