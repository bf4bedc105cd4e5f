"""The protocol that a target keeps for training: `outdraft.target.Target` does, and so do the tests' stand-ins."""

from __future__ import annotations

from typing import Any, Protocol

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
        """Its tokenizer."""

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

    def embed(self, ids: Tensor) -> Tensor:
        """`(batch, tokens)` ids -> `(batch, tokens, hidden)` input embeddings."""

    def head(self, features: Tensor) -> Tensor:
        """`(..., hidden)` post-final-norm features -> `(..., vocab)` logits, differentiable in the features."""

    def features(self, input_ids: Tensor, mask: Tensor | None = None, /) -> Tensor:
        """`(batch, tokens)` ids -> `(batch, tokens, hidden)` features after the final norm, one causal forward."""


def parameter_count(target: TargetLike) -> int:
    """Parameters of the target, tied ones once."""
    return sum(parameter.numel() for parameter in target.model.parameters())


def target_id(target: TargetLike) -> str:
    """The hub name or folder the target was loaded from; its class name when it was built in memory."""
    return str(getattr(target.model.config, "_name_or_path", "") or type(target.model).__name__)


def shown_target(target: TargetLike) -> str:
    """The target's id for files that are handed on: a folder elsewhere on this machine shows its name alone."""
    return str(portable(target_id(target)))
