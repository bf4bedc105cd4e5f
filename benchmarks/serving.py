"""Servers under several clients: ours plainly, with n-gram drafts and with a drafter, beside llama.cpp's and vLLM's.

    python benchmarks/serving.py --model smollm2 --draft-model smollm2 --data question.jsonl --output-dir OUT \\
        --llama-server BINARY --gguf bf16=FILE.gguf --vllm-python .venv-vllm/bin/python [-- OPTIONS OF outdraft serve]

All servers run at once and take turns: a block is some questions, asked by so many clients at once of every server, in
rotating order. Blocks go on until `--minutes` are over, the start of the servers included; every combination of clients
and temperature gets one in turn while the time lasts. All are asked by the same token ids for the same number of
tokens (llama.cpp forbids the end of sequence for that, the others go on after it). What does not start or fails is left
out, with the reason.

- llama.cpp: the binary of its server (`cmake --build build --target llama-server`), and a GGUF file with the model's
  tokens (`peer_gguf.py FOLDER FILE --words`). The server of `llama-cpp-python` answers one request at a time and takes
  no token ids.
- vLLM: an environment as in `peers.py`. It gets the weights as a folder, and an FSPAD or EAGLE head without its reduced
  vocabulary, as it has none.

Our texts are compared with those of plain decoding offline, sampled ones by their seeds. Writes
OUT/serving.md and OUT/serving.json. Run it with nothing else running, and without OMP_NUM_THREADS, which would be our
server's too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, count, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import named, write_folder
from serving_report import as_offline, markdown, rate, summary
from serving_servers import Server, ServerError, Way, ask, exported, llama, ours, vllm

import outdraft
from outdraft.console.app import quiet_libraries
from outdraft.data.provenance import environment
from outdraft.errors import UserError
from outdraft.evaluation.bench.questions import dialogues, questions_of, read_questions
from outdraft.output import plain
from outdraft.reference import load_prompts

PLAIN = "outdraft plain"
MOST = 16
"""Rows of a batch offline."""

PAUSE = 0.3
"""Seconds between two servers, in which the threads of the one before stop waiting for more."""

Cell = tuple[float, int]
"""Temperature and clients."""


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


BEGAN = time.perf_counter()


def started(given: argparse.Namespace, weights: Path, stack: ExitStack) -> tuple[list[Way], dict[str, str]]:
    """All ways that were asked for and whose servers run, and why the others do not."""
    folder, most = given.output_dir, max(given.clients)
    ways, failed = ours(folder, given.model, None, most, given.server), {}
    if given.draft_model:
        ways += ours(folder, given.model, given.draft_model, most, given.server)
    for name, file in map(named, given.gguf if given.llama_server else []):
        ways.append(llama(folder, given.llama_server, name, file, most, given.context, given.threads))
    for way in ways:
        stack.callback(way.server.close)
    if given.vllm_python:
        sizes = (most, given.context, given.threads, given.vllm_eager)
        drafters: list[Path | None] = [None]
        try:
            drafters += [exported(folder, str(weights), given.draft_model)] if given.draft_model else []
        except UserError as problem:
            failed["vLLM drafter"] = str(problem)
        for drafter in drafters:
            ways.append(vllm(folder, given.vllm_python, weights, drafter, *sizes))
            stack.callback(ways[-1].server.close)
    running: dict[Server, str | None] = {}
    for way in ways:
        if way.server not in running:
            try:
                way.server.wait(given.start_seconds)
                running[way.server] = None
            except ServerError as problem:
                running[way.server] = str(problem)
        if (reason := running[way.server]) is not None:
            failed[way.name] = reason
        say(f"{way.name}: {reason or 'takes requests'}")
    return [way for way in ways if running[way.server] is None], failed


def block(
    way: Way, numbers: Sequence[int], prompts: Sequence[list[int]], clients: int, tokens: int, temperature: float
) -> dict[str, Any]:
    """Ask these questions by so many clients at once, each the next question as soon as it has an answer."""
    time.sleep(PAUSE)
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda i: ask(way, i, prompts[i], tokens, temperature), numbers))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "answers": answers}


def measure(
    given: argparse.Namespace, ways: list[Way], prompts: Sequence[list[int]], failed: dict[str, str]
) -> dict[Cell, dict[str, list[dict[str, Any]]]]:
    """Blocks of every cell and way, until the time is over."""
    cells = [(temperature, clients) for temperature in given.temperatures for clients in given.clients]
    found: dict[Cell, dict[str, list[dict[str, Any]]]] = {cell: defaultdict(list) for cell in cells}
    taken: dict[int, float] = {}
    turns, places = count(), Counter[Cell]()

    def run(way: Way, *more: Any) -> dict[str, Any] | None:
        try:
            return block(way, *more)
        except ServerError as problem:
            failed[way.name] = str(problem)
            say(f"{way.name}: {problem}")
            return None

    for way in ways:  # a first answer compiles and measures
        run(way, range(min(len(prompts), max(given.clients))), prompts, max(given.clients), given.warm_tokens, 0.0)
    for cell in chain.from_iterable(cells for _ in count()):
        temperature, clients = cell
        left = 60 * given.minutes - (time.perf_counter() - BEGAN)
        if left < taken.get(clients, 0.0):
            return found
        began, turn = time.perf_counter(), next(turns)
        size = clients * -(-given.requests // clients)
        numbers = [(places[cell] + i) % len(prompts) for i in range(size)]
        places[cell] += size
        rates = []
        for i in range(len(ways)):
            way = ways[(i + turn) % len(ways)]
            if way.name in failed:
                continue
            done = run(way, numbers, prompts, clients, given.max_new_tokens, temperature)
            if done is not None:
                found[cell][way.name].append(done)
                rates.append(f"{way.name} {rate([done]):.1f}")
        if not rates:
            raise SystemExit("no server is left")
        say(f"T={temperature:g}, {clients} clients, {size} questions, tokens/s: {', '.join(rates)}")
        taken[clients] = max(taken.get(clients, 0.0), time.perf_counter() - began)
    raise AssertionError("cells never end")


def offline(model: Any, prompts: Sequence[list[int]], tokens: int, temperature: float) -> list[str]:
    """Texts of plain decoding without a server; a question's number is its seed, as in requests."""
    texts: list[str] = []
    for start in range(0, len(prompts), MOST):  # row i has the seed `start + i`
        part = prompts[start : start + MOST]
        out = model.generate(part, max_new_tokens=tokens, temperature=temperature, seed=start, eos_token_id=[])
        texts += out.texts
    return texts


