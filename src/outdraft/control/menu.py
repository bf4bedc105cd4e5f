"""The shapes that trees by the machine are chosen from, and how many tokens a round of each of them brings.

A menu is a grid: so many levels by so many candidates a level, from chains up to the bounds, and plain decoding beside
it. What is accepted is counted level by level, apart for every width, so that a round of one shape says something of
all shapes of its width. Knows nothing of seconds, nor of who chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from operator import mul

from outdraft.core.shape import TreeShape

PLAIN = TreeShape(0, 1, 1)
"""Drafts nothing."""
BATCH = 4
"""Rows from which on a batch begins with short chains: on two cores so many nodes cost (docs/trees.md)."""
STEP_BY_STEP = 6
"""Levels up to which every length is on the menu; beyond, about every fourth part longer."""
WIDE = 4
"""Trees of more candidates a level have narrower ones between themselves and chains."""
FIRST_CHANCE = 0.6
"""Chance that a first level is accepted, before anything was seen."""
FIRM = 4.0
"""Observations that what is known of other widths, or of the level above, counts for in a level's chance."""


class Menu:
    """Shapes within bounds.

    Args:
        bounds: the largest shape.
        discount: what a round's verdict is worth after one more round of the same width, in (0, 1].
    """

    def __init__(self, bounds: TreeShape, discount: float = 0.98):
        self.bounds, self.discount = bounds, discount
        self.most = min(bounds.depth + 1, bounds.size - 1)
        """Levels that a chain may have."""
        self.widths = widths(bounds.top_k)
        lengths = rungs(self.most)
        self.grid = [[self._shape(levels, width) for levels in lengths] for width in self.widths]
        places = {shape: (row, i) for row, line in enumerate(self.grid) for i, shape in enumerate(line)}
        self.places = {shape: place for shape, place in places.items() if shape != PLAIN}
        self.accepted = {width: [0.0] * self.most for width in self.widths}
        self.judged = {width: [0.0] * self.most for width in self.widths}
        self._tokens: dict[TreeShape, float] = {}

    @cached_property
    def shapes(self) -> list[TreeShape]:
        """All of them, plain decoding first."""
        return [PLAIN, *self.places]

    def start(self, rows: int) -> TreeShape:
        """The shape to begin with: half the bounds' levels, in batches a quarter; a chain, unless bounds are so wide
        that they are meant for a device on which nodes cost little."""
        if not self.places:
            return PLAIN
        wide = rows < BATCH and self.bounds.top_k > WIDE
        line, most = self.grid[-1 if wide else 0], max(1, self.most // (4 if rows >= BATCH else 2))
        return max((shape for shape in line if levels_of(shape) <= most), key=levels_of)

    def beside(self, shape: TreeShape) -> list[TreeShape]:
        """Those to try next to this one: a length more or less, a width more or less; next to plain, short chains."""
        if shape == PLAIN:
            return self.grid[0][:3] if self.places else []
        row, place = self.places[shape]
        around = [(row - 1, place), (row, place - 1), (row, place + 1), (row + 1, place)]
        inside = [(r, i) for r, i in around if 0 <= r < len(self.grid) and 0 <= i < len(self.grid[r])]
        return [self.grid[r][i] for r, i in inside] + [PLAIN] * (place == 0)

    def tokens(self, shape: TreeShape) -> float:
        """Expected of a row in a round."""
        if not self._tokens:
            self._tokens[PLAIN] = 1.0
            for width, line in zip(self.widths, self.grid, strict=True):
                expected = list(accumulate(accumulate(self.chances(width), mul), initial=1.0))
                self._tokens |= {shape: expected[levels_of(shape)] for shape in line}
        return self._tokens[shape]

    def chances(self, width: int) -> list[float]:
        """At index l, that level l + 1 of shapes of this width is accepted if all above it are.

        What is not known of a level is taken from other widths, and beyond them from the level above.
        """
        chances, before = [], FIRST_CHANCE
        others = [other for other in self.widths if other != width]
        for level in range(self.most):
            for known in (others, [width]):
                accepted = sum(self.accepted[one][level] for one in known)
                before = (accepted + FIRM * before) / (sum(self.judged[one][level] for one in known) + FIRM)
            chances.append(before)
        return chances

    def observe(self, shape: TreeShape, accepted: Sequence[int]) -> None:
        """A round's verdict: candidates accepted in each row."""
        levels = levels_of(shape)
        if not levels:
            return
        self._tokens.clear()
        for sums in (self.accepted[shape.top_k], self.judged[shape.top_k]):
            sums[:levels] = [self.discount * amount for amount in sums[:levels]]
        for count in accepted:
            for level in range(min(count + 1, levels)):
                self.judged[shape.top_k][level] += 1
                self.accepted[shape.top_k][level] += level < count

    def _shape(self, levels: int, width: int) -> TreeShape:
        bounds = self.bounds
        if width == 1:
            return TreeShape(levels - 1, 1, levels + 1, bounds.candidates)
        share = (bounds.size - 1) / (bounds.depth + 1) * width / bounds.top_k
        nodes = levels * width if bounds.candidates != "top-k" else max(levels, width, int(levels * share))
        return TreeShape(levels - 1, width, min(bounds.size, 1 + nodes), bounds.candidates)


def levels_of(shape: TreeShape) -> int:
    """That a draft of this shape has at most."""
    return 0 if shape.size == 1 else shape.depth + 1


def widths(most: int) -> list[int]:
    """Candidates a level that are on the menu, chains first."""
    if most == 1:
        return [1]
    return [1, round(most**0.5), most] if most > WIDE else [1, most]


def rungs(most: int) -> list[int]:
    """Numbers of levels that are on the menu."""
    lengths = list(range(1, min(most, STEP_BY_STEP) + 1))
    while lengths and lengths[-1] < most:
        lengths.append(min(most, lengths[-1] * 5 // 4 + 1))
    return lengths
