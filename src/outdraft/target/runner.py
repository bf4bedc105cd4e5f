"""The runner of the target for the rows of one batch: their prompts, then one tree per round, over one cache.

If a drafter consists of the target's own first layers, those may run ahead over candidates. On a CPU verification of
the tree reuses their results, so that they run once per token. Elsewhere the host would wait for the tree to find them;
they run again over the whole tree, which reads the weights no more often, as leaves never ran ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.core.tensors import causal, counting, integers, listed, read_freely, sent
from outdraft.core.tree import Tree
from outdraft.target.cache import SlotCache
from outdraft.target.views import Reads

if TYPE_CHECKING:
    from outdraft.target.target import Target

PREFILL_CHUNK = 1024
"""Prompt tokens per forward, which bounds the mask and the attention scores of long prompts."""

WORTHWHILE = 512
"""Tokens of a batch, padding included, up to which prompts of any lengths run together."""

PLAIN = Reads()
"""Reads of the features alone."""


class Output(NamedTuple):
    """The output of a forward of the target for every token."""

    features: Tensor
    """`(rows, tokens, hidden)` the last hidden state after the final norm, which the head reads."""
    taps: Tensor
    """`(rows, tokens, width)` what the drafter reads of the target (`Reads`)."""

    @classmethod
    def cat(cls, pieces: Sequence[Output]) -> Output:
        """Concatenate pieces that follow each other."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(*(torch.cat(part, dim=1) for part in zip(*pieces, strict=True)))


