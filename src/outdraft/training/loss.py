"""FSPAD's partial alignment distillation loss (arXiv 2408.15562), EAGLE's when `p` is `r`.

Position t of a sequence reads (e_{t+1}, f_t), and its outputs stand for f_{t+1}, from which the target says x_{t+2}.
A sequence of L tokens therefore has L-2 positions, and position t counts when x_{t+2} is a response token. Knows the
target's head as a function and nothing of data, optimisers or processes: sums come out, the caller divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.drafters.feature_head import DraftOutput, FeatureHead
from outdraft.training.cross_entropy import Head, soft_cross_entropy

UNROLL_DECAY = 0.8
NOISE_WIDTH = 0.2
NOISE_LENGTH = 512


class LossSums(NamedTuple):
    """Sums over the counted positions, scalars in float32; divide by `positions` for the means of the paper."""

    regression: Tensor
    """SmoothL1(r_t, f_{t+1}), each position the mean over d."""
    cross_entropy: Tensor
    """- sum_v softmax(head(f_{t+1}))_v log softmax(head(p_t))_v."""
    agreed: Tensor
    """Positions where head(p_t) and head(f_{t+1}) have the same argmax."""
    positions: Tensor
    """Counted positions; with several draft steps, those of the first, whose agreement this is."""


class DrafterLoss(nn.Module):
    """The drafter together with its loss: what is trained (and wrapped for several processes).

    Args:
        drafter: the only parameters here.
        head: the target's frozen head, `(..., hidden) -> (..., vocab)`, differentiable in its input.
        chunk_size: positions whose logits are held at once.
        unroll_steps: draft steps that are trained; 1 is the paper's loss, more feed the drafter its own r as in
            decoding (HASS, arXiv 2408.15766; EAGLE-3, arXiv 2503.01840), step k with weight 0.8^k, summing to 1.
    """

    def __init__(self, drafter: FeatureHead, head: Head, chunk_size: int = 512, unroll_steps: int = 1):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.unroll_steps = chunk_size, unroll_steps
        self._head = head

    def forward(self, embeddings: Tensor, features: Tensor, loss_mask: Tensor, noise: Tensor | None = None) -> LossSums:
        """Sums of both losses over the counted positions of a right-padded batch.

        Args:
            embeddings: `(batch, tokens, hidden)` the target's input embeddings of x_0 .. x_{L-1}.
            features: `(batch, tokens, hidden)` its features f_0 .. f_{L-1}.
            loss_mask: `(batch, tokens)` True where x is a response token; False on padding.
            noise: `(batch, tokens, hidden)` added to the features that the drafter reads, never to those it must hit.
        """
        counted = counted_positions(loss_mask)
        dtype = self.drafter.norm.weight.dtype
        seen = features.to(dtype) if noise is None else features.to(dtype) + noise.to(dtype)
        embedded, read = embeddings[:, 1:-1].to(dtype), seen[:, :-2]
        out = self.drafter(embedded, read)
        sums = self._compare(out, features[:, 1:-1], counted)
        if self.unroll_steps == 1:
            return sums
        weights = [UNROLL_DECAY**step for step in range(self.unroll_steps)]
        regression, cross_entropy = sums.regression * weights[0], sums.cross_entropy * weights[0]
        streams = [read]
        for step in range(1, self.unroll_steps):
            streams.append(torch.cat([read[:, :1], out.r[:, :-1]], dim=1))
            out = self._run_streams(embedded, streams)
            counted = counted.clone()
            counted[:, :step] = False  # nothing was drafted there yet
            later = self._compare(out, features[:, 1:-1], counted)
            regression = regression + later.regression * weights[step]
            cross_entropy = cross_entropy + later.cross_entropy * weights[step]
        return sums._replace(regression=regression / sum(weights), cross_entropy=cross_entropy / sum(weights))

    def _compare(self, out: DraftOutput, features: Tensor, counted: Tensor) -> LossSums:
        p, r, goal = out.p[counted], out.r[counted], features[counted]
        exact = torch.promote_types(r.dtype, torch.float32)
        regression = F.smooth_l1_loss(r.to(exact), goal.to(exact), reduction="none", beta=1.0).mean(dim=-1).sum()
        cross_entropy, agreed = soft_cross_entropy(p, goal, self._head, self.chunk_size)
        return LossSums(regression, cross_entropy, agreed, counted.sum())

    def _run_streams(self, embedded: Tensor, streams: list[Tensor]) -> DraftOutput:
        """Outputs of the last stream; stream k holds at t the feature that k draft steps have made of f_{t-k}."""
        count, length = len(streams), embedded.shape[1]
        positions = torch.arange(length, device=embedded.device).repeat(count)[None]
        out = self.drafter(
            embedded.repeat(1, count, 1),
            torch.cat(streams, dim=1),
            positions,
            unrolled_mask(length, count, embedded.device),
        )
        return DraftOutput(out.p[:, -length:], out.r[:, -length:])


def counted_positions(loss_mask: Tensor) -> Tensor:
    """`(batch, tokens)` mask of response tokens -> `(batch, tokens - 2)` positions t whose x_{t+2} is one."""
    return loss_mask[:, 2:].bool()


def unrolled_mask(length: int, streams: int, device: torch.device | str) -> Tensor:
    """`(1, 1, streams * length, streams * length)` who sees whom when a drafter is unrolled on its own features.

    At draft step j, position t sees what it would see in decoding: the target's features up to t-j (stream 0), and on
    the way from there to t the ones drafted in steps 1 .. j, each at its own place.
    """
    stream = torch.arange(streams, device=device).repeat_interleave(length)
    place = torch.arange(length, device=device).repeat(streams)
    start = (place - stream)[:, None]
    true_feature = (stream == 0) & (place <= start)
    drafted = (stream > 0) & (stream <= stream[:, None]) & (place == start + stream)
    return (true_feature | drafted)[None, None]


def feature_noise(
    lengths: Sequence[int], width: int, tokens: int, seeds: Sequence[int], device: torch.device | str
) -> Tensor:
    """Uniform noise (U(0,1) - 0.5) * 0.2 * 512 / L of the published recipe, zero on padding.

    Every row is drawn from a generator of its own, so that it depends neither on the batch it stands in nor on the
    process that computes it, and a resumed run draws what the uninterrupted one drew.

    Args:
        lengths: the rows' true lengths L.
        width: hidden size.
        tokens: padded length.
        seeds: one for every row.

    Returns:
        `(batch, tokens, hidden)` float32.
    """
    noise = torch.zeros(len(lengths), tokens, width, device=device)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator = torch.Generator(device=device).manual_seed(seed)
        drawn = torch.rand(length, width, generator=generator, device=device)
        noise[row, :length] = (drawn - 0.5) * (NOISE_WIDTH * NOISE_LENGTH / length)
    return noise
