"""The quantised weights of a GGUF file as our kernels multiply with them, kept beside the folder that is made of it.

The matrices of a file have other names than a model's, and some architectures' rows another order. So every linear
layer is found by its rows' numbers: whatever name and order `transformers` gave them, a match is proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from outdraft.errors import UserError
from outdraft.target.backends.native.weights import GROUP, Blocks, quantised, store

FILE = "outdraft_blocks.safetensors"
"""Name of the blocks in the folder."""
WHOLE = {"F32", "F16", "BF16", "F64"}
"""Kinds that are not quantised; such weights stay as they are."""


def find_blocks(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the blocks of a model's linear layers as `FILE` holds them.

    Args:
        file: the GGUF file.
        model: the model of the file, its weights as float32.
    """
    import gguf

    layers = {name: part.weight for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    keys = {name: _rows(weight.detach().numpy()) for name, weight in layers.items()}
    names = {_any_order(rows): name for name, rows in keys.items()}
    kept: dict[str, Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        if kind in WHOLE or len(tensor.shape) != 2 or tensor.shape[0] % GROUP:
            continue
        rows = _rows(gguf.dequantize(tensor.data, tensor.tensor_type))
        name = names.get(_any_order(rows))
        if name is None:  # an embedding without a head, or parts that the model has in another form
            continue
        places = {row: i for i, row in enumerate(rows)}
        order = torch.tensor([places[row] for row in keys[name]])
        blocks = blocks_of(np.ascontiguousarray(tensor.data), kind)
        if blocks is None:
            blocks = quantised(layers[name].detach(), 8)
        else:
            offsets = None if blocks.offsets is None else blocks.offsets[order]
            blocks = Blocks(blocks.numbers[order], blocks.scales[order], offsets)
        numbers = blocks.numbers.view(torch.uint8)
        if blocks.offsets is not None:
            numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
            kept[f"{name}.offsets"] = blocks.offsets
        kept |= {f"{name}.numbers": numbers, f"{name}.scales": blocks.scales}
    return kept


def store_blocks(model: nn.Module, folder: str | Path) -> None:
    """Give a model's weights the blocks of its folder, for a view on them.

    Raises:
        UserError: the model does not come from a GGUF file with quantised weights.
    """
    file = Path(folder) / FILE
    if not file.exists():
        raise UserError(
            "quantize=gguf takes the weights of a GGUF file as they are, and this model comes from none with quantised "
            "weights; give such a file, or quantize int8 or int4"
        )
    kept = load_file(file)
    for name, part in model.named_modules():
        if f"{name}.numbers" in kept and isinstance(part, nn.Linear):
            numbers, offsets = kept[f"{name}.numbers"], kept.get(f"{name}.offsets")
            if offsets is not None:
                numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)
            store(part.weight, Blocks(numbers.view(torch.int8), kept[f"{name}.scales"], offsets))


def blocks_of(rows: np.ndarray, kind: str) -> Blocks | None:
    """Return the blocks of a matrix as they are in a file; None if our kernels have none of this kind.

    Scales and offsets of Q4_K are products of two numbers, which are rounded to float16.

    Args:
        rows: `(outputs, bytes)`.
        kind: a name of `GGMLQuantizationType`.
    """
    if kind == "Q8_0":
        found = _split(rows, 34)
        whole = found[:, :, 2:].view(np.int8)
        if (whole == -128).any():  # which our kernels do not have
            return None
        return Blocks(_tensor(whole), _halves(found[:, :, :2]))
    if kind in ("Q4_0", "Q4_1"):
        found = _split(rows, 18 if kind == "Q4_0" else 20)
        scales = _halves(found[:, :, :2])
        offsets = scales * -8 if kind == "Q4_0" else _halves(found[:, :, 2:4])
        return Blocks(_nibbles(found[:, :, -16:]), scales, offsets)
    if kind == "Q4_K":
        found = _split(rows, 144)
        d, least = (_halves(found[:, :, i : i + 2]).float()[..., None] for i in (0, 2))
        packed = torch.from_numpy(found[:, :, 4:16].astype(np.int32)).unflatten(2, (3, 4))
        low, high, both = packed.unbind(2)
        scales = torch.cat([low & 63, both & 15 | low >> 6 << 4], dim=2)
        offsets = torch.cat([high & 63, both >> 4 | high >> 6 << 4], dim=2)
        numbers = _nibbles(found[:, :, 16:].reshape(*found.shape[:2], 4, 32))
        return Blocks(numbers, (d * scales).half().flatten(1), (-least * offsets).half().flatten(1))
    return None


def _split(rows: np.ndarray, size: int) -> np.ndarray:
    """Return `(outputs, blocks, size)` bytes."""
    return rows.reshape(len(rows), -1, size)


def _halves(pairs: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pairs).view(np.float16)[..., 0].copy())


def _nibbles(halves: np.ndarray) -> Tensor:
    """Return `(outputs, inputs)` numbers of bytes whose lower halves come first, then their upper ones."""
    both = np.stack([halves & 15, halves >> 4], axis=-2)
    return _tensor(both.view(np.int8))


def _tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers).reshape(len(numbers), -1))


def _rows(weight: np.ndarray) -> list[int]:
    """Return a number for every row, equal for equal rows."""
    return [hash((row + 0.0).tobytes()) for row in weight]  # + 0.0: there is a zero with a minus sign


def _any_order(rows: Sequence[int]) -> Any:
    return hash(tuple(sorted(rows)))
