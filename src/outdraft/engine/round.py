"""The decoding round: draft a tree, run the target over it once, verify, commit.

A round serves a batch of rows, each with its own length, sampling settings and random numbers. Plain decoding is the
same loop with trees of roots only, so both are measured on the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from outdraft.control.costs import Costs
from outdraft.core.dice import Chance, draw_each
from outdraft.core.sampling import Warper, probs_of
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import integers, sent
from outdraft.core.tree import Tree
from outdraft.core.verify import Verdict, verify
from outdraft.drafting.base import Drafter
from outdraft.engine.drafts import Drafts
from outdraft.engine.plan import Clock, Plan, plan_round, tuner_of
from outdraft.engine.rows import History, Prefixes, Row, compacted
from outdraft.target.exact.target import ExactTarget
from outdraft.target.runner import Output
from outdraft.target.target import Target

PIECE = 256
"""Prompt tokens whose logits are computed at once, where a row watches its prompt."""
SHORT = 256
"""Most tokens of a prompt that a resting drafter leaves unread, beside rows of which it has read more."""


@torch.inference_mode()
def decode(
    target: Target,
    drafter: Drafter | None,
    rows: Sequence[Row],
    shape: TreeShape,
    costs: Costs | None = None,
) -> Iterator[list[Row]]:
    """Decode all rows to their ends; yields the rows that gained tokens after every round.

    Args:
        target: the model that decides tokens; an `ExactTarget` gives the bits of plain decoding.
        drafter: the model that proposes tokens; None is plain decoding.
        rows: the rows to decode, filled in place.
        shape: largest shape of the trees.
        costs: records what rounds cost; used where rows have controllers (then all rows have one).
    """
    batch = Batch(target, drafter, [row for row in rows if row.max_new_tokens > 0], shape, costs)
    for row in rows:
        if row.max_new_tokens <= 0:
            row.finish_reason = "length"
    yield batch.prefill()
    while batch.rows:
        yield batch.round()


class Batch:
    """The rows still running, with the target's cache and the drafter's state for them.

    Args:
        rows: rows to decode, filled in place; each wants at least one new token.
        shape: largest shape of the trees; it may change every round.
        costs: as for `decode`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rows: Sequence[Row],
        shape: TreeShape,
        costs: Costs | None = None,
    ):
        self.target, self.drafts, self.rows, self.shape = target, Drafts(drafter), list(rows), shape
        self.costs = costs or Costs()
        self.clock = Clock(target.device, target.shared)
        self._unsettled: tuple[list[Any], list[Row]] | None = None  # marks of the last round, and its rows
        longest = max((len(row.prompt) + row.max_new_tokens for row in rows), default=1)
        repeated = max((row.ngrams.most for row in rows if row.ngrams is not None), default=0)
        self.capacity = min(longest, target.context_length) + self.drafts.slots(shape) + repeated
        self.cache = target.new_cache(len(rows), self.capacity)
        self.runner = target.runner(self.cache) if drafter is None else drafter.start(target, self.cache)
        if isinstance(target, ExactTarget):
            target.vouch(self.runner)
        self.roots = torch.empty(0, dtype=torch.long)
        for row in rows:
            row.shared = target.shared
        self.histories = [History(row.prompt, self.capacity, target.device, row.ngrams) for row in rows]

    def prefill(self) -> list[Row]:
        """Run the prompts and decide each row's first token, as plain decoding does."""
        if not self.rows:
            return []
        self.clock.start()
        prompts = [torch.tensor(row.prompt) for row in self.rows]
        return self._begin(prompts, self.runner.prefill(prompts))

    def prefill_in_pieces(self, tokens: int) -> Iterator[list[Row]]:
        """Run the prompts as `prefill` does, yielding after every piece; the last yield holds the rows.

        Args:
            tokens: most tokens per row in a piece.
        """
        prompts, pieces = [torch.tensor(row.prompt) for row in self.rows], list[Output]()
        self.clock.start()
        for piece in self.runner.prefill_in_pieces(prompts, tokens):
            pieces.append(piece)
            self._spend()
            yield []
            self.clock.start()
        yield self._begin(prompts, Output.cat(pieces))

    def read(self) -> bool:
        """Have the drafter read the prompts; return True if these rows can join others without a round of their own."""
        self.clock.start()
        ready = self.drafts.read()
        self._spend()
        return ready

    def rests(self, newcomers: Batch) -> bool:
        """Return True if the drafter is not asked once these rows have joined, so that it need not read their prompts.

        What it has not read is padded to the row that has most. So longer prompts are read all the same.
        """
        rows = len(self.rows) + len(newcomers.rows)
        tuner = tuner_of(self, rows)
        short = newcomers.drafts.pending <= max(SHORT, self.drafts.pending)
        return short and tuner is not None and tuner.rests(rows)

    def join(self, other: Batch) -> None:
        """Append the rows of another batch of the same target and drafter, between rounds; drop that batch after."""
        self.cache.join(other.cache)
        self.drafts.join(other.drafts)
        self.roots = torch.cat([self.roots, other.roots])
        self.rows += other.rows
        self.histories += other.histories

    def _begin(self, prompts: list[Tensor], prefilled: Output) -> list[Row]:
        """Decide each row's first token."""
        features, taps = prefilled
        counts = [len(prompt) for prompt in prompts]
        index = torch.arange(len(counts), device=features.device)
        logits = self.target.head(features[index, integers([n - 1 for n in counts], features.device)])
        drawn = draw_each(self._chances, probs_of(self._warpers, logits, Prefixes(self.histories)))
        last = logits.shape[-1] - 1
        self.roots = drawn.clamp(max=last)
        lost = [token > last for token in drawn.tolist()]
        firsts = self.roots.tolist()
        for i, (row, history) in enumerate(zip(self.rows, self.histories, strict=True)):
            history.append([firsts[i]])
            if row.finish_reason is not None:  # removed during its prompt
                continue
            if row.watch_prompt is not None:
                for start in range(0, counts[i] - 1, PIECE):
                    piece = features[i, start : min(start + PIECE, counts[i] - 1)]
                    row.tell(row.watch_prompt, self.target.head(piece))
            if lost[i]:
                row.fail(row.warper.error)
            if row.finish_reason is None:
                row.extend([firsts[i]], self.target.context_length, 0)
                row.tell(row.watch, logits[i : i + 1])
        self.drafts.begin(prompts, firsts, taps, self.runner)
        self._spend()
        return self.leave()

    def _spend(self) -> None:
        """Add the seconds since the clock started to the rows' prefill time."""
        self.clock.mark()
        (seconds,) = self.clock.laps()
        for row in self.rows:
            row.statistics.prefill_seconds += seconds

    def round(self) -> list[Row]:
        """Draft, verify and commit once for all running rows; return the rows that gained tokens."""
        self.clock.start()
        plan = plan_round(self)
        tree = self.drafts.trees(plan, self.roots, self.rows, Prefixes(self.histories))
        self.clock.mark()
        features, taps = self.runner.tree(tree)
        logits = self.target.logits(features, tree.counts)
        self.clock.mark()
        verdicts = verify(tree, logits, self._warpers, Prefixes(self.histories), self._chances)
        self._commit(tree, taps, logits, verdicts, plan)
        self.clock.mark()
        self._account(plan, tree, verdicts)
        return self.leave()

    @property
    def _warpers(self) -> list[Warper]:
        return [row.warper for row in self.rows]

    @property
    def _chances(self) -> list[Chance]:
        return [row.chance for row in self.rows]

    def _account(self, plan: Plan, tree: Tree, verdicts: Sequence[Verdict]) -> None:
        """Count the seconds of a round: at once if the plan needs them, otherwise after the device has finished."""
        if not plan.weighed:
            self._unsettled = self.clock.marks, list(self.rows)
            return
        laps = self.clock.agreed(self.clock.laps())
        plan.observe(self.rows, tree, verdicts, laps)
        for row in self.rows:
            row.statistics.add_seconds(*laps)

    def _settle(self) -> None:
        """Count the seconds of the last round, which the device has finished by now."""
        if self._unsettled is not None:
            marks, rows = self._unsettled
            self._unsettled = None
            for row in rows:
                row.statistics.add_seconds(*self.clock.laps(marks))

    def _commit(self, tree: Tree, taps: Tensor, logits: Tensor, verdicts: list[Verdict], plan: Plan) -> None:
        """Keep accepted paths in the cache; hand decided tokens to the rows and to the drafter's next update."""
        self._settle()
        self.cache.commit([verdict.path for verdict in verdicts])
        lost = [verdict.tokens[-1] >= logits.shape[-1] for verdict in verdicts]
        for verdict, is_lost in zip(verdicts, lost, strict=True):
            if is_lost:
                verdict.tokens[-1] = 0  # a placeholder until the row leaves
        counts = [len(verdict.path) for verdict in verdicts]
        longest = max(counts)
        padding = [[0] * (longest - count) for count in counts]
        paths = [verdict.path + more for verdict, more in zip(verdicts, padding, strict=True)]
        decided = [verdict.tokens + more for verdict, more in zip(verdicts, padding, strict=True)]
        newest = [[verdict.tokens[-1]] for verdict in verdicts]
        # One transfer: what was decided, where it lies in the tree, and the next roots.
        packed = sent([[*a, *b, *c] for a, b, c in zip(decided, paths, newest, strict=True)], taps.device)
        self.roots = packed[:, -1]
        self.drafts.tell(packed[:, :longest], taps, packed[:, longest:-1], [verdict.tokens for verdict in verdicts])
        for i, (row, history, verdict) in enumerate(zip(self.rows, self.histories, verdicts, strict=True)):
            drafted = len(verdict.tokens) - 1
            tokens = verdict.tokens[:drafted] if lost[i] else verdict.tokens
            taken = row.extend(tokens, self.target.context_length, drafted, copied=bool(plan.ngrams[i]))
            if taken and row.watch is not None:
                row.tell(row.watch, logits[i, verdict.path[:taken]])
            if lost[i] and row.finish_reason is None:
                row.fail(row.warper.error)
            history.append(verdict.tokens)
            row.statistics.add_round(tree.counts[i] - 1, tree.deepest[i], len(verdict.path) - 1, taken)
            row.statistics.repeats += bool(plan.ngrams[i]) and tree.counts[i] > 1
            if plan.idle:
                history.luck.observe(len(verdict.path) - 1)
        own = [i for i, ngram in enumerate(plan.ngrams) if not ngram and tree.counts[i] > 1]
        self.drafts.judge([len(verdicts[i].path) > 1 for i in own])

    def leave(self) -> list[Row]:
        """Remove finished rows; return all rows that the batch had before."""
        gained = list(self.rows)
        if any(row.finish_reason is not None for row in self.rows):
            self._settle()
        staying = compacted([row.finish_reason is None for row in self.rows])
        for row in self.rows:
            if row.finish_reason is not None and row.controller is not None:
                row.controller.finish()
        if len(staying) < len(self.rows):
            self.rows = [self.rows[i] for i in staying]
            self.histories = [self.histories[i] for i in staying]
            if staying:
                self.cache.select_rows(staying)
                self.roots = self.roots[sent(staying, self.roots.device)]
                self.drafts.select_rows(staying)
        return gained
