"""Statistics of decoding: rounds, drafted and accepted tokens, seconds. As in the literature, tau counts the bonus
token and the acceptance rate does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass
class Statistics:
    """Counts of one row, or sums over several rows.

    Attributes:
        rounds: target forwards after the prefill.
        emitted: tokens that those rounds added (without the prefill's own token).
        drafted: candidates verified.
        accepted: candidates accepted, those cut off by an end of sequence included.
        reached: at index d, rounds whose tree had candidates at depth d + 1.
        accepted_at: at index d, rounds that accepted a candidate at depth d + 1.
        lengths: candidates accepted in every round.
        repeats: rounds in which an n-gram draft overrode the drafter.
        depths: depth of every round's tree, 0 where nothing was drafted.
        prefill_seconds, draft_seconds, verify_seconds, rest_seconds: seconds by phase; each row of a batch holds the
            whole batch's seconds.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    repeats: int = 0
    reached: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    rest_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Tokens emitted per target forward, the bonus token included."""
        return self.emitted / self.rounds if self.rounds else float("nan")

    @property
    def acceptance_rate(self) -> float:
        """Accepted candidates divided by drafted candidates."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def acceptance_by_position(self) -> list[float]:
        """At index d, the share of rounds with candidates at depth d + 1 that accepted one there."""
        return [accepted / reached for accepted, reached in zip(self.accepted_at, self.reached, strict=True)]

    @property
    def draft_lengths(self) -> list[int]:
        """At index n, the number of rounds that drafted n levels (a chain's candidates)."""
        return [self.depths.count(depth) for depth in range(max(self.depths, default=-1) + 1)]

    @property
    def decode_seconds(self) -> float:
        """Seconds of all rounds, without the prefill."""
        return self.draft_seconds + self.verify_seconds + self.rest_seconds

    def add_seconds(self, draft: float, verify: float, rest: float) -> None:
        self.draft_seconds += draft
        self.verify_seconds += verify
        self.rest_seconds += rest

    def add_round(self, drafted: int, depth: int, accepted: int, emitted: int) -> None:
        """Count one round: candidates drafted, depth of the tree, candidates accepted, tokens emitted."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        self.lengths.append(accepted)
        self.depths.append(depth)
        grow = depth - len(self.reached)
        self.reached += [0] * grow
        self.accepted_at += [0] * grow
        for d in range(depth):
            self.reached[d] += 1
        for d in range(accepted):
            self.accepted_at[d] += 1

    @classmethod
    def sum(cls, parts: Iterable[Statistics], together: bool = False) -> Statistics:
        """Add statistics up; rows that were decoded `together` share their seconds, so the longest counts."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                own = getattr(total, name)
                if name in ("lengths", "depths"):
                    value = own + value
                elif isinstance(value, list):
                    value = [a + b for a, b in zip_longest(own, value, fillvalue=0)]
                else:
                    value = max(own, value) if together and name.endswith("_seconds") else own + value
                setattr(total, name, value)
        return total

    def as_dict(self) -> dict[str, object]:
        """Return the counts and the derived figures for JSON."""
        return {
            "tau": self.tau,
            "rounds": self.rounds,
            "emitted": self.emitted,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "repeats": self.repeats,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_position": self.acceptance_by_position,
            "draft_lengths": self.draft_lengths,
            "seconds": {
                "prefill": self.prefill_seconds,
                "draft": self.draft_seconds,
                "verify": self.verify_seconds,
                "rest": self.rest_seconds,
            },
        }
