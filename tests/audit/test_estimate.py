"""The forecast of an audit's length, and how progress is counted by it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from outdraft.evaluation.audit import AuditSettings
from outdraft.evaluation.audit.progress import Course, Pace, expected

PACES = (Pace(0.02, 0.002, 0.1), Pace(0.03, 0.003, 0.1))


def test_a_sampled_audit_is_mostly_its_samples_and_a_quick_one_is_not() -> None:
    settings = AuditSettings({"temperature": 1.0})
    full = expected(settings, *PACES, 24, samples=True)
    quick = expected(settings.made_quick(), *PACES, 24, samples=True)
    assert full["samples of the first tokens"] > 0.5 * sum(full.values())
    assert sum(quick.values()) < sum(full.values()) / 4
    # An error five times as large takes a twenty-fifth of the samples.
    assert full["samples of the first tokens"] / quick["samples of the first tokens"] == pytest.approx(25, rel=0.1)


def test_greedy_audits_expect_no_samples() -> None:
    found = expected(AuditSettings(), *PACES, 24, samples=False)
    assert "samples of the first tokens" not in found and "drafted greedy texts" in found
    assert found["drafted greedy texts"] == pytest.approx(3 * 48 * (0.03 + 7 * 0.003))


def test_progress_counts_by_expected_seconds_and_remembers_what_was_interrupted() -> None:
    out = io.StringIO()
    course = Course(Console(file=out), {"short": 1.0, "long": 3.0})
    with course.stage("short", 2) as advance:
        advance(2)
    with pytest.raises(KeyboardInterrupt), course.stage("long", 2):
        raise KeyboardInterrupt
    assert out.getvalue().split("\n")[:2] == ["short ... (0% done)", "long ... (25% done)"]
    assert course.title == "long"


def test_a_terminal_shows_the_share_of_the_whole_and_what_is_left() -> None:
    out = io.StringIO()
    course = Course(Console(file=out, force_terminal=True, width=120), {"short": 1.0, "long": 3.0})
    for title in ("short", "long"):
        with course.stage(title, 2) as advance:
            advance(1)
    assert "short 1/2" in out.getvalue() and "long 1/2" in out.getvalue()
    assert "62% of all" in out.getvalue() and "left" in out.getvalue()


def test_what_is_left_is_told_by_the_time_that_was_taken() -> None:
    course = Course(Console(quiet=True), {"a": 100.0})
    assert course.left(0.0) == "about 1 min 40 s"
    course.began -= 200.0  # half of the work took 200 seconds
    assert course.left(50.0) in ("about 3 min 20 s", "about 3 min 21 s")
