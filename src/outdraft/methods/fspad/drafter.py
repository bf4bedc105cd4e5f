"""Drafting with a network on the target's features: its forward, its cache between rounds, and its tree's expansion.

The drafter's own cache keeps one entry for each decided pair (token one ahead, target feature). Each round first takes
in the pairs that the verdict decided, with the target's true features, then runs ahead on its own `r` and rolls that
run back. How candidates are chosen is in `drafting/expand.py`.

`DraftStep` is the forward of a `FeatureHead` for the few nodes of a draft level, with the same equations and weights.
Drafting is not bound by arithmetic: a level of three nodes through a small head is some forty launches of a few
microseconds each. So the terms of the token alone (its half of the fusion with the bias, and FSPAD's gate) are looked
up in a table over the vocabulary, if it takes at most `TABLE_BYTES`. `layer_step.py` arranges the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import causal, chosen, integers
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext, Update
from outdraft.drafting.draft_cache import CachedState, DraftMask, RunAhead, causal_mask, pieces
from outdraft.drafting.sample import Step
from outdraft.methods.checkpoint import NetworkDrafter
from outdraft.methods.fspad.layer_step import LayerStep, Linear, NativeProduct, PackedProduct
from outdraft.methods.fspad.network import DraftNetwork, DraftOutput, FeatureHead, turning
from outdraft.methods.recorded import Given, PendingLevels, RecordedDrafts
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.native.operations import Fusion
from outdraft.target.backends.packed import plain_linear
from outdraft.target.backends.tree_attention import Pending, running_over
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads

TABLE_BYTES = 64 * 2**20
"""The largest memory, in bytes, that the table over the vocabulary may take."""

TABLE_CHUNK = 4096
"""The number of tokens of the table that are computed at once."""


class DraftStep(LayerStep):
    """The forward of a `FeatureHead`, for drafting only.

    Args:
        head: the trained network, on any backend; its weights are read once and stay as they are.
        embed: maps token ids to the embeddings that the head was trained on.
    """

    def __init__(self, head: FeatureHead, embed: Callable[[Tensor], Tensor], vocab_size: int):
        config, fusion = head.config, head.fusion
        super().__init__(head, turning(config.head_dim, config.rope_theta), config.max_position_embeddings, head.norm)
        self._config, self._embed = config, embed
        self._fc = self._linear(fusion.fc)
        self._taps = fusion.taps
        self._state_norm = None if fusion.state_norm is None else self._norm(fusion.state_norm)
        self._table: Tensor | None = None
        self._one_fusion: Fusion | None = None
        if fusion.feature_sampling:
            self._fusion_norm = self._norm(fusion.norm)
            self._fusion_gate, self._fusion_up = self._linear(fusion.gate_proj), self._linear(fusion.up_proj)
            self._fusion_down = self._linear(fusion.down_proj)
        width = config.hidden_size + (config.intermediate_size if fusion.feature_sampling else 0)
        if vocab_size * width * torch.finfo(self.dtype).bits // 8 <= TABLE_BYTES:
            self._tabulate(*plain_linear(fusion.fc), vocab_size, width)
        elif self.native is not None and fusion.feature_sampling:
            parts = (self._fc, self._fusion_gate, self._fusion_up, self._fusion_down)
            fc, gate, up, down = (getattr(part, "product", None) for part in parts)
            if fc and gate and up and down:
                self._one_fusion = Fusion(fc, gate, up, down, (fusion.norm.weight, fusion.norm.eps))

    # --- the forward -------------------------------------------------------------------------------------------

    def _inputs(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        h = self._fuse(tokens.reshape(-1), self._state(features.flatten(0, 1)))
        return h, h

    def _outputs(self, out: Tensor) -> DraftOutput:
        return DraftOutput(*(out.chunk(2, dim=-1) if self._config.partial_alignment else (out, out)))

    def _state(self, features: Tensor) -> Tensor:
        """Return the fusion's input, as `Fusion.state` does."""
        if self._taps is not None and features.shape[1] > self._config.hidden_size:
            feature, *outputs = features.split(self._config.hidden_size, dim=-1)
            features = self._taps(feature, outputs)  # decided tokens only, so as it is
        features = features.to(self.dtype)
        return features if self._state_norm is None else self._state_norm(features)

    def _fuse(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Fuse `(nodes,)` tokens and `(nodes, hidden)` features to h, equation 3."""
        if self._table is not None:
            known = F.embedding(tokens, self._table)
            if not self._config.feature_sampling:
                return self._fc.plus(features, known)
            z = self._fc.plus(features, known[:, : self._config.hidden_size])
            gate = known[:, self._config.hidden_size :]
        else:
            embeddings = self._embed(tokens).to(self.dtype)
            if self._one_fusion is not None:
                return self._one_fusion(embeddings, features)
            z = self._fc(torch.cat([embeddings, features], dim=-1))
            if not self._config.feature_sampling:
                return z
            gate = self._fusion_gate.silu(embeddings)
        return self._fusion_down.plus(self._fusion_up.times(self._fusion_norm(z), gate), z)

    # --- what is prepared --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _tabulate(self, weight: Tensor, bias: Tensor | None, vocab_size: int, width: int) -> None:
        """Tabulate `[W_e e + b ; SiLU(W_g e)]` of every token; then only the features' half of W_fc is needed."""
        d, weight = self._config.hidden_size, weight.to(self.dtype)
        of_token = Linear(weight[:, :d], None if bias is None else bias.to(self.dtype))
        table = torch.empty(vocab_size, width, dtype=self.dtype, device=self.device)
        for start in range(0, vocab_size, TABLE_CHUNK):
            ids = torch.arange(start, min(start + TABLE_CHUNK, vocab_size), device=self.device)
            embeddings = self._embed(ids).to(self.dtype)
            table[ids, :d] = of_token(embeddings)
            if width > d:
                table[ids, d:] = self._fusion_gate.silu(embeddings)
        half = weight[:, d:].contiguous()
        if isinstance(self._fc, NativeProduct):
            self._fc = NativeProduct(half, None)
        else:
            packed = isinstance(self._fc, PackedProduct)
            self._fc = PackedProduct(PackedLinear(half, None)) if packed else Linear(half, None)
        self._table = table


Forward = Callable[[tuple[Tensor, Tensor], Tensor | None, SlotCache], Any]
"""(angles, mask, cache) -> outputs, as in `LayerStep.__call__`."""

RunLevel = Callable[[Tensor, Tensor, Tensor], DraftOutput]
"""(tokens, features, parents), each `(rows, nodes, ...)` -> outputs of the tree's next level."""

LONG = 16
"""Pairs from which on only keys and values of all but the last are computed, in a forward of their own."""


class FeatureDrafter(NetworkDrafter):
    """A trained network bound to its target's embedding and head."""

    def __init__(self, head: DraftNetwork, target: Target):
        self.head = head
        super().__init__(head, target, Reads(layers=tuple(head.layers_read(target.num_layers))))
        self.step = self.arranged()
        self.recorded = None if target.pool is None else RecordedDrafts(self)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> FeatureDraftState:
        return FeatureDraftState(self, len(prompts), run.cache.capacity)

    def arranged(self) -> LayerStep:
        """Return the network's forward, arranged for drafting."""
        return DraftStep(self.head, self.embed, self.target.vocab_size)  # type: ignore[arg-type]

    def logits(self, p: Tensor) -> Tensor:
        """Return the head's logits of `(..., hidden)` p over the draft vocabulary."""
        head: Callable[[Tensor], Tensor] = self.head.lm_head or self.target.head
        if self.vocabulary is not None:
            head = self.vocabulary.head
        return head(p.to(self.target.dtype))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look tokens up in the checkpoint's own embedding where it has one, else in the target's."""
        own = self.head.embed_tokens
        return own(tokens) if own is not None else self.target.embed(tokens)

    def unasked(self, given: Given, cache: SlotCache, shape: TreeShape, rows: RowContext) -> Tree:
        """Draft as `FeatureDraftState.propose` does, over lengths on the device."""
        network, newest = self.step, self._taken_in(given, cache)
        levels = PendingLevels(given.lengths + given.counts.int(), cache)

        def run(tokens: Tensor, features: Tensor, parents: Tensor) -> DraftOutput:
            pending = levels.below(parents)
            turns = network.turns(pending.positions[:, -tokens.shape[1] :])
            with running_over(pending):
                return network(tokens, features, turns, None, cache)

        step = self.stepping(newest.r, run)
        return self.grow(given.roots, self.logits(newest.p[:, 0]), step, shape, rows)

    def _taken_in(self, given: Given, cache: SlotCache) -> DraftOutput:
        """Run the decided pairs; return `(rows, 1, hidden)` outputs at each row's last pair."""
        forward, last = partial(self.step, given.tokens, given.taps), given.counts[:, None] - 1
        out = self._in_order(given.lengths, given.tokens.shape[1], cache, forward)
        return DraftOutput(chosen(out.p, last), chosen(out.r, last))

    def _in_order(self, lengths: Tensor, count: int, cache: SlotCache, forward: Forward) -> Any:
        """Run `count` tokens of every row after its committed ones, each of which sees all before it."""
        device = lengths.device
        positions = lengths[:, None].long() + torch.arange(count, device=device)
        pending = Pending(lengths, causal(len(lengths), count, device), positions, (None,), cache)
        with running_over(pending):
            return forward(self.step.turns(positions), None, cache)

    def stepping(self, r: Tensor, run: RunLevel) -> Step:
        """Return the step that feeds every level the r of its parents; the `(rows, 1, hidden)` r are the roots'."""

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal r
            features = r.expand(-1, tokens.shape[1], -1) if r.shape[1] == 1 else chosen(r, parents)
            out = run(tokens, features, parents)
            r = out.r
            return self.logits(out.p)

        return step


class FeatureDraftState(CachedState):
    """The draft cache of one batch: an entry for each pair (token one ahead, target feature)."""

    layers = 1
    """The number of layers whose keys and values the cache holds."""

    def __init__(self, drafter: FeatureDrafter, rows: int, capacity: int):
        self.drafter, self.network = drafter, drafter.step
        self.cache = SlotCache(rows, self.layers, capacity, drafter.target.pool)

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        recorded = self.drafter.recorded
        if recorded is not None and recorded.serves(update, shape, rows, self.cache):
            tree = recorded(update, shape, rows, self.cache)
            if tree is not None:
                return tree
        return self._unrecorded(update, shape, rows)

    def _unrecorded(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        newest, drafter = self._take_in(update), self.drafter
        step = drafter.stepping(newest.r, self._run_levels())
        tree = drafter.grow(update.roots, drafter.logits(newest.p[:, 0]), step, shape, rows)
        self.cache.rollback()
        return tree

    def _run_levels(self) -> RunLevel:
        """Return the function that runs the levels of a tree, one after the other."""
        network, cache, starts, levels = self.network, self.cache, list(self.cache.lengths), 0
        if network.native is not None:
            ahead = RunAhead(cache, len(network) - 1)

            def over_pending(tokens: Tensor, features: Tensor, parents: Tensor) -> DraftOutput:
                positions, mask, _ = ahead.place(tokens, parents)
                return self._over(positions, mask, partial(network, tokens, features))

            return over_pending
        sight = DraftMask(cache, network.dtype, network.device)

        def over_mask(tokens: Tensor, features: Tensor, parents: Tensor) -> DraftOutput:
            nonlocal levels
            mask = sight.level(parents)
            angles = network.angles([start + levels for start in starts], 1)
            levels += 1
            return network(tokens, features, angles, mask, cache)

        return over_mask

    def _over(self, positions: Tensor, mask: Tensor, forward: Forward) -> Any:
        """Run the last of the pending tokens, those of which `(rows, tokens, pending)` says what they see."""
        pending = Pending(integers(self.cache.lengths, mask.device).int(), mask, positions, (None,), self.cache)
        with running_over(pending):
            return forward(self.network.turns(positions[:, -mask.shape[1] :]), None, self.cache)

    def _causal(self, count: int, device: torch.device, forward: Forward) -> Any:
        """Run `count` tokens of every row after the committed ones, each of which sees all before it."""
        slots = self.cache.reserve(count, device)
        if self.network.native is not None:
            return self._over(slots, causal(len(slots), count, device), forward)
        mask = causal_mask(self.cache, count, self.network.dtype, self.network.device)
        return forward(self.network.angles(self.cache.lengths, count), mask, self.cache)

    def _take_in(self, update: Update) -> DraftOutput:
        """Run the decided pairs with the target's true features, and commit them to the cache.

        Returns:
            `(rows, 1, hidden)` outputs at each row's last pair.
        """
        if max(update.counts) > LONG:
            update = self.read(update)
        counts, kept = update.counts, []
        for tokens, taps, ends in pieces(update, counts):
            kept.append(self._causal(tokens.shape[1], tokens.device, partial(self.network, tokens, taps)))
            self.cache.commit(ends)
        p, r = (torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*kept, strict=True))
        if len(set(counts)) == 1:
            return DraftOutput(p[:, counts[0] - 1 : counts[0]], r[:, counts[0] - 1 : counts[0]])
        last = integers(counts, p.device)[:, None] - 1
        return DraftOutput(chosen(p, last), chosen(r, last))

    def read(self, update: Update) -> Update:
        """Commit keys and values of all pairs but each row's last, whose outputs alone are needed; return those."""
        for tokens, taps, ends in pieces(update, [count - 1 for count in update.counts]):
            self._causal(tokens.shape[1], tokens.device, partial(self.network.read, tokens, taps))
            self.cache.commit(ends)
        return update.newest()
