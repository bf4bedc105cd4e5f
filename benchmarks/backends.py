"""Backends side by side: milliseconds of a forward, seconds of compiling, tokens a second with and without a drafter.

Compile first, so that the measurement does not wait for the compiler, then measure with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/backends.py --compile-only
    OMP_NUM_THREADS=2 python benchmarks/backends.py [--batches 1,8] [--nodes 1,4,8,10,16,32] [--tokens 0]

Backends take turns, so that whatever slows the machine down for a while slows all of them down; figures are medians.
The second run still compiles, but from torch's cache on disk (`TORCHINDUCTOR_CACHE_DIR`): what it says of seconds is
that, and the first run's are those of a cold cache. With `--layers` and `--width` the weights are random, and nothing
is drafted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode_prompts
from outdraft.core.tree import Tree
from outdraft.evaluation.bench.methods import WITH_LOOKUP
from outdraft.reference import load_prompts
from outdraft.target.backends import BACKENDS, CompiledForward
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target


def targets(given: argparse.Namespace) -> tuple[Any, dict[str, Target]]:
    """The stock model, and the same weights on every backend."""
    dtype = getattr(torch, given.dtype)
    if given.layers is not None:
        config = LlamaConfig(
            vocab_size=given.vocab,
            hidden_size=given.width,
            intermediate_size=3 * given.width,
            num_hidden_layers=given.layers,
            num_attention_heads=given.width // 64,
            num_key_value_heads=max(1, given.width // 128),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model, words = LlamaForCausalLM(config).to(dtype).to(given.device).eval(), None
    else:
        loaded = load_target(given.model, dtype=dtype, device=given.device, backend="eager")
        model, words = loaded.model, loaded.tokenizer
    return model, {name: load_target(model, words, backend=name) for name in given.backends.split(",")}


class Forwards:
    """A target with prompts behind it, and a tree to run again and again."""

    def __init__(self, target: Target, rows: int, nodes: int, context: int):
        self.run = ModelRunner(target, target.new_cache(rows, context + nodes))
        dice = torch.Generator().manual_seed(rows)
        with torch.inference_mode():
            lengths = [context - 3 * row for row in range(rows)]
            self.run.prefill([torch.randint(target.vocab_size, (length,), generator=dice) for length in lengths])
        parents = torch.tensor([-1, *((node - 1) // 2 for node in range(1, nodes))]).expand(rows, -1)
        tokens = torch.randint(target.vocab_size, (rows, nodes), generator=dice).to(target.device)
        self.tree = Tree(tokens, parents.to(target.device), [nodes] * rows)

    @torch.inference_mode()
    def seconds(self) -> float:
        target = self.run.target
        start = time.perf_counter()
        target.head(self.run.tree(self.tree).features)
        if target.device.type == "cuda":
            torch.cuda.synchronize()
        self.run.cache.rollback()
        return time.perf_counter() - start


def forwards(found: dict[str, Target], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a forward with its head, by backend, number of rows and of nodes."""
    cases = [(rows, nodes) for rows in numbers(given.batches) for nodes in numbers(given.nodes)]
    results = []
    for rows, nodes in cases:
        ready = {name: Forwards(target, rows, nodes, given.context) for name, target in found.items()}
        for one in ready.values():
            one.seconds()  # warms up, and compiles
            one.seconds()
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(0 if given.compile_only else given.repetitions):
            for name, one in ready.items():
                seconds[name].append(one.seconds())
        if not given.compile_only:
            ms = {name: 1000 * statistics.median(own) for name, own in seconds.items()}
            results.append({"rows": rows, "nodes": nodes, "ms": ms})
            print(
                "| " + " | ".join([str(rows), str(nodes), *(f"{value:.2f}" for value in ms.values())]) + " |",
                flush=True,
            )
    return results


class Stock:
    """`transformers`' own greedy generate, of the model as it is."""

    def __init__(self, model: Any, stops: list[int]):
        self.model, self.stops = model, stops

    def generate(self, prompt: list[int], max_new_tokens: int) -> Any:
        ids = torch.tensor([prompt], device=self.model.device)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0, "eos_token_id": self.stops}
        start = time.perf_counter()
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        seconds = time.perf_counter() - start
        tokens = found[0, len(prompt) :].tolist()
        return SimpleNamespace(tokens=[tokens], seconds=seconds, statistics=SimpleNamespace(rounds=len(tokens)))


