"""Advice on a terminal. Computes nothing but what a sentence needs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outdraft.evaluation.advice import CHAIN, REACHABLE, TAUS, Advice
from outdraft.evaluation.environment import busy
from outdraft.evaluation.report import closing, table
from outdraft.output import number


def show(advice: Advice, console: Console) -> None:
    """Print what was timed, what the prompts gave, and what follows."""
    facts = advice.environment
    console.print(
        f"{facts['cpu']}, {facts['threads']} threads, {facts['device']}, {facts['dtype']}, {facts['backend']} backend; "
        f"{advice.seconds:.0f} s",
        markup=False,
    )
    passes = ", ".join(f"{_milliseconds(seconds)} over {tokens}" for tokens, seconds in advice.passes.items())
    console.print(f"One pass of the target: {passes} tokens; its output layer {_milliseconds(advice.head_seconds)}.")
    console.print(drafts_table(advice))
    for name, reason in advice.left_out.items():
        console.print(f"not timed: {name}: {reason}", markup=False)
    asked = advice.prompts.summaries[0].questions
    console.print(table(advice.prompts.summaries, advice.prompts.temperature), f"on {asked} prompts")
    held = ", ".join(f"{name} {_size(count)}" for name, count in advice.memory.items() if count)
    console.print(f"Memory: {held}.")
    if (note := busy(facts)) is not None:
        console.print(note)
    console.print(Text("Now: " + closing(advice.prompts.summaries), "bold"))
    console.print(Text("A trained drafter: " + trained(advice), "bold"))
    for step in advice.next:
        console.print(Text.assemble(("Next", "bold"), f" ({step.why}):"))
        console.print(f"  {step.command}", markup=False)


def drafts_table(advice: Advice) -> Table:
    """One row a way of drafting: what it costs, the tau from which it pays, and the speed-up at larger ones."""
    built = Table(
        title=f"drafts of {CHAIN} tokens: cost in plain rounds, speed-up = tau / (1 + draft + verify)",
        title_justify="left",
    )
    built.add_column("drafter")
    for column in ("draft step", "draft", "verify", "pays from tau", *(f"at tau {tau:g}" for tau in TAUS)):
        built.add_column(column, justify="right", no_wrap=True)
    for kind in advice.kinds:
        cost = kind.cost
        built.add_row(
            kind.name,
            _milliseconds(cost.step_seconds),
            number(cost.draft),
            number(cost.verify),
            *(
                [number(cost.tau_to_pay), *(f"{number(cost.speedup(tau))}x" for tau in TAUS)]
                if kind.always
                else ["where the text repeats"]
            ),
        )
    return built


def trained(advice: Advice) -> str:
    """From which tau on training pays, and what it would bring, in a sentence."""
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
