"""Accelerations of the same forward, by name.

`eager` is the model as it is. `packed` (CPU) keeps every linear layer's weight in oneDNN's own blocked layout, which
makes a pass over few tokens several times cheaper than reading plain rows; stock modules stay around it. The choice
never changes what is computed, only how; plain decoding is always timed on the same backend. Knows nothing of drafting.
"""

from __future__ import annotations

import copy
import warnings
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from outdraft.errors import UserError

Backend = Literal["eager", "packed"]
BACKENDS = ("eager", "packed")
PACKABLE = (torch.bfloat16, torch.float32)

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's layout; inference only.

    Args:
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Not a buffer: an opaque tensor can neither be cast nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def accelerate(model: Model, backend: str) -> Model:
    """The model on this backend: itself, or a view that shares everything but what the backend replaces.

    Raises:
        UserError: no such backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return model
    reason = why_not_packed(model)
    if reason is not None:
        warnings.warn(f"backend 'packed' cannot serve this model ({reason}); using 'eager'", stacklevel=2)
        return model
    return _packed_view(model)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model on any backend; packed weights are counted like any other."""
    packed = (module for module in model.modules() if isinstance(module, PackedLinear))
    kept = sum(parameter.numel() for parameter in model.parameters())
    return kept + sum(module.in_features * module.out_features for module in packed)


def why_not_packed(model: nn.Module) -> str | None:
    """What stands in the way of packing, None if nothing does."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return "it lies on " + weight.device.type
    if weight.dtype not in PACKABLE:
        return f"{weight.dtype} is not packed"
    if not _packs(weight.dtype):
        return f"oneDNN has no linear layers in {weight.dtype} here"
    if getattr(model, "hf_quantizer", None) is not None or hasattr(model, "_hf_hook"):
        return "it is quantised or spread over devices"
    if getattr(model, "peft_config", None):
        return "it has adapters; merge them first"
    return None


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """`packed` where it can serve, else `eager`."""
    return "packed" if device.type == "cpu" and dtype in PACKABLE and _packs(dtype) else "eager"


def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN and, for bfloat16, the processor what its kernels need."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _packed_view(module: Model) -> Model:
    """A shallow copy of the module tree in which every linear layer is packed; the original stays as it is."""
    view = copy.copy(module)
    view._modules = {name: _packed(child) for name, child in module._modules.items()}
    return view


def _packed(module: nn.Module | None) -> nn.Module | None:
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, Conv1D):
        return PackedLinear(module.weight.T, module.bias)
    return None if module is None else _packed_view(module)
