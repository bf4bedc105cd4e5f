"""The protocol of a target in training, which `outdraft.target.Target` and the tests' stand-ins fulfil."""

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
