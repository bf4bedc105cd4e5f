"""Models by their configurations alone, so that a backend says before anything is loaded that it cannot serve one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def unloaded(config: Any, dtype: torch.dtype, device: str | torch.device = "cpu", **options: Any) -> Any:
    """Build a model with random weights that take no memory: their rows are windows of one row of numbers.

    Args:
        config: its configuration.
        dtype, device: of its weights.
        **options: more for `from_config`.
    """
    dice = torch.Generator().manual_seed(0)

    def filled(part: Tensor) -> Tensor:
        numbers = torch.randn(sum(part.shape) + 1, generator=dice) * (0.02 if part.ndim > 1 else 1)
        return numbers.to(device, part.dtype).as_strided(part.shape, [1] * part.ndim)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model._apply(filled).eval()
