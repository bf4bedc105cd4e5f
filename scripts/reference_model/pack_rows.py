"""Packs weights as int8 rows with a float32 scale each; `outdraft.reference` reads them back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from outdraft.reference import COMPANIONS, PACKED, SCALE, UNPACKED


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


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack a state: matrices become int8 rows and a scale vector, other floats bfloat16; integers stay."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            packed[name], packed[name + SCALE] = quantize_rows(tensor)
        else:
            packed[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def pack_folder(source: Path, destination: Path) -> None:
    """Pack the Hugging Face folder ``source`` into ``destination``."""
    destination.mkdir(parents=True, exist_ok=True)
    save_file(pack(load_file(source / UNPACKED)), destination / PACKED, metadata={"format": "pt"})
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)
    settings = json.loads((destination / "config.json").read_text())
    settings["dtype"] = "bfloat16"
    (destination / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
