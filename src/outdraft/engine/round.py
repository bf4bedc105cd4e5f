"""The round: draft a tree, run the target over it once, verify, commit.

For a batch of rows, each with its own length, sampling settings and dice. The only place that knows target, drafter
and verification at once; it knows nothing of text, files or the command line. Plain decoding is the same loop with
trees of nothing but their roots, so both are measured on the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from outdraft.control.base import Controller
from outdraft.control.budget import DraftBudget
from outdraft.control.costs import Costs
from outdraft.control.tuner import Choice
from outdraft.core.sampling import Chance, Warper, draw_each, laws_of
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.core.tensors import integers, sent
from outdraft.core.tree import Tree
from outdraft.core.verify import Verdict, verify
from outdraft.drafting.base import Drafter, DraftState, Pace, RowContext, Update
from outdraft.drafting.repeats import Others, Repeats, spliced
from outdraft.engine.history import Prefix, Prefixes
from outdraft.errors import first_line
from outdraft.target.exact.target import ExactTarget
from outdraft.target.runner import Output, TargetRun
from outdraft.target.target import Target

MOST_NODES = 256
"""Of all rows, up to which they are padded to the longest repetition: what a compiled forward takes."""

PIECE = 256
"""Tokens of a prompt whose logits are made at once, where somebody watches them."""

UNTOLD = 64
"""Tokens of a row that the drafter may be behind before it is asked again, whatever is repeated: it takes them in at
once, in all rows as many as in the one that has most."""


@dataclass
class Row:
    """One sequence being decoded.

    Attributes:
        prompt: token ids.
        warper: logits to law.
        chance: its dice, which drafting and verification share.
        max_new_tokens: decided tokens at most.
        stop_token_ids: a token of these ends the row and is part of it.
        should_stop: called with the new tokens after each of them; True ends the row there (stop strings).
        tokens: decided so far, the prompt not included.
        finish_reason: `eos`, `length`, `stop`, `context` or `error`; None while the row is running.
        error: why it could not go on, where that is how it ended.
        accepted: for every decided token, whether it was drafted.
        controller: says how far to draft for it; None drafts as far as the shape allows.
        repeats: when what the text repeats is drafted in the drafter's place; None asks the drafter always.
        watch: called with the target's `(tokens, vocab)` logits of newly decided tokens, once those are in `tokens`.
        watch_prompt: called with those of the prompt's tokens but the first, some at a time.
    """

    prompt: list[int]
    warper: Warper
    chance: Chance
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    should_stop: Callable[[list[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    accepted: list[bool] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    controller: Controller | None = None
    repeats: Repeats | None = None
    watch: Callable[[Tensor], None] | None = None
    watch_prompt: Callable[[Tensor], None] | None = None

    def extend(self, tokens: Sequence[int], context_length: int, drafted: int) -> int:
        """Append decided tokens one by one, the first of them drafted, ending exactly where plain decoding would.

        Returns:
            How many were taken.
        """
        for taken, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self.accepted.append(taken <= drafted)
            if token in self.stop_token_ids:
                self.finish_reason = "eos"
            elif self._stops():
                self.finish_reason = "stop"
            elif self.error is not None:
                pass
            elif len(self.tokens) >= self.max_new_tokens:
                self.finish_reason = "length"
            elif len(self.prompt) + len(self.tokens) >= context_length:
                self.finish_reason = "context"
            if self.finish_reason is not None:
                return taken
        return len(tokens)

    def fail(self, error: Exception | None = None) -> None:
        """It ends here, alone: its logits are no numbers, or what was given to it raised an error."""
        self.finish_reason = "error"
        self.error = (
            f"after {len(self.tokens)} new tokens the logits are not finite (NaN, infinite, or every token ruled out): "
            "the model's weights are broken, its precision is too low (try float32), or a logits processor did it"
            if error is None
            else f"after {len(self.tokens)} new tokens {type(error).__name__} was raised: {first_line(error)}"
        )

    def tell(self, watch: Callable[[Tensor], None] | None, logits: Tensor) -> None:
        """One of those who watch it; what fails is its own."""
        try:
            if watch is not None:
                watch(logits)
        except Exception as error:
            self.fail(error)

    def _stops(self) -> bool:
        try:
            return self.should_stop is not None and self.should_stop(self.tokens)
        except Exception as error:  # stopping criteria and tokenizers are the user's
            self.fail(error)
            return False


@torch.inference_mode()
def decode(
    target: Target, drafter: Drafter | None, rows: Sequence[Row], shape: TreeShape, costs: Costs | None = None
) -> Iterator[list[Row]]:
    """Decode all rows to their ends; yields the rows that gained tokens after every round.

    Args:
        target: decides; an `ExactTarget` with the bits of plain decoding.
        drafter: proposes; None is plain decoding.
        rows: filled in place.
        shape: of the trees, at most.
        costs: told what rounds cost, where rows have controllers (all of them, then).
    """
    batch = Batch(target, drafter, [row for row in rows if row.max_new_tokens > 0], shape, costs or Costs())
    for row in rows:
        if row.max_new_tokens <= 0:
            row.finish_reason = "length"
    yield batch.prefill()
    while batch.rows:
        yield batch.round()


class Batch:
    """The rows still running, the target's cache and the drafter's state for them.

    Args:
        target: decides.
        drafter: proposes; None is plain decoding.
        rows: filled in place, each of at least one new token.
        shape: of the trees, at most; may be another one in every round.
        costs: told what rounds cost.
    """

    def __init__(self, target: Target, drafter: Drafter | None, rows: Sequence[Row], shape: TreeShape, costs: Costs):
        self.target, self.drafter, self.rows, self.shape, self.costs = target, drafter, list(rows), shape, costs
        self.clock = _Clock(target.device)
        self._unsettled: tuple[list[Any], list[Row]] | None = None  # marks of the last round, and its rows
        longest = max((len(row.prompt) + row.max_new_tokens for row in rows), default=1)
        repeated = max((row.repeats.most for row in rows if row.repeats is not None), default=0)
        self.capacity = min(longest, target.context_length) + self._slots(shape) + repeated
        self.cache = target.new_cache(len(rows), self.capacity)
        self.run = TargetRun(target, self.cache) if drafter is None else drafter.start(target, self.cache)
        if isinstance(target, ExactTarget):
            self.run = target.start(self.run)
        self.state: DraftState | None = None
        self.roots = torch.empty(0, dtype=torch.long)
        self.updates: list[Update] = []  # what the drafter has not been told yet
        self.told = False  # whether it was told anything
        self.prefixes = [Prefix(row.prompt, self.capacity, target.device, row.repeats) for row in rows]

    def prefill(self) -> list[Row]:
        """Run the prompts and decide each row's first token, as plain decoding does."""
        if not self.rows:
            return []
        self.clock.start()
        prompts = [torch.tensor(row.prompt) for row in self.rows]
        return self._begin(prompts, self.run.prefill(prompts))

    def prefill_in_pieces(self, tokens: int) -> Iterator[list[Row]]:
        """The same, giving the word back after every piece; the last one yields the rows.

        Args:
            tokens: of each row that a piece has at most.
        """
        prompts, pieces = [torch.tensor(row.prompt) for row in self.rows], list[Output]()
        self.clock.start()
        for piece in self.run.prefill_in_pieces(prompts, tokens):
            pieces.append(piece)
            self._spend()
            yield []
            self.clock.start()
        yield self._begin(prompts, Output.cat(pieces))

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch of the same target and drafter, between rounds; it is of no use after."""
        self.cache.join(other.cache)
        if self.state is not None and other.state is not None:
            self.state.join(other.state)
            self.updates = [Update.beside(Update.join(self.updates), Update.join(other.updates))]
        self.roots = torch.cat([self.roots, other.roots])
        self.rows += other.rows
        self.prefixes += other.prefixes

    def _begin(self, prompts: list[Tensor], prefilled: Output) -> list[Row]:
        """Decide each row's first token."""
        features, taps = prefilled
        counts = [len(prompt) for prompt in prompts]
        index = torch.arange(len(counts), device=features.device)
        logits = self.target.head(features[index, integers([n - 1 for n in counts], features.device)])
        warpers, chances = [row.warper for row in self.rows], [row.chance for row in self.rows]
        drawn = draw_each(chances, laws_of(warpers, logits, Prefixes(self.prefixes)))
        last = logits.shape[-1] - 1
        self.roots = drawn.clamp(max=last)
        lost = [token > last for token in drawn.tolist()]
        firsts = self.roots.tolist()
        for i, (row, prefix) in enumerate(zip(self.rows, self.prefixes, strict=True)):
            prefix.append([firsts[i]])
            if row.finish_reason is not None:  # taken out amid its prompt
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
        if self.drafter is not None:
            # Pairs (token one ahead, tap): the prompt from its second token on, then the token just decided.
            tokens = torch.zeros(features.shape[:2], dtype=torch.long)
            for i, prompt in enumerate(prompts):
                tokens[i, : counts[i] - 1] = prompt[1:]
                tokens[i, counts[i] - 1] = firsts[i]
            self.updates = [Update(tokens.to(features.device), taps, counts)]
            self.state = self.drafter.begin([prompt.to(features.device) for prompt in prompts], self.run)
        self._spend()
        return self.leave()

    def _spend(self) -> None:
        """The time since the clock was started went into prompts."""
        self.clock.mark()
        (seconds,) = self.clock.laps()
        for row in self.rows:
            row.statistics.prefill_seconds += seconds

    def round(self) -> list[Row]:
        """Draft, verify, commit once for all running rows; the rows that gained tokens."""
        self.clock.start()
        repeated = self._repeated()
        shape, choice, pace = self.shape, None, None
        if not all(repeated):
            shape, choice = self._choose()
            pace = self._pace(shape) if choice is None else None
            if choice is not None or pace is not None:  # they weigh what the drafter's own rounds bring
                repeated = [[]] * len(self.rows)
        tree = self._draft(shape, pace, repeated)
        self.clock.mark()
        features, taps = self.run.tree(tree)
        logits = self.target.logits(features, tree.counts)
        self.clock.mark()
        warpers, chances = [row.warper for row in self.rows], [row.chance for row in self.rows]
        verdicts = verify(tree, logits, warpers, Prefixes(self.prefixes), chances)
        self._settle()
        self._commit(tree, taps, logits, verdicts, repeated)
        self.clock.mark()
        if choice is None and pace is None:  # nobody needs the times now, and they may not be known yet
            self._unsettled = self.clock.marks, list(self.rows)
            return self.leave()
        drafting, verifying, rest = self.clock.laps()
        if choice is not None:
            choice.observe([len(verdict.path) - 1 for verdict in verdicts], drafting + verifying + rest)
        if pace is not None:
            depths = [row.statistics.depths[-1] for row in self.rows]
            accepted = [len(verdict.path) - 1 for verdict in verdicts]
            emitted = [len(verdict.tokens) for verdict in verdicts]
            pace.observe(depths, accepted, emitted, tree.counts, verifying, rest)
        for row in self.rows:
            row.statistics.add_seconds(drafting, verifying, rest)
        return self.leave()

    def _settle(self) -> None:
        """Count the last round's time, which its device has spent by now."""
        if self._unsettled is not None:
            marks, rows = self._unsettled
            self._unsettled = None
            for row in rows:
                row.statistics.add_seconds(*self.clock.laps(marks))

    def _choose(self) -> tuple[TreeShape, Choice | None]:
        """This round's shape, and who is told what came of it, where a tuner chooses whole shapes."""
        controller = self.rows[0].controller
        pacer = controller.pacer if controller is not None and self.state is not None else None
        tuner = pacer.tuner(self.shape, len(self.rows)) if pacer is not None else None
        if tuner is None:
            return self._fitting(self.shape), None
        choice = tuner.choose(len(self.rows), self._intake)
        shape = self._fitting(choice.shape)
        return shape, choice if shape == choice.shape else None

    def _pace(self, shape: TreeShape) -> DraftBudget | None:
        """What the rows' controllers say of this round."""
        controllers = [row.controller for row in self.rows if row.controller is not None]
        if self.state is None or not controllers:
            return None
        levels, nodes = (0 if shape.size == 1 else shape.depth + 1), min(shape.top_k, shape.size - 1)
        return DraftBudget(controllers, self.costs, levels, nodes, self._intake, self.clock.now)

    @property
    def _intake(self) -> int:
        """Tokens of a row, at most, that the drafter was not told yet."""
        return sum(max(update.counts) for update in self.updates)

    def _draft(self, shape: TreeShape, pace: Pace | None, repeated: Sequence[list[int]]) -> Tree:
        if all(repeated):
            roots = self.roots.tolist()
            return Tree.listed(
                [[root, *chain] for root, chain in zip(roots, repeated, strict=True)], self.target.device
            )
        if self.state is None or shape.size == 1 or (pace is not None and not any(pace.going)):
            return Tree.roots(self.roots)
        if pace is None and any(repeated):
            pace = Others([not chain for chain in repeated])
        context = RowContext(
            Prefixes(self.prefixes),
            [row.warper for row in self.rows],
            [row.chance for row in self.rows],
            pace,
        )
        update, self.updates = Update.join(self.updates), []
        self.told = True
        tree = self.state.propose(update, shape, context)
        return spliced(tree, repeated) if isinstance(pace, Others) else tree

    def _repeated(self) -> list[list[int]]:
        """Of every row, the candidates that its own text gives, none where it repeats nothing.

        In company a greedy row waits for all others to repeat themselves, too: all pay for the longest, and padding the
        drafter's trees to it was slower in every batch. Rows that draw do not wait, and have no more candidates than
        the tree, for a seed's text is to be the same in any company. The first round is the drafter's, which then has
        read the prompts before these rows join others.
        """
        if not self.told or self.shape.size == 1 or self._intake > UNTOLD:
            return [[]] * len(self.rows)
        greedy = [row.warper.greedy for row in self.rows]
        limit = max(1, MOST_NODES // len(greedy) - 1) if all(greedy) else self.shape.size - 1
        if self.target.slot_limit is not None:
            left = self.target.slot_limit - max(self.cache.lengths) - self._slots(self.shape) - self._intake
            limit = max(0, min(limit, left))
        found = [prefix.repeated(limit) for prefix in self.prefixes]
        if all(found):
            return found
        return [[] if waits else chain for chain, waits in zip(found, greedy, strict=True)]

    def _fitting(self, shape: TreeShape) -> TreeShape:
        """As much of it as still fits where a family's attention limits the slots."""
        limit = self.target.slot_limit
        if limit is None:
            return shape
        left = limit - max(self.cache.lengths)
        while shape.size > 1 and self._slots(shape) > left:
            shape = shape.at_most(max(1, shape.depth), shape.size - 1)
        return shape

    def _slots(self, shape: TreeShape) -> int:
        return shape.size if self.drafter is None else self.drafter.slots(shape)

    def _commit(
        self, tree: Tree, taps: Tensor, logits: Tensor, verdicts: list[Verdict], repeated: Sequence[list[int]]
    ) -> None:
        """Keep the accepted paths in the cache, hand the decided tokens to the rows and to the next update."""
        self.cache.commit([verdict.path for verdict in verdicts])
        lost = [verdict.tokens[-1] >= logits.shape[-1] for verdict in verdicts]
        for verdict, is_lost in zip(verdicts, lost, strict=True):
            if is_lost:
                verdict.tokens[-1] = 0  # in its place until the row leaves
        counts = [len(verdict.path) for verdict in verdicts]
        longest = max(counts)
        padding = [[0] * (longest - count) for count in counts]
        paths = [verdict.path + more for verdict, more in zip(verdicts, padding, strict=True)]
        decided = [verdict.tokens + more for verdict, more in zip(verdicts, padding, strict=True)]
        newest = [[verdict.tokens[-1]] for verdict in verdicts]
        # One transfer: what was decided, where it lies in the tree, and the next roots.
        packed = sent([[*a, *b, *c] for a, b, c in zip(decided, paths, newest, strict=True)], taps.device)
        self.roots = packed[:, -1]
        if self.state is not None:
            kept = packed[:, longest:-1, None].expand(-1, -1, taps.shape[-1])
            self.updates.append(Update(packed[:, :longest], taps.gather(1, kept), counts))
        for i, (row, prefix, verdict) in enumerate(zip(self.rows, self.prefixes, verdicts, strict=True)):
            drafted = len(verdict.tokens) - 1
            taken = row.extend(
                verdict.tokens[:drafted] if lost[i] else verdict.tokens, self.target.context_length, drafted
            )
            if taken:
                row.tell(row.watch, logits[i, verdict.path[:taken]])
            if lost[i] and row.finish_reason is None:
                row.fail(row.warper.error)
            prefix.append(verdict.tokens)
            row.statistics.add_round(tree.counts[i] - 1, tree.deepest[i], len(verdict.path) - 1, taken)
            row.statistics.repeats += bool(repeated[i]) and tree.counts[i] > 1

    def leave(self) -> list[Row]:
        """Let finished rows go; all that were there."""
        gained = list(self.rows)
        if any(row.finish_reason is not None for row in self.rows):
            self._settle()
        staying = compacted([row.finish_reason is None for row in self.rows])
        for row in self.rows:
            if row.finish_reason is not None and row.controller is not None:
                row.controller.finish()
        if len(staying) < len(self.rows):
            self.rows = [self.rows[i] for i in staying]
            self.prefixes = [self.prefixes[i] for i in staying]
            if staying:
                self.cache.select_rows(staying)
                self.roots = self.roots[staying]
                self.updates = [update.select_rows(staying) for update in self.updates]
                if self.state is not None:
                    self.state.select_rows(staying)
        return gained


def compacted(staying: Sequence[bool]) -> list[int]:
    """The places of those that stay, the last ones in the gaps that others leave, so that few are moved."""
    order = list(range(sum(staying)))
    behind = [place for place in range(len(order), len(staying)) if staying[place]]
    for place in order:
        if not staying[place]:
            order[place] = behind.pop()
    return order


class _Clock:
    """Seconds between marks. Where work is asynchronous the device keeps them, so that no mark waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def now(self) -> float:
        """A time of the host's, once all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Forget all marks and set the first."""
        self.marks = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self, marks: list[Any] | None = None) -> list[float]:
        """Seconds from each mark to the next, of those set since the start or of earlier ones; waits for the last."""
        marks = self.marks if marks is None else marks
        pairs = list(pairwise(marks))
        if self.device.type == "cuda":
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
