"""Nucleus sampling (`top_p`, arXiv 1904.09751) without sorting the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import generation as hf

NEAR = 64
"""Distance of a sum of probabilities from the threshold, in units of the dtype's rounding, within which the order of
summation might decide."""


class TopP(hf.TopPLogitsWarper):
    """The warper of `transformers`, with the same result bit for bit; on a CPU it takes a tenth of the time or less.

    Tokens of which all together could not reach the threshold are left out, and the few others are sorted. Where equal
    logits lie on both sides of the nucleus' edge, or rounding might move it, the whole row is sorted as `transformers`
    does, since its sort alone decides which of the equal ones stay.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu" or self.min_tokens_to_keep > 1:
            return super().__call__(input_ids, scores)
        return torch.cat([self._warped(input_ids, row) for row in scores.split(1)])

    def _warped(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Warp `(1, vocab)` scores."""
        least = self._least(scores[0])
        if least is None:
            return super().__call__(input_ids, scores)
        return scores.masked_fill(scores < least, self.filter_value)

    def _least(self, scores: Tensor) -> Tensor | None:
        """Return the smallest of `(vocab,)` scores that is in the nucleus; None if that takes a sort of all."""
        probs, removed = scores.softmax(-1), 1 - self.top_p
        able = (probs >= removed / len(probs)).nonzero()[:, 0]
        if not len(able):  # NaN
            return None
        best, order = scores[able].sort(descending=True)
        own = probs[able[order]].double()
        # The mass of every token and of those below it, which decides.
        up_to = probs.sum(dtype=torch.float64) - (own.cumsum(0) - own)
        if bool((up_to - removed).abs().min() < NEAR * torch.finfo(scores.dtype).eps):
            return None
        count = max(1, int((up_to > removed).sum()))
        if count < len(best) and bool(best[count] == best[count - 1]):
            return None
        return best[count - 1]
