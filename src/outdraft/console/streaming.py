"""Streaming an answer to the terminal with coloured accepted draft tokens, and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from outdraft.output import ACCEPTED, number

if TYPE_CHECKING:
    from outdraft.api.output import Piece


@dataclass
class Streamed:
    """A streamed answer with its figures."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    seconds: float = 0.0
    first_seconds: float = 0.0
    """The seconds until the first token."""

    @property
    def tau(self) -> float:
        """The mean tokens a round; every round ends with a token of the target's own, unless cut there."""
        rounds = self.accepted.count(False) - 1 + (self.accepted[-1] if self.accepted else 0)
        return (len(self.accepted) - 1) / rounds if rounds > 0 else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second, prefill included."""
        return len(self.accepted) / self.seconds if self.seconds else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Return the answer and its figures for JSON."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "tau": self.tau,
            "tokens_per_second": self.tokens_per_second,
            "from_draft": self.accepted,
        }

    def line(self, plain_seconds: float | None = None) -> str:
        """Return the figures in a line.

        Args:
            plain_seconds: seconds of a token without drafting, where known; the line then says how many times as fast
                this answer was.
        """
        count, rate = len(self.accepted), self.tokens_per_second
        parts = [f"tau {number(self.tau)}", f"{number(rate, '.1f')} tokens/s", f"{count} tokens"]
        if any(self.accepted):
            parts.append(f"{sum(self.accepted) / count:.0%} of the text came from drafts")
        decoding = self.seconds - self.first_seconds
        if plain_seconds is not None and count > 1 and decoding > 0:
            parts.append(f"{(count - 1) * plain_seconds / decoding:.2f}x of plain")
        if end := {"context": "the context is full", "length": "max_new_tokens reached"}.get(str(self.finish_reason)):
            parts.append(end)
        return " | ".join(parts)


LEGEND = "= drafted, and confirmed by the model together with what was drafted around it; the rest it decided itself"
"""The legend of the tint of drafted tokens."""


def legend() -> Text:
    """Return the line that says what the tint means."""
    return Text.assemble((" tinted ", ACCEPTED), (f" {LEGEND}", "dim"))


def stream(
    pieces: Iterable[Piece], console: Console, show_drafts: bool = False, streamed: Streamed | None = None
) -> Streamed:
    """Print the pieces of a row as they come.

    Args:
        pieces: of one row.
        console: where they are printed.
        show_drafts: colour drafted tokens.
        streamed: filled in place, for callers that need the answer so far where Ctrl-C ends it.
    """
    streamed = Streamed() if streamed is None else streamed
    start = time.perf_counter()
    for piece in pieces:
        streamed.first_seconds = streamed.first_seconds or time.perf_counter() - start
        streamed.text += piece.text
        streamed.tokens.append(piece.token)
        streamed.accepted.append(piece.accepted)
        streamed.finish_reason = piece.finish_reason
        if show_drafts and piece.accepted:
            console.print(piece.text, end="", style=ACCEPTED, markup=False, highlight=False, emoji=False)
        elif not console.quiet:  # as it is: printing would make spaces of tabs and pictures of :names:
            console.file.write(piece.text)
        console.file.flush()
    streamed.seconds = time.perf_counter() - start
    console.print()
    return streamed
