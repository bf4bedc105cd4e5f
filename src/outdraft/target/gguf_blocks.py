"""The quantised weights of a GGUF file as our kernels multiply with them, kept beside the folder that is made of it.

The matrices of a file have other names than a model's, and some architectures' rows another order. So every linear
layer is found by its rows' numbers: whatever name and order `transformers` gave them, a match is proved.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from outdraft.errors import UserError, first_line
from outdraft.target.backends.native.weights import GROUP, Blocks, quantised, store

FOLDER, SUFFIX = "outdraft_blocks", ".blocks"
"""Folder in a model's own, and ending of its files, one of each layer: no tool takes them for parts of the model."""
WHOLE = {"F32", "F16", "BF16", "F64"}
"""Kinds that are not quantised; such weights stay as they are."""
KEPT = {"Q4_0", "Q4_1", "Q8_0"}
"""Kinds whose blocks are kept bit for bit."""
ROWS = 1024
"""Rows of a matrix that are dequantised at once."""


def told(kinds: str) -> str:
    """Return what becomes of weights of these kinds, joined by " and "; empty if none is quantised."""
    fates: dict[str, list[str]] = {"as they are": [], "with scales rounded to float16": [], "rounded to 8 bits": []}
    exact, nearly, rounded = fates.values()
    for kind in kinds.split(" and "):
        if kind not in WHOLE:
            (exact if kind in KEPT else nearly if kind == "Q4_K" else rounded).append(kind)
    return ", ".join(f"{' and '.join(own)} {fate}" for fate, own in fates.items() if own)


def write_blocks(file: Path, model: nn.Module, folder: Path) -> None:
    """Write the blocks of a model's linear layers; there is one matrix in memory at a time.

    Args:
        model: the model of the file, its weights rounded to bfloat16.
        folder: gets `FOLDER`, if a layer is quantised in the file.
    """
    import gguf

    keys = {name: _keys(part.weight) for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    names: dict[bytes, list[str]] = defaultdict(list)  # layers may be equal
    for name, own in keys.items():
        names[_any_order(own)].append(name)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in WHOLE or len(tensor.shape) != 2 or tensor.shape[0] % GROUP:
            continue
        found, blocks = _matrix(tensor.data, tensor.tensor_type)
        # There is no name for an embedding without a head, or for parts that the model has in another form.
        for name in names.pop(_any_order(found), ()):
            order = np.empty(len(found), dtype=np.int64)
            order[np.argsort(keys[name], kind="stable")] = np.argsort(found, kind="stable")
            (folder / FOLDER).mkdir(exist_ok=True)
            save_file(_packed(blocks, torch.from_numpy(order)), folder / FOLDER / f"{name}{SUFFIX}")


def refuse_without_blocks(folder: str | Path) -> None:
    """Raise a UserError if a model's folder does not come from a GGUF file with quantised weights."""
    if not (Path(folder) / FOLDER).is_dir():
        raise UserError(
            "quantize=gguf takes the quantised weights of a GGUF file, and this model comes from none with quantised "
            "weights; give such a file, or quantize int8 or int4"
        )


def store_blocks(model: nn.Module, folder: str | Path) -> None:
    """Give a model's weights the blocks of its folder, for a view on them, which reads one layer's at a time."""
    for name, part in model.named_modules():
        file = Path(folder) / FOLDER / f"{name}{SUFFIX}"
        if isinstance(part, nn.Linear) and file.exists():
            store(part.weight, partial(_read, file))


def _packed(blocks: Blocks, order: Tensor) -> dict[str, Tensor]:
    """Return the rows of blocks in this order as tensors of a file, two numbers of four bits in a byte."""
    numbers = blocks.numbers[order].view(torch.uint8)
    if blocks.offsets is None:
        return {"numbers": numbers, "scales": blocks.scales[order]}
    both = numbers[:, ::2] | numbers[:, 1::2] << 4
    return {"numbers": both, "scales": blocks.scales[order], "offsets": blocks.offsets[order]}


def _read(file: Path) -> Blocks:
    try:
        kept = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{file}' is damaged ({first_line(error)}); delete '{file.parents[1]}'") from error
    numbers, offsets = kept["numbers"], kept.get("offsets")
    if offsets is not None:
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)
    return Blocks(numbers.view(torch.int8), kept["scales"], offsets)


def _matrix(data: np.ndarray, kind: Any) -> tuple[np.ndarray, Blocks]:
    """Return the keys of a matrix's rows, and its blocks.

    Args:
        data: `(outputs, bytes)`.
        kind: its `GGMLQuantizationType`.
    """
    import gguf

    keys, blocks = [], []
    for begin in range(0, len(data), ROWS):
        part = np.ascontiguousarray(data[begin : begin + ROWS])
        dense = torch.from_numpy(gguf.dequantize(part, kind))
        keys.append(_keys(dense))
        blocks.append(blocks_of(part, kind.name) or quantised(dense, 8))
    return np.concatenate(keys), Blocks.joined(blocks)


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


def _keys(weight: Tensor) -> np.ndarray:
    """Return a number for every row, equal for rows that are equal in bfloat16."""
    parts = (part.detach().bfloat16() + 0.0 for part in weight.split(ROWS))  # there is a zero with a minus sign
    rows = (row for part in parts for row in part.view(torch.int16).numpy())
    return np.fromiter((hash(row.tobytes()) for row in rows), np.int64, len(weight))


def _any_order(keys: np.ndarray) -> bytes:
    return np.sort(keys).tobytes()
