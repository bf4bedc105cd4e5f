"""What is wrong with one request is told to that one: the others are answered as if it had not been there."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running import NAME, Served
from test_server import settled, tensor_bytes
from transformers import LogitsProcessor

from outdraft.serving import engine, jobs
from outdraft.serving.jobs import AnswerText

POISONED = "poison"


class Broken(LogitsProcessor):
    """NaN, or an error, after some tokens of prompts that say so."""

    def __init__(self, length: int, raises: bool):
        self.length, self.raises = length, raises

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] < self.length + 3:
            return scores
        if self.raises:
            raise RuntimeError("a processor fails")
        return scores * float("nan")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    """Prompts that begin with the word get a processor that fails; those with another one a tokenizer that does."""
    tokenizer: Any = served.model.tokenizer
    marks = {kind: tokenizer(f"{POISONED} {kind}")["input_ids"] for kind in ("nan", "raise", "text")}
    warper, take = jobs.Warper, AnswerText.take

    def made(settings: Any, length: int, *rest: Any) -> Any:
        extra = [Broken(length, length == len(marks["raise"]))] if length in kinds else []
        return warper(settings, length, *rest[:2], extra, *rest[3:])

    kinds = {len(marks["nan"]), len(marks["raise"])}
    assert len({len(mark) for mark in marks.values()}) == 3
    monkeypatch.setattr(jobs, "Warper", made)

    def failing(self: Any, tokens: Any, accepted: Any) -> bool:
        if getattr(self, "poisoned", False) and len(tokens) > 2:
            raise ValueError("no such token")
        return take(self, tokens, accepted)

    def text(tokenizer: Any, stops: Any, prompt: Any) -> Any:
        answer = AnswerText(tokenizer, stops, prompt)
        answer.poisoned = list(prompt) == marks["text"]  # type: ignore[attr-defined]
        return answer

    monkeypatch.setattr(AnswerText, "take", failing)
    monkeypatch.setattr(jobs, "AnswerText", text)


@pytest.mark.usefixtures("poison")
def test_of_many_requests_only_the_poisoned_fail(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 at concurrency 16, every tenth one bad in one of several ways."""
    settled(served)
    monkeypatch.setattr(engine.log, "exception", lambda _: None)  # pytest keeps what is logged, and the rows with it
    rng = random.Random(0)
    prompts = ["red", "blue sun moon and", "x", "red cat one two three"]
    expected = {
        (prompt, seed): served.model.generate(
            prompt, max_new_tokens=8, **({"temperature": 0.9, "seed": seed} if seed else {})
        ).texts[0]
        for prompt in prompts
        for seed in (0, 1)
    }
    held = tensor_bytes()
    wrong: list[Any] = []

    def ask(number: int) -> None:
        with served.client() as http:
            if number % 10 == 0:
                kind = number // 10 % 6
                if kind == 0:
                    answer = http.post("/v1/completions", content=b'{"prompt": "\xff\xfe"}')
                elif kind == 1:
                    answer = http.post("/v1/completions", json={"prompt": "a" * 100_000})
                elif kind == 2:
                    with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 9}):
                        return  # the connection is cut
                else:
                    bad = f"{POISONED} {('nan', 'raise', 'text')[kind - 3]}"
                    answer = http.post("/v1/completions", json={"prompt": bad, "max_tokens": 9, "temperature": 0})
                right = answer.status_code == (400 if kind < 2 else 500) and answer.json()["error"]["message"]
                if not right or (kind == 3 and "not finite" not in answer.text):
                    wrong.append((number, kind, answer.status_code, answer.text))
                return
            prompt, seed = rng.choice(prompts), number % 2
            drawn = {"temperature": 0.9, "seed": seed} if seed else {"temperature": 0}
            answer = http.post("/v1/completions", json={"model": NAME, "prompt": prompt, "max_tokens": 8, **drawn})
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != expected[prompt, seed]:
                wrong.append((number, prompt, seed, answer.status_code, answer.text))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(500)))
    assert not wrong, wrong[:3]
    settled(served)
    assert tensor_bytes() <= held + 2**20, "memory is flat"


def test_a_model_that_is_broken_says_so(starting: Callable[..., Served]) -> None:
    from running import tiny_model

    model = tiny_model()
    with torch.no_grad():
        model.target.model.get_output_embeddings().weight.fill_(float("nan"))  # type: ignore[union-attr]
    served = starting(model=model)
    with served.client() as http:
        for settings in ({"temperature": 0}, {"temperature": 1}, {"temperature": 0, "n": 3}):
            answer = http.post("/v1/completions", json={"prompt": "red", "max_tokens": 4, **settings})
            assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
        streamed = http.post("/v1/completions", json={"prompt": "red", "max_tokens": 4, "stream": True}).text
        assert "not finite" in streamed and '"text"' not in streamed
    settled(served)


def test_rows_that_cannot_be_taken_in_fail_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(served)
    with monkeypatch.context() as patch, served.client() as http:

        def full(*args: Any) -> None:
            raise MemoryError("no room")

        patch.setattr(type(served.engine._lanes[True].decoder), "add", full)
        assert http.post("/v1/completions", json={"prompt": "red", "max_tokens": 4}).status_code == 500
    with served.client() as http:
        assert http.post("/v1/completions", json={"prompt": "red", "max_tokens": 4}).status_code == 200
    settled(served)
