"""The largest size of a draft: EAGLE-2's depth, top-k and size, with defaults per device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from outdraft.errors import UserError

CandidateKind = Literal["top-k", "sampled", "sampled-with-replacement", "spine"]


@dataclass(frozen=True)
class TreeShape:
    """The largest size of a tree: EAGLE's depth, top_k and total_token."""

    depth: int
    """Levels of a tree below its first: a path holds at most depth + 1 drafted tokens."""
    top_k: int
    """Most tokens of a level that are drafted further, and continuations of each; 1 drafts a chain."""
    size: int
    """Nodes that the target verifies, the root included."""
    candidates: CandidateKind = "top-k"
    """Most probable candidates in EAGLE-2's dynamic tree, or `top_k` chains sampled from the drafter's distribution;
    `spine` is one sampled chain with most probable candidates beside it, where the drafter has all levels at once."""

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("top_k", 1), ("size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"tree_{name} must be at least {least}, not {getattr(self, name)}")
        if self.candidates not in get_args(CandidateKind):
            raise UserError(f"candidates must be one of {', '.join(get_args(CandidateKind))}, not '{self.candidates}'")

    @classmethod
    def chain(cls, num_speculative_tokens: int, **settings: object) -> TreeShape:
        """Make a chain of `num_speculative_tokens` candidates."""
        if num_speculative_tokens < 1:
            raise UserError(
                f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}; --method none drafts nothing"
            )
        return cls(num_speculative_tokens - 1, 1, num_speculative_tokens + 1, **settings)  # type: ignore[arg-type]

    def at_most(self, path: int, size: int) -> TreeShape:
        """Limit the shape to paths of `path` candidates and to `size` nodes (both at least 1)."""
        return replace(self, depth=min(self.depth, path - 1), size=min(self.size, size))

    def doubled(self) -> TreeShape:
        """Double the length of paths: a controller that decides how far to draft may go this far."""
        longer = 2 * self.depth + 1
        return replace(self, depth=longer, size=longer + 2 if self.top_k == 1 else 2 * self.size)


CPU_TREE = TreeShape(depth=3, top_k=3, size=10)
"""Default tree on a CPU: few draft steps, few nodes, measured on two cores (docs/measurements/draft-shapes.md)."""

GREEDY_CHAIN, BATCH_CHAIN, BATCH = TreeShape.chain(4), TreeShape.chain(3), 4
"""Greedy defaults on a CPU instead of `CPU_TREE`, for drafters whose levels each cost a step. `BATCH_CHAIN` holds from
`BATCH` rows on. All shipped drafters were faster with chains once the target's layers took less time
(docs/measurements/draft-shapes.md)."""

CPU_CHAIN = TreeShape.chain(4, candidates="sampled")
"""Sampled default on a CPU. At temperature 1 a chain drawn from the drafter's distribution was accepted twice as far as
a tree of the drafter's most probable tokens."""

GPU_TREE = TreeShape(depth=5, top_k=10, size=60)
"""EAGLE-2's tree for targets of 7B and 8B."""

GPU_CHAIN = TreeShape.chain(5, candidates="sampled")
"""Sampled default on a GPU, for the reason given at `CPU_CHAIN`."""

GPU_NODES = 128
"""Nodes of all rows that a GPU verifies in little more time than one token. On an H200 an 8B target took 5.3 ms over
one, 6.7 over 60, 8.3 over 128, and proportionally more beyond (docs/measurements/gpu.md)."""


def gpu_tree(rows: int, tree: TreeShape = GPU_TREE) -> TreeShape:
    """Return a tree of `GPU_TREE`'s size, or as much of it as `rows` rows together can verify within `GPU_NODES`."""
    size = min(tree.size, GPU_NODES // rows)
    if size > tree.top_k:
        return replace(tree, size=size)
    return TreeShape.chain(max(1, min(tree.depth, size - 1)))
