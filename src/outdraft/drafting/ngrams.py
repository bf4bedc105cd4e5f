"""Where the end of a text stood in it before, and what came after that then.

Token ids of one row, which only grow. Knows nothing of trees, models or what is made of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence


class Text:
    """What was decided of one row, and where each of its n-grams last ended.

    Args:
        tokens: decided so far.
        longest: tokens of the longest n-gram that is looked for first.
        shortest: tokens of the shortest one.
    """

    def __init__(self, tokens: Sequence[int], longest: int, shortest: int):
        self.longest, self.shortest = longest, shortest
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in newly decided tokens."""
        for token in tokens:
            # The n-grams that end here are earlier ones only now that something follows.
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def match(self) -> tuple[int, int]:
        """Length of the longest n-gram at the end that occurred before (0: none), and where it last ended."""
        count = len(self.tokens)
        for n in range(min(self.longest, count - 1), self.shortest - 1, -1):
            end = self._ends.get(tuple(self.tokens[count - n :]))
            if end is not None:
                return n, end
        return 0, count

    def alike(self, end: int, most: int) -> int:
        """How many tokens before `end` are those before the end of the text, counted up to `most`."""
        here, there = len(self.tokens), end
        while there > 0 and end - there < most and self.tokens[there - 1] == self.tokens[here - 1]:
            here, there = here - 1, there - 1
        return end - there

    def after(self, end: int, most: int) -> list[int]:
        """`most` tokens that followed there; past the end of the text they go round as they have since `end`."""
        found = self.tokens[end : end + most]
        period = len(self.tokens) - end
        while found and len(found) < most:
            found.append(found[-period])
        return found
