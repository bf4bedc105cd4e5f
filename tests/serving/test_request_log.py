"""`--log-requests`: one line a request as it ends, with its id and figures and without its text; none by default."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
from running import Served, until
from test_server import settled

LINE = re.compile(
    r"(\S+) prompt_tokens=(\d+) completion_tokens=(\d+) tau=(\S+) seconds=(\d+\.\d{3}) finish_reason=(\S+)"
)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    """The fields of every request's line, in the order in which the requests ended."""
    found = [LINE.fullmatch(record.getMessage()) for record in caplog.records if record.levelno == logging.INFO]
    return [match.groups() for match in found if match]


def test_every_request_is_one_line_with_the_figures_of_its_usage(
    starting: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outdraft.serving")
    served = starting(log_requests=True)
    settings = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "secret words"}]}
    with served.client() as http:
        two = http.post("/v1/completions", json={"prompt": "red cat", "n": 2, **settings}).json()
        talk = http.post("/v1/chat/completions", json={**chat, **settings}).json()
        assert http.post("/v1/completions", json={"prompt": ""}).status_code == 400
        with served.held():
            with http.stream("POST", "/v1/completions", json={"prompt": "blue", "stream": True, **settings}):
                until(lambda: served.engine._running)
            until(served.engine._commands.qsize)  # the client has gone, and the engine is told so
        served.stop()
    found = lines(caplog)
    for answer, line in zip((two, talk), found, strict=False):
        usage = answer["usage"]
        tau = f"{usage['speculation']['tau']:.2f}"
        assert line[:4] == (answer["id"], str(usage["prompt_tokens"]), str(usage["completion_tokens"]), tau)
        assert float(line[4]) > 0 and line[5] == "length"
    assert len(found) == 3 and found[2][0].startswith("cmpl-") and found[2][5] == "cancelled"
    assert not re.search("secret|red cat|blue", caplog.text), "no text is logged"


def test_requests_are_not_logged_unless_asked_for(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "outdraft.serving")
    with served.client() as http:
        assert http.post("/v1/completions", json={"prompt": "red", "max_tokens": 2}).status_code == 200
    settled(served)
    assert not lines(caplog)
