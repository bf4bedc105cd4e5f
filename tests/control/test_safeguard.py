"""A drafter that is good for nothing costs at most a few percent, and one that becomes good is noticed."""

from __future__ import annotations

import itertools

import pytest
from simulated import PLAIN_PASS, answer, fixed_costs, make
from simulation import Answer, Draft, decode

from outdraft.control import Costs, Experience
from outdraft.control.base import LEAST_START, MOST_START, START
from outdraft.control.settings import PRACTICE

ADAPTIVE = [
    ("confidence", {"threshold": 0.0}),
    ("beta", {}),
    ("beta", {"prior_accepted": 50.0}),
    ("calibrated", {}),
]
RATIOS = list(itertools.product((0.05, 0.1, 0.15), (0.04, 0.15, 0.3), (0.01, 0.05)))  # begin, step, slope


def boastful(tokens: int = 128, levels: int = 16) -> Answer:
    """Nothing is ever accepted of what the drafter is sure of."""
    return [Draft([0.99] * levels, 0)] * tokens


@pytest.mark.parametrize("name, options", ADAPTIVE)
@pytest.mark.parametrize("limit", [1, 8, 16])
def test_an_untrained_drafter_costs_less_than_five_percent_of_an_answer(name: str, options: dict, limit: int):
    for ratio in RATIOS:
        costs = fixed_costs(*ratio)
        run = decode(make(name, costs, limit, **options), boastful(), costs)
        assert run.drafted > 0
        assert run.seconds / (128 * costs.plain()) < 1.05, ratio


@pytest.mark.parametrize("name, options", ADAPTIVE)
def test_so_it_does_while_the_costs_are_still_being_learned(name: str, options: dict):
    for ratio in RATIOS:
        truth, learning = fixed_costs(*ratio), Costs()
        run = decode(make(name, learning, **options), boastful(), truth)
        assert run.seconds / (128 * truth.plain()) < 1.05, ratio
        assert learning.step() < 2 * learning.verify(1)


@pytest.mark.parametrize("name, options", ADAPTIVE)
def test_in_the_long_run_drafting_in_vain_costs_two_percent(name: str, options: dict):
    costs = fixed_costs()
    short, long = (decode(make(name, costs, **options), boastful(tokens), costs) for tokens in (1000, 4000))
    assert (long.seconds - short.seconds) / (3000 * costs.plain()) < 1.021


@pytest.mark.parametrize("name", ["beta", "calibrated"])
def test_probes_become_rarer_while_they_fail(name: str):
    costs = fixed_costs()
    early, late = (decode(make(name, costs), boastful(tokens), costs) for tokens in (500, 4000))
    assert (late.drafted - early.drafted) / 3500 < 0.5 * early.drafted / 500
    assert late.drafted > early.drafted


@pytest.mark.parametrize("name, options", ADAPTIVE)
def test_a_drafter_that_becomes_good_is_noticed(name: str, options: dict):
    costs = fixed_costs()
    bad = decode(make(name, costs, **options), answer([0.0], tokens=400), costs)
    both = decode(make(name, costs, **options), answer([0.0] * 400 + [0.9], tokens=1000), costs)
    good_tokens_per_pass = 600 * PLAIN_PASS / (both.seconds - bad.seconds)
    assert good_tokens_per_pass > 1.7


@pytest.mark.parametrize("name", ["beta", "calibrated"])
def test_bad_stretches_do_not_lock_a_good_drafter_out(name: str):
    costs = fixed_costs()
    chances = ([0.9] * 100 + [0.0] * 100) * 6
    run = decode(make(name, costs), answer(chances, tokens=1200), costs)
    fixed = min(decode(make("fixed", costs, n), answer(chances, tokens=1200), costs).seconds for n in range(9))
    assert run.seconds < 1.05 * fixed


