"""Where stop strings end an answer, for every way of decoding: one rule offline and served.

Knows the text of tokens; nothing of rows or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from outdraft.api.text import Detokenizer, decode_text, special_ids
from outdraft.errors import UserError


class Stops:
    """Where stop strings end an answer: looked for in its text with special tokens spelled out, so that those can be
    stop strings, too.

    Args:
        strings: any of which ends the answer.
        tokenizer: of the model.

    Raises:
        UserError: a string is empty, which every text contains.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        if not all(strings):
            raise UserError("a stop string is empty; leave it out")
        self.strings, self._tokenizer, self._special = list(strings), tokenizer, special_ids(tokenizer)
        self._spelled = ""
        self._hidden: list[tuple[int, int]] = []  # of that, (place, characters) which are not shown

    def add(self, token: int, new: str, pending: str) -> int | None:
        """Where the text that is shown ends, if this token completes a stop string.

        Args:
            token: the newest.
            new: text that it made certain.
            pending: text that stands there and is not certain.
        """
        if not self.strings:
            return None
        searched = len(self._spelled)
        if token in self._special:
            spelled = decode_text(self._tokenizer, [token], skip_special_tokens=False)
            self._hidden.append((searched, len(spelled)))
            self._spelled += spelled
        self._spelled += new
        text = self._spelled + pending
        places = [text.find(one, max(0, searched - len(one) + 1)) for one in self.strings]
        found = [place for place in places if place >= 0]
        return self._shown(min(found)) if found else None

    def uncertain(self) -> int:
        """Characters at the end of what is shown that may be the beginning of a stop string."""
        longest = max((len(one) for one in self.strings), default=1) - 1
        for length in range(min(longest, len(self._spelled)), 0, -1):
            if any(one.startswith(self._spelled[-length:]) for one in self.strings):
                return self._shown(len(self._spelled)) - self._shown(len(self._spelled) - length)
        return 0

    def _shown(self, place: int) -> int:
        """The same place in the text without special tokens."""
        return place - sum(min(length, max(0, place - start)) for start, length in self._hidden)


def stops_at(
    strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()
) -> Callable[[list[int]], bool]:
    """A test whether the newest token completes one of the strings, told of each token in turn.

    Raises:
        UserError: a string is empty, which every text contains.
    """
    stops, detokenizer = Stops(strings, tokenizer), Detokenizer(tokenizer, prompt=prompt)

    def completed(tokens: list[int]) -> bool:
        stopped = False
        for token in tokens[len(detokenizer.tokens) :]:
            new = detokenizer.add(token)
            stopped = stops.add(token, new, detokenizer.pending) is not None
        return stopped

    return completed
