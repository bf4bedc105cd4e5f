"""The text of one answer while its tokens come: stop strings cut off, nothing handed out that may still be cut.

Knows a tokenizer; nothing of models, rows or the web.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from outdraft.api.text import Detokenizer, Stops


class Piece(NamedTuple):
    """Some text and whether a drafter had guessed the token that it came with."""

    text: str
    accepted: bool


class AnswerText:
    """Grows token by token.

    Args:
        tokenizer: of the model.
        stops: strings that end the answer and are no part of it; those of special tokens are found, too.
        prompt: tokens that the answer follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._detokenizer = Detokenizer(tokenizer, prompt=prompt)
        self._stops = Stops(stops, tokenizer)
        self.text = ""
        self.starts: list[int] = []
        """Of every token, where its text begins."""
        self.stopped = False
        """Whether a stop string was found; the text ends before it, and further tokens add nothing."""
        self._accepted: list[bool] = []
        self._seen = 0  # characters that stand there, certain or not
        self._given = 0  # characters handed out
        self._piece = 0  # token whose text is to be handed out next

    def take(self, tokens: Sequence[int], accepted: Sequence[bool]) -> bool:
        """Take in those of an answer's tokens that are new; whether a stop string is complete."""
        for place in range(len(self.starts), len(tokens)):
            self.starts.append(self._seen)
            self._accepted.append(accepted[place])
            if not self.stopped:
                self._add(tokens[place])
        return self.stopped

    def finish(self) -> None:
        """No further token comes: what was held back of an unfinished character is text now."""
        if not self.stopped:
            self._end(self.text + self._detokenizer.finish())

    def release(self) -> list[Piece]:
        """The text that has become certain since the last call, by the tokens that it came with."""
        certain = len(self.text) - (0 if self.stopped else self._stops.uncertain())
        pieces: list[Piece] = []
        while self._given < certain:
            last = self._piece + 1 == len(self.starts)
            end = certain if last else min(certain, self.starts[self._piece + 1])
            if end > self._given:
                pieces.append(Piece(self.text[self._given : end], self._accepted[self._piece]))
                self._given = end
            if self._given < certain:
                self._piece += 1
        return pieces

    def _add(self, token: int) -> None:
        new, pending = self._detokenizer.add(token), self._detokenizer.pending
        self.text += new
        self._seen = max(self._seen, len(self.text) + len(pending))
        end = self._stops.add(token, new, pending)
        if end is not None:
            self._end((self.text + pending)[:end])

    def _end(self, text: str) -> None:
        self.text, self.stopped = text, True
        self.starts = [min(start, len(text)) for start in self.starts]
        self._seen = min(self._seen, len(text))
