"""The target as training sees it: the protocol that `outdraft.target.Target` and stand-ins fulfil, and its most
probable next tokens.

Against these a drafter is trained without the target's head: a few dozen probabilities hold nearly all of the mass, and
the rest carries no loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from outdraft.data.provenance import portable


class TargetLike(Protocol):
    """A frozen causal language model as training sees it."""

    @property
    def model(self) -> Any:
        """The stock `transformers` causal language model."""

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def causal_inputs(self, rows: int, tokens: int) -> dict[str, Any]:
        """Return the inner model's inputs, beside tokens, of a causal forward whose cache nobody reads later."""

    def embed(self, ids: Tensor) -> Tensor:
        """Map `(batch, tokens)` ids to `(batch, tokens, hidden)` input embeddings."""

    def head(self, features: Tensor) -> Tensor:
        """Map `(..., hidden)` features after the final norm to `(..., vocab)` logits, differentiably."""

    def features(self, input_ids: Tensor, mask: Tensor | None = None, /) -> Tensor:
        """Map `(batch, tokens)` ids to `(batch, tokens, hidden)` features after the final norm, causally."""


def parameter_count(target: TargetLike) -> int:
    """Count the parameters of the target, tied ones once."""
    return sum(parameter.numel() for parameter in target.model.parameters())


def target_id(target: TargetLike) -> str:
    """Return the hub name or folder of the target; its class name when it was built in memory."""
    return str(getattr(target.model.config, "_name_or_path", "") or type(target.model).__name__)


def shown_target(target: TargetLike) -> str:
    """Return the target's id for published files: a folder elsewhere on this machine shows its name alone."""
    return str(portable(target_id(target)))


HEAD_ROWS = 512
"""The default number of positions whose logits are held at once."""

LOGARITHM_ROWS = 32
"""The number of positions whose logits become float32 at once: these fit a processor's cache, four times as fast."""


class TopProbs(NamedTuple):
    """The most probable tokens of every position, best first."""

    ids: Tensor
    """The `(positions, k)` token ids, int64."""
    probs: Tensor
    """The `(positions, k)` probabilities at temperature 1 over the whole vocabulary: a row sums to at most 1."""


def top_probs(logits: Tensor, k: int) -> TopProbs:
    """Return the `k` most probable tokens by `(positions, vocab)` logits."""
    best = logits.topk(k, dim=-1)
    whole = torch.cat([rows.float().logsumexp(dim=-1, keepdim=True) for rows in logits.split(LOGARITHM_ROWS)])
    return TopProbs(best.indices, (best.values.float() - whole).exp())


@torch.no_grad()
def most_probable(target: TargetLike, goal: Tensor, k: int, rows: int = HEAD_ROWS) -> TopProbs:
    """Return the target's most probable tokens for given features.

    Args:
        goal: `(positions, hidden)` features after the final norm.
        k: tokens of every position; all where the vocabulary has fewer.
        rows: positions whose logits are held at once.
    """
    with torch.autocast(goal.device.type, enabled=False):
        pieces = [top_probs(target.head(piece), min(k, target.vocab_size)) for piece in goal.split(rows)]
    return TopProbs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def predicting(loss_mask: Tensor) -> Tensor:
    """Map the `(..., tokens)` mask of response tokens to the `(..., tokens - 1)` mask of positions that predict one."""
    return loss_mask[..., 1:].bool()


def within(said: TopProbs, indices: Tensor) -> TopProbs:
    """Translate most probable tokens to a reduced draft vocabulary.

    Args:
        said: tokens of the whole vocabulary.
        indices: `(vocab,)` indices of tokens in the draft vocabulary, -1 where it lacks one.

    Returns:
        Ids of the draft vocabulary; a token outside it has id -1 and probability 0.
    """
    ids = indices[said.ids]
    return TopProbs(ids, said.probs.masked_fill(ids < 0, 0.0))
