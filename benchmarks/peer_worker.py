"""The line protocol between `peers.py` and an engine in an environment of its own: both of its ends.

An engine's worker says one JSON line `{"facts": ...}` when it is ready, and then answers every line
`{"prompt", "max_new_tokens", "temperature", "seed", "ends"}` with a line `{"tokens", "emitted", "prefill_seconds",
"seconds"}`: new token ids, an end of sequence included; how many of them each forward of the target brought, the
prefill's first; seconds to the first token, and of all. What fails is answered with `{"error"}`. Only the standard
library is used, since it runs in both environments. Knows no engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Decode = Callable[[dict[str, Any]], Iterator[tuple[int, int]]]
"""Request -> one new token after the other, each as (which forward of the target brought it, token)."""


class WorkerError(Exception):
    """An engine that did not start, failed or ended; one line."""


# --- the engine's end ------------------------------------------------------------------------------------------------


def own_stdout() -> TextIO:
    """Standard output for answers alone: whatever the engine's libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(answers: TextIO, decode: Decode, facts: Mapping[str, Any]) -> None:
    """Answer questions until standard input ends.

    Args:
        answers: where answers go, of `own_stdout`.
        decode: what answers; it is asked for no token after an end or the last one wanted.
        facts: versions and settings, for the report.
    """
    _say(answers, {"facts": dict(facts)})
    for line in sys.stdin:
        try:
            answer = _timed(decode, json.loads(line))
        except Exception as error:  # the other end must hear of it, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        _say(answers, answer)


def _timed(decode: Decode, request: dict[str, Any]) -> dict[str, Any]:
    tokens: list[int] = []
    emitted: list[int] = []
    ends, most = set(request["ends"]), request["max_new_tokens"]
    start, first, latest = time.perf_counter(), 0.0, None
    for forward, token in decode(request):
        first = first or time.perf_counter()
        if forward != latest:
            emitted.append(0)
            latest = forward
        tokens.append(token)
        emitted[-1] += 1
        if token in ends or len(tokens) >= most:
            break
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "emitted": emitted, "prefill_seconds": first - start, "seconds": seconds}


def _say(answers: TextIO, record: dict[str, Any]) -> None:
    answers.write(json.dumps(record) + "\n")
    answers.flush()


# --- our end ---------------------------------------------------------------------------------------------------------


class Worker:
    """An engine's process, from its start to `close`.

    Args:
        command: that starts it.
        log: the file that its standard error goes to.
        variables: of the environment, beside our own.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None):
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **(variables or {})},
            )
        self.facts: dict[str, Any] = self._read()["facts"]

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one prompt.

        Raises:
            WorkerError: the engine failed at it, or has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read()

    def close(self) -> None:
        """Let it end, or end it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        record = json.loads(line)
        if "error" in record:
            raise WorkerError(f"{record['error']} (its log: {self._log})")
        return record

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it said nothing"
        return WorkerError(f"ended with status {status}: {said} (its log: {self._log})")
