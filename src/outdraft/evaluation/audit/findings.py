"""The settings of an audit, its findings, Holm's correction of their p-values, the verdict, and terminal output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outdraft.core.sampling_settings import SamplingSettings
from outdraft.errors import UserError, refuse_below
from outdraft.evaluation.audit.stock import Noise

QUICK = {"limit": 8, "max_new_tokens": 24, "text_prompts": 3, "texts": 16, "seeds": 2, "trees": 8}
"""The largest values of a quick look."""
QUICK_VARIATION = 0.1
"""The error of the first tokens that a quick look must find."""


@dataclass
class AuditSettings:
    """Settings of an audit: the checks, their sizes and their chance of error."""

    generation: dict[str, Any] = field(default_factory=dict)
    """Sampling, tree and controller settings as `generate` takes them; without a temperature only greedy decoding is
    checked."""
    greedy: bool = True
    """Compare greedy texts too where the settings sample."""
    data: Path | None = None
    """Prompts: JSON lines or text; built-in ones if left out."""
    limit: int = 24
    """Prompts to use at most."""
    max_new_tokens: int = 48
    """Length of the texts that are compared."""
    total_variation: float = 0.02
    """The error in the output distribution of the first tokens that must be found, in total variation."""
    power: float = 0.95
    """Probability that such an error is found; with `total_variation` and `alpha` it sets the sample size."""
    alpha: float = 0.001
    """Probability that a lossless decoder is called wrong, over all statistical tests together."""
    seed: int = 0
    """The seed of all draws."""
    batch_size: int = 256
    """Rows sampled at once; greedy texts are decoded eight at a time."""
    first_tokens: int = 3
    """New tokens whose joint distribution is tested against the exact one."""
    prefixes: int = 4
    """Prefixes of texts after which that distribution is tested."""
    cells: int = 8
    """The most continuations that are tested apart after each prefix."""
    text_prompts: int = 8
    """Prompts of the longer sampled texts."""
    texts: int = 32
    """Texts sampled after each of these prompts, with the drafter and without."""
    seeds: int = 4
    """Seeds of the texts after each of these prompts that are compared with stock `generate`'s."""
    permutations: int = 9999
    """Permutations of the two-sample test; its p-value cannot fall below 1 / (permutations + 1)."""
    trees: int = 24
    """Draft trees whose every node is recomputed one token at a time."""
    quick: bool = False
    """Fewer and shorter texts, and only larger errors of the first tokens: a look of minutes. The verdict says so."""
    output_dir: Path | None = None
    """Folder that keeps what is finished; the same command goes on from there."""

    def __post_init__(self) -> None:
        # What is tested statistically is the rule that throws dice. Shared noise leaves nothing to chance: its texts
        # are plain decoding's own.
        self.generation = {"coupling": "dice", **self.generation}
        refuse_below(self, first_tokens=2, cells=2, texts=2, limit=1, max_new_tokens=1, batch_size=1, prefixes=1)
        refuse_below(self, text_prompts=1, seeds=1, permutations=1, trees=1)
        if not 0 < self.total_variation < 1:
            raise UserError(f"--total-variation must lie between 0 and 1, not {self.total_variation:g}")
        if not 0 < self.alpha < 0.5:
            raise UserError(f"--alpha must lie between 0 and 0.5, not {self.alpha:g}")
        if not 0.5 <= self.power < 1:
            raise UserError(f"--power must be at least 0.5 and less than 1, not {self.power:g}")

    def seed_for(self, use: str, *place: int) -> int:
        """Return the seed of one use of random numbers, such as the texts of prompt `place`. It is far from those of
        other uses and of other base seeds, though decoding counts on from it, a seed a row."""
        spread = np.random.SeedSequence([self.seed % 2**64, crc32(use.encode()), *place])
        return int(spread.generate_state(1, np.uint64)[0] >> np.uint64(2))

    def made_quick(self) -> AuditSettings:
        """The same as a quick look: what `QUICK` names becomes as small as that, unless it is smaller already."""
        harder = max(self.total_variation, QUICK_VARIATION)
        fewer = {name: min(getattr(self, name), most) for name, most in QUICK.items()}
        return replace(self, quick=True, total_variation=harder, **fewer)

    @property
    def sampling(self) -> dict[str, Any]:
        """The generation settings that shape the output distribution, not the tree."""
        known = SamplingSettings.__dataclass_fields__
        return {name: value for name, value in self.generation.items() if name in known or name == "do_sample"}

    @property
    def greedy_generation(self) -> dict[str, Any]:
        """The same settings at temperature 0; filters fall away, for the distribution is a point mass."""
        left_out = ("temperature", "top_k", "top_p", "min_p")
        return {name: value for name, value in self.generation.items() if name not in left_out} | {"do_sample": False}


SHOWN_LINES = 6
"""The number of a check's details on a terminal; the JSON and the report have all of them."""


@dataclass
class Finding:
    """The result of one check.

    Attributes:
        name: its key in reports.
        question: the check as a question, whose answer is yes for a lossless decoder.
        passed: True for yes; `judge` sets it for statistical tests.
        evidence: the result's figures in a sentence or two.
        p_value: p-value of a statistical test, before any correction.
        adjusted: p-value after Holm's correction, which is compared with alpha.
        figures: figures for JSON.
        lines: details worth a line each.
        seconds: duration of the check.
    """

    name: str
    question: str
    passed: bool
    evidence: str
    p_value: float | None = None
    adjusted: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "passed": self.passed,
            "evidence": self.evidence,
            "p_value": self.p_value,
            "p_value_holm": self.adjusted,
            "seconds": self.seconds,
            **self.figures,
            "details": self.lines,
        }