class ModelRunner:
    """Runs the target with the cache of the rows that it decodes.

    Args:
        cache: an empty cache for these rows.
        reads: what is read of the target for every token.
    """

    def __init__(self, target: Target, cache: SlotCache, reads: Reads = PLAIN):
        self.target, self.cache, self.reads = target, cache, reads
        self._levels: list[_Level] = []  # levels that ran ahead since the last tree, in slot order

    def prefill(self, prompts: Sequence[Tensor]) -> Output:
        """Run `(tokens,)` prompts of any lengths and commit them; outputs after a row's own end are meaningless.

        Prompts of very different lengths run in groups of like length, since padding costs as much as tokens do.
        """
        groups = _of_like_length([len(prompt) for prompt in prompts])
        if len(groups) == 1:
            return Output.cat(list(self.prefill_in_pieces(prompts)))
        outputs: list[Output] = []
        self.cache.select_rows([])
        for group in groups:
            own = self.target.new_cache(len(group), len(prompts[group[0]]))
            outputs.append(ModelRunner(self.target, own, self.reads).prefill([prompts[row] for row in group]))
            self.cache.join(own)
        order = [row for group in groups for row in group]
        index = sorted(range(len(order)), key=order.__getitem__)  # of every row among the groups
        self.cache.select_rows(index)
        parts = ([part for output in own for part in output] for own in zip(*outputs, strict=True))
        return Output(*(pad_sequence([whole[at] for at in index], batch_first=True) for whole in map(list, parts)))

    def prefill_in_pieces(self, prompts: Sequence[Tensor], most: int | None = None) -> Iterator[Output]:
        """Run prompts as `prefill` does, in pieces of at most `most` tokens of every row."""
        most = most or PREFILL_CHUNK
        target, cache = self.target, self.cache
        longest = max(len(prompt) for prompt in prompts)
        # Padding repeats the prompt: on one token over and over models are chaotic, so that no forwards compare.
        padded = [prompt.repeat(-(-longest // len(prompt)))[:longest] for prompt in prompts]
        tokens = torch.stack(padded).to(target.device)
        for start in range(0, longest, most):
            piece = tokens[:, start : start + most]
            count = piece.shape[1]
            slots = cache.reserve(count, target.device)
            mask = causal(len(prompts), count, target.device)
            # Rows that ended before this piece write slots that are never committed.
            output = self.forward(piece, slots.clamp(max=target.context_length - 1), mask, slots)
            cache.commit([range(max(0, min(count, len(prompt) - start))) for prompt in prompts])
            yield output

    def tree(self, tree: Tree) -> Output:
        """Run every node of the trees at once, each seeing the committed tokens and its ancestors only.

        The nodes stay pending in the cache, in the order of the tree. On a CPU the first part runs only over nodes that
        it has not seen.
        """
        if self._levels and read_freely(self.target.device):
            return self._tree_after_running_ahead(tree)
        if self._levels:
            self._levels = []
            self.cache.rollback()
        slots = self.cache.reserve(tree.nodes, self.target.device)
        return self.forward(tree.tokens, self.positions(tree), tree.ancestors, slots)

    def positions(self, tree: Tree) -> Tensor:
        """Return the `(rows, nodes)` positions of a tree after the committed tokens.

        Candidates past the context's end are verified at its last position and then cut: their verdict is never used.
        """
        lengths, last = self.cache.lengths, self.target.context_length - 1
        positions = integers(lengths, self.target.device)[:, None] + tree.depths
        # No node lies deeper than there are nodes.
        return positions if max(lengths) + tree.nodes <= last else positions.clamp(max=last)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, slots: Tensor) -> Output:
        """Run `(rows, tokens)` over reserved slots; the last three arguments as in `attention_mask`."""
        if not self.reads.layers:
            features = self.target.forward(tokens, positions, mask, slots, self.cache)
            return Output(features, features if self.reads.features else features[..., :0])
        inputs = self.target.inputs(positions, mask, slots, self.cache)
        return Output(*self.target.reader(self.reads)(input_ids=tokens, **inputs))

    def ahead(self, tokens: Tensor, parents: Tensor, positions: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        """Run the first part over a level of `(rows, nodes)` candidates; the first call runs it over the roots.

        Args:
            parents: indices of their parents in the level before.
            positions, mask, slots: as in `attention_mask`, of all levels so far.

        Returns:
            `(rows, nodes, hidden)` output of the first part.
        """
        inputs = self.target.inputs(positions, mask, slots, self.cache)
        carried = self.target.reader(self.reads).lower(input_ids=tokens, **inputs)
        self.passed(tokens, parents, carried)
        return carried[..., : self.target.hidden_size]

    def passed(self, tokens: Tensor, parents: Tensor, carried: Tensor) -> None:
        """Record a level that has run through the first part, and its output; arguments as in `ahead`."""
        self._levels.append(_Level(tokens, parents, carried))

    def _tree_after_running_ahead(self, tree: Tree) -> Output:
        indices, missing = self._find(tree)
        carried = torch.cat([level.carried for level in self._levels], dim=1)
        self._levels = []
        device = tree.tokens.device
        index = sent(indices, device)
        if any(missing):
            carried = torch.cat([carried, self._run_missing(tree, index, missing)], dim=1)
        self.cache.arrange(indices)
        carried = carried.gather(1, index[..., None].expand(-1, -1, carried.shape[-1]))
        slots = self.cache.pending_slots(0, tree.nodes, device)
        inputs = self.target.inputs(self.positions(tree), tree.ancestors, slots, self.cache)
        return Output(*self.target.reader(self.reads).upper(carried, **inputs))

    def _find(self, tree: Tree) -> tuple[list[list[int]], list[list[int]]]:
        """Return every node's index among the pending slots, and the nodes that did not run ahead.

        A node matches the candidate that ran ahead with its token after its parent; padding stands for the root.
        """
        parts = [part for level in self._levels for part in (level.tokens, level.parents)]
        tokens_of_all, parents_of_all, *lists = listed([tree.tokens, tree.parents, *parts])
        tree.__dict__["lists"] = tokens_of_all, parents_of_all  # so that nothing asks for them again
        levels = list(zip(lists[::2], lists[1::2], strict=True))
        indices: list[list[int]] = []
        missing: list[list[int]] = []
        for row, (tokens, parents) in enumerate(zip(*tree.lists, strict=True)):
            ran: dict[tuple[int, int], int] = {}
            first = above = 0
            for level_tokens, level_parents in levels:
                for place, (token, parent) in enumerate(zip(level_tokens[row], level_parents[row], strict=True), first):
                    ran[above + parent if first else -1, token] = place
                above, first = first, first + len(level_tokens[row])
            found, new = [ran[-1, tokens[0]]], list[int]()
            for node in range(1, tree.counts[row]):
                candidate = (found[parents[node]], tokens[node])
                if candidate not in ran:
                    ran[candidate] = first + len(new)
                    new.append(node)
                found.append(ran[candidate])
            indices.append(found + [0] * (tree.nodes - len(found)))
            missing.append(new)
        return indices, missing

    def _run_missing(self, tree: Tree, indices: Tensor, missing: list[list[int]]) -> Tensor:
        """Run the first part over the nodes that did not run ahead, most of them leaves; padded with roots."""
        count, device = max(len(new) for new in missing), tree.tokens.device
        nodes = sent([new + [0] * (count - len(new)) for new in missing], device)
        pending = self.cache.pending
        self.cache.reserve(count, device)
        slots = self.cache.pending_slots(0, pending + count, device)
        rows = counting(0, len(missing), device)[:, None]
        # Several nodes may share an index (padding has the root's), which is seen if any of them is.
        mask = torch.zeros(len(missing), count, pending + count, dtype=torch.int, device=device)
        mask.scatter_add_(2, indices[:, None].expand(-1, count, -1), tree.ancestors[rows, nodes].int())
        positions = self.positions(tree)
        everywhere = torch.zeros_like(slots).scatter_(1, indices, positions)
        everywhere[:, pending:] = positions.gather(1, nodes)
        inputs = self.target.inputs(everywhere, mask > 0, slots, self.cache)
        return self.target.reader(self.reads).lower(input_ids=tree.tokens.gather(1, nodes), **inputs)


def _of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the rows in groups, the longest first: one group where padding them all is a third of the work at most."""
    if max(lengths) * len(lengths) <= max(1.5 * sum(lengths), WORTHWHILE):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] * 1.5 < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


class _Level(NamedTuple):
    """Candidates of one run of the first part, each tensor `(rows, nodes, ...)`."""

    tokens: Tensor
    parents: Tensor
    carried: Tensor
