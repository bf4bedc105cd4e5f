"""What exact mode costs and how often greedy texts part without it: plain, drafting, exact drafting in paired turns.

Times are medians over prompts.

OMP_NUM_THREADS=2 python benchmarks/exact.py [--dtype float32] [--backend eager]
"""

from __future__ import annotations

import argparse
from statistics import median

from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode, read_prompts
from outdraft.core.statistics import Statistics
from outdraft.evaluation.bench.measure import PLAIN, compare, speculative
from outdraft.reference import load_prompts
from outdraft.target.exact.target import exactly

SHAPES = {
    "chain of 2": {"num_speculative_tokens": 2},
    "chain of 3": {"num_speculative_tokens": 3},
    "chain of 5": {"num_speculative_tokens": 5},
    "tree 3/2/6": {"tree_depth": 3, "tree_top_k": 2, "tree_size": 6},
    "tree 3/3/10": {"tree_depth": 3, "tree_top_k": 3, "tree_size": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--method")
    parser.add_argument("--data", help="prompts as for `outdraft bench`; the shipped held-out ones without")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtype")
    parser.add_argument("--backend")
    given = parser.parse_args()

    target = load_target(given.model, dtype=given.dtype, backend=given.backend)
    drafter = load_drafter_for(target, given.draft_model, method=given.method)
    shipped = load_prompts("heldout")
    prompts = read_prompts(given.data, given.limit) if given.data else shipped[:: max(1, len(shipped) // given.limit)]
    rivals = [speculative(PLAIN, target, None)]
    for name in given.shapes.split(","):
        rivals.append(speculative(name, target, drafter, **SHAPES[name]))
        rivals.append(speculative(f"{name}, exact", target, drafter, exact=True, **SHAPES[name]))
    runs = compare(rivals, encode(prompts, target), max_new_tokens=given.max_new_tokens)
    print(f"{target.dtype}, {target.backend}, {len(prompts)} prompts: {exactly(target).exactness!r}")
    print("| | tau | verify ms | speed-up | texts parted |\n|---|---|---|---|---|")
    for rival in rivals:
        own, plain = runs[rival.name], runs[PLAIN]
        counts = Statistics.sum(run.answer.statistics for run in own)
        parted = sum(a.answer.tokens != b.answer.tokens for a, b in zip(own, plain, strict=True))
        speedup = median(a.tokens_per_second / b.tokens_per_second for a, b in zip(own, plain, strict=True))
        milliseconds = median(
            1000 * run.answer.statistics.verify_seconds / max(1, run.answer.statistics.rounds) for run in own
        )
        print(f"| {rival.name} | {counts.tau:.2f} | {milliseconds:.1f} | {speedup:.2f} | {parted} of {len(own)} |")


if __name__ == "__main__":
    main()
