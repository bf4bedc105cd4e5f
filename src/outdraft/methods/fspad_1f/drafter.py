"""Drafting with a `OneForwardHead`: one forward takes in the decided pairs and gives the logits of all slots.

The cache keeps keys and values of FSPAD's rows, as FSPAD's does, in both layers; mask rows are written behind them and
forgotten. Candidates that are chosen come from a best-first tree over tables of k x k transitions (`tree.py`), under
noise shared with the target as well; candidates that are drawn grow level by level from the same transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import causal, chosen, counting, integers, sent
from outdraft.core.tree import Tree, attention_mask
from outdraft.drafting.base import Limits, RowContext, Update
from outdraft.drafting.masks import causal_mask
from outdraft.drafting.sample import Block
from outdraft.drafting.vocabulary import NEVER
from outdraft.methods.fspad.draft_step import DraftStep
from outdraft.methods.fspad.drafter import FeatureDrafter, FeatureDraftState
from outdraft.methods.fspad.layer_step import LayerStep, turning
from outdraft.methods.fspad.network import DraftOutput
from outdraft.methods.fspad_1f.network import OneForwardHead, SecondLayer, head_rows
from outdraft.methods.fspad_1f.tree import Tables, best_first, with_spine
from outdraft.target.backends.packed import plain_linear
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

MOST_BESIDE = 64
"""The most decided tokens of a row that are taken in together with mask rows; of longer texts only the last one is."""

CPU_TREE = TreeShape(depth=5, top_k=8, size=16)
"""The default tree on a CPU."""


class SecondStep(LayerStep):
    """The forward of the second layer, arranged for drafting."""

    def __init__(self, layer: SecondLayer):
        config = layer.config
        super().__init__(layer, turning(config.head_dim, config.rope_theta), config.max_position_embeddings, layer=1)
        self._input_norm = self._norm(layer.input_norm)

    def over(
        self, r: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache, masked: int
    ) -> DraftOutput | None:
        """Write keys and values of all `(rows, nodes, hidden)` r; return the outputs of the last `masked` nodes."""
        rows, nodes, width = r.shape
        read = self._attend(self._input_norm(r).flatten(0, 1), rows, nodes, angles, mask, cache)
        if not masked:
            return None
        last = read.view(rows, nodes, -1)[:, -masked:].flatten(0, 1)
        return self._outputs(self._o.plus(last, r[:, -masked:].reshape(-1, width)), rows)


class BlockStep(DraftStep):
    """The forward of both layers. Mask row j has the token id `vocab_size + j - 1`, whose embedding is its slot's."""

    def __init__(self, drafter: OneForward, head: OneForwardHead):
        self.vocab_size = vocab = drafter.target.vocab_size
        slots = head.slots

        def embed(tokens: Tensor) -> Tensor:
            known = drafter.embed(tokens.clamp(max=vocab - 1))
            own = slots[(tokens - vocab).clamp(min=0)].to(known.dtype)
            return torch.where((tokens < vocab)[..., None], known, own)

        super().__init__(head, embed, vocab + len(slots))
        self._second = None if head.second is None else SecondStep(head.second)

    def __call__(
        self,
        tokens: Tensor,
        features: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: SlotCache,
        masked: int = 0,
    ) -> DraftOutput:
        """Run a forward whose last `masked` nodes are mask rows; their outputs are the last layer's."""
        out = super().__call__(tokens, features, angles, mask, cache)
        if self._second is None:
            return out
        further = self._second.over(out.r, angles, mask, cache, masked)
        if further is None:
            return out
        return DraftOutput(
            *(torch.cat([own[:, :-masked], more], dim=1) for own, more in zip(out, further, strict=True))
        )


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
    """A trained `OneForwardHead` bound to its target's embedding and head.

    Args:
        head: the network, on the target's device and in its precision.
        target: the model it was trained for.

    Raises:
        UserError: the shapes say that it is another model's drafter.
    """

    head: OneForwardHead
    step: BlockStep

    def __init__(self, head: OneForwardHead, target: Target):
        super().__init__(head, target)
        self.recorded = None
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
        self._places = torch.arange(target.vocab_size, device=target.device)
        if kept is not None:
            self._places = torch.zeros_like(self._places)
            self._places[kept] = torch.arange(len(kept), device=target.device)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> OneForwardState:
        return OneForwardState(self, len(prompts), run.cache.capacity + self.head.config.block_size)

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
            noise = torch.stack([torch.stack([c.at(d) for d in range(logits.shape[1])]) for c in coupled.chances])  # type: ignore[attr-defined]
            noise = noise if self.vocabulary is None else noise[..., self.vocabulary.tokens]
            scores = [warper.scores(own) for warper, own in zip(coupled.warpers, logits, strict=True)]
            logits = torch.stack(scores) - noise.log()
            warmth = [warper.temperature or 1.0 for warper in coupled.warpers]
            states = states / sent(warmth, states.device, states.dtype)[:, None, None]
        best = logits.topk(min(self.head.config.slot_candidates, logits.shape[-1]))
        return Slots(logits, best.indices, best.values.to(self.dtype), states)

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
            asked = self._before[self._places[tokens]] * slots.states[:, level, None]
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
        drafter, roots = self.drafter, update.roots
        shape = shape.at_most(drafter.head.config.block_size, shape.size)
        if max(update.counts) > MOST_BESIDE:
            update = self._shortened(update)
        if shape.size == 1:
            self._read(update)
            return Tree.roots(roots)
        named = rows.guided(roots.device) or (rows.coupled and any(warper.names_tokens for warper in rows.warpers))
        slots = drafter.slots_of(self._block(update, shape.depth), rows if rows.coupled and not named else None)
        if not named and (shape.candidates == "top-k" or rows.greedy or rows.coupled):
            return best_first(roots, drafter.tables(slots), shape, rows.budget)
        block = drafter.block(slots)
        if shape.candidates == "spine" and not named:
            drawn = TreeShape.chain(min(shape.depth + 1, shape.size - 1), candidates="sampled")
            chain = drafter.grow(roots, block.first, block, drawn, rows)
            return with_spine(chain, drafter.tables(slots), shape)
        return drafter.grow(roots, block.first, block, shape, rows)

    def _shortened(self, update: Update) -> Update:
        """Take in all pairs but each row's last; return an update of the last ones."""
        counts = [count - 1 for count in update.counts]
        self._read(Update(update.tokens[:, :-1], update.taps[:, :-1], counts))
        last = integers(counts, update.tokens.device)[:, None]
        return Update(update.tokens.gather(1, last), chosen(update.taps, last), [1] * len(counts))

    def _block(self, update: Update, masked: int) -> DraftOutput:
        """Run the decided pairs and `masked` mask rows, and commit the pairs.

        Returns:
            `(rows, 1 + masked, hidden)` outputs of the slots.
        """
        network, cache, counts = self.network, self.cache, update.counts
        rows, new, device = len(counts), max(counts), update.tokens.device
        last = integers(counts, device)[:, None] - 1
        marks = counting(0, masked, device) + network.vocab_size
        tokens = torch.cat([update.tokens[:, :new], marks.expand(rows, -1)], dim=1)
        context = chosen(update.taps, last).expand(-1, masked, -1)
        features = torch.cat([update.taps[:, :new], context], dim=1)
        even = len(set(counts)) == 1
        angles = network.angles(cache.lengths, new + masked) if even else self._angles(counts, new, masked)
        slots = cache.reserve(new + masked, device)
        if even:
            mask = causal_mask(cache, new + masked, network.dtype, device)
        else:
            seen = causal(rows, new + masked, device).clone()
            seen[:, new:, :new] &= (counting(0, new, device) <= last)[:, None]
            mask = attention_mask(seen, slots, cache.lengths, cache.extent, slots)
        out = network(tokens, features, angles, mask, cache, masked)
        cache.commit([range(count) for count in counts])
        first = DraftOutput(*(chosen(part, last) for part in out))
        return DraftOutput(*(torch.cat([own, part[:, new:]], dim=1) for own, part in zip(first, out, strict=True)))

    def _angles(self, counts: Sequence[int], new: int, masked: int) -> tuple[Tensor, Tensor]:
        """Return the angles of rows that take in different numbers of pairs: mask rows stand right after each row's."""
        device = self.network.device
        starts, order = integers(self.cache.lengths, device)[:, None], counting(0, new + masked, device)
        behind = order - (new - integers(counts, device))[:, None]
        return self.network.angles_at(starts + torch.where(order < new, order, behind))
