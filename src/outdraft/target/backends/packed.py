"""Linear layers on a CPU whose weights have oneDNN's own layout.

Shallow views of models hold them instead of plain layers, and fused replacements (`fused.py`) instead of the modules
around them; the original stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from outdraft.target.backends.fused import Doubles, hooked
from outdraft.target.ranks import whole, whole_weight

PACKABLE = (torch.bfloat16, torch.float32)

UNITS = 256
"""Unit vectors that a quantised layer runs over at once."""

Model = TypeVar("Model", bound=nn.Module)

_product: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


class PackedLinear(nn.Module):
    """A linear layer whose weight has oneDNN's layout; inference only.

    Args:
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Some families' code asks for its type or shape (a router that computes in its weight's precision).
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        # Not a buffer: an opaque tensor can neither be cast nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._packed, self.bias, "none", [], "")

    def dense(self) -> Tensor:
        """Return the `(out, in)` weight."""
        return self._packed.to_dense()


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model on any backend; packed weights count like any other, and once."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    beside = {id(parameter) for module in packed for name, parameter in module._parameters.items() if name != "bias"}
    kept = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in beside)
    return kept + sum(module.in_features * module.out_features for module in packed)


def why_not_packed(model: nn.Module) -> str | None:
    """Return why this model cannot be packed, None if it can."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return "it lies on " + weight.device.type
    if weight.dtype not in PACKABLE:
        return f"{weight.dtype} is not packed"
    if not packs(weight.dtype):
        return f"oneDNN has no linear layers in {weight.dtype} here"
    return why_not_replaced(model)


def why_not_replaced(model: nn.Module) -> str | None:
    """Return why a model's modules cannot be replaced, None if they can."""
    if hasattr(model, "_hf_hook"):
        return "it is spread over devices"
    if any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        return "processes share its layers"
    if getattr(model, "hf_quantizer", None) is not None or quantised_part(model) is not None:
        return "it is quantised"
    if getattr(model, "peft_config", None) or any("base_layer" in module._modules for module in model.modules()):
        return "it has adapters; merge them first"
    if any("_orig_mod" in module._modules for module in model.modules()):
        return "parts of it are compiled already"
    if any(is_parametrized(module) for module in model.modules()):
        return "it has parametrized weights; make them plain with torch.nn.utils.parametrize.remove_parametrizations"
    return None


def quantised_part(model: nn.Module) -> str | None:
    """Return the name of a module whose weights are not plain floating-point numbers, None if there is none."""
    for name, module in model.named_modules():
        own = [tensor for tensor in module._parameters.values() if tensor is not None]
        # Layers that keep their weight in a form of their own still say what shape it stands for.
        if is_linear(module) and not isinstance(module, PackedLinear):
            own.append(getattr(module, "weight", None))
        if not all(is_plain(tensor) for tensor in own):
            return name
    return None


def is_plain(weight: Any) -> bool:
    """Return True for a tensor of plain floating-point numbers, which can be read and copied as what they stand for."""
    if type(weight) not in (nn.Parameter, Tensor):  # libraries keep packed numbers in kinds of tensors of their own
        return False
    return weight.is_floating_point() and weight.element_size() >= 2


def packs(dtype: torch.dtype) -> bool:
    """Return True if this build of torch has oneDNN and, for bfloat16, the processor supports its kernels."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_view(
    model: Model, linear: Callable[..., PackedLinear] = PackedLinear, doubles: Doubles | None = None
) -> Model:
    """Return a shallow copy of the module tree in which linear layers without hooks are packed; the original stays as
    it is.

    Norms, MLPs and attentions that have a fused replacement (`fused.py`) are replaced by it.

    Args:
        linear: makes a packed layer of `(out, in)` weight and bias.
        doubles: makes the replacements of other modules.
    """
    return _view(model, linear, doubles or Doubles(linear))


def _view(model: Model, linear: Callable[..., PackedLinear], doubles: Doubles) -> Model:
    view: Any = copy.copy(model)
    view._modules = {name: _packed(child, linear, doubles) for name, child in model._modules.items()}
    return view


def _packed(module: nn.Module | None, linear: Callable[..., PackedLinear], doubles: Doubles) -> nn.Module | None:
    if module is None or isinstance(module, PackedLinear):
        return module
    if type(module) is nn.Linear and not hooked(module):
        return linear(module.weight, module.bias)
    if isinstance(module, Conv1D) and not hooked(module):
        return linear(module.weight.T, module.bias)
    double = doubles.double(module)
    return _view(module, linear, doubles) if double is None else double


def is_linear(module: Any) -> bool:
    """Return True for linear layers of any library: they say their width, whatever they keep their weight in."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


@torch.no_grad()
def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight `(out, in)` and bias of a linear layer on any backend and of any quantiser.

    A weight that is not kept as plain numbers is what the layer makes of unit vectors.
    """
    bias: Any = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, PackedLinear):
        return module.dense(), bias
    weight: Any = None if getattr(module, "weight", None) is None else whole_weight(module)
    if not is_linear(module) or is_plain(weight):
        return weight.detach(), bias
    kept = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    floats = (part.dtype for part in kept if part.is_floating_point() and part.dtype.itemsize >= 2)
    width: Any = module.in_features
    units = torch.eye(width, dtype=next(floats, torch.float32), device=kept[0].device)
    columns = torch.cat([module(part) for part in units.split(UNITS)])
    return (columns if bias is None else columns - bias).T.contiguous(), bias


def plain_weights(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the named weights that the module has; of quantised linear layers, what they stand for."""
    found = {}
    for name in names:
        path, _, last = name.rpartition(".")
        try:
            part = module.get_submodule(path)
            weight = plain_linear(part)[0] if last == "weight" and is_linear(part) else whole(getattr(part, last))
        except AttributeError:
            continue
        if is_plain(weight):
            found[name] = weight.detach()
    return found