def judge(findings: Sequence[Finding], alpha: float) -> None:
    """Set `passed` of the statistical tests: True where Holm's adjusted p-value is at least alpha."""
    tests = [finding for finding in findings if finding.p_value is not None]
    for finding, adjusted in zip(tests, holm([finding.p_value or 0.0 for finding in tests]), strict=True):
        finding.adjusted = adjusted
        finding.passed = adjusted >= alpha


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: rejecting those below alpha errs with probability at most alpha, over all together."""
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass
class Audit:
    """All findings of an audit, and the verdict.

    Attributes:
        settings: settings of the audit and the model, for reports.
        environment: machine, versions, precision, backend.
        findings: findings in the order of the checks.
        noise: rounding noise of this model, precision and backend.
        alpha: joint level of the statistical tests.
        seconds: duration of the whole audit.
        expected_seconds: the forecast from before it began.
        stopped: the check that ran when the user ended the audit; None for a complete audit.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    findings: list[Finding]
    noise: Noise
    alpha: float
    seconds: float
    expected_seconds: float = 0.0
    stopped: str | None = None

    @property
    def kept(self) -> bool | None:
        """True if every check passed, False if one failed; None where a stopped audit has no failure."""
        if all(finding.passed for finding in self.findings):
            return True if self.stopped is None else None
        return False

    @property
    def verdict(self) -> str:
        if self.kept:
            found = "KEPT: no check found the output to differ from what the target alone gives."
            return found + self._unseen + self._quick
        if self.kept is None:
            names = ", ".join(finding.name for finding in self.findings)
            return (
                f"STOPPED during the check '{self.stopped}': those that were finished ({names}) found no difference, "
                "which says nothing about the others."
            )
        failed = [finding.name for finding in self.findings if not finding.passed]
        end = "" if self.stopped is None else f" Stopped during the check '{self.stopped}'."
        return f"NOT KEPT: the output differs from what the target alone gives ({', '.join(failed)}).{end}"

    @property
    def _quick(self) -> str:
        """A remark on the limits of a quick audit."""
        if not self.settings.get("quick"):
            return ""
        found = self.settings
        seen = f"{found['prompts']} prompts of {found['max_new_tokens']} tokens"
        if any(finding.name == "beginnings" for finding in self.findings):
            seen += f", and a total variation of {found['total_variation']:g} in the first tokens"
        return f" A quick look ({seen}): without --quick the audit finds smaller errors."

    @property
    def _unseen(self) -> str:
        """A warning where no candidate was drafted, or none accepted."""
        runs = [finding.figures["drafting"] for finding in self.findings if "drafting" in finding.figures]
        if not any(run["drafted"] for run in runs):
            return " But nothing was drafted, so this says nothing about the drafter."
        if not any(run["accepted"] for run in runs):
            return " But no candidate was ever accepted, so this says little: try a better drafter or other prompts."
        return ""

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "verdict": self.verdict,
            "alpha": self.alpha,
            "stopped_during": self.stopped,
            "seconds": self.seconds,
            "expected_seconds": self.expected_seconds,
            "checks": {finding.name: finding.as_dict() for finding in self.findings},
            "noise": asdict(self.noise),
            "settings": self.settings,
            "environment": self.environment,
        }


def show(audit: Audit, console: Console) -> None:
    facts = audit.environment
    console.print(
        f"{audit.settings['method']}, {facts['device']}, {facts['dtype']}, {facts['backend']} backend; "
        f"{sampling_line(audit)}",
        markup=False,
    )
    table = Table(show_lines=True)
    table.add_column("check", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for finding in audit.findings:
        mark = Text("yes", style="green") if finding.passed else Text("NO", style="bold red")
        adjusted = "-" if finding.p_value is None else f"{finding.p_value:.3g} ({finding.adjusted:.3g})"
        said = Group(Text(finding.question, style="bold"), Text(finding.evidence))
        table.add_row(finding.name, mark, adjusted, said)
    console.print(table)
    for finding in audit.findings:
        more = len(finding.lines) - SHOWN_LINES
        shown = finding.lines[:SHOWN_LINES] + ([f"... and {more} more (--json, --report)"] if more > 0 else [])
        for line in shown:
            console.print(Text(f"{finding.name}: {line}", style="dim"))
    if audit.noise.positions:
        console.print(Text(noise_line(audit), style="dim"))
    colour = "yellow" if audit.kept is None else "green" if audit.kept else "red"
    panel = Panel(Text(audit.verdict, style=f"bold {colour}"), border_style=colour, expand=False)
    console.print(panel, soft_wrap=False)


def sampling_line(audit: Audit) -> str:
    generation = audit.settings["generation"]
    greedy = not generation.get("temperature")
    told = [f"{name} {value}" for name, value in generation.items() if not (greedy and name == "coupling")]
    return ", ".join([*(["greedy"] if greedy else []), *told])


def noise_line(audit: Audit) -> str:
    noise = audit.noise
    return (
        f"noise floor of {audit.environment['dtype']} on the {audit.environment['backend']} backend, one token against "
        f"many in one forward of the stock model, {noise.positions} positions: logit gaps move by {noise.gap_mean:.2g} "
        f"on average and {noise.gap:.2g} at most, output distributions by a total variation of "
        f"{noise.variation_mean:.2g} and {noise.variation:.2g}; the best token differs at {noise.flips} of them"
    )
