"""Decoding with EESD (arXiv 2406.03853): the target's own first layers and a trained exit layer draft.

A candidate runs through the first layers in the target's own cache; on a CPU verification takes that over
(`ModelRunner.ahead`). The exit layer keeps a cache of its own, one entry for every decided token. Its slots are those
of the target's cache, so that both parts run in one forward over one mask (`shortcut_view`). On a CPU entries of
accepted candidates stay; elsewhere the host would wait to find them, and they are computed anew beside the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import causal, counting, listed, read_freely, sent
from outdraft.core.tree import Tree
from outdraft.drafting.base import DraftState, RowContext, Update
from outdraft.drafting.draft_cache import RunAhead, take_in
from outdraft.drafting.expand import grow
from outdraft.methods.checkpoint import NetworkDrafter
from outdraft.methods.eesd.network import ExitLayer
from outdraft.methods.recorded import Given, PendingLevels, RecordedDrafts
from outdraft.target.backends.tree_attention import Pending
from outdraft.target.cache import LayerCache, SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads, shortcut_view


class EarlyExit(NetworkDrafter):
    """A trained `ExitLayer` on its target's first layers."""

    def __init__(self, exit_layer: ExitLayer, target: Target):
        split = exit_layer.config.exit_layer
        super().__init__(exit_layer, target, Reads(features=False, layers=(split,), split=split))
        self.exit_layer = exit_layer
        self.exit = exit_layer.bind(target)
        if target.gathered_on is not None:  # layers below hand over what lies on other devices
            from accelerate.hooks import AlignDevicesHook, add_hook_to_module

            add_hook_to_module(exit_layer.layer, AlignDevicesHook(target.device, skip_keys="past_key_values"))
        self.shortcut = shortcut_view(target.model, split, exit_layer.layer, target.gathered_on)
        self.recorded = None if target.pool is None else RecordedDrafts(self)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> EarlyExitState:
        return EarlyExitState(self, run)

    @property
    def ready(self) -> bool:
        """Whether whole drafts can be recorded: the forwards in them ran before and computed what the model does."""
        return self.recorded is not None and self.shortcut.ready and self.exit.view.ready

    def unasked(self, given: Given, cache: _BothCaches, shape: TreeShape, rows: RowContext) -> Tree:
        """Take in what was decided after the last root and draft, as `EarlyExitState.propose` does, over lengths on the
        device."""
        (batch, new), device = given.tokens.shape, given.tokens.device
        last, windows = self.target.context_length - 1, tuple(self.target.windows.values())
        if new > 1:  # what of it lies beyond a row's own tokens is written again by the tree
            begun = given.lengths - given.counts.int() + 1
            positions = (begun[:, None].long() + torch.arange(new - 1, device=device)).clamp(max=last)
            pending = Pending(begun, causal(batch, new - 1, device), positions, windows, cache)
            self.exit.view.over(pending, inputs_embeds=given.taps[:, 1:])
        levels = PendingLevels(given.lengths, cache, last, windows)

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            features, _ = self.shortcut.over(levels.below(parents), input_ids=tokens)
            return self.exit.head(features)

        roots = given.roots
        logits = step(roots[:, None], torch.zeros_like(roots)[:, None])[:, 0]
        return self.grow(roots, logits, step, shape, rows)

    def slots(self, shape: TreeShape) -> int:
        """Return the slots that a draft takes: the root, each level's expandable nodes, and at most a whole tree of
        others."""
        return 1 + shape.depth * shape.top_k + shape.size


