"""Which tree suits this machine: many shapes on the same prompts, in paired turns, with where each round's time goes.

Run it with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/trees.py [--model M --draft-model D] [--temperature 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from outdraft.evaluation.measure import PLAIN, compare, speculative
from outdraft.evaluation.prompts import encode, read_prompts
from outdraft.evaluation.summary import summarise
from outdraft.loading import load_drafter_for, load_target
from outdraft.reference import load_prompts

TREES = ["2/2/6", "3/2/8", "3/3/10", "4/3/10", "5/3/10", "5/4/16", "7/3/14", "5/10/60"]
CHAINS = [3, 4, 5, 7]
SAMPLED_CHAINS = [3, 4, 5]
SAMPLED_TREES = ["3/2/9", "3/3/13"]


def shape(text: str) -> dict[str, int]:
    """`depth/top_k/size` as settings of `generate`."""
    depth, top_k, size = (int(part) for part in text.split("/"))
    return {"tree_depth": depth, "tree_top_k": top_k, "tree_size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--data", type=Path, help="prompts as for `outdraft bench`; the shipped held-out ones without")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype")
    given = parser.parse_args()

    target = load_target(given.model, dtype=given.dtype)
    drafter = load_drafter_for(target, given.draft_model)
    shipped = load_prompts("heldout")
    prompts = read_prompts(given.data, given.limit) if given.data else shipped[:: max(1, len(shipped) // given.limit)]
    best = {"candidates": "top-k"}
    rivals = [speculative(PLAIN, target, None)]
    rivals += [speculative(text, target, drafter, **shape(text)) for text in TREES]
    rivals += [speculative(f"chain of {n}", target, drafter, num_speculative_tokens=n, **best) for n in CHAINS]
    if given.temperature > 0:
        drawn = {"candidates": "sampled"}
        rivals += [
            speculative(f"sampled chain of {n}", target, drafter, num_speculative_tokens=n, **drawn)
            for n in SAMPLED_CHAINS
        ]
        rivals += [speculative(f"sampled {text}", target, drafter, **shape(text), **drawn) for text in SAMPLED_TREES]
    runs = compare(
        rivals,
        encode(prompts, target),
        repetitions=given.repetitions,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
    )
    print("| depth/top-k/size | tau | speed-up | 95% | draft ms | verify ms | rest ms |\n|---|---|---|---|---|---|---|")
    for rival in rivals:
        found = summarise(rival.name, rival.method, rival.parameters, runs[rival.name], runs[PLAIN], None)
        counts, (low, high) = found.statistics, found.speedup_interval
        seconds = (counts.draft_seconds, counts.verify_seconds, counts.rest_seconds)
        times = " | ".join(f"{1000 * part / counts.rounds:.1f}" for part in seconds)
        print(f"| {rival.name} | {counts.tau:.2f} | {found.speedup:.2f} | {low:.2f}-{high:.2f} | {times} |")


if __name__ == "__main__":
    main()
