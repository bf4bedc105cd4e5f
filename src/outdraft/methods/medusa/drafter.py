"""Medusa's heads (arXiv 2401.10774, Medusa-1) and decoding with them.

Head k reads the target's newest feature f_t and guesses x_{t+1+k}, whatever stands between: one pass of all heads is
the whole draft, and a tree is the product of their guesses, ranked by the product of their probabilities. The target
is frozen. By default every head reads its logits through the target's own output layer, so that a head is d x d
weights; the paper's heads have one of V x d each (`own_head`). There is no memory but the newest feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, integers
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.drafting.expand import grow
from outdraft.drafting.sample import Block
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Network
from outdraft.target.backends import count_parameters
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target


@dataclass(frozen=True)
class MedusaConfig:
    """Shapes of the heads."""

    hidden_size: int
    """Width d of the target's features."""
    vocab_size: int
    """Entries of the target's output layer."""
    num_heads: int = 5
    """Tokens guessed ahead: the longest path of a tree."""
    num_layers: int = 1
    """Residual blocks of a head."""
    own_head: bool = False
    """Whether every head has an output layer of its own; the target's otherwise."""
    own_head_bias: bool = False
    """Whether those have a bias, as the target's must then have, too."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"medusa_{name} must be at least 1, not {getattr(self, name)}")


class ResidualBlock(nn.Module):
    """x + SiLU(W x), which is x itself before training (section 2.1.1)."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(Network):
    """All heads; without output layers of their own they need the target's to speak.

    Args:
        config: their shapes.
    """

    method = "medusa"

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(d) for _ in range(config.num_layers))) for _ in range(config.num_heads)
        )
        outputs = config.num_heads if config.own_head else 0
        self.outputs = nn.ModuleList(nn.Linear(d, config.vocab_size, config.own_head_bias) for _ in range(outputs))

    @classmethod
    def beginning(cls, model: Any, config: MedusaConfig) -> MedusaHeads:
        """Where training starts: every head says what the model itself would say next, in float32.

        Raises:
            UserError: output layers of their own are asked for, and the model's is no plain one to begin with.
        """
        if not config.own_head:
            return cls(config)
        output = model.get_output_embeddings()
        weight, bias = getattr(output, "weight", None), getattr(output, "bias", None)
        if weight is None or not weight.is_floating_point() or weight.shape != (config.vocab_size, config.hidden_size):
            raise UserError("the target's output layer is no plain linear one; leave own_head out")
        heads = cls(replace(config, own_head_bias=bias is not None))
        with torch.no_grad():
            for layer in heads.outputs:
                layer.weight.copy_(weight)  # type: ignore[operator]
                if bias is not None:
                    layer.bias.copy_(bias)  # type: ignore[operator]
        return heads

    def speaking(self, target: Target) -> list[Callable[[Tensor], Tensor]]:
        """Of every head with an output layer of its own, the way through it from what the head gives to logits."""
        return [target.head_through(layer) for layer in self.outputs]


class Medusa(Drafter):
    """Trained `MedusaHeads` on their target's features.

    Args:
        heads: the network, on the target's device and in its precision.
        target: the model it was trained for.

    Raises:
        UserError: the shapes say that it is another model's drafter.
    """

    method = MedusaHeads.method

    def __init__(self, heads: MedusaHeads, target: Target):
        for name in ("hidden_size", "vocab_size"):
            own, others = getattr(heads.config, name), getattr(target, name)
            if own != others:
                raise UserError(
                    f"the drafter was trained for a target with {name} {own}, this one has {others}; "
                    "choose its own drafter or train one (outdraft train)"
                )
        self.limits = Limits(depth=heads.config.num_heads, stepwise=False)
        self.heads, self.target, self.speaking = heads, target, heads.speaking(target)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> MedusaState:
        return MedusaState(self)

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.heads)

    def logits(self, features: Tensor, levels: int) -> Tensor:
        """`(rows, levels, vocab)` of the first heads, from `(rows, hidden)` features."""
        read = [self.heads.heads[level](features) for level in range(levels)]
        if not self.speaking:
            return self.target.head(torch.stack(read, dim=1))
        return torch.stack([speak(x) for speak, x in zip(self.speaking, read, strict=False)], dim=1)


class MedusaState(DraftState):
    """Nothing to remember: the newest feature comes with every update."""

    def __init__(self, drafter: Medusa):
        self.drafter = drafter

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        shape = shape.at_most(self.drafter.heads.config.num_heads, shape.size)
        row = counting(0, len(update.counts), update.taps.device)
        last = integers([count - 1 for count in update.counts], update.taps.device)
        block = Block(self.drafter.logits(update.taps[row, last], shape.depth + 1))
        return grow(update.roots, block.first, block, shape, rows)

    def select_rows(self, rows: Sequence[int]) -> None:
        pass

    def join(self, other: MedusaState) -> None:
        pass
