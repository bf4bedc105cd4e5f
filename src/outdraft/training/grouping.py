"""Which examples of a batch are computed together: those of like length, so that little work goes to padding.

The batch of an optimizer step stays what it is, and its loss is a sum over positions; so however it is divided, the
same sums over the same positions come out, rounded differently. Nothing is random here. Knows lengths only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

GROUP_COST = {"cpu": 128, "cuda": 1024}
"""What one more forward and backward costs beside its tokens, in tokens: all weights are read once more, and a GPU
wants that many rows to be busy. Estimates, not tuned."""


def group_cost(device: torch.device) -> int:
    """Tokens that one more group must save to be worth it."""
    return GROUP_COST.get(device.type, GROUP_COST["cuda"])


def groups_of_like_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Divide rows so that padded tokens and `cost` for every group are least in sum.

    Args:
        lengths: tokens of every row.
        cost: of one more group, in tokens.

    Returns:
        Indices into `lengths`, every one once; the longest rows come first, so that what is held at most is held at
        once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # least[n]: of the n longest rows, and where their last group begins. In sorted order a group is a stretch, whose
    # padded length is that of its first row.
    least: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        options = ((least[begin][0] + cost + (end - begin) * lengths[order[begin]], begin) for begin in range(end))
        least.append(min(options))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        begin = least[end][1]
        groups.append(order[begin:end])
        end = begin
    return groups[::-1]
