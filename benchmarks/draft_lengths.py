"""Every fixed draft length against the controllers, group by group, in paired turns: is the best length found untold?

Groups are the categories of a Spec-Bench or MT-bench question file; other prompts are one group. What is asked: the
ratio of a controller's tokens per second to those of the fixed length that turned out best on that very group, which
favours the fixed lengths. Run it with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/draft_lengths.py --method eesd [--data question.jsonl] [--temperature 1]

`--untrained` makes the drafter's weights random: drafting cannot pay then, and controllers must notice.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import Prompt, encode, prompt_of, read_prompts
from outdraft.data.records import split_lines
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import PLAIN, Run, compare, speculative
from outdraft.evaluation.bench.summary import interval, summarise
from outdraft.methods.eesd.drafter import EarlyExit
from outdraft.methods.eesd.network import ExitLayerConfig, empty
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead
from outdraft.reference import load_prompts
from outdraft.target.backends import accelerate
from outdraft.target.target import Target

MULTI_TURN = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


def grouped(data: Path | None, each: int, longest: int, target: Target) -> dict[str, list[list[int]]]:
    """Encoded prompts by group, the first `each` that leave room for an answer."""
    groups: dict[str, list[list[int]]] = defaultdict(list)
    found: list[tuple[str, Prompt]] = [("held out", prompt) for prompt in load_prompts("heldout")]
    if data is not None:
        records = [json.loads(line) for line in split_lines(data.read_text(encoding="utf-8"))]
        if all("category" in record for record in records):
            found = [(record["category"], prompt_of(record)) for record in records]
        else:
            found = [(data.stem, prompt) for prompt in read_prompts(data)]
    for category, prompt in found:
        group = "multi-turn" if category in MULTI_TURN else category
        if len(groups[group]) < each:
            try:
                (ids,) = encode([prompt], target)
            except UserError:
                continue
            if len(ids) + longest <= target.context_length:
                groups[group].append(ids)
    return {group: prompts for group, prompts in groups.items() if prompts}


def with_random_weights(drafter: Drafter, target: Target) -> Drafter:
    """The same network, never trained."""
    torch.manual_seed(0)
    if isinstance(drafter, EarlyExit):
        layer = empty(target.model, ExitLayerConfig(drafter.exit_layer.config.exit_layer))
        weights = {name: 0.05 * torch.randn(weight.shape) for name, weight in layer.state_dict().items()}
        layer.load_state_dict(weights, assign=True)
        return EarlyExit(accelerate(layer.to(target.dtype), target.backend), target)
    assert isinstance(drafter, FeatureDrafter)
    head = FeatureHead(drafter.head.config).to(target.dtype).eval()
    return FeatureDrafter(accelerate(head, target.backend), target)


def ratio(own: Sequence[Run], other: Sequence[Run]) -> tuple[float, float, float]:
    """Median of paired ratios of tokens per second, and its bootstrap interval over prompts."""
    rates = [len(run.answer.tokens) / run.answer.seconds for run in own]
    others = [len(run.answer.tokens) / run.answer.seconds for run in other]
    ratios = np.array(rates) / np.array(others)
    return float(np.median(ratios)), *interval(ratios, [run.prompt for run in own])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--method", default="eesd")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--per-group", type=int, default=4)
    parser.add_argument("--lengths", default="1,2,3,4,5,6")
    parser.add_argument("--controllers", default="beta,calibrated")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tree", action="store_true", help="the controllers may grow the drafter's default tree")
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures there too")
    given = parser.parse_args()

    target = load_target(given.model)
    drafter = load_drafter_for(target, given.draft_model, method=given.method)
    assert drafter is not None
    if given.untrained:
        drafter = with_random_weights(drafter, target)
    lengths = [int(part) for part in given.lengths.split(",")]
    most: dict[str, Any] = {} if given.tree else {"num_speculative_tokens": 2 * max(lengths)}
    rivals = [speculative(PLAIN, target, None)]
    rivals += [speculative(f"{n}", target, drafter, num_speculative_tokens=n) for n in lengths]
    rivals += [speculative(name, target, drafter, controller=name, **most) for name in given.controllers.split(",")]
    groups = grouped(given.data, given.per_group, given.max_new_tokens, target)
    order = [(group, prompt) for turn in in_turn(groups) for group, prompt in turn]
    runs = compare(
        rivals,
        [prompt for _, prompt in order],
        repetitions=given.repetitions,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
    )
    print("| group | method | drafted | tau | speed-up | against the best fixed length |\n|---|---|---|---|---|---|")
    report: dict[str, Any] = {}
    for group in [*groups, "all"]:
        chosen = {
            name: [run for run in found if group in ("all", order[run.prompt][0])] for name, found in runs.items()
        }
        found = {r.name: summarise(r.name, r.method, 0, chosen[r.name], chosen[PLAIN], None) for r in rivals}
        best = max((str(n) for n in lengths), key=lambda name: found[name].speedup)
        report[group] = {}
        for rival in rivals[1:]:
            one, against = found[rival.name], ratio(chosen[rival.name], chosen[best])
            depths = one.statistics.depths
            fixed = rival.name in map(str, lengths)
            name = f"fixed {rival.name}" + (" (best)" if rival.name == best else "") if fixed else rival.name
            low, high = one.speedup_interval
            print(
                f"| {group} | {name} | {sum(depths) / len(depths):.1f} | {one.statistics.tau:.2f} | {one.speedup:.2f} "
                f"[{low:.2f}, {high:.2f}] | {against[0]:.3f} [{against[1]:.3f}, {against[2]:.3f}] |"
            )
            report[group][name] = {**one.as_dict(), "against_best_fixed": list(against)}
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


def in_turn(groups: dict[str, list[list[int]]]) -> list[list[tuple[str, list[int]]]]:
    """The groups' prompts in turn: the first of each, the second of each, ..."""
    most = max(len(prompts) for prompts in groups.values())
    return [[(group, prompts[i]) for group, prompts in groups.items() if i < len(prompts)] for i in range(most)]


if __name__ == "__main__":
    main()
