"""Whatever is sent, the answer is one or says what is wrong with it: never 500, never a row left behind."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import NAME, PATIENCE, Served
from test_server import settled

from outdraft.serving.protocol import NEUTRAL, ChatRequest, CompletionRequest
from outdraft.serving.responses import ResponsesRequest

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NEAR: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just(NAME),
    "prompt": st.text(max_size=20) | st.lists(st.integers(0, 300), max_size=6),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
    "input": st.text(max_size=20)
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=9)})
        | st.fixed_dictionaries({"type": st.just("function_call"), "call_id": st.text(max_size=3)}),
        max_size=3,
    ),
    "instructions": st.text(max_size=9),
    "max_tokens": st.integers(1, 6),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "temperature": st.floats(0, 3) | st.floats(),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "top_logprobs": st.integers(0, 5),
    "repetition_penalty": st.floats(0, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "echo": st.booleans(),
    "ignore_eos": st.booleans(),
    "speculative": st.booleans(),
    "return_pieces": st.booleans(),
}
PLAIN = ["n", "stream", "ignore_eos"]
"""Fields whose values above are all sound."""
SAID = st.text("abc ", min_size=1, max_size=9)
SOUND = {
    "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": SAID}), min_size=1, max_size=1),
    "prompt": SAID,
    "input": SAID,
}
"""First fields that every server takes."""
REQUESTS = (ChatRequest, CompletionRequest, ResponsesRequest)
FIELDS = sorted({*(name for one in REQUESTS for name in one.model_fields), *NEUTRAL, *ResponsesRequest.neutral()})
LENGTHS = {"input": "max_output_tokens"}
"""By a path's first field, what it calls `max_tokens`."""


@st.composite
def bodies(draw: st.DrawFn, first: str) -> dict[str, Any]:
    """Requests, half of them of sound fields only; of the others up to two fields were made into anything."""
    plain = draw(st.booleans())
    sound = [name for name in PLAIN if name in ResponsesRequest.model_fields] if first in LENGTHS else PLAIN
    names = draw(st.sets(st.sampled_from(sound if plain else sorted(NEAR)), max_size=5))
    length = LENGTHS.get(first, "max_tokens")
    body = {name: draw(NEAR[name]) for name in sorted({first, *names} - {"max_tokens"})}
    body[length] = draw(NEAR["max_tokens"])
    if plain:
        return {**body, first: draw(SOUND[first])}
    for name in draw(st.lists(st.sampled_from(FIELDS) | st.text(max_size=8), max_size=2)):
        body[name] = draw(ANY)
    return body


@pytest.mark.parametrize(
    ("path", "first"),
    [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/v1/responses", "input")],
)
def test_no_body_is_the_server_s_fault(served: Served, path: str, first: str) -> None:
    codes: dict[int, int] = {}
    length = LENGTHS.get(first, "max_tokens")

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(first))
    def sent(body: dict[str, Any]) -> None:
        if not isinstance(body.get(length), int):
            body[length] = 3  # nothing is learned from long answers
        content = json.dumps(body).encode()
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
        codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text)
        if answer.status_code == 200:
            assert '"error":{' not in answer.text
        else:
            assert answer.json()["error"]["message"]

    with served.client() as http:
        sent()
    settled(served)
    assert codes.get(200, 0) > 5 and codes.get(400, 0) > 5, f"both kinds were tried: {codes}"


@pytest.mark.timeout(900)
def test_the_schema_finds_no_fault(served: Served) -> None:
    """Schemathesis, where it is installed: requests made from the server's own description of itself.

    On a slow machine it tries fewer of them: a first one of every operation, and others for half a minute.
    """
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    end = time.monotonic() + 30
    tried: set[str] = set()

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def run(case: Any) -> None:
            if case.operation.label in tried and time.monotonic() > end:
                return
            tried.add(case.operation.label)
            if isinstance(case.body, dict):
                case.body["max_output_tokens" if "/responses" in case.operation.label else "max_tokens"] = 2
            answer = case.call(timeout=PATIENCE)
            assert answer.status_code < 500, (answer.status_code, answer.text)

        run()
    settled(served)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses"} <= tried
