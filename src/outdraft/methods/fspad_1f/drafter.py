"""Drafting with a `OneForwardHead`: one forward takes in the decided pairs and gives the logits of all slots.

FSPAD's layer takes the pairs in as it does in FSPAD, the second layer runs the mask rows, and one product with the head
gives all logits. The cache keeps keys and values of FSPAD's rows in both layers; those of mask rows are forgotten.
Candidates that are chosen come from a best-first tree over tables of k x k transitions (`tree.py`), under noise shared
with the target as well; candidates that are drawn grow level by level from the same transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outdraft.core.coupling import noise_of
from outdraft.core.sampling import scores_of
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, read_freely, sent
from outdraft.core.tree import Tree
from outdraft.drafting.base import Limits, RowContext, Update
from outdraft.drafting.sample import Block
from outdraft.drafting.vocabulary import NEVER, indices_in
from outdraft.methods.fspad.drafter import DraftStep, FeatureDrafter, FeatureDraftState, Forward
from outdraft.methods.fspad.layer_step import LayerStep
from outdraft.methods.fspad.network import DraftOutput
from outdraft.methods.fspad_1f.network import OneForwardHead, head_rows
from outdraft.methods.fspad_1f.tree import Tables, best_at_once, best_first, with_spine
from outdraft.methods.recorded import Given
from outdraft.target.backends.packed import plain_linear
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

CPU_TREE = TreeShape(depth=5, top_k=8, size=16)
"""The default tree on a CPU."""


class BlockStep(DraftStep):
    """The forward of FSPAD's rows, and of mask rows. Mask row j has the token id `vocab_size + j - 1`, whose embedding
    is its slot's."""

    def __init__(self, drafter: OneForward, head: OneForwardHead):
        self.vocab_size = vocab = drafter.target.vocab_size
        slots, config = head.slots, head.config

        def embed(tokens: Tensor) -> Tensor:
            known = drafter.embed(tokens.clamp(max=vocab - 1))
            own = slots[(tokens - vocab).clamp(min=0)].to(known.dtype)
            return torch.where((tokens < vocab)[..., None], known, own)

        super().__init__(head, embed, vocab + len(slots))
        self.second = None
        if (second := head.second) is not None:
            turns, _ = head.frequencies()
            self.second = LayerStep(second, turns, config.max_position_embeddings, second.norm, layer=1)

    def __call__(
        self, tokens: Tensor, features: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> DraftOutput:
        """Run FSPAD's rows; the second layer's keys and values of them are written, too."""
        rows, nodes = tokens.shape
        h, _ = self._inputs(tokens, features)
        if self.second is not None:
            self.second.stored(h, rows, nodes, angles, cache)
        return self._outputs(self._through(h, h, rows, nodes, angles, mask, cache))

    def read(
        self, tokens: Tensor, features: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> None:
        (rows, nodes), (h, _) = tokens.shape, self._inputs(tokens, features)
        self.stored(h, rows, nodes, angles, cache)
        if self.second is not None:
            self.second.stored(h, rows, nodes, angles, cache)

    def masked(
        self, r: Tensor, count: int, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> DraftOutput:
        """Return the `(rows, count, hidden)` outputs of mask rows after slot 0, whose r is `(rows, 1, hidden)`."""
        rows, layer = len(r), self.second or self
        tokens = (counting(0, count, r.device) + self.vocab_size).repeat(rows)
        h = self._fuse(tokens, self._state(r.expand(-1, count, -1).flatten(0, 1)))
        return self._outputs(layer._through(h, h, rows, count, angles, mask, cache))


@dataclass
class Slots:
    """The slots of a block and their candidates, best first; ids are those of the draft vocabulary."""

    logits: Tensor
    """`(rows, slots, vocab)`."""
    ids: Tensor
    """`(rows, slots, k)` the most probable tokens."""
    values: Tensor
    """`(rows, slots, k)` their logits, in float32 at least."""
    states: Tensor
    """`(rows, slots, rank)` W_H r of every slot."""


class OneForward(FeatureDrafter):
    """A trained `OneForwardHead` bound to its target's embedding and head."""

    head: OneForwardHead
    step: BlockStep

    def __init__(self, head: OneForwardHead, target: Target):
        super().__init__(head, target)
        self.limits = Limits(depth=head.config.block_size, stepwise=False)
        self.marginal = head.config.marginal
        """True to draft without the transition."""
        transition, kept = head.transition, head.draft_tokens
        self.dtype = torch.promote_types(self.step.dtype, torch.float32)
        rows = head_rows(target.model)
        rows = (rows if kept is None else rows[kept.to(rows.device)]).to(target.device, self.dtype)
        codes = rows @ transition.basis.to(self.dtype)
        parts = (transition.before, transition.after, transition.state)
        before, after, self._state = (plain_linear(part)[0].detach().to(self.dtype) for part in parts)
        self._before, self._after = codes @ before.T, codes @ after.T
        every = torch.arange(target.vocab_size, device=target.device) if kept is None else kept.to(target.device)
        self._indices = indices_in(every, target.vocab_size).clamp(min=0)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> OneForwardState:
        return OneForwardState(self, len(prompts), run.cache.capacity)

    def arranged(self) -> LayerStep:
        return BlockStep(self, self.head)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        if device.type != "cpu" or sampling:
            return super().default_shape(device, sampling)
        return CPU_TREE.at_most(self.head.config.block_size, CPU_TREE.size)

    def slots_of(self, out: DraftOutput, coupled: RowContext | None = None) -> Slots:
        """Return the slots of `(rows, slots, hidden)` outputs, through one product with the head.

        Of coupled rows the logits are those at the rows' temperatures, less the logarithm of the noise that will choose
        the target's tokens: their candidates are the tokens that the drafter would choose.
        """
        logits, states = self.logits(out.p), out.r.to(self.dtype) @ self._state.T
        if coupled is not None:
            noise = noise_of(coupled.chances, logits.shape[1])  # type: ignore[arg-type]
            noise = noise if self.vocabulary is None else noise[..., self.vocabulary.tokens]
            logits = scores_of(coupled.warpers, logits) - noise.log()
            warmth = [warper.temperature or 1.0 for warper in coupled.warpers]
            if len(set(warmth)) == 1:
                states = states / warmth[0]
            else:
                states = states / sent(warmth, states.device, states.dtype)[:, None, None]
        best = logits.topk(min(self.head.config.slot_candidates, logits.shape[-1]))
        return Slots(logits, best.indices, best.values.to(self.dtype), states)

    def unasked(self, given: Given, cache: SlotCache, shape: TreeShape, rows: RowContext) -> Tree:
        first, below = self._taken_in(given, cache), given.lengths + given.counts.int()
        run = partial(self._in_order, below, shape.depth, cache)
        return self.tree(given.roots, self.outputs(first, shape.depth, run), shape, rows, asks=False)

    def outputs(self, first: DraftOutput, count: int, run: Callable[[Forward], DraftOutput]) -> DraftOutput:
        """Return the `(rows, 1 + count, hidden)` outputs of slot 0 and of the mask rows after it.

        Args:
            first: those of slot 0.
            run: runs the forward of the mask rows, over slots after the committed ones.
        """
        if not count:
            return first
        masked = run(partial(self.step.masked, first.r, count))
        return DraftOutput(*(torch.cat(parts, dim=1) for parts in zip(first, masked, strict=True)))

    def tree(self, roots: Tensor, out: DraftOutput, shape: TreeShape, rows: RowContext, asks: bool) -> Tree:
        """Build trees of the slots with these outputs.

        Args:
            asks: True if the host may read the tables.
        """
        named = rows.named(roots.device)
        slots = self.slots_of(out, rows if rows.coupled and not named else None)
        if not named and (shape.candidates == "top-k" or rows.greedy or rows.coupled):
            tables = self.tables(slots)
            return best_first(roots, tables, shape, rows.budget) if asks else best_at_once(roots, tables, shape)
        block = self.block(slots)
        if shape.candidates == "spine" and not named:
            drawn = TreeShape.chain(min(shape.depth + 1, shape.size - 1), candidates="sampled")
            chain = self.grow(roots, block.first, block, drawn, rows)
            return with_spine(chain, self.tables(slots), shape)
        return self.grow(roots, block.first, block, shape, rows)

    def tables(self, slots: Slots) -> Tables:
        """Return the candidates of the slots with their log-probabilities; those of a slot after a candidate before it
        sum to what the slot's own distribution gives its candidates."""
        ids, values = slots.ids, slots.values
        named = ids if self.vocabulary is None else self.vocabulary.tokens[ids]
        sure = values - slots.logits.to(self.dtype).logsumexp(-1, keepdim=True)
        if self.marginal:
            return Tables(named, sure[:, 0], sure[:, 1:, None].expand(-1, -1, ids.shape[2], -1))
        asked = self._before[ids[:, :-1]] * slots.states[:, 1:, None]
        scores = values[:, 1:, None] + asked @ self._after[ids[:, 1:]].transpose(-1, -2)
        later = scores.log_softmax(-1) + sure[:, 1:, None].logsumexp(-1, keepdim=True)
        return Tables(named, sure[:, 0], later)

    def block(self, slots: Slots) -> Block:
        """Return the slots as a `Step`: later slots give probability to their candidates alone, by the transition."""
        if self.marginal:
            return Block(slots.logits)

        def moved(level: int, tokens: Tensor, logits: Tensor) -> Tensor:
            asked = self._before[self._indices[tokens]] * slots.states[:, level, None]
            ids = slots.ids[:, level]
            scores = slots.values[:, level, None] + asked @ self._after[ids].transpose(-1, -2)
            everywhere = scores.new_full(logits.shape, NEVER)
            return everywhere.scatter_(2, ids[:, None].expand_as(scores), scores)

        return Block(slots.logits, moved)


class OneForwardState(FeatureDraftState):
    """The draft cache of one batch."""

    drafter: OneForward
    network: BlockStep

    def __init__(self, drafter: OneForward, rows: int, capacity: int):
        self.layers = 1 if drafter.head.second is None else 2
        super().__init__(drafter, rows, capacity)

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        return super().propose(update, shape.at_most(self.drafter.head.config.block_size, shape.size), rows)

    def _unrecorded(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        drafter, roots, first = self.drafter, update.roots, self._take_in(update)
        if shape.size == 1:
            return Tree.roots(roots)
        out = drafter.outputs(first, shape.depth, partial(self._causal, shape.depth, roots.device))
        self.cache.rollback()  # mask rows are forgotten
        return drafter.tree(roots, out, shape, rows, rows.budget is not None or read_freely(roots.device))
