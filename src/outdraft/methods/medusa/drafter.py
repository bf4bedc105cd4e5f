"""Medusa's heads (arXiv 2401.10774, Medusa-1) and decoding with them.

Head k reads the target's newest feature f_t and guesses x_{t+1+k}, whatever tokens come between: one pass of all heads
is the whole draft, and a tree is the product of their guesses, ranked by the product of their probabilities. The target
is frozen. By default every head reads its logits through the target's own output layer, so that a head is d x d
weights; the paper's heads have one of V x d each (`own_head`). There is no memory but the newest feature. There is no
official layout of folders: such heads come from training here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import chosen, counting, integers
from outdraft.core.tree import Tree
from outdraft.drafting.base import DraftState, Limits, RowContext, Update
from outdraft.drafting.expand import grow
from outdraft.drafting.folder import find_folder, is_own, read_config
from outdraft.drafting.sample import Block
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, Network, NetworkDrafter, read_own
from outdraft.methods.recorded import Given, NoCache, RecordedDrafts
from outdraft.target.backends.packed import is_linear, plain_linear
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target


@dataclass(frozen=True)
class MedusaConfig:
    """The shapes of the heads."""

    hidden_size: int
    """The width d of the target's features."""
    vocab_size: int
    """The number of entries of the target's output layer."""
    num_heads: int = 5
    """The number of heads, which bounds the length of a tree's paths."""
    num_layers: int = 1
    """The number of residual blocks of a head."""
    own_head: bool = False
    """True if every head has its own output layer; else all use the target's."""
    own_head_bias: bool = False
    """True if the heads' own output layers have a bias, as the target's must then have, too."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"medusa_{name} must be at least 1, not {getattr(self, name)}")


class ResidualBlock(nn.Module):
    """The residual block x + SiLU(W x), which is the identity before training (section 2.1.1)."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(Network):
    """All Medusa heads; without output layers of their own they use the target's."""

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
        """Build float32 heads to start training from; each predicts the model's own next token.

        Raises:
            UserError: `own_head` is set, and the model's output layer is no plain linear one to copy.
        """
        if not config.own_head:
            return cls(config)
        output = model.get_output_embeddings()
        weight, bias = plain_linear(output) if is_linear(output) else (None, None)
        if weight is None or weight.shape != (config.vocab_size, config.hidden_size):
            raise UserError("the target's output layer is no plain linear one; leave own_head out")
        heads = cls(replace(config, own_head_bias=bias is not None))
        with torch.no_grad():
            for layer in heads.outputs:
                layer.weight.copy_(weight)  # type: ignore[operator]
                if bias is not None:
                    layer.bias.copy_(bias)  # type: ignore[operator]
        return heads

    @property
    def own_heads(self) -> list[Tensor]:
        return [layer.weight for layer in self.outputs]  # type: ignore[misc]

    def speaking(self, target: Target) -> list[Callable[[Tensor], Tensor]]:
        """Return, for every own output layer, the function from a head's output through it to logits."""
        return [target.head_through(layer) for layer in self.outputs]


class Medusa(NetworkDrafter):
    """The drafter of trained `MedusaHeads` on their target's features."""

    def __init__(self, heads: MedusaHeads, target: Target):
        super().__init__(heads, target)
        self.limits = Limits(depth=heads.config.num_heads, stepwise=False)
        self.heads, self.speaking = heads, heads.speaking(target)
        self.recorded = None if target.pool is None else RecordedDrafts(self)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> MedusaState:
        return MedusaState(self, len(prompts))

    def unasked(self, given: Given, cache: NoCache, shape: TreeShape, rows: RowContext) -> Tree:
        return self.tree(given.roots, chosen(given.taps, given.counts[:, None] - 1)[:, 0], shape, rows)

    def tree(self, roots: Tensor, features: Tensor, shape: TreeShape, rows: RowContext) -> Tree:
        """Grow trees below `(rows,)` roots from the `(rows, hidden)` features before them."""
        block = Block(self.logits(features, shape.depth + 1))
        return grow(roots, block.first, block, shape, rows)

    def logits(self, features: Tensor, levels: int) -> Tensor:
        """Return the first heads' `(rows, levels, vocab)` logits of `(rows, hidden)` features."""
        read = [self.heads.heads[level](features) for level in range(levels)]
        if not self.speaking:
            return self.target.head(torch.stack(read, dim=1))
        return torch.stack([speak(x) for speak, x in zip(self.speaking, read, strict=False)], dim=1)


class MedusaState(DraftState):
    """A state without memory: every update brings the newest feature."""

    def __init__(self, drafter: Medusa, rows: int):
        self.drafter, self.cache = drafter, NoCache(rows)

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        shape, recorded = shape.at_most(self.drafter.heads.config.num_heads, shape.size), self.drafter.recorded
        if recorded is not None and recorded.serves(update, shape, rows, self.cache):
            tree = recorded(update, shape, rows, self.cache)
            if tree is not None:
                return tree
        row = counting(0, len(update.counts), update.taps.device)
        last = integers([count - 1 for count in update.counts], update.taps.device)
        return self.drafter.tree(update.roots, update.taps[row, last], shape, rows)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache = NoCache(len(rows))

    def read(self, update: Update) -> Update:
        return update.newest()

    def join(self, other: MedusaState) -> None:
        self.cache = NoCache(len(self.cache.lengths) + len(other.cache.lengths))


def load_medusa(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint[MedusaHeads]:
    """Load Medusa's heads from a folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`."""
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if not is_own(config) or config["method"] != MedusaHeads.method:
        raise UserError(f"'{folder}' holds no Medusa heads; choose a folder that `outdraft train --method medusa` made")
    own = read_own(folder, config, MedusaConfig)
    return own.checkpoint(MedusaHeads, dtype, device)
