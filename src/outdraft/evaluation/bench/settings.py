"""The settings of `outdraft bench`, checked.

The docstrings are the command line's help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outdraft.errors import UserError

SUITES = ("spec-bench", "mt-bench", "eagle", "gsm8k", "prompts")

SHOWN = (
    *("limit", "on_bad_line", "temperatures", "repetitions", "max_new_tokens", "seed"),
    *("controllers", "peers", "peers_backend"),
)
"""Settings that a result shows as they are, beside those of what is compared."""


@dataclass
class BenchSettings:
    """Settings of `outdraft bench`."""

    model: str
    draft_models: list[str] = field(default_factory=list)
    """PATH or NAME=PATH of a drafter; may be repeated."""
    methods: list[str] | None = None
    data: Path | None = None
    """Questions or prompts: JSON lines, text, or a folder of EAGLE's sets; the shipped held-out ones if left out."""
    suite: str | None = None
    """spec-bench, mt-bench, eagle, gsm8k or prompts: what the data are; guessed from the file if left out."""
    limit: int | None = None
    """Questions to use at most, of every group (task)."""
    on_bad_line: str = "error"
    """error or skip: what becomes of lines that cannot be used and of questions too long for the model's context."""
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    repetitions: int = 1
    """Times every prompt is decoded."""
    max_new_tokens: int = 128
    seed: int = 0
    tree: dict[str, Any] = field(default_factory=dict)
    controllers: list[str] = field(default_factory=lambda: ["default"])
    """How far to draft; every drafter runs with each. `default` is what `generate` takes by itself without a seed."""
    include_transformers: bool = False
    """Time the stock `generate` of transformers too; the same as --peers generate."""
    peers: list[str] = field(default_factory=list)
    """The stock library in the same run, with commas: generate, prompt-lookup[=N], assistant[=PATH], early-exit=N."""
    peers_backend: str = "eager"
    """eager or same: whether --peers run on the model as transformers loads it, which is loaded once more for that, or
    on the target's own packed or compiled modules."""
    output_dir: Path | None = None
    """Keep every answer here, in Spec-Bench's format too; an interrupted run goes on from it."""
    report: Path | None = None
    """Write a page with charts to this HTML file; needs plotly, the extra `report`."""
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "repetitions", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for temperature in self.temperatures:
            if temperature < 0:
                raise UserError(f"temperature must be 0 (greedy) or more, not {temperature:g}")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise UserError("--temperatures names a temperature twice; leave one of them out")
        if self.on_bad_line not in ("error", "skip"):
            raise UserError(f"--on-bad-line must be error or skip, not '{self.on_bad_line}'")
        if self.peers_backend not in ("eager", "same"):
            raise UserError(f"--peers-backend must be eager or same, not '{self.peers_backend}'")
        if self.suite is not None and self.suite not in SUITES:
            raise UserError(f"unknown suite '{self.suite}' in --suite; choose of {', '.join(SUITES)}")
        if self.suite is not None and self.data is None:
            raise UserError(f"--suite {self.suite} needs its questions; give the file with --data")
        if self.report is not None and self.report.is_dir():
            raise UserError(f"--report {self.report} is a folder; give the name of a file, such as report.html")

    def shown(self, suite: str, prompts: int) -> dict[str, Any]:
        """All settings, for the result."""
        return {
            "model": self.model,
            "draft_models": self.draft_models,
            "methods": self.methods,
            "data": None if self.data is None else str(self.data),
            "suite": suite,
            "prompts": prompts,
            **{name: getattr(self, name) for name in SHOWN},
            **self.tree,
        }
