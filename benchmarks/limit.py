"""How near a forward comes to the limit: reading the weights and the KV cache once.

Milliseconds of a forward with its head over some tokens after a context, by backend, beside a read of as many bytes in
the same turn, and beside llama.cpp on the same weights in bfloat16 and in Q8_0:

    OMP_NUM_THREADS=2 python benchmarks/limit.py --model smollm2 --llama-python .venv-llama/bin/python

Everything takes turns, so that whatever slows the machine down for a while slows all of it down; figures are medians.
Arithmetic is not part of the limit. llama.cpp gives logits for all
tokens, as verification needs them. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_worker import Worker
from peers import write_folder

from outdraft.api.loading import load_target
from outdraft.core.tree import Tree
from outdraft.data.provenance import environment
from outdraft.target.backends.native.modules import NativeLayer
from outdraft.target.backends.native.weights import NativeLinear
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

HERE = Path(__file__).resolve().parent


class Forward:
    """A target with a context behind it, and a chain of tokens to run again and again."""

    def __init__(self, target: Target, tokens: int, context: int):
        self.run = ModelRunner(target, target.new_cache(1, context + tokens))
        dice = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            self.run.prefill([torch.randint(target.vocab_size, (context,), generator=dice)])
        drawn = torch.randint(target.vocab_size, (1, tokens), generator=dice)
        self.tree = Tree.chains(drawn, 1) if tokens > 1 else Tree.roots(drawn[0])

    @torch.inference_mode()
    def __call__(self) -> float:
        start = time.perf_counter()
        self.run.target.head(self.run.tree(self.tree).features)
        seconds = time.perf_counter() - start
        self.run.cache.rollback()
        return seconds


class Read:
    """A read of so many bytes by all threads, in a buffer that no cache holds."""

    def __init__(self, nbytes: int):
        self.room = torch.ones(max(nbytes, 2**28) // 4 + 1)
        self.share = nbytes / self.room.nbytes

    def __call__(self) -> float:
        start = time.perf_counter()
        self.room.sum()
        return (time.perf_counter() - start) * self.share


class Llama:
    """A forward of llama.cpp, in its own process."""

    def __init__(self, worker: Worker, tokens: int, context: int):
        self.worker, self.tokens, self.context = worker, tokens, context

    def __call__(self) -> float:
        return float(self.worker.ask({"context": self.context, "tokens": self.tokens})["seconds"])


def bytes_read(target: Target, context: int) -> int:
    """Bytes of all weights and of the keys and values of the context."""
    config = target.config
    native = [module for module in target.model.modules() if isinstance(module, NativeLayer | NativeLinear)]
    weights = sum(module.nbytes for module in native) or target.num_parameters * target.dtype.itemsize
    heads = config.num_key_value_heads * config.head_dim
    return weights + 2 * config.num_hidden_layers * heads * context * target.dtype.itemsize


def measured(ways: dict[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repetitions + 2):
        for name, way in ways.items():
            took = way()
            if turn >= 2:  # the first ones warm up
                seconds[name].append(took)
    return {name: 1000 * statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backends", default="packed,native,native-int8,native-int4", help="separated by commas")
    parser.add_argument("--tokens", default="1,2,4,5,8,16,32", help="separated by commas")
    parser.add_argument("--contexts", default="200,2000", help="tokens before them, separated by commas")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--llama-python", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    targets = {
        name: load_target(given.model, dtype=given.dtype, device="cpu", backend=name)
        for name in given.backends.split(",")
    }
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.llama_python is not None:
            stock = load_target(given.model, dtype=given.dtype, device="cpu", backend="eager")
            workers = started(given.llama_python, stock, Path(folder))
        facts = environment(next(iter(targets.values())))
        print(json.dumps({name: facts[name] for name in ("cpu", "threads", "versions")}))
        names = ["read of the bytes", *targets, *workers]
        print("| context | tokens | " + " | ".join(names) + " | native / read |\n" + "|---" * (3 + len(names)) + "|")
        report = []
        for context in map(int, given.contexts.split(",")):
            for tokens in map(int, given.tokens.split(",")):
                whole = targets.get("native") or next(iter(targets.values()))
                ways: dict[str, Callable[[], float]] = {"read": Read(bytes_read(whole, context))}
                ways |= {name: Forward(target, tokens, context) for name, target in targets.items()}
                ways |= {name: Llama(worker, tokens, context) for name, worker in workers.items()}
                ms = measured(ways, given.repetitions)
                report.append({"context": context, "tokens": tokens, "bytes": bytes_read(whole, context), "ms": ms})
                share = f"{ms['native'] / ms['read']:.2f}" if "native" in ms else ""
                cells = [str(context), str(tokens), *(f"{value:.2f}" for value in ms.values()), share]
                print("| " + " | ".join(cells) + " |", flush=True)
        for worker in workers.values():
            worker.close()
    if given.json is not None:
        record: dict[str, Any] = {"environment": facts, "settings": {k: str(v) for k, v in vars(given).items()}}
        given.json.write_text(json.dumps(record | {"forwards": report}, indent=1))


def started(python: Path, target: Target, folder: Path) -> dict[str, Worker]:
    """Processes of llama.cpp on the target's weights."""
    write_folder(target, folder / "model")
    script = [str(python), str(HERE / "limit_llama.py"), "--folder", str(folder / "model")]
    threads = ["--threads", str(torch.get_num_threads())]
    return {
        f"llama.cpp {kind}": Worker([*script, *threads, "--kind", kind], folder / f"{kind}.log")
        for kind in ("bf16", "Q8_0")
    }


if __name__ == "__main__":
    main()
