"""Drafting with a `DFlashNetwork`: one forward gives the logits of all levels, from which chains and trees grow.

The drafter's cache keeps keys and values of the context rows, one for every decided token but the anchor, at the slots
of their positions. A block is written behind them and forgotten after its forward: the next round has the target's true
outputs for the accepted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.shape import GPU_TREE, TreeShape
from outdraft.core.tensors import causal
from outdraft.core.tree import Tree, attention_mask
from outdraft.drafting.base import Limits, RowContext, Update
from outdraft.drafting.draft_cache import CachedState, pieces
from outdraft.drafting.sample import Block
from outdraft.methods.checkpoint import NetworkDrafter
from outdraft.methods.dflash.network import Angles, DFlashNetwork
from outdraft.methods.tapped import rotary_frequencies
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads


class DFlash(NetworkDrafter):
    """A trained `DFlashNetwork` bound to its target's layers, and to its embedding and head where it has none."""

    def __init__(self, network: DFlashNetwork, target: Target):
        self.network, config = network, network.config
        super().__init__(network, target, Reads(features=False, layers=config.taps(target.num_layers)))
        self.limits = Limits(depth=config.proposals, stepwise=False)
        frequencies, self._turn_scale = rotary_frequencies(config)
        self._frequencies = frequencies.to(target.device)
        self._head = self._output()

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DFlashState:
        return DFlashState(self, len(prompts), run.cache.capacity)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        """Return a shape as deep as the block on a GPU, where levels cost nothing and verifying costs little."""
        if device.type == "cpu":
            return super().default_shape(device, sampling)
        if sampling:
            return TreeShape.chain(self.network.config.proposals, candidates="sampled")
        return TreeShape(self.network.config.proposals - 1, GPU_TREE.top_k, GPU_TREE.size)

    def angles(self, positions: Tensor) -> Angles:
        """Return the rotary cosines and sines of `(rows, tokens)` positions."""
        turns = (positions[:, None, :, None] * self._frequencies).repeat(1, 1, 1, 2)
        dtype = self.network.norm.weight.dtype
        return (turns.cos() * self._turn_scale).to(dtype), (turns.sin() * self._turn_scale).to(dtype)

    def levels(self, roots: Tensor, cache: SlotCache, count: int) -> Tensor:
        """Return `(rows, count, vocab)` logits of the first slots that propose, before the Markov head's bias.

        Args:
            roots: `(rows,)` the anchors.
            cache: holds the context rows of all tokens before the anchors, and nothing pending.
            count: levels, at most as many as the block proposes.
        """
        config = self.network.config
        first = 0 if config.anchor_first else 1
        # Rows of a block that is causal everywhere do not depend on those behind them.
        size = first + count if all(causal for causal, _ in config.sights) else config.block_size
        block = F.pad(roots[:, None], (0, size - 1), value=config.mask_token_id)
        slots = cache.reserve(size, roots.device)
        masks = {sight: self._mask(sight, slots, cache) for sight in set(config.sights)}
        x = self.embed(block).to(self.network.norm.weight.dtype)
        states = self.network(x, self.angles(slots), [masks[sight] for sight in config.sights], cache)
        cache.rollback()
        return self.logits(states[:, first : first + count])

    def logits(self, states: Tensor) -> Tensor:
        """Map `(..., d)` normed states to `(..., vocab)` logits, before the Markov head's bias."""
        config = self.network.config
        dtype = self.target.dtype if self.network.lm_head is None else self.network.norm.weight.dtype
        logits = self._head(states.to(dtype))
        if config.output_multiplier != 1:
            logits = logits * config.output_multiplier
        cap = config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def _mask(self, sight: tuple[bool, int], slots: Tensor, cache: SlotCache) -> Tensor | None:
        """Return the `(rows, 1, B, extent)` mask of a layer's block rows; None where every row sees every slot."""
        (is_causal, window), (rows, size), lengths = sight, slots.shape, cache.lengths
        if not is_causal and len(set(lengths)) == 1 and (not window or window >= cache.extent):
            return None
        mask = causal(rows, size, slots.device)
        if not is_causal:
            mask = torch.ones_like(mask)
        return attention_mask(mask, slots, lengths, cache.extent, slots, window or None)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the `(rows, tokens, d)` embeddings of `(rows, tokens)` ids."""
        scale, own = self.network.config.input_embedding_scale, self.network.embed_tokens
        if own is None and not scale:
            return self.target.embed(tokens)
        return F.embedding(tokens, self.target.embedding_rows if own is None else own.weight) * (scale or 1.0)

    def _output(self) -> Callable[[Tensor], Tensor]:
        """Return the function from normed states to logits over the draft vocabulary."""
        config = self.network.config
        if self.vocabulary is not None:
            return self.vocabulary.head
        if self.network.lm_head is not None:
            return self.network.lm_head
        if config.final_logit_softcapping or config.output_multiplier != 1:  # the drafter has its own final scaling
            return self.target.model.get_output_embeddings()
        return self.target.head


class DFlashState(CachedState):
    """The draft cache of one batch: keys and values of the context rows."""

    def __init__(self, drafter: DFlash, rows: int, capacity: int):
        self.drafter = drafter
        config = drafter.network.config
        layers, room = config.num_hidden_layers, capacity + config.block_size
        self.cache = SlotCache(rows, layers, room, drafter.target.pool)

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        self._take_in(update)
        drafter, roots, markov = self.drafter, update.roots, self.drafter.network.markov_head
        shape = shape.at_most(drafter.network.config.proposals, shape.size)
        levels = drafter.levels(roots, self.cache, shape.depth + 1)
        if markov is None:
            block = Block(levels)
        else:
            levels[:, 0] += markov(roots)
            block = Block(levels, lambda _, tokens, logits: logits + markov(tokens))
        return drafter.grow(roots, block.first, block, shape, rows)

    def read(self, update: Update) -> Update:
        self._take_in(Update(update.tokens, update.taps, [count - 1 for count in update.counts]))
        return update.newest()

    def _take_in(self, update: Update) -> None:
        """Write the context rows of the tokens decided since the last draft into the cache."""
        for tokens, taps, ends in pieces(update, update.counts):
            slots = self.cache.reserve(tokens.shape[1], tokens.device)
            self.drafter.network.take_in(taps, self.drafter.angles(slots), self.cache)
            self.cache.commit(ends)
