"""Weights as int8 rows with a scale each, half the size of bfloat16, for files that ship inside the package."""

from __future__ import annotations

import torch
from torch import Tensor

PACKED = "model.int8.safetensors"
"""The name of the file of packed weights in a folder of a model or a drafter."""

SCALE = ".scale"


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to symmetric int8 rows with scales; of a few clipping points, each row takes that of least squared
    error."""
    weight = weight.float()
    peak = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, least = peak / 127, torch.full_like(peak, torch.inf)
    for clip in torch.linspace(0.7, 1.0, 13).tolist():
        scale = clip * peak / 127
        rounded = (weight / scale).round().clamp(-127, 127) * scale
        error = (rounded - weight).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return (weight / best).round().clamp(-127, 127).to(torch.int8), best.squeeze(1)


def dequantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """Return the bfloat16 matrix that packed rows stand for."""
    return (rows.float() * scale.float()[:, None]).to(torch.bfloat16)


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack a state: matrices become int8 rows and a scale vector, other floats bfloat16; integers stay."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            packed[name], packed[name + SCALE] = quantize_rows(tensor)
        else:
            packed[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the bfloat16 state that a packed state stands for."""
    return {
        name: dequantize_rows(tensor, packed[name + SCALE]) if tensor.dtype == torch.int8 else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }
