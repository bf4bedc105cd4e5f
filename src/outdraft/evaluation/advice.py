"""What `outdraft advise` has found for one model on this machine, and what follows from it.

The speed-up is that of `rounds.py`: tau / (1 + draft + verify). Measures nothing (`advising.py` does) and prints
nothing (`advice_screen.py`).
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from outdraft.errors import UserError
from outdraft.evaluation.bench import Comparison
from outdraft.evaluation.contenders import LOOKUP, WITH_LOOKUP
from outdraft.evaluation.measure import PLAIN
from outdraft.evaluation.rounds import RoundCost
from outdraft.evaluation.summary import Summary
from outdraft.target.named import named, shipped_drafters

CHAIN = 4
"""Candidates of the drafts that are timed."""

PASSES = (1, 1 + CHAIN, 16)
"""Tokens of the target's passes that are timed."""

TAUS = (2.0, 2.5, 3.0)
"""For which the speed-up is told."""

REACHABLE = 2.0
"""Above such a tau a first drafter seldom comes (docs/measurements): training is advised where less is enough."""

CONTROLLER = "calibrated"
"""How far a drafter that is given drafts here: as far as it pays."""

UNLIKELY = 0.9
"""A pass cannot take so much less than one over fewer tokens: then something else has had the processor."""


@dataclass
class AdviceSettings:
    """What `outdraft advise` takes."""

    model: str
    draft_model: str | None = None
    data: Path | None = None
    """Prompts to try on, JSON lines or text: the first --limit of them; built-in questions for a chat if left out."""
    limit: int = 4
    """Prompts that are answered."""
    max_new_tokens: int = 64
    """Of an answer, at most; slow machines answer more briefly."""
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


@dataclass
class Kind:
    """A way of drafting, timed."""

    name: str
    cost: RoundCost
    parameters: int
    to_train: bool
    """Whether it would have to be trained: its weights are arbitrary."""
    always: bool = True
    """Whether it drafts in every round; prompt lookup does only where the text repeats, so no tau is its bound."""


@dataclass
class Step:
    """A command to run next, and why."""

    why: str
    command: str


@dataclass
class Advice:
    """What was found."""

    settings: AdviceSettings
    environment: dict[str, Any]
    passes: dict[int, float]
    """Tokens -> seconds of one pass of the target over them, its output layer included."""
    head_seconds: float
    kinds: list[Kind]
    left_out: dict[str, str]
    """Kinds that could not be timed, and why."""
    prompts: Comparison
    memory: dict[str, int]
    """Bytes: of the target's weights, of its cache for 1,000 tokens, of each drafter, and the most held here."""
    seconds: float
    next: list[Step] = field(default_factory=list)

    @property
    def best(self) -> Summary | None:
        """What was faster than plain decoding on the prompts, the fastest of it."""
        drafting = [summary for summary in self.prompts.summaries if summary.name != PLAIN]
        fastest = max(drafting, key=lambda summary: summary.speedup)
        return fastest if fastest.speedup > 1 else None

    @property
    def contradiction(self) -> str | None:
        """What in the timings cannot be, so that nothing follows from them; None where all is in order."""
        for fewer, more in pairwise(self.passes):
            if self.passes[more] < UNLIKELY * self.passes[fewer]:
                return f"a pass over {more} tokens came out shorter than over {fewer}"
        return None

    @property
    def trainable(self) -> Kind | None:
        """Of the kinds that would have to be trained, the one that pays from the lowest tau on."""
        return min((kind for kind in self.kinds if kind.to_train), key=lambda kind: kind.cost.tau_to_pay, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        best, trainable = self.best, self.trainable
        return {
            "model": self.settings.model,
            "draft_model": self.settings.draft_model,
            "passes": {str(tokens): seconds for tokens, seconds in self.passes.items()},
            "head_seconds": self.head_seconds,
            "drafts": {
                kind.name: {
                    **kind.cost.as_dict(),
                    "candidates": CHAIN,
                    "parameters": kind.parameters,
                    "to_train": kind.to_train,
                    "speedup_at_tau": {f"{tau:g}": kind.cost.speedup(tau) for tau in TAUS},
                }
                for kind in self.kinds
            },
            "left_out": self.left_out,
            "prompts": {summary.name: summary.as_dict() for summary in self.prompts.summaries},
            "pays_now": None if best is None else best.name,
            "tau_to_pay": None if trainable is None else trainable.cost.tau_to_pay,
            "contradiction": self.contradiction,
            "memory_bytes": self.memory,
            "next": [asdict(step) for step in self.next],
            "seconds": self.seconds,
            "environment": self.environment,
        }


def next_steps(advice: Advice) -> list[Step]:
    """What to run: what pays now first, then what would bring more."""
    settings, best, trainable = advice.settings, advice.best, advice.trainable
    model = f"--model {shlex.quote(settings.model)}"
    for name in ("dtype", "device", "backend"):
        if (value := getattr(settings, name)) is not None:
            model += f" --{name} {value}"
    drafter = "" if settings.draft_model is None else f" --draft-model {shlex.quote(settings.draft_model)}"
    steps = []
    if best is not None and best.name == LOOKUP:
        steps.append(
            Step("prompt lookup was the fastest, and needs no training", f"outdraft chat {model} --method {LOOKUP}")
        )
    elif best is not None:
        alone = "" if best.name.endswith(WITH_LOOKUP) else " --prompt-lookup-min 0"
        command = f"outdraft chat {model}{drafter} --controller {CONTROLLER}{alone}"
        steps.append(Step("the drafter was the fastest", command))
    if not drafter and named(settings.model) is not None and shipped_drafters(settings.model):
        shipped = f" --draft-model {shlex.quote(settings.model)}"
        steps.append(Step("a drafter for this model ships with outdraft", f"outdraft advise {model}{shipped}"))
    elif advice.contradiction is not None:
        again = f"outdraft advise {model}{drafter}"
        steps.append(Step("once the machine is quiet, to know whether training pays", again))
    elif trainable is not None and trainable.cost.tau_to_pay <= REACHABLE and not (drafter and best):
        data = "prompts.jsonl" if settings.data is None else shlex.quote(str(settings.data))
        steps.append(
            Step(
                "a trained drafter is likely to pay: first let the model answer prompts like those of your users",
                f"outdraft regenerate {model} --data {data} --temperature 0,1 --output answers.jsonl",
            )
        )
    if not steps:
        steps.append(Step("plain decoding is the fastest here", f"outdraft chat {model} --method none"))
    return steps
