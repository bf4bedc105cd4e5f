"""Measures on this machine whether a layer is batch-invariant: whether each row has the same bits batched as single.

By its mathematics a matrix product, norm or activation treats rows separately. But kernels choose blocking, vector
lanes and threads by the number of rows, and the order of a sum decides its last bits. Kernels depend on shapes and
precision, not on the numbers, so the numbers here make every difference visible:

- for matrix products, sums that cancel: the result is only rounding error, which differs with the order; - for norms
and rotary embeddings, the same in single precision and with a large offset, where errors grow; - for activations in 16
bits, all 65,536 numbers, in whole vectors and in remainders of vectors.

Modules of any other kind are always run per row. At last whole forwards over trees are compared with one-token
forwards, bit for bit (`Case`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from outdraft.core.tree import Tree
from outdraft.target.backends import PackedLinear
from outdraft.target.cache import SlotCache
from outdraft.target.target import Target

if TYPE_CHECKING:
    from outdraft.target.exact.target import ExactTarget
TRIALS = 4
"""Number of random inputs tried where no single one is sure to show a difference."""

PIECE = 7
"""Numbers in a remainder: fewer than any vector register holds."""

COPYING = (nn.Embedding, nn.Dropout, nn.Identity)
"""Modules that only copy numbers (scaled embeddings multiply each by one, which every kernel rounds alike)."""


def is_leaf(module: nn.Module) -> bool:
    """Return True if the module computes by itself: its parts have no weights (experts and their activation)."""
    children = [child for child in module._modules.values() if child is not None]
    if isinstance(module, COPYING) or any(_weights(child) for child in children):
        return False
    return not children or _weights(module)


def _weights(module: nn.Module) -> bool:
    packed = any(isinstance(inner, PackedLinear) for inner in module.modules())
    return packed or any(True for _ in module.parameters())


def mixes(module: nn.Module) -> bool:
    """Return True if the module computes with weights of its own beside its parts, inseparably from them."""
    return not is_leaf(module) and not isinstance(module, COPYING) and bool(module._parameters)


def kind_of(leaf: Any) -> tuple[Any, ...]:
    """Return what decides which kernels a leaf calls; leaves of one kind behave alike."""
    if isinstance(leaf, PackedLinear):
        return type(leaf), leaf.in_features, leaf.out_features, leaf.bias is not None
    tensors = {**dict(leaf.named_parameters(recurse=False)), **dict(leaf.named_buffers(recurse=False))}
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.stride()) for name, tensor in tensors.items())
    return type(leaf), repr(leaf), shapes


def one_by_one(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function for one token at a time, as a forward over one token would, and join the results.

    Args:
        function: takes tensors `(rows, tokens, ...)` or `(tokens, ...)`; tensors of other leading sizes are passed
            whole.
        *args: arguments; the first tensor sets the leading sizes.
        **kwargs: keyword arguments, treated alike.
    """
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    batched = first.dim() > 2
    lead = first.shape[:2] if batched else first.shape[:1]

    def alone(value: Any, row: int, token: int) -> Any:
        if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead:
            return value
        return value[row : row + 1, token : token + 1] if batched else value[token : token + 1]

    def at(row: int, token: int) -> Any:
        own = {name: alone(value, row, token) for name, value in kwargs.items()}
        return function(*(alone(value, row, token) for value in args), **own)

    if not batched:
        return _joined([at(0, token) for token in range(lead[0])], 0)
    return _joined([_joined([at(row, token) for token in range(lead[1])], 1) for row in range(lead[0])], 0)


def _joined(results: list[Any], dim: int) -> Any:
    if isinstance(results[0], tuple):
        return tuple(_joined(list(parts), dim) for parts in zip(*results, strict=True))
    return torch.cat(results, dim)