class EarlyExitState(DraftState):
    """The exit layer's cache: all decided tokens up to the last tree's root, then the expanded nodes of that tree."""

    def __init__(self, drafter: EarlyExit, run: ModelRunner):
        self.drafter, self.run = drafter, run
        self.cache = SlotCache(run.cache.rows, 1, run.cache.capacity, drafter.target.pool)
        self.last_position = drafter.target.context_length - 1
        # Of every row's next update, taps that the exit layer has read already: its last root's.
        self.taken = [0] * run.cache.rows
        self._both = _BothCaches(run.cache, self.cache, drafter.exit_layer.config.exit_layer)
        self._at_once = run.target is drafter.target  # exact mode runs views of its own
        self._finds = read_freely(drafter.target.device) and drafter.recorded is None
        self._expanded: list[tuple[Tensor, Tensor]] = []  # tokens and parents of the last tree's levels below the root

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        recorded = self.drafter.recorded if self._at_once and self.drafter.ready else None
        # A draft that is recorded begins after the last one's root.
        if recorded is not None and set(self.taken) == {1} and recorded.serves(update, shape, rows, self._both):
            tree = recorded(update, shape, rows, self._both)
            if tree is not None:
                return tree
        found = self._keep_accepted(update)
        starts = [taken + kept for taken, kept in zip(self.taken, found, strict=True)]
        left = [count - known for count, known in zip(update.counts, starts, strict=True)]
        roots = update.roots[:, None]
        lower, none = RunAhead(self.run.cache, self.last_position), torch.zeros_like(roots)
        if self._at_once and not any(left):
            newest = self._features(roots, none, lower)[:, 0]
            self.cache.commit([range(1)] * len(left))
        else:
            hidden = self.run.ahead(roots, none, *lower.place(roots, none))
            newest = self._take_in(update.taps, starts, left, hidden)
        self.taken = [1] * len(left)
        upper = RunAhead(self.cache, self.last_position)

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            if self._finds:
                self._expanded.append((tokens, parents))
            if self._at_once:
                return self.drafter.exit.head(self._features(tokens, parents, lower))
            level = self.run.ahead(tokens, parents, *lower.place(tokens, parents))
            return self.drafter.exit.head(self._exit(level, *upper.place(tokens, parents)))

        return grow(update.roots, self.drafter.exit.head(newest), step, shape, rows)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)
        self.taken = [self.taken[row] for row in rows]
        self._expanded = [(tokens[list(rows)], parents[list(rows)]) for tokens, parents in self._expanded]

    def join(self, other: EarlyExitState) -> None:
        for state in (self, other):  # what was computed for candidates is computed again where they were accepted
            state.cache.rollback()
            state._expanded = []
        self.cache.join(other.cache)
        self.taken += other.taken

    def _keep_accepted(self, update: Update) -> list[int]:
        """Commit the exit layer's entries of accepted candidates; return their number for every row."""
        if not self._expanded:
            self.cache.rollback()
            return [0] * len(update.counts)
        decided, *lists = listed([update.tokens, *(part for level in self._expanded for part in level)])
        levels = list(zip(lists[::2], lists[1::2], strict=True))
        self._expanded = []
        paths = []
        for row, (tokens, count) in enumerate(zip(decided, update.counts, strict=True)):
            path, above, first = list[int](), 0, 0
            for token, (level_tokens, level_parents) in zip(tokens[: count - 1], levels, strict=False):
                nodes = zip(level_tokens[row], level_parents[row], strict=True)
                above = next((place for place, node in enumerate(nodes) if node == (token, above)), -1)
                if above < 0:
                    break
                path.append(first + above)
                first += len(level_tokens[row])
            paths.append(path)
        self.cache.commit(paths)
        return [len(path) for path in paths]

    def _features(self, tokens: Tensor, parents: Tensor, lower: RunAhead) -> Tensor:
        """Run a level through the first layers and the exit layer; return `(rows, nodes, hidden)` after the norm."""
        inputs = self.drafter.target.inputs(*lower.place(tokens, parents), self.run.cache)
        self.cache.reserve(tokens.shape[1], tokens.device)
        features, hidden = self.drafter.shortcut(input_ids=tokens, **{**inputs, "past_key_values": self._both})
        self.run.passed(tokens, parents, hidden)
        return features

    def _take_in(self, taps: Tensor, starts: Sequence[int], counts: Sequence[int], hidden: Tensor) -> Tensor:
        """Run the exit layer over pending decided tokens and the root; return `(rows, hidden)` at the root.

        Args:
            taps: `(rows, m, hidden)` early hidden states of the update.
            starts: each row's index of its first pending token.
            counts: each row's number of pending tokens.
            hidden: `(rows, 1, hidden)` early hidden state of the root.
        """
        device, longest = taps.device, max(counts)
        index = sent(starts, device)[:, None] + counting(0, longest + 1, device)
        index = index.clamp_(max=taps.shape[1] - 1)[..., None]
        new = taps.gather(1, index.expand(-1, -1, taps.shape[-1]))
        new[counting(0, len(counts), device), sent(counts, device)] = hidden[:, 0]
        whole = [count + 1 for count in counts]
        return take_in(
            self.cache, whole, self.last_position, device, lambda piece, *placed: self._exit(new[:, piece], *placed)
        )

    def _exit(self, hidden: Tensor, positions: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        inputs = self.drafter.target.inputs(positions, mask, slots, self.cache)
        return self.drafter.exit.features(hidden, **inputs)


class _BothCaches(LayerCache):
    """A cache for one forward: the target's cache for its first layers, and the exit layer's own after them.

    Both have the same slots: the target's holds the root among its pending tokens, the other among its committed ones.
    """

    def __init__(self, first: SlotCache, own: SlotCache, layers: int):
        super().__init__(layers=[])
        self.first, self.own, self.cut = first, own, layers

    @property
    def lengths(self) -> list[int]:
        """The committed tokens of every row of the target's cache, by which compiled forwards recognise a decoding
        step."""
        return self.first.lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        cache = self.first if layer_idx < self.cut else self.own
        return cache.update(key_states, value_states, layer_idx)

    def whole(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        cache = self.first if layer_idx < self.cut else self.own
        return cache.whole(key_states, value_states, layer_idx)

    @property
    def room(self) -> int:
        return min(self.first.room, self.own.room)

    @property
    def capacity(self) -> int:
        return min(self.first.capacity, self.own.capacity)

    def room_for(self, pending: int) -> None:
        for cache in (self.first, self.own):
            cache.room_for(pending)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit what a draft took in, up to its root, to the exit layer's own cache."""
        self.own.advance(counts)

    @property
    def addresses(self) -> tuple[int, ...]:
        return (*self.first.addresses, *self.own.addresses)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.first.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.first.get_mask_sizes(query_length)

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def max_batch_size(self) -> int:
        return self.first.rows
