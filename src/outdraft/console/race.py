"""One question answered twice on the terminal, by plain decoding and then with a drafter, and how the two compare.

Each answer appears token by token as it is decided. Knows one model and one question; chooses neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from outdraft.api.generation import SpeculativeModel
from outdraft.api.prompts import Message, encode_chat
from outdraft.console.streaming import Streamed, stream
from outdraft.evaluation.identity import Difference, Divergence, divergences
from outdraft.evaluation.measure import PLAIN, WARM_UP_TOKENS
from outdraft.output import ACCEPTED, number


@dataclass
class Race:
    """Both answers to one question."""

    question: str
    name: str
    """Of the way of drafting."""
    plain: Streamed
    drafted: Streamed
    parting: Divergence | None
    """Where the texts differ; None where they are the same."""

    @property
    def ratio(self) -> float:
        """How much faster the drafted answer came, in tokens a second."""
        return self.drafted.tokens_per_second / self.plain.tokens_per_second

    def line(self) -> str:
        """Both rates, their ratio, and whether the text is the same."""
        rates = f"{number(self.plain.tokens_per_second, '.1f')} tokens/s, {self.name}"
        text = "the same text"
        if (found := self.parting) is not None:
            kind = "a near-tie that rounding decides" if found.tie else "more than rounding explains"
            gap = f"logit gap {number(found.gap, '.4f')}, noise {number(found.noise, '.4f')}"
            text = f"the texts part at token {found.position + 1}, {kind} ({gap})"
        return (
            f"{PLAIN} {rates} {number(self.drafted.tokens_per_second, '.1f')} tokens/s: {number(self.ratio)}x, {text}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "question": self.question,
            "method": self.name,
            **{name: _facts(one) for name, one in (("plain", self.plain), ("drafted", self.drafted))},
            "ratio": self.ratio,
            "identical": True if self.parting is None else self.parting.as_dict(),
        }


def race(model: SpeculativeModel, name: str, messages: list[Message], console: Console, max_new_tokens: int) -> Race:
    """Stream both answers, greedily.

    Args:
        model: with a drafter and a chat template.
        name: of its way of drafting.
        messages: the conversation to answer.
        console: where it all appears; drafted tokens tinted where it has colours.
        max_new_tokens: of each answer.
    """
    alone = model.with_drafter(None)
    greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    for one in (alone, model):  # first calls are slower
        one.generate(messages, **greedy | {"max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens)})
    question = messages[-1]["content"]
    console.print(Text.assemble(("Question: ", "bold"), question), "")

    console.print(Text(f"{PLAIN} decoding, one pass of the model a token", "bold"))
    plain = stream(alone.stream(messages, **greedy), console)
    console.print(plain.line(), "", style="dim", markup=False, sep="\n")

    console.print(Text(f"with drafting ({name})", "bold"))
    if console.is_terminal and not console.no_color:
        console.print(Text.assemble((" tinted ", ACCEPTED), (f" {LEGEND}", "dim")))
    drafted = stream(model.stream(messages, **greedy), console, show_drafts=True)
    console.print(drafted.line(), "", style="dim", markup=False, sep="\n")

    found = Race(question, name, plain, drafted, _parting(model, messages, plain, drafted))
    console.print(Text(found.line(), "bold"))
    return found


LEGEND = "= drafted, and confirmed by the model together with what was drafted around it; the rest it decided itself"
"""What the tint means."""


def _parting(model: SpeculativeModel, messages: list[Message], plain: Streamed, drafted: Streamed) -> Divergence | None:
    if plain.tokens == drafted.tokens:
        return None
    assert model.tokenizer is not None  # it has streamed text
    ids = encode_chat(messages, model.tokenizer)
    return divergences(model.target, [Difference(0, ids, plain.tokens, drafted.tokens)])[0]


def _facts(streamed: Streamed) -> dict[str, Any]:
    return {
        "text": streamed.text,
        "tokens": len(streamed.tokens),
        "tau": streamed.tau,
        "tokens_per_second": streamed.tokens_per_second,
        "from_draft": streamed.accepted,
    }