class OneByOne(nn.Module):
    """Runs another module (or function) for one token at a time."""

    def __init__(self, inner: Callable[..., Any]):
        super().__init__()
        self._inner = [inner]  # in a list, so that it is not registered as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return one_by_one(self._inner[0], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inner"][0], name)


class Probe(OneByOne):
    """Runs a leaf batched and single, for every shape that it gets, and compares.

    Attributes:
        stacks: True while all rows have had the same bits either way.
    """

    def __init__(self, leaf: nn.Module):
        super().__init__(leaf)
        self.kind = kind_of(leaf)
        self.stacks = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.stacks = self.stacks and _stacks(self.kind, self._inner[0], args, kwargs)
        return super().forward(*args, **kwargs)


_known: dict[Any, bool] = {}


def _stacks(kind: tuple[Any, ...], leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Measure if this kind of leaf is batch-invariant for these shapes, once per process and number of threads."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    shapes = tuple((tuple(value.shape), value.dtype) for value in given)
    key = (kind, shapes, torch.get_num_threads())
    if key not in _known:
        _known[key] = _try(leaf, args, kwargs)
    return _known[key]


def _try(leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dice = torch.Generator().manual_seed(0)
    if type(leaf) in (nn.Linear, PackedLinear, Conv1D):
        return same_alone(*cancelling(leaf, args[0], dice))
    parameters, buffers = list(leaf.parameters()), list(leaf.buffers())
    if not parameters and not buffers:
        return _activation_stacks(leaf, args, kwargs, dice)
    name = type(leaf).__name__.lower()
    if ("norm" in name and all(parameter.dim() == 1 for parameter in parameters)) or "rotary" in name:
        single = copy.deepcopy(leaf).float()
        return all(
            same_alone(leaf, *_random(args, dice, offset), **kwargs)
            and same_alone(single, *_random(args, dice, offset, torch.float32), **kwargs)
            for offset in (0, 256)
            for _ in range(TRIALS)
        )
    return False


def same_alone(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Return True if every token has the same bits batched as single."""
    return _equal(function(*args, **kwargs), one_by_one(function, *args, **kwargs))


def cancelling(leaf: Any, like: Tensor, dice: torch.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Make a layer of the same kind and an input of the same shape whose exact products are all zero.

    Their output is rounding error alone.
    """
    inputs, outputs = leaf.weight.shape if isinstance(leaf, Conv1D) else (leaf.in_features, leaf.out_features)
    order, half = torch.randperm(inputs, generator=dice), inputs // 2
    one, other = order[:half], order[half : 2 * half]

    x = torch.zeros(like.shape, dtype=like.dtype)
    x[..., one] = _spread((*like.shape[:-1], half), dice).to(like.dtype)
    x[..., other] = -x[..., one]
    few = torch.zeros(min(outputs, 64), inputs, dtype=like.dtype)
    few[:, one] = _spread((len(few), half), dice).to(like.dtype)
    few[:, other] = few[:, one]
    weight = few[torch.arange(outputs) % len(few)]
    bias = None if leaf.bias is None else torch.zeros(outputs, dtype=like.dtype)
    if isinstance(leaf, PackedLinear):
        return PackedLinear(weight, bias), x
    made: Any = copy.copy(leaf)
    made._parameters = {
        "weight": nn.Parameter(weight.T.contiguous() if isinstance(leaf, Conv1D) else weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    return made, x


def _activation_stacks(leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dice: torch.Generator) -> bool:
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return False
    if args[0].dtype.itemsize == 2:
        key = (kind_of(leaf), args[0].dtype)
        if key not in _known:
            _known[key] = _same_in_remainders(leaf, args[0].dtype)
        return _known[key]
    return all(same_alone(leaf, *_random(args, dice, 0)) for _ in range(TRIALS))


def _same_in_remainders(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Return True if every 16-bit number gives the same result in whole vectors and in remainders of vectors."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    whole = function(numbers)
    pieces = torch.cat([function(piece) for piece in numbers.split(PIECE)])
    return _equal(whole.nan_to_num(), pieces.nan_to_num())


def _random(args: tuple[Any, ...], dice: torch.Generator, offset: float, dtype: torch.dtype | None = None) -> list[Any]:
    """Replace tensors by random numbers of many magnitudes."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return (_spread(value.shape, dice) + offset).to(dtype or value.dtype)

    return [other(value) for value in args]


def _spread(shape: Sequence[int], dice: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=dice) * torch.exp2(torch.randint(-6, 7, tuple(shape), generator=dice))


def _equal(some: Any, others: Any) -> bool:
    if isinstance(some, tuple):
        return all(_equal(a, b) for a, b in zip(some, others, strict=True))
    return torch.equal(some, others)


class Kept(SlotCache):
    """A cache that exposes what its layers hold."""

    def __init__(self, target: Target, capacity: int, rows: int = 1):
        super().__init__(rows, target.num_layers, capacity)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.held[layer_idx] = super().update(key_states, value_states, layer_idx)
        return self.held[layer_idx]


class Case:
    """Random trees after random prompts of different lengths, with the same number of nodes in every row.

    Args:
        plain: the stock target.
    """

    def __init__(self, plain: Target, rows: int, nodes: int):
        self.plain = plain
        dice = torch.Generator().manual_seed(rows * 1000 + nodes)

        def tokens(*shape: int) -> Tensor:
            return torch.randint(plain.vocab_size, shape, generator=dice)

        longest = max(2, min(12, plain.context_length - nodes - 1))
        self.prompts = [tokens(2 + (5 * row + 3) % (longest - 1)) for row in range(rows)]
        parents = [
            [-1, *(int(torch.randint(max(0, i - 3), i, (), generator=dice)) for i in range(1, nodes))]
            for _ in range(rows)
        ]
        self.trees = Tree(tokens(rows, nodes), torch.tensor(parents), [nodes] * rows)

    def tree(self, exact: ExactTarget) -> tuple[Tensor, Tensor, Kept]:
        """Return features, logits and cache of one forward over all nodes."""
        cache = Kept(self.plain, max(len(prompt) for prompt in self.prompts) + self.trees.nodes, len(self.prompts))
        run = exact.runner(cache)
        run.prefill(self.prompts)
        features = run.tree(self.trees).features
        return features, exact.head(features), cache

    def difference(self, exact: ExactTarget) -> str | None:
        """Describe where the forward over the trees differs from one-token forwards, None if it does not."""
        features, logits, cache = self.tree(exact)
        children: dict[int, list[int]]
        for row, prompt in enumerate(self.prompts):
            own = Kept(self.plain, len(prompt) + self.trees.nodes)
            run = self.plain.runner(own)
            run.prefill([prompt])
            children = self.trees.children(row)
            ahead = [(0, 0)]
            while ahead:
                node, depth = ahead.pop()
                own.lengths[0] = len(prompt) + depth  # back to the parent
                single = run.tree(Tree.roots(self.trees.tokens[row, node : node + 1])).features
                pairs = [("features", features[row, node], single[0, 0])]
                pairs.append(("logits", logits[row, node], self.plain.head(single)[0, 0]))
                for layer, (keys, values) in own.held.items():
                    slot = len(prompt) + node
                    pairs.append((f"keys (layer {layer})", cache.held[layer][0][row, :, slot], keys[0, :, -1]))
                    pairs.append((f"values (layer {layer})", cache.held[layer][1][row, :, slot], values[0, :, -1]))
                # Deepest first: what went wrong in a layer shows in all after it.
                for name, given, expected in [*pairs[2:], *pairs[:2]]:
                    # NaN of broken weights is the same on both sides; decoding tells of it.
                    if not torch.allclose(given, expected, rtol=0, atol=0, equal_nan=True):
                        return name
                run.cache.commit([[0]])
                ahead += [(child, depth + 1) for child in children.get(node, [])]
        return None