def arguments() -> argparse.Namespace:
    def numbers(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference", help="an empty one leaves drafters out")
    parser.add_argument("--data", type=Path, help="Spec-Bench's question.jsonl; shipped held-out prompts if left out")
    parser.add_argument("--questions", type=int, default=48, help="tasks take turns")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="longer questions are left out")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--clients", type=numbers(int), default=[1, 4, 16])
    parser.add_argument("--temperatures", type=numbers(float), default=[0.0, 1.0])
    parser.add_argument("--requests", type=int, default=6, help="of a block at least")
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything")
    parser.add_argument("--start-seconds", type=float, default=240.0, help="that a server has to start")
    parser.add_argument("--warm-tokens", type=int, default=16, help="of every client's first answer, not measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of llama.cpp and vLLM")
    parser.add_argument("--llama-server", help="binary of llama.cpp's server")
    parser.add_argument("--gguf", action="append", default=[], help="NAME=FILE for llama.cpp; may be repeated")
    parser.add_argument("--vllm-python", help="of the environment with vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM does not compile")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("server", nargs="*", help="further options of `outdraft serve`, after --")
    return parser.parse_args()


def questions(given: argparse.Namespace, target: Any) -> list[list[int]]:
    """Token ids of the questions' first turns, a question of every task in turn."""
    if given.data is None:
        found = questions_of([messages[:1] for messages in load_prompts("heldout")], "heldout")
    else:
        found = read_questions(given.data, on_bad_line="skip").questions
    tasks: dict[str, list[list[int]]] = defaultdict(list)
    for one in dialogues(found, target, given.max_new_tokens, "skip")[0]:
        if len(one.first) <= given.max_prompt_tokens:
            tasks[one.question.group].append(one.first)
    mixed = [prompt for each in zip_longest(*tasks.values()) for prompt in each if prompt is not None]
    return mixed[: given.questions]


def main() -> None:
    given = arguments()
    quiet_libraries()
    folder: Path = given.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = outdraft.load(given.model, method="none", dtype="bfloat16")
        prompts = questions(given, model.target)
        given.context = max(map(len, prompts)) + given.max_new_tokens + 8
        weights = folder / "target"
        write_folder(model.target, weights)
        say(f"{len(prompts)} questions")
        facts = environment()
        with ExitStack() as stack:
            ways, failed = started(given, weights, stack)
            found = measure(given, ways, prompts, failed)
        say("servers have ended; decoding offline")
        results = []
        for (temperature, clients), blocks in found.items():
            last = max((one.question for each in chain(*blocks.values()) for one in each["answers"]), default=-1)
            texts = offline(model, prompts[: last + 1], given.max_new_tokens, temperature)
            servers = {
                way.name: summary(blocks[way.name], blocks[PLAIN])
                | ({"as_offline": as_offline(blocks[way.name], texts)} if way.ours or not temperature else {})
                for way in ways
                if blocks[way.name]
            }
            results.append({"temperature": temperature, "clients": clients, "servers": servers})
    except UserError as error:
        sys.exit(f"serving: {error}")
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    settings |= {"questions": len(prompts), "prompt_tokens": int(median(map(len, prompts)))}
    result = {"environment": facts, "settings": settings, "results": results, "left_out": failed}
    (folder / "serving.json").write_text(json.dumps(plain(result), indent=1), encoding="utf-8")
    text = markdown(result)
    (folder / "serving.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
