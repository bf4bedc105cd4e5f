"""Many clients at once, some of whom leave: every answer is the offline one, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
import torch
from running import PATIENCE, Served, until

from outdraft.errors import UserError
from outdraft.serving.server import listen
from outdraft.serving.settings import ServeSettings
from training.tiny import WORDS


def settled(served: Served) -> None:
    """Wait until nothing runs or waits: so say the engine, after all that it was asked for before, and its figures."""
    engine, said = served.engine, SimpleQueue[bool]()

    def idle() -> bool:
        engine._commands.put(lambda: said.put(not engine._running and not len(engine._queue)))
        figures = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return said.get(timeout=PATIENCE) and not any(map(served.figure, figures))

    until(idle, "rows are left behind")


def tensor_bytes() -> int:
    """That all living tensors hold; packed weights, which other tests may have left, have no storage to ask."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) is torch.Tensor and one.layout == torch.strided and one.device.type == "cpu":
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def test_two_hundred_requests_of_which_some_are_cancelled(served: Served) -> None:
    """Concurrency 16; greedy and seeded answers, streamed or whole, with and without the drafter."""
    settled(served)
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=count)) for count in (1, 2, 3, 5, 8, 12)]
    requests = []
    for number in range(200):
        body = {"prompt": rng.choice(prompts), "max_tokens": rng.choice([1, 7, 20]), "temperature": 0}
        if number % 4 == 0:
            body |= {"temperature": 0.9, "seed": number % 3}
        if number % 10 == 3:
            body["speculative"] = False
        requests.append((body, number % 2 == 0, number % 5 == 1))
    before, held = served.figure("request_success_total"), tensor_bytes()

    @cache
    def offline(prompt: str, most: int, temperature: float, seed: int | None) -> str:
        settings = {} if seed is None else {"temperature": temperature, "seed": seed}
        return served.model.generate(prompt, max_new_tokens=most, **settings).text

    def ask(http: httpx.Client, body: dict[str, Any], stream: bool, leave: bool) -> str | None:
        if leave:
            with http.stream("POST", "/v1/completions", json={**body, "max_tokens": 90, "stream": True}) as answer:
                for place, _ in enumerate(answer.iter_lines()):
                    if place == 4:
                        return None
        if not stream:
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            chunks = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert chunks[-1] == "[DONE]"
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])

    with served.client() as http, ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda request: ask(http, *request), requests))
    settled(served)
    until(lambda: tensor_bytes() <= 1.02 * held + 10_000, "memory is flat")  # once the last connections are closed
    finished = 0
    for (body, _, leave), text in zip(requests, texts, strict=True):
        if leave:
            continue
        finished += 1
        assert text == offline(body["prompt"], body["max_tokens"], body["temperature"], body.get("seed")), body
    assert served.figure("request_success_total") - before >= finished
    assert served.figure("kv_cache_usage_perc") == 0
    assert served.figure("spec_decode_num_accepted_tokens_total") > 0
    assert not served.engine._running and not len(served.engine._queue)


def test_a_client_that_leaves_frees_its_row_at_once(starting: Callable[..., Served]) -> None:
    served = starting(max_num_seqs=1)
    long = {"prompt": "red", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    for stream in (True, False):
        address = served.url.removeprefix("http://").split(":")
        before = served.figure("request_failure_total")
        with socket.create_connection((address[0], int(address[1]))) as wire:
            body = json.dumps({**long, "stream": stream, "n": 100}).encode()
            kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
            wire.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n".encode() + body)
            until(lambda: served.figure("num_requests_running"))
        settled(served)
        assert served.figure("request_failure_total") == before + 1
    with served.client() as http:
        assert http.post("/v1/completions", json={"prompt": "red", "max_tokens": 2}).status_code == 200


def test_a_slow_reader_holds_no_row(starting: Callable[..., Served]) -> None:
    served = starting(max_num_seqs=1)
    body = {"prompt": "a", "max_tokens": 90, "stream": True, "n": 4, "seed": 0, "ignore_eos": True}
    with served.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        settled(served)  # nothing was read yet
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_more_requests_than_may_wait_are_told_to_come_back(starting: Callable[..., Served]) -> None:
    """Of one request the first answer runs and the others wait, a second waits whole, and no third may."""
    served = starting(max_num_seqs=1, max_waiting=2)
    body = {"prompt": "a", "max_tokens": 6, "n": 4, "ignore_eos": True}
    with served.client() as http, ThreadPoolExecutor(12) as pool:
        with served.held():
            asked = [pool.submit(http.post, "/v1/completions", json=body)]
            until(lambda: served.engine._running and len(served.engine._queue) == 1)
            asked += [pool.submit(http.post, "/v1/completions", json=body) for _ in range(11)]
            until(lambda: sum(one.done() for one in asked) == 10)
        answers = [one.result() for one in asked]
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 10
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}