def decoding(model: Any, found: dict[str, Target], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second over the shipped prompts: stock generate, then plain and drafted by backend."""
    first = next(iter(found.values()))
    prompts = encode_prompts(load_prompts("heldout")[: given.prompts], first.tokenizer)
    models: dict[tuple[str, str], Any] = {("stock", "plain"): Stock(model, first.eos_token_ids)}
    for name, target in found.items():
        drafter = load_drafter_for(target, "reference", method=given.method, backend=name)
        models[name, "plain"] = SpeculativeModel(target)
        models[name, given.method] = models[name, given.method + WITH_LOOKUP] = SpeculativeModel(target, drafter)
    for one in models.values():
        one.generate(prompts[0], max_new_tokens=16)  # warms up, and compiles
    if given.compile_only:
        return []
    runs: dict[tuple[str, str], list[Any]] = {key: [] for key in models}
    for turn, prompt in enumerate(prompts):
        order = list(models.items())
        shift = turn % len(order)
        for key, one in [*order[shift:], *order[:shift]]:
            alone = {"prompt_lookup_min": 0} if key[1] == given.method else {}
            runs[key].append(one.generate(prompt, max_new_tokens=given.tokens, **alone))
    base = next(iter(runs))
    ratios = {key: quartiles(outputs, runs[base]) for key, outputs in runs.items()}
    results = []
    for (name, method), outputs in runs.items():
        rate = sum(len(o.tokens[0]) for o in outputs) / sum(o.seconds for o in outputs)
        plain = runs[name, "plain"]
        own_plain = sum(len(o.tokens[0]) for o in plain) / sum(o.seconds for o in plain)
        same = sum(o.tokens == p.tokens for o, p in zip(outputs, plain, strict=True))
        across = sum(o.tokens == p.tokens for o, p in zip(outputs, runs[base], strict=True))
        tokens = sum(len(o.tokens[0]) for o in outputs)
        tau = tokens / sum(o.statistics.rounds for o in outputs)
        results.append(
            {
                "backend": name,
                "method": method,
                "tokens_per_second": rate,
                "speed_up": rate / own_plain,
                "against_stock": ratios[name, method],
                "tau": tau,
                "same_as_own_plain": same,
                "same_as_first": across,
                "prompts": len(outputs),
            }
        )
        cells = [name, method, f"{rate:.1f}", f"{rate / own_plain:.2f}", ratios[name, method], f"{tau:.2f}"]
        print("| " + " | ".join([*cells, f"{same}/{len(outputs)}", f"{across}/{len(outputs)}"]) + " |", flush=True)
    return results


def quartiles(some: list[Any], others: list[Any]) -> str:
    """How many times the tokens a second of others, prompt by prompt: median, and the quartiles around it."""
    ratios = [
        len(one.tokens[0]) / one.seconds * other.seconds / len(other.tokens[0])
        for one, other in zip(some, others, strict=True)
    ]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--layers", type=int, help="a target of random weights, so deep")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="1,8", help="rows, separated by commas; empty measures no forwards")
    parser.add_argument("--nodes", default="1,4,8,10,16,32", help="nodes of a row, separated by commas")
    parser.add_argument("--context", type=int, default=200, help="tokens before the tree")
    parser.add_argument("--repetitions", type=int, default=20, help="forwards of every backend and case")
    parser.add_argument("--method", default="fspad")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of every answer; 0 decodes nothing")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, found = targets(given)
    report: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(given).items()}}
    names = list(found)
    if given.batches:
        print(
            "| rows | nodes | " + " | ".join(f"{name} ms" for name in names) + " |\n" + "|---" * (2 + len(names)) + "|"
        )
        report["forwards"] = forwards(found, given)
    if given.tokens and given.layers is None:
        print(
            "| backend | method | tokens/s | over own plain | over stock | tau | texts as own plain | as stock |\n"
            + "|---" * 8
            + "|"
        )
        report["decoding"] = decoding(model, found, given)
    for name, target in found.items():
        if isinstance(target._run, CompiledForward):
            report["compile_seconds"] = target._run.seconds
            seconds = ", ".join(f"{size} {took:.1f} s" for size, took in target._run.seconds.items())
            print(f"{name}: compiled {seconds}")
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
