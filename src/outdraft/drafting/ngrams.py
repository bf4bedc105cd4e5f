"""An index of the n-grams of one row's tokens, which finds earlier occurrences of the end and what followed them."""

from __future__ import annotations

from collections.abc import Sequence


class Text:
    """The decided tokens of one row, and where each of its n-grams last ended.

    Args:
        tokens: tokens decided so far.
        longest: length of the longest n-gram, which is looked for first.
        shortest: length of the shortest n-gram.
    """

    def __init__(self, tokens: Sequence[int], longest: int, shortest: int):
        self.longest, self.shortest = longest, shortest
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append newly decided tokens."""
        for token in tokens:
            # The n-grams that end here are earlier ones only now that something follows.
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def match(self) -> tuple[int, int]:
        """Return the length of the longest n-gram at the end that occurred before (0: none), and its last end."""
        count = len(self.tokens)
        for n in range(min(self.longest, count - 1), self.shortest - 1, -1):
            end = self._ends.get(tuple(self.tokens[count - n :]))
            if end is not None:
                return n, end
        return 0, count

    def alike(self, end: int, most: int) -> int:
        """Count the tokens before `end` that equal those before the end of the text, up to `most`."""
        here, there = len(self.tokens), end
        while there > 0 and end - there < most and self.tokens[there - 1] == self.tokens[here - 1]:
            here, there = here - 1, there - 1
        return end - there

    def after(self, end: int, most: int) -> list[int]:
        """Return the `most` tokens that followed `end`; beyond the text's end, they repeat the tokens since `end`."""
        found = self.tokens[end : end + most]
        period = len(self.tokens) - end
        while found and len(found) < most:
            found.append(found[-period])
        return found
