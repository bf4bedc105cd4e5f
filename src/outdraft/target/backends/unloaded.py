"""Models by their configurations alone, so that a backend says before anything is loaded that it cannot serve one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from outdraft.target.backends import refuse_unquantisable


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


def refuse_before_loading(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, backend: str
) -> None:
    """Raise the UserError of a backend that cannot quantise a model, as far as is known before it is loaded."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = unloaded(config, dtype, device, trust_remote_code=trust_remote_code)
    except Exception:  # of any library; loading the model tells the user
        return
    refuse_unquantisable(model, backend)
