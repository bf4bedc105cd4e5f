"""The shapes of drafts that a tuner chooses among, and the expected tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from outdraft.core.shape import TreeShape

PLAIN = TreeShape(0, 1, 1)
"""The shape that drafts nothing."""
BATCH = 4
"""Rows from which a batch begins with short chains: on two cores so many nodes cost
(docs/reference/draft-shapes.md)."""
STEP_BY_STEP = 6
"""Number of levels up to which the grid has every number; beyond, each is about a quarter larger than the last."""
WIDE = 4
"""Candidates per level above which trees have narrower ones between themselves and chains."""
FIRST_CHANCE = 0.6
"""Prior probability that a first level is accepted."""
HOPED = 0.8
"""Prior probability of the same where the question is whether a drafter needs to be tried at all."""
FIRM = 4.0
"""Weight, in observations, of a level's prior, which comes from other widths or from the level above."""


class ShapeGrid:
    """The shapes within some bounds, and the expected tokens per round of each.

    A grid has shapes by number of levels and candidates per level, from chains up to the bounds, and plain decoding.
    Acceptance is counted level by level, separately for every width, so that a round of one shape informs about all
    shapes of its width.

    Args:
        bounds: the largest shape.
        discount: weight of a round's verdict after one more round of the same width, in (0, 1].
    """

    def __init__(self, bounds: TreeShape, discount: float = 0.98):
        self.bounds, self.discount = bounds, discount
        self.most = min(bounds.depth + 1, bounds.size - 1)
        """Largest number of levels of a chain."""
        self.widths = widths(bounds.top_k)
        self.lines = [[self._shape(levels, width) for levels in lengths(self.most)] for width in self.widths]
        positions = {shape: (row, i) for row, line in enumerate(self.lines) for i, shape in enumerate(line)}
        self.positions = {shape: position for shape, position in positions.items() if shape != PLAIN}
        self.shapes = [PLAIN, *self.positions]
        self.accepted = {width: [0.0] * self.most for width in self.widths}
        self.judged = {width: [0.0] * self.most for width in self.widths}
        self._tokens: dict[TreeShape, float] = {}

    def start(self, rows: int) -> TreeShape:
        """Return the shape to begin with: a chain of half the bounds' levels, in batches a quarter.

        It is a tree only if bounds are so wide that they are meant for a device on which nodes cost little.
        """
        if not self.positions:
            return PLAIN
        wide = rows < BATCH and self.bounds.top_k > WIDE
        line, most = self.lines[-1 if wide else 0], max(1, self.most // (4 if rows >= BATCH else 2))
        return max((shape for shape in line if levels_of(shape) <= most), key=levels_of)

    def beside(self, shape: TreeShape) -> list[TreeShape]:
        """Return the neighbours to try: a length or a width more or less; next to plain, short chains."""
        if shape == PLAIN:
            return self.lines[0][:3] if self.positions else []
        row, position = self.positions[shape]
        around = [(row - 1, position), (row, position - 1), (row, position + 1), (row + 1, position)]
        inside = [(r, i) for r, i in around if 0 <= r < len(self.lines) and 0 <= i < len(self.lines[r])]
        return [self.lines[r][i] for r, i in inside] + [PLAIN] * (position == 0)

    def tokens(self, shape: TreeShape) -> float:
        """Return the expected tokens of a row in a round."""
        if not self._tokens:
            self._tokens[PLAIN] = 1.0
            for width, line in zip(self.widths, self.lines, strict=True):
                expected = list(accumulate(accumulate(self.chances(width), mul), initial=1.0))
                self._tokens |= {shape: expected[levels_of(shape)] for shape in line}
        return self._tokens[shape]

    def chances(self, width: int) -> list[float]:
        """Return, at index l, the probability that level l + 1 of this width is accepted if all above it are.

        Missing evidence of a level is taken from other widths, and beyond them from the level above.
        """
        chances, before = [], FIRST_CHANCE
        others = [other for other in self.widths if other != width]
        for level in range(self.most):
            for known in (others, [width]):
                accepted = sum(self.accepted[one][level] for one in known)
                before = (accepted + FIRM * before) / (sum(self.judged[one][level] for one in known) + FIRM)
            chances.append(before)
        return chances

    def hoped(self) -> float:
        """Return the probability that a first level is accepted, high as long as little is known."""
        accepted, judged = (sum(own[0] for own in sums.values()) for sums in (self.accepted, self.judged))
        return (accepted + FIRM * HOPED) / (judged + FIRM)

    def observe(self, shape: TreeShape, accepted: Sequence[int]) -> None:
        """Learn from a round: candidates accepted in each row."""
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
    """Return the largest number of levels of a draft of this shape."""
    return 0 if shape.size == 1 else shape.depth + 1


def widths(most: int) -> list[int]:
    """Return the grid's numbers of candidates per level, chains first."""
    if most == 1:
        return [1]
    return [1, round(most**0.5), most] if most > WIDE else [1, most]


def lengths(most: int) -> list[int]:
    """Return the grid's numbers of levels."""
    found = list(range(1, min(most, STEP_BY_STEP) + 1))
    while found and found[-1] < most:
        found.append(min(most, found[-1] * 5 // 4 + 1))
    return found