def test_requests_wait_until_the_cache_has_room(starting: Callable[..., Served]) -> None:
    """Two rows fit at a time; all are answered, and more is never set aside than there is."""
    served = starting(kv_cache_tokens=120)
    usage, shares = served.service.metrics.cache_usage, list[float]()
    tell = usage.set
    usage.set = lambda share: (shares.append(share), tell(share))  # type: ignore[func-returns-value, method-assign]
    with served.client() as http, ThreadPoolExecutor(8) as pool:
        body = {"prompt": "red", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        refused = http.post("/v1/completions", json={**body, "max_tokens": 119})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert 0 < max(shares) <= 1


def test_running_answers_are_finished_when_the_server_is_told_to_stop(starting: Callable[..., Served]) -> None:
    served = starting(max_num_seqs=1)
    body = {"prompt": "red", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with served.client() as http, ThreadPoolExecutor(2) as pool:
        with served.held():
            asked = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(2)]
            until(
                lambda: len(served.engine._running) + len(served.engine._queue) + served.engine._commands.qsize() == 2
            )
            served.service.stop()
            until(lambda: not served.engine.alive)
        served.stop()
        assert [one.result().status_code for one in asked] == [200, 200], "the one that waited, too"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long_end_with_an_error_then(starting: Callable[..., Served], stream: bool) -> None:
    served = starting(max_num_seqs=1, shutdown_timeout=0.0)
    body = {"prompt": "red", "max_tokens": 100, "n": 64, "ignore_eos": True, "stream": stream}
    with served.client() as http, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.post, "/v1/completions", json=body)
        until(lambda: served.figure("num_requests_running"))
        served.stop()
        answer = asked.result()
    if stream:
        last = [line for line in answer.text.splitlines() if line][-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    else:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"


def test_a_failing_forward_fails_its_requests_only(starting: Callable[..., Served]) -> None:
    served = starting()
    whole = served.engine.target.forward
    body = {"prompt": "red", "max_tokens": 5, "temperature": 0}
    with served.client() as http:
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]

        def broken(*_: Any) -> Any:
            raise RuntimeError("out of memory, for instance")

        served.engine.target.forward = broken
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 500 and "memory" not in answer.text
        served.engine.target.forward = whole
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
        assert http.get("/health").status_code == 200


def test_a_key_is_asked_for_where_one_is_set(starting: Callable[..., Served]) -> None:
    served = starting(api_key="secret")
    with served.client() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert http.get("/health").status_code == 200


def test_a_client_gives_an_idle_connection_up_before_the_server_does(served: Served) -> None:
    """Of two that do so at the same time one sends a request on what the other closes."""
    assert served.service.server.config.timeout_keep_alive > 4 * (httpx.Limits().keepalive_expiry or 0) > 0


def test_large_and_slow_requests_are_cut_off(starting: Callable[..., Served]) -> None:
    served = starting(max_request_bytes=2000)
    with served.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "a" * 3000})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        answer = http.post("/v1/completions", content=iter([b"x" * 1500, b"y" * 1500]))
        assert answer.status_code == 413
    served = starting(request_timeout=0.3)
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=60) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b"408" in wire.recv(100)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{'prompt': 1}",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "seed": 99999999999999999999}',
        b'{"prompt": [1, 2, -3]}',
        b'{"prompt": [100000]}',
        b'{"prompt": []}',
        b'{"prompt": ""}',
        b'{"prompt": "a", "stop": ""}',
        b'{"prompt": "a", "best_of": 3}',
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_malformed_bodies_are_the_client_s_mistake(served: Served, body: bytes, kind: str) -> None:
    with served.client() as http:
        answer = http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    with served.client() as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/completions", 405),
            ("GET", "/../etc/passwd", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status and answer.json()["error"]["message"]


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"port": 70000}, {"max_num_seqs": 0}, {"api_key": ""}, {"shutdown_timeout": float("nan")}):
        with pytest.raises(UserError):
            ServeSettings(**wrong)
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen on"):
        listen("127.0.0.1", taken.getsockname()[1])
    assert ServeSettings().loopback and ServeSettings(host="::1").loopback
    assert not ServeSettings(host="0.0.0.0").loopback
