"""vLLM's OpenAI server with an FSPAD drafter on two tensor-parallel processes: the same texts, speculation counted.

The command is the one that `outdraft export` prints, with what a CPU and the comparison in float32 need after it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from vllm_engine import NEW_TOKENS

START_SECONDS = 600.0


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def server(folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address on this machine."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two tensor-parallel processes need two cores")
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    vllm, serve, target, *arguments = shlex.split(folders["fspad"].command)
    assert (vllm, serve) == ("vllm", "serve")
    # What that starts: the script itself asks for a package named vllm, and the build for CPUs has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target, *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--tensor-parallel-size", "2", "--max-model-len", "512", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with log.open("wb") as written:
        running = subprocess.Popen(
            command, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", running, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            with suppress(subprocess.TimeoutExpired):
                running.wait(60)
            with suppress(ProcessLookupError):  # its workers, should they have outlived it
                os.killpg(running.pid, signal.SIGKILL)
            running.wait(10)


def wait_for(address: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers; the end of its log where it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and running.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def counters(server: str) -> dict[str, float]:
    """vLLM's counters of speculative decoding."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("vllm:spec_decode_num_") and "_total{" in line:
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def test_two_processes_give_the_same_texts(server: str, prompts: Any, plain_texts: Any) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    name = client.models.list().data[0].id
    before = counters(server)
    answer = client.completions.create(
        model=name, prompt=prompts, max_tokens=NEW_TOKENS, temperature=0, extra_body={"return_token_ids": True}
    )
    assert [choice.token_ids for choice in answer.choices] == plain_texts  # type: ignore[attr-defined]
    after = counters(server)
    drafted, accepted = (
        after[f"vllm:spec_decode_num_{what}_tokens_total"]
        - before.get(f"vllm:spec_decode_num_{what}_tokens_total", 0.0)
        for what in ("draft", "accepted")
    )
    assert 0 < accepted < drafted


def test_a_chat_is_answered(server: str) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    name = client.models.list().data[0].id
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    settings: dict[str, Any] = {"model": name, "messages": question, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    pieces = client.chat.completions.create(**settings, stream=True)
    assert whole and "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole
