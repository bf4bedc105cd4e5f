"""Matrices in the layout of our CPU kernels, of 16, 8 or 4 bits, and linear layers on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.target.backends.native.build import kernels
from outdraft.target.backends.packed import PackedLinear
from outdraft.target.huge_pages import ARENA

TYPES = (torch.float32, torch.bfloat16)
GROUP = 32
"""Inputs of a quantised matrix that share a scale."""
PANELS = 128
"""Panels that are multiplied out at once, in single precision."""
STORED = "outdraft_blocks"
"""Attribute of a weight whose file has it in blocks: what reads them."""


@dataclass
class Blocks:
    """A matrix of whole numbers, each times the scale of its group of `GROUP` inputs plus the group's offset.

    Attributes:
        numbers: `(outputs, inputs)` int8, -127 ... 127 of eight bits or 0 ... 15 of four.
        scales: `(outputs, groups)` float16.
        offsets: `(outputs, groups)` float16 of four bits; None of eight.
    """

    numbers: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 if self.offsets is None else 4

    def dense(self) -> Tensor:
        """Return the `(outputs, inputs)` float32 matrix."""
        groups = self.numbers.unflatten(1, (-1, GROUP)) * self.scales.float()[..., None]
        return (groups if self.offsets is None else groups + self.offsets.float()[..., None]).flatten(1)

    def laid_out(self, order: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
        """Return numbers and scales, their outputs in this order, in panels as weights.h reads them."""

        def panels(part: Tensor) -> Tensor:
            padded = part.new_zeros(-(-len(order) // lanes) * lanes, part.shape[1])
            padded[: len(order)] = part[order]
            return padded.view(-1, lanes, part.shape[1])

        kept = [panels(part) for part in (self.scales, self.offsets) if part is not None]
        return blocked(panels(self.numbers), self.bits), torch.stack(kept, dim=1).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def joined(parts: Sequence[Blocks]) -> Blocks:
        """Return the matrix of several below each other; four bits beside eight are rounded to eight."""
        if len({part.bits for part in parts}) > 1:
            parts = [part if part.bits == 8 else quantised(part.dense(), 8) for part in parts]
        offsets = [part.offsets for part in parts if part.offsets is not None]
        numbers, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("numbers", "scales"))
        return Blocks(numbers, scales, torch.cat(offsets) if offsets else None)


class CWeight(Structure):
    """`Weight` of weights.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("lines", "scales", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "bits")),
    ]


class Weight:
    """A matrix in the kernels' layout.

    Args:
        weight: `(outputs, inputs)` float32 or bfloat16; an even number of inputs.
        bias: `(outputs,)` or None.
        gated: True if the first half of the outputs are gates of the second; each a multiple of `LANES`.
        bits: 8 or 4 quantises the weight, a multiple of `GROUP` inputs; None keeps it.
        blocks: what the weight stands for, in place of it and of `bits`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        gated: bool = False,
        bits: int | None = None,
        blocks: Blocks | None = None,
    ):
        weight = weight.detach()
        blocks = quantised(weight, bits) if blocks is None and bits is not None else blocks
        self.outputs, self.inputs = weight.shape
        self.dtype, self.half = weight.dtype, int(weight.dtype == torch.bfloat16)
        self.bits = None if blocks is None else blocks.bits
        order, lanes = torch.arange(self.outputs), kernels().outdraft_lanes()
        if gated:  # panels of gates and of gated values in turn
            order = order.view(2, -1, lanes).transpose(0, 1).flatten()
        self._order, self.scales = order, None
        if blocks is None:
            padded = weight.new_zeros(-(-self.outputs // lanes) * lanes, self.inputs)
            padded[: self.outputs] = weight[order]
            words = padded.view(-1, lanes, self.inputs).unflatten(2, (-1, 1 + self.half)).transpose(1, 2).contiguous()
            self.lines = ARENA.settled(words).view(torch.int32)
        else:
            self.lines, self.scales = map(ARENA.settled, blocks.laid_out(order, lanes))
        self.bias = None if bias is None else bias.detach().float()[order].contiguous()
        kept = (self.lines, self.scales, self.bias)
        self.struct = CWeight(
            *(None if part is None else part.data_ptr() for part in kept), *weight.shape, self.bits or 0
        )
        self._at = byref(self.struct)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return `(..., outputs)` products of `(..., inputs)`, plus `added`."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        beside = None if added is None else added.contiguous()
        kernels().outdraft_linear(
            self.half, torch.get_num_threads(), self._at, c_void_p(x.data_ptr()), c_int64(x.numel() // self.inputs),
            c_void_p(out.data_ptr()), None if beside is None else c_void_p(beside.data_ptr()),
        )  # fmt: skip
        return out

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in (self.lines, self.scales, self.bias) if part is not None)

    def dense(self) -> Tensor:
        """Return the `(outputs, inputs)` matrix that the kernels multiply with."""
        if self.scales is None:
            panels = self.lines.view(self.dtype).view(*self.lines.shape[:3], -1).transpose(1, 2)
        else:
            few = zip(self.lines.split(PANELS), self.scales.split(PANELS), strict=True)
            panels = torch.cat([self._product(*part).to(self.dtype) for part in few])
        rows = panels.reshape(-1, self.inputs)[: self.outputs]
        return torch.empty_like(rows).index_copy_(0, self._order, rows)

    def _product(self, lines: Tensor, scales: Tensor) -> Tensor:
        """Return panels of quantised numbers in single precision."""
        numbers = unblocked(lines, self.bits or 0).unflatten(2, (-1, GROUP))
        scale, *offset = (part.transpose(1, 2)[..., None].float() for part in scales.unbind(2))
        return numbers * scale + (offset[0] if offset else 0)


def quantised(weight: Tensor, bits: int) -> Blocks:
    """Quantise a matrix: eight bits to -127 ... 127 with a scale, four to 0 ... 15 with an offset too.

    Args:
        weight: `(outputs, inputs)`.
        bits: 8 or 4.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    most = 127 if bits == 8 else 15
    offset = torch.zeros(()) if bits == 8 else groups.amin(2).half().float()
    reach = groups.abs().amax(2) if bits == 8 else groups.amax(2) - offset
    scale = (reach / most).half()
    # A scale that was rounded down becomes the next larger one, so that the largest weight is not cut.
    scale = torch.where(scale.float() * most < reach, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    numbers = (groups - offset[..., None]) / scale.float().clamp(min=1e-30)[..., None]
    whole = numbers.round().clamp(-127 if bits == 8 else 0, most).to(torch.int8)
    return Blocks(whole.flatten(1), scale, None if bits == 8 else offset.half())


def blocked(numbers: Tensor, bits: int) -> Tensor:
    """Arrange `(panels, LANES, inputs)` whole numbers in lines as weights.h reads them."""
    if bits == 8:
        parts = (numbers.view(torch.uint8) ^ 128).unflatten(2, (-1, 4))
    else:
        halves = numbers.view(torch.uint8).unflatten(2, (-1, 2, 4))
        parts = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    return parts.transpose(1, 2).contiguous()


def unblocked(lines: Tensor, bits: int) -> Tensor:
    """Return the `(panels, LANES, inputs)` whole numbers of `blocked`."""
    parts = lines.transpose(1, 2)
    parts = parts ^ 128 if bits == 8 else torch.stack([parts & 15, parts >> 4], dim=3)
    return parts.flatten(2).contiguous().view(torch.int8)


class NativeLinear(PackedLinear):
    """A linear layer with our kernels' layout of its weight; inference only.

    Args:
        weight: `(out, in)`, an even number of inputs.
        bias: `(out,)` or None.
        bits, blocks: as in `Weight`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int | None = None, blocks: Blocks | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self._packed = Weight(weight, bias, bits=bits, blocks=blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self._packed(x)

    def dense(self) -> Tensor:
        return self._packed.dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight that a forward reads."""
        return self._packed.nbytes


def draft_bits(weight: Tensor) -> int | None:
    """Return the bits of a drafter's weight: eight beside a target in 16 bits. Only the target decides tokens, and
    half the bytes are half the time."""
    return 8 if weight.dtype == torch.bfloat16 and weight.shape[1] % GROUP == 0 else None


def linear(weight: Tensor, bias: Tensor | None, narrow: bool = False) -> PackedLinear:
    """Return a layer on our kernels, `narrow` with the bits of `draft_bits`; on oneDNN's where they do not serve its
    shape."""
    if weight.shape[1] % 2 or weight.dtype not in TYPES:
        return PackedLinear(weight, bias)
    return NativeLinear(weight, bias, draft_bits(weight) if narrow else None)


Quantise = Callable[[Sequence[Tensor]], Blocks | None]
"""Makes one matrix of those of several layers below each other; None leaves them as they are."""


def rounding(bits: int) -> Quantise:
    """Return what rounds weights to 8 or 4 bits."""
    return lambda parts: quantised(torch.cat([part.detach() for part in parts]), bits)


def stored(parts: Sequence[Tensor]) -> Blocks | None:
    """Take the blocks that `store` gave to the layers' weights; None if one has none."""
    found = [vars(part).pop(STORED, None) for part in parts]
    return None if None in found else Blocks.joined([read() for read in found])


def store(weight: Tensor, read: Callable[[], Blocks]) -> None:
    """Give a weight what reads the blocks of the file that it comes from."""
    setattr(weight, STORED, read)


def quantised_linear(weight: Tensor, bias: Tensor | None, quantise: Quantise) -> PackedLinear:
    """Return a quantised layer; the weight becomes that of the layer."""
    blocks = quantise([weight])
    if blocks is None:
        return linear(weight, bias)
    made = NativeLinear(weight, bias, blocks=blocks)
    weight.data.copy_(made.dense())
    return made


# --- stock layers whose weights lie in the kernels' layout alone, so that a model takes its memory once ---------------


STAYS = 8
"""Readings after which a weight stays laid out, as something else than our kernels seems to run the layer."""


class ReleasedLinear(nn.Linear):
    """A stock linear layer without a weight of its own: whoever reads the weight gets it laid out anew.

    `release` makes it of a plain layer, which it becomes again after `STAYS` readings, and before it is copied, moved
    or loaded into. Its parameter is on the device `meta`.
    """

    _packed: tuple[Weight, slice]
    _readings: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        packed, rows = self._packed
        shown = self._parameters["weight"]
        assert shown is not None
        with torch.inference_mode(False), torch.no_grad():
            laid_out = packed.dense()[rows].clone() if packed.outputs > self.out_features else packed.dense()
        found = nn.Parameter(laid_out, requires_grad=shown.requires_grad)
        self._readings += 1
        if self._readings >= STAYS:
            self._keep(found)
        return found

    def restore(self) -> None:
        """Make the layer plain again."""
        self._keep(self.weight)

    def _keep(self, weight: Any) -> None:
        if type(self) is ReleasedLinear:
            del self._packed, self._readings
            self.__class__ = nn.Linear  # type: ignore[assignment]
            self._parameters["weight"] = weight

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.restore()
        return nn.Linear._apply(self, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        nn.Linear._load_from_state_dict(self, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.restore()
        return nn.Linear.__reduce_ex__(self, protocol)


def release(layers: Sequence[nn.Linear], packed: Weight) -> None:
    """Take the weights of plain layers away, which lie one below the other in `packed`."""
    begin = 0
    for layer in layers:
        shown = torch.empty_like(layer.weight, device="meta")
        layer._parameters["weight"] = nn.Parameter(shown, requires_grad=layer.weight.requires_grad)
        layer.__class__ = ReleasedLinear
        layer._packed, layer._readings = (packed, slice(begin, begin + layer.out_features)), 0  # type: ignore[assignment]
        begin += layer.out_features
