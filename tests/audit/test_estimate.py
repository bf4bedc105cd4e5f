"""The forecast of an audit's length, and how progress is counted by it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from outdraft.evaluation.audit import AuditSettings, progress
from outdraft.evaluation.audit.forecast import Pace, Paces, expected
from outdraft.evaluation.audit.progress import Course

PACES = Paces(
    plain=Pace(0.02, 0.002, 0.1),
    drafted=Pace(0.03, 0.003, 0.1),
    stock=Pace(0.04, 0.004, 0.1),
    samples=Pace(0.0, 0.0, 0.5, 0.01),
)
LENGTHS = [20] * 24


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_sampled_audit_is_mostly_its_samples_and_a_quick_one_is_not() -> None:
    settings = AuditSettings({"temperature": 1.0})
    full = expected(settings, PACES, LENGTHS, samples=True)
    quick = expected(settings.made_quick(), PACES, LENGTHS, samples=True)
    assert full["samples of the first tokens"] > 0.5 * sum(full.values())
    assert sum(quick.values()) < sum(full.values()) / 4
    # An error five times as large takes a twenty-fifth of the samples.
    assert full["samples of the first tokens"] / quick["samples of the first tokens"] == pytest.approx(25, rel=0.1)


def test_greedy_audits_expect_no_samples() -> None:
    found = expected(AuditSettings(), PACES, LENGTHS, samples=False)
    assert "samples of the first tokens" not in found and "drafted greedy texts" in found
    assert found["drafted greedy texts"] == pytest.approx(3 * (0.1 + 48 * (0.03 + 7 * 0.003)))


def test_sixteen_bits_take_more_samples_and_a_closer_look_at_seeded_texts() -> None:
    settings = AuditSettings({"temperature": 1.0})
    single, half = (expected(settings, PACES, LENGTHS, samples=True, exact=exact) for exact in (True, False))
    more = {name for name in single if half[name] > single[name]}
    assert more == {"samples of the first tokens", "seeded texts against stock generate"}


def test_a_pace_is_linear_in_the_rows_and_knows_nothing_of_the_first_run() -> None:
    runs = iter([(100.0, 100.0), (1.0, 0.5), (2.4, 1.2)])
    asked = list[int]()

    def run(rows: int) -> tuple[float, float]:
        asked.append(rows)
        return next(runs)

    pace = Pace.timed(run)
    assert asked == [1, 1, 8]
    assert pace.batch(1, 10) == pytest.approx(1.0 + 10 * 0.5) and pace.batch(8, 10) == pytest.approx(2.4 + 10 * 1.2)


def test_progress_counts_by_expected_seconds_and_remembers_what_was_interrupted(clock: Clock) -> None:
    out = io.StringIO()
    course = Course(Console(file=out), {"short": 1.0, "long": 3.0})
    with course.stage("short", 2) as advance:
        clock.now = 1.0
        advance(2)
    with pytest.raises(KeyboardInterrupt), course.stage("long", 2):
        raise KeyboardInterrupt
    assert out.getvalue().split("\n")[:2] == ["short ... (0% done)", "long ... (25% done)"]
    assert course.title == "long"


def test_a_terminal_shows_the_share_of_the_whole_and_what_is_left(clock: Clock) -> None:
    out = io.StringIO()
    course = Course(Console(file=out, force_terminal=True, width=120), {"short": 1.0, "long": 3.0})
    for title, seconds in (("short", 1.0), ("long", 1.5)):
        with course.stage(title, 2) as advance:
            clock.now += seconds
            advance(1)
    assert "short 1/2" in out.getvalue() and "long 1/2" in out.getvalue()
    assert "62% of all, about 2 s left" in out.getvalue()


def test_what_is_left_is_told_by_the_time_that_was_taken(clock: Clock) -> None:
    course = Course(Console(quiet=True), {"first": 50.0, "second": 50.0})
    assert course.rest() == 100.0
    with course.stage("first", 4) as advance:
        clock.now = 200.0
        advance(1)
        assert course.rest() == 3 * 200.0 + 50.0, "a running check is told of by its own speed"
        clock.now = 200.0
        advance(3)
    assert course.rest() == 4 * 50.0, "later ones are corrected by how the forecast was met"
    assert course.done() == 0.5


def test_a_file_has_a_line_for_every_tenth_of_a_long_check_and_none_for_short_ones(clock: Clock) -> None:
    out = io.StringIO()
    course = Course(Console(file=out, width=120), {"short": 1.0, "long": 100.0})
    for title, seconds in (("short", 0.01), ("long", 1.0)):
        with course.stage(title, 100) as advance:
            for _ in range(100):
                clock.now += seconds
                advance(1)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["short ... (0% done)", "long ... (1% done)"]
    assert [line.partition("/")[0] for line in lines[2:]] == [f"long: {tenth}0" for tenth in range(1, 10)]
    assert lines[6] == "long: 50/100 (50% done, about 50 s left)"
