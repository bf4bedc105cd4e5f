"""Modules of a model on our CPU kernels: whole decoder layers, norms and linear layers.

A layer is recognised by its parts and used only if it gave the stock layer's results, as in `fused.py`. Over pending
tokens it is one call; any other forward runs the stock layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.target.backends import fused
from outdraft.target.backends.fused import Doubles, FusedNorm, epsilon, hooked
from outdraft.target.backends.native.build import why_not_native
from outdraft.target.backends.native.operations import LANES, Layer, PendingView, Stack, rms_norm
from outdraft.target.backends.native.weights import (
    GROUP,
    TYPES,
    Quantise,
    Weight,
    linear,
    quantised_linear,
    release,
    rounding,
    stored,
)
from outdraft.target.backends.packed import packed_view, why_not_replaced
from outdraft.target.backends.tree_attention import Pending, running, running_over

ATTENTION_PARTS = (
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
)
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class NativeNorm(FusedNorm):
    """RMSNorm by our kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.eps)


class NativeLayer(nn.Module):
    """A decoder layer as one call of our kernels over pending tokens.

    Args:
        layer: the stock layer, whose attributes it shows.
        in_tuple: True if the stock layer returns a tuple.
        quantise: quantises the weights, which the stock layer then has too; None keeps them.
        owned: True if nobody else uses the stock layer, which then keeps no weights of its own (`ReleasedLinear`).
    """

    layer_idx: int

    def __init__(self, layer: Any, in_tuple: bool = False, quantise: Quantise | None = None, owned: bool = False):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        for name, value in vars(layer).items():  # what a model's forward may look up, such as the kind of attention
            if not name.startswith("_") and name not in self.__dict__:
                self.__dict__[name] = value
        self._modules = dict(layer._modules)  # so that weights keep their names
        self.__dict__["_stock"] = layer
        self.layer_idx = attention.layer_idx
        norms = [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
        parts = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        weights = []
        for own in parts:
            blocks = None if quantise is None else quantise([part.weight for part in own])
            weight = Weight(*fused.joined(*own), gated=own[0] is mlp.gate_proj, blocks=blocks)
            weights.append(weight)
            if owned:
                release(own, weight)
            elif blocks is not None:
                for part, kept in zip(own, weight.dense().split([part.out_features for part in own]), strict=True):
                    part.weight.data.copy_(kept)
        qkv, o, gate_up, down = weights
        self.kernel = Layer(
            qkv,
            o,
            gate_up,
            down,
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            attention.scaling,
            _of(layer.input_layernorm),
            _of(layer.post_attention_layernorm),
            [_of(norm) for norm in norms],
            ACTIVATIONS[type(mlp.act_fn).__name__],
        )
        self.stack = Stack([self.kernel])
        self.in_tuple = in_tuple

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a forward reads."""
        return sum(weight.nbytes for weight in self.kernel.weights)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        pending = running()
        if pending is None or position_embeddings is None:
            return self.__dict__["_stock"](
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        out = run([self], self.stack, hidden_states, position_embeddings, pending, attention_mask)
        return (out,) if self.in_tuple else out


class NativeStack(nn.ModuleList):
    """A model's list of layers. A forward that asks for all of them over pending tokens runs neighbours as one call.

    Args:
        layers: layers of any kind; those beside each other that are all `NativeLayer` become one call.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__(layers)
        self._joined: list[Any] = []
        for shape, group in groupby(self, lambda layer: layer.stack.probe.shape if type(layer) is NativeLayer else ()):
            own: list[Any] = list(group)
            self._joined += [_Neighbours(own)] if shape else own

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        pending, whole = running(), index.start in (None, 0) and index.step is None
        whole = whole and (index.stop is None or index.stop >= len(self))
        # Layers of several kinds get a mask each.
        together = whole and pending is not None and len(pending.windows) == 1
        return self._joined if together else list(self._modules.values())[index]


class _Neighbours:
    """Layers of a list in place of one of them; arguments as those of `NativeLayer.forward`."""

    def __init__(self, layers: list[NativeLayer]):
        self.layers, self._stack = layers, Stack([layer.kernel for layer in layers])

    def __call__(
        self, x: Tensor, attention_mask: Any = None, *, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Any:
        pending = running()
        assert pending is not None
        out = run(self.layers, self._stack, x, position_embeddings, pending, attention_mask)
        return (out,) if self.layers[-1].in_tuple else out


def run(
    layers: Sequence[NativeLayer],
    stack: Stack,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    pending: Pending,
    mask: Any,
) -> Tensor:
    """Run layers and their kernels over pending tokens; the mask says which window they have."""
    view = view_of(pending, angles, pending.window(mask))
    return stack(x, view, [pending.cache.whole(stack.probe, stack.probe, layer.layer_idx) for layer in layers])


def view_of(pending: Pending, angles: tuple[Tensor, Tensor], window: int | None) -> PendingView:
    """Return the pending tokens for our kernels; the same for all layers with these angles and this window."""
    key = (id(angles[0]), window)
    known = pending.views.get(key)
    if known is None:
        known = pending.views[key] = (PendingView(pending, angles, window), angles)  # kept, so that ids stay theirs
    return known[0]


def _of(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, float(epsilon(norm) or 0.0)


class NativeDoubles(Doubles):
    """Replacements by our kernels for one model."""

    def __init__(self, quantise: Quantise | None = None, owned: bool = False) -> None:
        super().__init__(linear)
        self.quantise, self.owned = quantise, owned
        self._tuples: dict[Any, bool | None] = {}
        """Whether layers of a kind return tuples; None if our kernels compute something else."""

    def double(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(map(self._serves, module)):
            return NativeStack([self._layer(layer) for layer in module])
        if self._serves(module):
            return self._layer(module)
        double = super().double(module)
        return NativeNorm(module) if isinstance(double, FusedNorm) and module.weight.dtype in TYPES else double

    def _serves(self, module: nn.Module) -> bool:
        if not recognised(module):
            return False
        kind = _kind(module)
        if kind not in self._tuples:
            self._tuples[kind] = _alike(module)
        return self._tuples[kind] is not None

    def _layer(self, layer: nn.Module) -> NativeLayer:
        return NativeLayer(layer, bool(self._tuples[_kind(layer)]), self.quantise, self.owned)


def _kind(layer: nn.Module) -> Any:
    return tuple(fused.kind(part) for part in layer.modules())


def recognised(layer: Any) -> bool:
    """Return True if a module looks like a decoder layer that our kernels compute."""
    parts = set(layer._modules)
    if parts != LAYER_PARTS or any(hooked(part) for part in layer.modules()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
    if set(attention._modules) not in ATTENTION_PARTS or set(mlp._modules) != MLP_PARTS:
        return False
    if any(set(norm._parameters) != {"weight"} or epsilon(norm) is None for norm in norms):
        return False
    whole = fused.attends(attention) and fused.linear(attention, "q_proj", "k_proj", "v_proj", "o_proj")
    whole = whole and fused.linear(mlp, "gate_proj", "up_proj", "down_proj")
    if not whole or type(mlp.act_fn).__name__ not in ACTIVATIONS or attention.head_dim % LANES:
        return False
    if any(len(norm.weight) != attention.head_dim for norm in norms[2:]) or mlp.down_proj.in_features % LANES:
        return False
    return attention.q_proj.in_features % 2 == 0 and attention.q_proj.weight.dtype in TYPES


class _OneLayer:
    """A cache of one row of one layer, for the comparison."""

    def __init__(self, native: NativeLayer, tokens: int):
        _, kv_heads, _, width = native.stack.probe.shape
        self.both = torch.zeros(2, 1, kv_heads, tokens, width)

    def whole(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.both[0], self.both[1]


@torch.inference_mode()
def _alike(layer: Any) -> bool | None:
    """Compare in single precision; return whether the stock layer returns a tuple, or None if they differ."""
    own = copy.deepcopy(layer).float().eval()
    tokens, width, size = fused.TRIED, own.self_attn.q_proj.in_features, own.self_attn.head_dim
    native = NativeLayer(own)
    dice = torch.Generator().manual_seed(0)
    turned = torch.rand(1, tokens, size // 2, generator=dice).repeat(1, 1, 2) * 6
    angles = (turned.cos(), turned.sin())
    positions = torch.arange(tokens)[None]
    seen = torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
    found: Any = None
    for size in fused.MAGNITUDES:
        x = torch.randn(1, tokens, width, generator=dice) * size
        pending = Pending(torch.zeros(1, dtype=torch.int32), seen, positions, (None,), _OneLayer(native, tokens))
        try:
            found = own(
                x,
                attention_mask=seen[:, None],
                position_ids=positions,
                position_embeddings=angles,
                past_key_values=None,
            )
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return None  # its signature differs from its looks
        with running_over(pending):
            if not fused.same(found, native(x, position_embeddings=angles)):
                return None
    return None if fused.turns_a_part(own.self_attn) else isinstance(found, tuple)


def native_view(model: Any, owned: bool = False, narrow: Sequence[Tensor] = ()) -> Any:
    """Return a shallow copy of the module tree on our kernels; the original stays as it is, or gives its layers'
    weights away if it is `owned`.

    Args:
        narrow: weights of linear layers that have the bits of `draft_bits`.
    """
    few = {id(weight) for weight in narrow}
    return packed_view(model, lambda weight, bias: linear(weight, bias, id(weight) in few), NativeDoubles(owned=owned))


def quantised_view(model: Any, bits: int | None, owned: bool = False) -> Any:
    """Return `native_view` with quantised weights. The original gets the same weights, in its precision.

    Args:
        bits: 8 or 4 of the layers' weights, beside which the head has eight; None takes what `store` gave to weights.
    """
    layers, head = (stored, stored) if bits is None else (rounding(bits), rounding(8))
    return packed_view(model, partial(quantised_linear, quantise=head), NativeDoubles(layers, owned))


def why_not_parts(model: Any) -> str | None:
    """Return why our kernels cannot run a network's linear layers, None if they can."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return "it lies on " + weight.device.type
    if weight.dtype not in TYPES:
        return f"they have no {weight.dtype}"
    return why_not_native()


def why_not_quantised(model: Any, bits: int | None) -> str | None:
    """Return why `quantised_view` cannot have a model with these bits, None if it can."""
    if (reason := why_not_native_model(model)) is not None or bits is None:
        return reason
    parts = (part for part in model.modules() if isinstance(part, nn.Linear))
    odd = next((part.in_features for part in parts if part.in_features % GROUP), None)
    return None if odd is None else f"a layer has {odd} inputs, no multiple of {GROUP}"


def why_not_native_model(model: Any) -> str | None:
    """Return why our kernels cannot run this model's layers, None if they can."""
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not 'sdpa'"
    if (reason := why_not_replaced(model) or why_not_parts(model)) is not None:
        return reason
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    layers = next((part for part in lists if len(part) == config.num_hidden_layers), ())
    doubles = NativeDoubles()
    if not layers or not all(recognised(layer) for layer in layers) or doubles.double(layers[0]) is None:
        return "its layers have another form"
    return None
