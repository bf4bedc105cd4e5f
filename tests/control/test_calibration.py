"""A drafter's confidence becomes a probability of acceptance."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from simulated import fixed_costs, make

from outdraft.control.base import Evidence
from outdraft.control.thompson import Platt, expit, logit

GRID = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]


def fresh() -> Platt:
    return Platt(Evidence(Platt.PRIOR))


def taught(truth, rounds: int = 3000, seed: int = 0) -> Platt:
    rng, calibration = random.Random(seed), fresh()
    for _ in range(rounds):
        confidence = rng.random()
        calibration.observe(confidence, rng.random() < truth(confidence))
    return calibration


def test_it_starts_at_the_identity():
    calibration = fresh()
    for confidence in GRID:
        assert calibration.probability(confidence) == pytest.approx(confidence, abs=0.03)


@pytest.mark.parametrize("intercept, slope", [(2.0, 0.7), (-1.0, 1.0), (0.5, 0.1)])
def test_it_finds_how_the_drafter_misjudges_itself(intercept: float, slope: float):
    def truth(confidence: float) -> float:
        return expit(intercept + slope * logit(confidence))

    calibration = taught(truth)
    for confidence in GRID[1:-1]:
        assert calibration.probability(confidence) == pytest.approx(truth(confidence), abs=0.09)


def test_more_confidence_never_means_less_whatever_was_seen():
    calibration = taught(lambda confidence: 1 - confidence, rounds=500)
    found = [calibration.probability(confidence / 50) for confidence in range(51)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert all(0 < p < 1 for p in found)


def test_one_surprise_does_not_throw_it_over():
    calibration = taught(lambda confidence: confidence, rounds=100)
    before = [calibration.probability(confidence) for confidence in GRID]
    calibration.observe(1.0, False)
    for confidence, p in zip(GRID, before, strict=True):
        assert calibration.probability(confidence) == pytest.approx(p, abs=0.15)


def test_platt_agrees_with_the_maximum_of_the_posterior():
    from scipy.optimize import minimize

    rng = random.Random(1)
    seen = [(c, rng.random() < expit(1.0 + 0.8 * logit(c))) for c in (rng.uniform(0.1, 0.9) for _ in range(400))]
    platt = fresh()
    for confidence, accepted in seen:
        platt.observe(confidence, accepted)

    def loss(line) -> float:
        total = Platt.INTERCEPT_PRECISION * line[0] ** 2 / 2 + Platt.SLOPE_PRECISION * (line[1] - 1) ** 2 / 2
        for confidence, accepted in seen:
            p = expit(line[0] + line[1] * logit(confidence))
            total -= math.log(p if accepted else 1 - p)
        return total

    best = minimize(loss, [0.0, 1.0]).x
    assert platt.line() == pytest.approx(tuple(best), abs=0.12)


def test_the_verdict_on_a_cut_tree_is_about_the_candidates_that_were_verified():
    """A level of mass 0.9 of which one candidate of 0.3 is verified, and accepted in 30 of 100 rounds."""
    rng, row = random.Random(0), make("calibrated", fixed_costs(slope=0.5), 1)
    row.safeguard.credit = 1e9
    for _ in range(300):
        row.decide([], 3)
        row.verdict_on([0.3], [0])
        accepted = int(rng.random() < 0.3)
        row.observe([0.9], accepted, 1 + accepted, 0.0)
    assert row.calibration.probability(0.3) == pytest.approx(0.3, abs=0.08)
    assert row.calibration.probability(0.9) > 0.7  # what it would have been for the whole level was not judged
