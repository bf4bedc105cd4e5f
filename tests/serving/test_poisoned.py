"""What is wrong with one request is told to that one: the others are answered as if it had not been there."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running import NAME, Served, until
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

    def failing(self: Any, tokens: Any, *guesses: Any) -> bool:
        if getattr(self, "poisoned", False) and len(tokens) > 2:
            raise ValueError("no such token")
        return take(self, tokens, *guesses)

    def text(tokenizer: Any, stops: Any, prompt: Any, hidden: Any) -> Any:
        answer = AnswerText(tokenizer, stops, prompt, hidden)
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
    responded = served.model.generate([{"role": "user", "content": "red"}], max_new_tokens=8).text
    held = tensor_bytes()
    wrong: list[Any] = []

    def ask(number: int) -> None:
        with served.client() as http:
            if number % 10 == 0:
                kind = number // 10 % 6
                path, name = ("/v1/completions", "prompt") if number % 20 else ("/v1/responses", "input")
                if kind == 0:
                    answer = http.post(path, content=b'{"' + name.encode() + b'": "\xff\xfe"}')
                elif kind == 1:
                    answer = http.post(path, json={name: "a" * 100_000})
                elif kind == 2:
                    with http.stream("POST", path, json={name: "x", "stream": True, "ignore_eos": True}):
                        return  # the connection is cut
                else:
                    bad = f"{POISONED} {('nan', 'raise', 'text')[kind - 3]}"
                    answer = http.post("/v1/completions", json={"prompt": bad, "max_tokens": 9, "temperature": 0})
                right = answer.status_code == (400 if kind < 2 else 500) and answer.json()["error"]["message"]
                if not right or (kind == 3 and "not finite" not in answer.text):
                    wrong.append((number, kind, answer.status_code, answer.text))
                return
            if number % 4 == 1:
                asked = {"input": "red", "max_output_tokens": 8, "temperature": 0, "stream": number % 8 == 1}
                answer = http.post("/v1/responses", json=asked)
                if answer.status_code != 200 or json.dumps(responded)[1:-1] not in answer.text:
                    wrong.append((number, answer.status_code, answer.text))
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
    until(lambda: tensor_bytes() <= held + 2**20, "memory is flat")


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


def test_a_prompt_that_the_model_cannot_run_fails_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs with it, new rows and running ones, as if it had not been there."""
    settled(served)
    monkeypatch.setattr(engine.log, "exception", lambda _: None)
    target, asked = served.model.target, {"red": 8, "blue sun": 8, "q": 8, "x": 12}
    expected = {text: served.model.generate(text, max_new_tokens=most).text for text, most in asked.items()}
    (bad,) = served.model.tokenizer("q")["input_ids"]  # type: ignore[misc]
    forward = target.forward

    def failing(tokens: Any, *rest: Any) -> Any:
        if tokens.shape[1] > 0 and not rest[-1].extent - tokens.shape[1] and (tokens == bad).any():
            raise RuntimeError("out of memory")
        return forward(tokens, *rest)

    monkeypatch.setattr(target, "forward", failing)
    free, found = threading.Event(), {}

    def ask(text: str) -> None:
        body = {"prompt": text, "max_tokens": asked[text], "temperature": 0, "echo": True, "logprobs": 1}
        with served.client() as http:
            found[text] = http.post("/v1/completions", json=body)

    with ThreadPoolExecutor(4) as pool:
        served.engine._commands.put(free.wait)  # so that all are admitted together
        until(served.engine._commands.empty)
        running = [pool.submit(ask, text) for text in asked]
        until(lambda: served.engine._commands.qsize() == len(asked))
        free.set()
        for one in running:
            one.result()
    assert found.pop("q").status_code == 500
    for text, answer in found.items():
        (choice,) = answer.json()["choices"]
        assert choice["text"] == text + expected[text]
        assert len(choice["logprobs"]["tokens"]) == len(text) + asked[text]
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
