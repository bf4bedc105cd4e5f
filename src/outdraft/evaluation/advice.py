"""The findings of `outdraft advise` for one model on this machine, the advice drawn from them, and their terminal
output.

The speed-up is tau / (1 + draft + verify), as in `rounds.py`. `advising.py` does the measuring.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outdraft.data.provenance import busy
from outdraft.errors import refuse_below
from outdraft.evaluation.bench.bench import Comparison
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.evaluation.bench.methods import LOOKUP, WITH_LOOKUP
from outdraft.evaluation.bench.result import WIDE, closing, table
from outdraft.evaluation.bench.summary import Summary
from outdraft.evaluation.rounds import RoundCost
from outdraft.output import counted, number
from outdraft.target.named import named, shipped_drafters

CHAIN = 4
"""The number of candidates of the drafts that are timed."""

PASSES = (1, 1 + CHAIN, 16)
"""The numbers of tokens of the target passes that are timed."""

TAUS = (2.0, 2.5, 3.0)
"""The values of tau for which the speed-up is shown."""

REACHABLE = 2.0
"""The tau that a first drafter seldom exceeds (docs/measurements): training is advised where it is enough."""

CONTROLLER = "calibrated"
"""The controller of a given drafter: it drafts as far as it pays."""

UNLIKELY = 0.9
"""The ratio below which a pass cannot be faster than one over fewer tokens: other load has disturbed the timing."""


@dataclass
class AdviceSettings:
    """Settings of `outdraft advise`."""

    model: str
    draft_model: str | None = None
    data: Path | None = None
    """Prompts to try on, JSON lines or text: the first --limit of them; built-in questions for a chat if left out."""
    limit: int = 4
    """Prompts that are answered."""
    max_new_tokens: int = 64
    """Tokens of an answer, at most; slow machines answer more briefly."""
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        refuse_below(self, limit=1, max_new_tokens=1)


@dataclass
class Kind:
    """A way of drafting with its timings."""

    name: str
    cost: RoundCost
    parameters: int
    to_train: bool
    """True if the drafter is untrained, with arbitrary weights."""
    flags: str = ""
    """The flags of `outdraft train` for such a drafter."""
    always: bool = True
    """True if it drafts in every round; prompt lookup drafts only where the text repeats, so no tau is its bound."""


@dataclass
class Step:
    """A command to run next, with its reason."""

    why: str
    command: str


@dataclass
class Advice:
    """The measurements and the advice."""

    settings: AdviceSettings
    environment: dict[str, Any]
    passes: dict[int, float]
    """The seconds of one target pass, output layer included, by its number of tokens."""
    head_seconds: float
    kinds: list[Kind]
    left_out: dict[str, str]
    """The kinds that could not be timed, with the reason."""
    prompts: Comparison
    memory: dict[str, int]
    """The bytes of the target's weights, of its cache for 1,000 tokens, of each drafter, and the peak in use."""
    seconds: float
    next: list[Step] = field(default_factory=list)

    @property
    def best(self) -> Summary | None:
        """The fastest way of drafting on the prompts; None where plain decoding was faster."""
        drafting = [summary for summary in self.prompts.summaries if summary.name != PLAIN]
        fastest = max(drafting, key=lambda summary: summary.speedup)
        return fastest if fastest.speedup > 1 else None

    @property
    def contradiction(self) -> str | None:
        """The impossible part of the timings, which makes them useless; None where all are plausible."""
        for fewer, more in pairwise(self.passes):
            if self.passes[more] < UNLIKELY * self.passes[fewer]:
                return f"a pass over {more} tokens came out shorter than over {fewer}"
        return None

    @property
    def trainable(self) -> Kind | None:
        """The trainable kind that pays from the lowest tau on."""
        return min((kind for kind in self.kinds if kind.to_train), key=lambda kind: kind.cost.tau_to_pay, default=None)

    def as_dict(self) -> dict[str, Any]:
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
    """Return the commands to run: first those that pay now, then those that would bring more."""
    settings, best, trainable = advice.settings, advice.best, advice.trainable
    model = _flags(settings, "dtype", "device", "backend", "quantize")
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
        chosen = _flags(settings, "dtype", "device") + trainable.flags
        command = f"outdraft train {chosen} --data answers.jsonl --output-dir drafter --dry-run"
        steps.append(Step("then see what training would take, and train", command))
    if not steps:
        steps.append(Step("plain decoding is the fastest here", f"outdraft chat {model} --method none"))
    return steps


def _flags(settings: AdviceSettings, *names: str) -> str:
    """Format the model and these settings, where they were given, as flags."""
    given = {"model": shlex.quote(settings.model)} | {name: getattr(settings, name) for name in names}
    return " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)


def show(advice: Advice, console: Console) -> None:
    facts = advice.environment
    console.print(
        f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, {facts['device']}, {facts['dtype']}, "
        f"{facts['backend']} backend; {advice.seconds:.0f} s",
        markup=False,
    )
    passes = ", ".join(f"{_milliseconds(seconds)} over {tokens}" for tokens, seconds in advice.passes.items())
    console.print(f"One pass of the target: {passes} tokens; its output layer {_milliseconds(advice.head_seconds)}.")
    console.print(drafts_table(advice, console.width >= WIDE))
    for name, reason in advice.left_out.items():
        console.print(f"not timed: {name}: {reason}", markup=False)
    asked = advice.prompts.summaries[0].questions
    console.print(table(advice.prompts.summaries, advice.prompts.temperature), f"on {asked} prompts")
    held = ", ".join(f"{name} {_size(count)}" for name, count in advice.memory.items() if count)
    held = held.replace("most held here", "this run's peak")
    console.print(f"Memory: {held}.")
    if (note := busy(facts)) is not None:
        console.print(f"{note} Run this again on a quiet machine before you decide.")
    console.print(Text("Without training: " + closing(advice.prompts.summaries), "bold"))
    console.print(Text("A trained drafter: " + trained(advice), "bold"))
    for step in advice.next:
        console.print(Text.assemble(("Next", "bold"), f" ({step.why}):"))
        console.print(f"  {step.command}", markup=False)


def drafts_table(advice: Advice, wide: bool = True) -> Table:
    """Make a table of the ways of drafting: cost, the tau from which each pays, and speed-ups at larger values.

    It is `WIDE` wide; for less, the seconds of a draft step are left out, and names are folded.
    """
    built = Table(
        title=f"drafts of {CHAIN} tokens: cost in plain rounds, speed-up = tau / (1 + draft + verify)",
        title_justify="left",
    )
    built.add_column("drafter")
    steps = ["draft step"] if wide else []
    for column in (*steps, "draft", "verify", "pays\nfrom tau", *(f"at tau\n{tau:g}" for tau in TAUS)):
        built.add_column(column, justify="right", no_wrap=True)
    for kind in advice.kinds:
        cost = kind.cost
        built.add_row(
            kind.name,
            *([_milliseconds(cost.step_seconds)] if wide else []),
            number(cost.draft),
            number(cost.verify),
            *(
                [number(cost.tau_to_pay), *(f"{number(cost.speedup(tau))}x" for tau in TAUS)]
                if kind.always
                else ["where the\ntext repeats"]
            ),
        )
    return built


def trained(advice: Advice) -> str:
    """Return a sentence on the tau from which training pays, and on its speed-up."""
    kind = advice.trainable
    if kind is None:
        return "none could be timed for this model."
    if (why := advice.contradiction) is not None:
        return f"the machine was too busy to tell ({why})."
    cost = kind.cost
    gains = ", ".join(f"{number(cost.speedup(tau))}x at tau {tau:g}" for tau in TAUS)
    text = f"{kind.name} pays from tau {number(cost.tau_to_pay)} on; expect {gains}."
    if cost.tau_to_pay > REACHABLE:
        text += f" First drafters seldom reach that: training is not expected to pay here (under tau {REACHABLE:g})."
    return text


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
