"""What a benchmark has found, as JSON and on a terminal. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from outdraft.evaluation.environment import busy
from outdraft.evaluation.measure import Run
from outdraft.evaluation.questions import LeftOut, Question
from outdraft.evaluation.report import WIDE, closing, group_table, rendered
from outdraft.evaluation.summary import Summary, scattered


@dataclass
class Comparison:
    """All contenders at one temperature."""

    temperature: float
    summaries: list[Summary]
    """Over all questions."""
    runs: dict[str, list[Run]]
    groups: dict[str, list[Summary]] = field(default_factory=dict)
    """Over the questions of each group (task)."""
    questions: Sequence[Question] = ()

    def __getitem__(self, name: str) -> Summary:
        return next(summary for summary in self.summaries if summary.name == name)

    @property
    def cut_short(self) -> int:
        """Conversations of some contender that ended early, since the next turn did not fit the context."""
        return sum(
            len(run.answers) < len(self.questions[run.prompt].turns)
            for own in self.runs.values()
            for run in own
            if self.questions
        )


@dataclass
class BenchResult:
    """Comparisons at every temperature, and what they were made on."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    comparisons: list[Comparison]
    questions: Sequence[Question] = ()
    left_out: Sequence[LeftOut] = ()
    """Lines that could not be used, and questions too long for the model."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "left_out": [one.as_dict() for one in self.left_out],
            "results": [
                {
                    "temperature": one.temperature,
                    "verdict": closing(one.summaries),
                    "disturbed": scattered(one.runs),
                    "conversations_cut_short": one.cut_short,
                    "methods": {s.name: s.as_dict() for s in one.summaries},
                    "groups": {
                        group: {s.name: s.as_dict() for s in summaries} for group, summaries in one.groups.items()
                    },
                }
                for one in self.comparisons
            ],
        }

    def show(self, console: Console) -> None:
        """Print a table for every temperature, and one by group where there are several."""
        facts = self.environment
        console.print(
            f"{facts['cpu']}, {facts['threads']} threads, {facts['device']}, {facts['dtype']}, {facts['backend']} "
            f"backend; {self.settings['prompts']} prompts, {self.settings['repetitions']} repetitions",
            markup=False,
        )
        for one in self.comparisons:
            console.print(rendered(one.summaries, one.temperature, wide=console.width >= WIDE))
            if len(one.groups) > 1:
                console.print(group_table(one.groups, one.temperature))
            if one.cut_short:
                console.print(f"{one.cut_short} conversations ended early: the next turn did not fit the context")
            console.print(closing(one.summaries), style="bold", markup=False)
        for note in (busy(facts), *(scattered(one.runs) for one in self.comparisons)):
            if note is not None:
                console.print(note)
        for left in self.left_out[:8]:
            console.print(f"left out: {left.source}: {left.reason}", markup=False)
        if len(self.left_out) > 8:
            console.print(f"... and {len(self.left_out) - 8} more left out (all with --json)")