def test_a_row_begins_with_the_credit_of_the_row_before():
    costs, experience = fixed_costs(), Experience()
    for tokens, drafts, bounds in (
        (128, [0.95], (MOST_START, MOST_START)),
        (64, [0.0], (LEAST_START, START)),
        (128, [0.0], (LEAST_START, LEAST_START)),
    ):
        row = make("calibrated", costs, experience=experience)
        assert row.safeguard.credit == experience.credit
        decode(row, answer(drafts, tokens=tokens), costs)
        row.finish()
        assert bounds[0] <= experience.credit <= bounds[1]


def test_after_one_useless_answer_the_next_ones_cost_less():
    costs, experience = fixed_costs(), Experience()
    seconds = []
    for seed in range(4):
        row = make("calibrated", costs, seed=seed, experience=experience)
        seconds.append(decode(row, boastful(), costs).seconds / (128 * costs.plain()))
        row.finish()
    assert max(seconds[1:]) < 1.03 and max(seconds[1:]) <= seconds[0]


def test_the_first_drafts_after_loading_run_to_their_limit_and_cost_no_credit():
    costs = Costs(practice=4)
    row = make("calibrated", costs, 8)
    credit, depths = row.safeguard.credit, []
    for _ in range(4):
        levels = 0
        while row.decide([0.9] * levels, 4):
            levels += 1
        costs.observe_draft(PLAIN_PASS, [PLAIN_PASS] * (levels - 1))
        row.observe([0.9] * levels, 0, 1, 20 * PLAIN_PASS)
        depths.append(levels)
        assert row.safeguard.credit >= credit
    assert depths == [8] * 4 and row.verified.own == [0.0, 0.0]
    levels = 0
    while row.decide([0.9] * levels, 4):
        levels += 1
    row.observe([0.9] * levels, 0, 1, 20 * PLAIN_PASS)
    assert levels == 0 or row.safeguard.credit < credit


@pytest.mark.parametrize("name", ["beta", "calibrated"])
def test_a_controller_that_keeps_refusing_rests_for_longer_and_longer(name: str):
    costs = fixed_costs()
    row = make(name, costs, prior_rejected=1e6)
    row.safeguard.waited, waits = -1e9, []  # no probes
    for _ in range(6):
        assert not row.decide([], 1)
        waits.append(row.resting)
        credit = row.safeguard.credit
        while row.resting:
            row.rest()
        assert row.safeguard.credit == pytest.approx(credit + waits[-1] * 0.02)
        row.observe([], 0, 1, costs.plain())
    assert waits == [0, 2, 6, 8, 8, 8]
    row.counts.own[:] = [1e9, 0.0]  # it has become good
    assert row.decide([], 1)
    row.observe([0.9], 1, 2, costs.plain())
    row.counts.own[:] = [0.0, 1e9]
    assert not row.decide([], 1) and row.resting == 0


def test_the_baseline_of_fixed_length_has_no_safeguard():
    costs = fixed_costs()
    run = decode(make("fixed", costs, 4), boastful(), costs)
    assert run.drafted == 4 * 128


@pytest.mark.parametrize("name", ["beta", "calibrated"])
@pytest.mark.parametrize("slower", [5, 20, 60])
def test_a_busy_minute_at_the_start_does_not_stop_drafting_for_good(name: str, slower: float):
    """First answers whose drafts were slowed down; later ones are soon as fast as if nothing had happened."""
    truth = fixed_costs()
    busy = fixed_costs(0.1 * slower, 0.08 * slower)
    speeds = {}
    for first in (busy, truth):
        costs, experience = Costs(PRACTICE), Experience()
        for number in range(16):
            row = make(name, costs, 5, seed=number, experience=experience)
            run = decode(row, answer([0.7], tokens=64, seed=number), first if number < 2 else truth)
            speeds[first, number] = 64 * truth.plain() / run.seconds
    late = range(10, 16)
    assert sum(speeds[busy, number] for number in late) > 0.95 * sum(speeds[truth, number] for number in late)
    assert min(speeds[truth, number] for number in late) > 1.3
