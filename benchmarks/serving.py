"""What the server gives when several clients ask at once, with the drafter and without, over the loopback.

    python benchmarks/serving.py [--clients 1,4,16] [--max-new-tokens 64] [--draft-model reference] [-- SERVER OPTIONS]

Every client asks one held-out prompt after the other, streamed. Ways take turns; a table says tokens per
second of all clients together, the ratio to plain decoding by the same server at the same number of clients, tau, and
the median time to the first token. Run it with nothing else running, and without OMP_NUM_THREADS, which would be the
server's too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from outdraft.reference import load_prompts


def ask(http: httpx.Client, messages: Any, body: dict[str, Any], speculative: bool) -> tuple[float, dict[str, Any]]:
    """Seconds to the first chunk of text, and the usage."""
    body = {"messages": messages, "stream": True, "ignore_eos": True, **body}
    body |= {"stream_options": {"include_usage": True}, "speculative": speculative}
    began, first, usage = time.perf_counter(), 0.0, {}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    return first, usage


def measure(url: str, prompts: list[Any], clients: int, body: dict[str, Any], speculative: bool) -> dict[str, float]:
    """One way, all prompts."""
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        done = list(pool.map(lambda messages: ask(http, messages, body, speculative), prompts))
        seconds = time.perf_counter() - began
    tokens = sum(usage["completion_tokens"] for _, usage in done)
    rounds = sum(usage["speculation"]["rounds"] for _, usage in done)
    emitted = tokens - len(done)
    return {
        "rate": tokens / seconds,
        "tau": emitted / rounds,
        "first": statistics.median(first for first, _ in done),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("server", nargs="*", help="further options of `outdraft serve`, after --")
    options = parser.parse_args()
    command = [sys.executable, "-m", "outdraft.cli", "serve", "--port", "0"]
    command += ["--model", options.model, "--draft-model", options.draft_model, *options.server]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        compare(address(server), options)
    finally:
        server.terminate()
        server.wait()


def address(server: subprocess.Popen[str]) -> str:
    """Where it listens, once it does."""
    assert server.stderr is not None
    for line in server.stderr:
        if (found := re.search(r"listening on (\S+)", line)) is not None:
            return found[1]
    raise SystemExit("the server did not start")


def compare(url: str, options: argparse.Namespace) -> None:
    """All ways at all numbers of clients, in turns."""
    prompts = [messages[:1] for messages in load_prompts("heldout")[: options.prompts]]
    body = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
    for speculative in (True, False):
        measure(url, prompts[:2], 2, {**body, "max_tokens": 8}, speculative)
    print("clients  drafter  tokens/s  ratio   tau  first token (ms)")
    for clients in map(int, options.clients.split(",")):
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for turn in range(options.turns):
            for speculative in (False, True) if turn % 2 == 0 else (True, False):
                found[speculative].append(measure(url, prompts, clients, body, speculative))
        plain = statistics.median(one["rate"] for one in found[False])
        for speculative, runs in found.items():
            rate, tau, first = (statistics.median(run[name] for run in runs) for name in ("rate", "tau", "first"))
            way = "yes" if speculative else "no"
            print(
                f"{clients:7d}  {way:>7}  {rate:8.1f}  {rate / plain:5.2f}  {tau:4.2f}  {first * 1000:16.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
