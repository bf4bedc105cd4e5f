"""The servers that `serving.py` compares: their commands, start and end, and a client of their completions.

All of them are asked by token ids over the loopback, streamed, and answer with as many tokens as are wanted: no text
ends early, and no prompt is kept for the next request. Knows no figures.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from outdraft.export.export import export_drafter
from outdraft.methods.checkpoint import save_drafter
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.named import named, shipped_drafter

HERE = Path(__file__).resolve().parent


class ServerError(Exception):
    """A server that did not start, refused a request or has ended; one line."""


class Server:
    """A server's process, from `Server(...)`, which returns at once, to `close`.

    Args:
        command: that starts it; `{port}` stands for its port.
        log: the file that its output goes to.
        variables: of its environment, beside our own.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None):
        self.log, self.port = log, free_port()
        self.command = [part.replace("{port}", str(self.port)) for part in command]
        environment = {**os.environ, **(variables or {})}
        with log.open("wb") as written:
            self._process = subprocess.Popen(
                self.command, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> None:
        """Return once it takes requests.

        Raises:
            ServerError: it has ended, or the time is over.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise self.ended()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            connection.close()
            time.sleep(0.2)
        raise ServerError(f"takes no requests after {seconds:.0f} seconds (its log: {self.log})")

    def ended(self) -> ServerError:
        """Why, by the last line of its log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return ServerError(f"has ended: {lines[-1].strip() if lines else 'it said nothing'} (its log: {self.log})")

    def close(self) -> None:
        """Let it end, or end it with all of its processes."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class Way:
    """A server and how it is asked."""

    name: str
    server: Server
    body: dict[str, Any] = field(default_factory=dict)
    """What its requests say beside the prompt."""
    seeded: bool = True
    """False if requests cannot have seeds."""
    ours: bool = False


@dataclass(frozen=True)
class Asked:
    """An answer, and when it came."""

    question: int
    first: float
    """Seconds from the request to the first text."""
    seconds: float
    tokens: int
    text: str
    rounds: int | None
    """Forwards of the target after the prompt's, where the server tells."""


def ask(way: Way, question: int, prompt: Sequence[int], tokens: int, temperature: float) -> Asked:
    """Ask for a completion of so many tokens. The stream is parsed after its end, so that the client costs little.

    Raises:
        ServerError: there is no such answer.
    """
    body = {"model": "served", "prompt": list(prompt), "max_tokens": tokens, "temperature": temperature}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, **way.body}
    if temperature and way.seeded:
        body["seed"] = question
    sent = json.dumps(body)
    connection = http.client.HTTPConnection("127.0.0.1", way.server.port, timeout=300)
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServerError(f"refuses with {answer.status}: {answer.read(300)!r}")
        lines = [(time.perf_counter() - began, line) for line in answer]
    except (OSError, http.client.HTTPException) as problem:
        raise ServerError(f"does not answer: {problem} (its log: {way.server.log})") from None
    finally:
        connection.close()
    text, first, usage, rounds = "", 0.0, {}, None
    for seconds, line in lines:
        if not line.startswith(b"data: {"):
            continue
        said = json.loads(line.removeprefix(b"data: "))
        usage = said.get("usage") or usage
        for choice in said.get("choices", ()):
            text += choice["text"]
            first = first or (seconds if choice["text"] else 0.0)
    if usage.get("completion_tokens") != tokens:
        raise ServerError(f"answers with {usage.get('completion_tokens')} tokens and not {tokens}: {lines[-1:]!r}")
    rounds = usage.get("speculation", {}).get("rounds")
    return Asked(question, first or lines[-1][0], lines[-1][0], tokens, text, rounds)


# --- commands ------------------------------------------------------------------------------------------------------


def ours(folder: Path, model: str, draft_model: str | None, clients: int, more: Sequence[str]) -> list[Way]:
    """Our server: without a drafter it answers plainly and with n-gram drafts, with one it drafts with both."""
    command = [sys.executable, "-m", "outdraft.cli", "serve", "--port", "{port}", "--model", model]
    command += ["--served-model-name", "served", "--max-num-seqs", str(clients), *more]
    if draft_model is None:
        server = Server(command, folder / "outdraft.log")
        plain = Way("outdraft plain", server, {"speculative": False}, ours=True)
        return [plain, Way("outdraft n-gram", server, ours=True)]
    server = Server([*command, "--draft-model", draft_model], folder / "outdraft-drafter.log")
    return [Way("outdraft drafter", server, ours=True)]


def llama(folder: Path, binary: str, name: str, file: Path, clients: int, context: int, threads: int) -> Way:
    """llama.cpp's own server with continuous batching, one slot for each client."""
    command = [binary, "--model", str(file), "--host", "127.0.0.1", "--port", "{port}", "--alias", "served"]
    command += ["--parallel", str(clients), "--cont-batching", "--ctx-size", str(clients * context)]
    command += ["--threads", str(threads), "--threads-batch", str(threads), "--cache-ram", "0", "--no-ui", "--offline"]
    return Way(f"llama.cpp {name}", Server(command, folder / f"llama.cpp-{name}.log"), {"cache_prompt": False})


def vllm(
    folder: Path, python: str, model: Path, drafter: Path | None, clients: int, context: int, threads: int, eager: bool
) -> Way:
    """vLLM's OpenAI server, plain or with an exported drafter; a seed for a request ends it on a CPU."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--served-model-name", "served", "--dtype", "bfloat16"]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(clients), "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if eager else []
    name = "vLLM"
    if drafter is not None:
        name = "vLLM drafter"
        drafting = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": 4}
        command += ["--speculative-config", json.dumps(drafting)]
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    return Way(name, Server(command, folder / f"{name.replace(' ', '-')}.log", variables), seeded=False)


def exported(folder: Path, model: str, draft_model: str) -> Path:
    """An FSPAD or EAGLE head as a folder for vLLM; it drafts from the whole vocabulary there.

    Raises:
        UserError: vLLM cannot run it.
    """
    done = folder / "drafter-for-vllm"
    if done.exists():
        return done
    source = shipped_drafter(draft_model) if named(draft_model) is not None else draft_model
    read = load_drafter(source, dtype=torch.bfloat16)
    head = FeatureHead(replace(read.head.config, draft_vocab_size=0)).to(torch.bfloat16)
    head.load_state_dict({name: part for name, part in read.head.state_dict().items() if name != "draft_tokens"})
    whole = save_drafter(folder / "drafter-of-all-tokens", head, target_id=read.target_id)
    export_drafter(model, whole, "vllm", done)
    return done


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
