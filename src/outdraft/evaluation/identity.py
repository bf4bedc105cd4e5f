"""Whether a greedy text is the one that plain decoding gives, and if not, where it parts and how near a tie was there.

In low precision a forward over many tokens rounds differently from one over a single token, so that texts can part
where the two best tokens are all but equal. A parting is called a tie only when the gap lies within that measured
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.run import TargetRun
from outdraft.target import Target
from outdraft.tree import Tree


@dataclass(frozen=True)
class Divergence:
    """Where a text leaves the plain one."""

    prompt: int
    """Which of the prompts, from 0."""
    position: int
    """Which new token, from 0."""
    gap: float
    """Logit of the plain choice less that of the other, by plain one-token forwards; nan where one text just ends."""
    noise: float
    """Largest change of the gap between the two best tokens, up to here, from one-token forwards to the stock model's
    own forward over the whole text, which knows nothing of our cache, trees or masks."""

    @property
    def tie(self) -> bool:
        """Whether the gap lies within the noise: rounding, not a defect."""
        return self.gap <= self.noise

    def as_dict(self) -> dict[str, float | int | bool]:
        return {
            "prompt": self.prompt,
            "position": self.position,
            "logit_gap": self.gap,
            "noise": self.noise,
            "tie": self.tie,
        }


def divergences(
    target: Target, prompts: Sequence[list[int]], plain: Sequence[list[int]], others: Sequence[list[int]]
) -> list[Divergence]:
    """One for every prompt whose two texts differ; empty when all are identical."""
    return [
        divergence(target, number, prompt, own, other)
        for number, (prompt, own, other) in enumerate(zip(prompts, plain, others, strict=True))
        if own != other
    ]


@torch.inference_mode()
def divergence(target: Target, number: int, prompt: list[int], plain: list[int], other: list[int]) -> Divergence:
    """Measure the first difference between two texts that differ."""
    shorter = min(len(plain), len(other))
    position = next((i for i in range(shorter) if plain[i] != other[i]), shorter)
    common = plain[:position]
    single = logits_one_by_one(target, prompt, common)
    whole = target.head(target.features(torch.tensor([prompt + common], device=target.device))[0, len(prompt) - 1 :])
    best = single.topk(2, dim=-1).indices
    gaps = [logits.gather(1, best).diff(dim=-1)[:, 0] for logits in (single, whole.float())]
    noise = float((gaps[0] - gaps[1]).abs().max())
    if position == shorter:
        return Divergence(number, position, float("nan"), noise)
    return Divergence(number, position, float(single[-1, plain[position]] - single[-1, other[position]]), noise)


def logits_one_by_one(target: Target, prompt: list[int], tokens: list[int]) -> Tensor:
    """`(len(tokens) + 1, vocab)` logits after the prompt and after each token, as plain decoding computes them."""
    run = TargetRun(target, target.new_cache(1, len(prompt) + len(tokens) + 1))
    rows = [target.head(run.prefill([torch.tensor(prompt)]).features[0, -1:])]
    for token in tokens:
        root = Tree.roots(torch.tensor([token], device=target.device))
        rows.append(target.head(run.tree(root).features[0]))
        run.cache.commit([[0]])
    return torch.cat(rows).float()
