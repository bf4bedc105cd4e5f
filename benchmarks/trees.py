"""Which trees suit this machine: shapes, chains and trees by the machine, at several batch sizes, in paired turns.

Run it with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/trees.py [--model M --draft-model D] [--batches 1,4,8,16] [--temperatures 0,1]

In every turn all rivals decode the same batch of prompts in rotating order, each row to the same length whatever it
says, so plain decoding is always a full batch. A drafted batch empties as the luckier rows end; `--full` stops at the
first of them, which is what a server sees that puts new rows in their places. What counts is tokens per second after
the prefill, each rival's against plain decoding's of the same turn; the interval is over turns. `auto` is
`tree_size="auto"`; it learns as it goes and keeps what it learned from cell to cell no more than a user's process would
(a model of its own for every cell). `NAME+lookup` drafts what the text repeats, too, as `generate` does by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode, read_prompts
from outdraft.core.statistics import Statistics
from outdraft.data.provenance import environment
from outdraft.drafting.base import Drafter
from outdraft.engine.round import decode
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.evaluation.bench.methods import WITH_LOOKUP
from outdraft.evaluation.bench.summary import interval
from outdraft.reference import load_prompts
from outdraft.target.target import Target

GREEDY = "plain,default,5/10/60,5/10/48,chain 1,chain 2,chain 3,chain 4,chain 5,chain 7,auto"
SAMPLING = "plain,default,5/10/60,drawn 3/2/9,drawn 3/3/13,chain 1,chain 2,chain 3,chain 5,chain 7,auto"
WARM_UP_TOKENS = 12


def settings_of(name: str) -> dict[str, Any]:
    """Settings of `generate`: `default`, `auto`, `chain N`, `depth/top_k/size` (EAGLE-2's), `drawn depth/top_k/size`,
    or a controller for the default's doubled shape (`calibrated` decides level by level for one row, and chooses whole
    shapes, as `auto` does, for more); with `+lookup` repetitions are drafted, too."""
    if name == PLAIN:
        return {}
    if not name.endswith(WITH_LOOKUP):
        return {"prompt_lookup_min": 0, **shape_of(name)}
    return shape_of(name.removesuffix(WITH_LOOKUP))


def shape_of(name: str) -> dict[str, Any]:
    """Settings of the shape alone."""
    words = name.split()
    if name == "default":
        return {}
    if name == "auto":
        return {"tree_size": "auto"}
    if words[0] == "chain":
        return {"num_speculative_tokens": int(words[1])}
    if "/" in words[-1]:
        depth, top_k, size = (int(part) for part in words[-1].split("/"))
        drawn = {"candidates": "sampled"} if words[0] == "drawn" else {}
        return {"tree_depth": depth, "tree_top_k": top_k, "tree_size": size, **drawn}
    return {"controller": name}


@dataclass
class Rival:
    """One way of decoding in one cell, and what came of it."""

    name: str
    model: SpeculativeModel
    settings: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    """Tokens per second of every turn."""
    counts: list[Statistics] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """Of every turn, those of the row that took longest."""

    @classmethod
    def of(cls, name: str, target: Target, drafter: Drafter) -> Rival:
        return cls(name, SpeculativeModel(target, None if name == PLAIN else drafter), settings_of(name))

    def decode(self, prompts: Sequence[list[int]], full: bool, counts: bool = True, **settings: Any) -> None:
        """One turn.

        Args:
            prompts: of the rows.
            full: count only as long as all rows run.
            counts: whether it does at all.
            **settings: of `generate`.
        """
        model = self.model
        rows, draft = model._rows(list(prompts), {**settings, **self.settings})
        for _ in decode(model.target, model.drafter, rows, draft.shape, draft.costs):
            if full and any(row.finish_reason is not None for row in rows):
                break
        if counts:
            total = Statistics.sum((row.statistics for row in rows), together=True)
            self.rates.append(total.emitted / total.decode_seconds)
            self.counts.append(total)
            self.rounds.append(max(row.statistics.rounds for row in rows))

    def against(self, plain: Rival) -> dict[str, Any]:
        """The figures of the table."""
        ratios = np.array(self.rates) / np.array(plain.rates)
        total = Statistics.sum(self.counts)
        whole = sum(self.rounds)
        milliseconds = {part: 1000 * getattr(total, f"{part}_seconds") / whole for part in ("draft", "verify", "rest")}
        return {
            "tokens_per_second": statistics.median(self.rates),
            "speedup": float(np.median(ratios)),
            "interval": interval(ratios, range(len(ratios))),
            "ratios": ratios.tolist(),
            "tau": total.tau,
            "drafted": total.drafted / total.rounds,
            "levels": statistics.fmean(total.depths),
            "idle": total.depths.count(0) / len(total.depths),
            "milliseconds": milliseconds,
        }


def turns_of(prompts: list[list[int]], batch: int, turns: int) -> Iterator[list[list[int]]]:
    """Batches of prompts, one after the other, going round where they run out."""
    for turn in range(turns):
        yield [prompts[(turn * batch + row) % len(prompts)] for row in range(batch)]


def cell(
    names: Sequence[str],
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    given: argparse.Namespace,
    batch: int,
    temperature: float,
) -> dict[str, dict[str, Any]]:
    """All rivals at one batch size and temperature."""
    rivals = [Rival.of(name, target, drafter) for name in names]
    # Every row gets all its tokens. Not by `min_new_tokens`, which reads every row's prefix in every law: most users
    # have no such setting, and drafts pay for it more than plain decoding does.
    endless = {"logit_bias": dict.fromkeys(target.eos_token_ids, -100.0)}
    settings = {"temperature": temperature, "max_new_tokens": given.tokens, **endless}
    short = {**settings, "max_new_tokens": WARM_UP_TOKENS}
    for rival in rivals:
        rival.decode(prompts[:batch], given.full, counts=False, seed=0, **short)
    for turn, chosen in enumerate(turns_of(prompts, batch, given.turns)):
        first = turn % len(rivals)
        for rival in (*rivals[first:], *rivals[:first]):
            rival.decode(chosen, given.full, seed=1000 * turn, **settings)
    return {rival.name: rival.against(rivals[0]) for rival in rivals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--method")
    parser.add_argument("--data", type=Path, help="prompts as for `outdraft bench`; the shipped held-out ones without")
    parser.add_argument("--batches", default="1,4,8,16", help="rows decoded together, separated by commas")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--greedy-rivals", default=GREEDY, help="plain first; separated by commas")
    parser.add_argument("--sampling-rivals", default=SAMPLING)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of every row")
    parser.add_argument("--full", action="store_true", help="measure only as long as all rows of a batch are running")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--backend")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    target = load_target(given.model, dtype=given.dtype, device=given.device, backend=given.backend)
    drafter = load_drafter_for(target, given.draft_model, method=given.method, backend=given.backend)
    assert drafter is not None
    encoded = encode(read_prompts(given.data, None) if given.data else load_prompts("heldout"), target)
    prompts = [ids for ids in encoded if len(ids) + given.tokens < target.context_length]
    found = []
    for temperature in (float(text) for text in given.temperatures.split(",")):
        names = (given.sampling_rivals if temperature > 0 else given.greedy_rivals).split(",")
        if names[0] != PLAIN:
            parser.error(f"the first rival must be {PLAIN}: all others are compared with it")
        for batch in (int(text) for text in given.batches.split(",")):
            figures = cell(names, target, drafter, prompts, given, batch, temperature)
            found.append({"temperature": temperature, "batch": batch, "rivals": figures})
            show(temperature, batch, figures)
    if given.json is not None:
        about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        given.json.write_text(
            json.dumps({"settings": about, "environment": environment(target), "found": found}, indent=1)
        )


def show(temperature: float, batch: int, figures: dict[str, dict[str, Any]]) -> None:
    print(f"\ntemperature {temperature:g}, {batch} row{'s' * (batch > 1)}\n")
    print("| | speed-up | 95% | tokens/s | tau | levels | nodes drafted | draft ms | verify ms | rest ms |")
    print("|---" * 10 + "|")
    for name, one in figures.items():
        low, high = one["interval"]
        parts = " | ".join(f"{one['milliseconds'][part]:.1f}" for part in ("draft", "verify", "rest"))
        print(
            f"| {name} | {one['speedup']:.2f} | {low:.2f}-{high:.2f} | {one['tokens_per_second']:.0f} |"
            f" {one['tau']:.2f} | {one['levels']:.1f} | {one['drafted']:.1f} | {parts} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
