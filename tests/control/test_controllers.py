"""What each controller decides."""

from __future__ import annotations

import math
from statistics import mean, pvariance

import pytest
import torch
from simulated import PLAIN_PASS, answer, decode_many, fixed_costs, generator, make
from simulation import Run, decode, oracle, round_seconds

from outdraft.control import CONTROLLERS, Costs, Experience
from outdraft.control.base import Evidence
from outdraft.control.thompson import draw_beta, worth_going_on, worth_starting, worth_verifying

WEIGHING = ["beta", "calibrated"]


def best_fixed(answers, costs: Costs) -> float:
    return min(decode_many("fixed", answers, costs, length).seconds for length in range(9))


def length_of(controller, confidence: float = 0.7) -> int:
    """Levels that it drafts now, each with this confidence."""
    levels = 0
    while controller.decide([confidence] * levels, 1):
        levels += 1
    return levels


@pytest.mark.parametrize("a, b", [(1, 1), (0.3, 0.6), (40, 8), (500, 2)])
def test_beta_draws_have_the_mean_and_variance_of_theory(a: float, b: float):
    dice = generator()
    drawn = [draw_beta(a, b, dice) for _ in range(4000)]
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert mean(drawn) == pytest.approx(a / (a + b), abs=4 * math.sqrt(variance / 4000))
    assert pvariance(drawn) == pytest.approx(variance, rel=0.15)


def test_beta_draws_of_vanishing_counts_are_all_or_nothing():
    dice = generator()
    drawn = [draw_beta(1e-9, 3e-9, dice) for _ in range(400)]
    assert set(drawn) <= {0.0, 1.0} and 0.15 < mean(drawn) < 0.35


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_draft_is_longer_than_the_limit(name: str):
    for limit in (0, 1, 3):
        costs = fixed_costs(step=0.0001, slope=0.0)
        controller = make(name, costs, limit)
        for _ in range(20):
            levels = length_of(controller, 0.99)
            assert levels <= limit
            controller.observe([0.99] * levels, levels, levels + 1, round_seconds(costs, levels))


@pytest.mark.parametrize("name", CONTROLLERS)
def test_same_seed_and_same_observations_give_the_same_decisions(name: str):
    torch.manual_seed(0)
    text = answer([0.6])
    first = decode(make(name, fixed_costs(), seed=3), text, fixed_costs())
    torch.manual_seed(1)
    assert decode(make(name, fixed_costs(), seed=3), text, fixed_costs()) == first
    assert torch.initial_seed() == 1


@pytest.mark.parametrize("name", WEIGHING)
def test_another_seed_gives_other_draws(name: str):
    text = answer([0.6])
    runs = [decode(make(name, fixed_costs(), seed=seed), text, fixed_costs()) for seed in range(4)]
    assert len({run.drafted for run in runs}) > 1


def test_fixed_drafts_to_the_limit_every_time():
    controller = make("fixed", fixed_costs(), 5)
    assert length_of(controller, 0.01) == 5


def test_confidence_stops_where_the_product_falls_below_the_threshold():
    controller = make("confidence", fixed_costs(), threshold=0.3)
    assert controller.decide([], 1)
    assert controller.decide([0.6], 1) and controller.decide([0.6, 0.6], 1)
    assert not controller.decide([0.6, 0.6, 0.6], 1)


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("prior_accepted, prior_rejected, drafts_on", [(1000, 1, True), (1, 1000, False)])
def test_a_level_is_drafted_for_the_chance_of_the_next_one(name, prior_accepted, prior_rejected, drafts_on):
    costs = fixed_costs()
    controller = make(name, costs, prior_accepted=prior_accepted, prior_rejected=prior_rejected)
    controller.decide([], 1)
    assert controller.decide([0.99], 1) is drafts_on


def test_beta_counts_accepted_levels_and_the_one_rejection():
    controller = make("beta", fixed_costs(), discount=1.0, prior_accepted=2, prior_rejected=3)
    controller.observe([0.5] * 4, 2, 3, 0.03)
    controller.observe([0.5] * 2, 2, 3, 0.03)
    controller.observe([], 0, 1, 0.02)
    assert (controller.counts[0], controller.counts[1]) == (2 + 4, 3 + 1)


def test_discounted_counts_fade_to_the_prior():
    controller = make("beta", fixed_costs(), discount=0.5)
    controller.observe([0.5] * 4, 4, 5, 0.03)
    controller.observe([0.5], 0, 1, 0.03)
    assert (controller.counts[0], controller.counts[1]) == (1 + 2, 1 + 1)


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("step", [0.05, 0.2])
def test_learners_come_near_the_best_fixed_length(name: str, chance: float, step: float):
    costs = fixed_costs(begin=1.2 * step, step=step)
    answers = [answer([chance], levels=8, seed=seed) for seed in range(24)]
    assert decode_many(name, answers, costs).seconds < 1.1 * best_fixed(answers, costs)


def test_confidence_that_tells_easy_from_hard_beats_every_fixed_length():
    chances = ([0.95] * 6 + [0.1] * 6) * 12
    costs = fixed_costs()
    answers = [answer(chances, seed=seed) for seed in range(12)]
    assert decode_many("calibrated", answers, costs).seconds < 0.9 * best_fixed(answers, costs)
    assert decode_many("calibrated", answers, costs).seconds < 0.9 * decode_many("beta", answers, costs).seconds


def test_dearer_drafting_means_shorter_drafts():
    answers = [answer([0.8], seed=seed) for seed in range(4)]
    for name in WEIGHING:
        runs = [decode_many(name, answers, fixed_costs(step=step)) for step in (0.03, 0.1, 0.3)]
        lengths = [run.drafted / run.rounds for run in runs]
        assert lengths[0] > lengths[1] + 0.5 > lengths[2] + 1


@pytest.mark.parametrize("name", WEIGHING)
def test_experience_spares_a_new_row_the_learning(name: str):
    costs, useless = fixed_costs(), [answer([0.0], seed=seed) for seed in range(6)]
    afresh = decode_many(name, useless, costs, memory=0)
    assert decode_many(name, useless, costs).seconds < afresh.seconds


def test_rows_share_experience_only_when_they_end():
    experience, costs = Experience(), fixed_costs()
    running = make("beta", costs, experience=experience)
    running.observe([0.5] * 8, 8, 9, 0.04)
    assert make("beta", costs, experience=experience).counts[0] == 1
    running.finish()
    assert make("beta", costs, experience=experience).counts[0] == 1 + 8
    running.finish()
    assert make("beta", costs, experience=experience).counts[0] == 1 + 8
    assert make("beta", costs, experience=experience, memory=0).counts[0] == 1


def test_experience_counts_for_no_more_rounds_than_its_memory():
    experience, costs = Experience(), fixed_costs()
    for seed in range(10):
        decode(make("beta", costs, seed=seed, experience=experience, memory=5), answer([1.0], seed=seed), costs)
    a = make("beta", costs, experience=experience, memory=5).counts[0]
    assert 5 < a - 1 <= 5 * 8


@pytest.mark.parametrize("name", WEIGHING)
def test_a_token_is_never_dearer_than_by_plain_decoding(name: str):
    costs = fixed_costs()
    controller = make(name, costs)
    for _ in range(50):
        controller.observe([0.5] * 8, 0, 1, 3 * PLAIN_PASS)
    assert controller.spent[0] > controller.spent[1] and controller.price == costs.plain()


@pytest.mark.parametrize("name", WEIGHING)
def test_the_price_is_seconds_over_tokens_and_a_stall_counts_twice_at_most(name: str):
    controller = make(name, fixed_costs())
    for _ in range(200):
        controller.observe([], 0, 4, PLAIN_PASS)
    steady = controller.price
    assert steady == pytest.approx(PLAIN_PASS / 4, rel=0.01)
    controller.observe([], 0, 4, 100 * PLAIN_PASS)
    assert steady < controller.price < 1.01 * steady


def test_later_levels_may_pay_for_the_beginning():
    dear_start = Costs.fixed(begin=0.95, step=0.05, verify_base=1.0, verify_per_node=0.0)
    likely, unlikely = ([theta**level for level in range(1, 9)] for theta in (0.9, 0.3))
    assert worth_starting(1.0, likely, 1, dear_start, 1)
    assert not worth_starting(1.0, likely[:1], 1, dear_start, 1)
    assert not worth_starting(1.0, unlikely, 1, dear_start, 1)


def test_a_level_is_worth_its_step_and_its_nodes():
    costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.05)
    assert worth_going_on(1.0, 0.16, 1, costs, 1) and not worth_going_on(1.0, 0.14, 1, costs, 1)
    assert worth_going_on(0.5, 0.31, 1, costs, 1) and not worth_going_on(0.5, 0.29, 1, costs, 1)
    assert worth_going_on(1.0, 0.36, 5, costs, 1) and not worth_going_on(1.0, 0.34, 5, costs, 1)


def test_candidates_are_verified_while_each_earns_its_share_of_the_pass():
    costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.05)
    gains = [0.8, 0.5, 0.2, 0.06, 0.04, 0.01]
    assert worth_verifying(1.0, gains, costs, 1) == 4
    assert worth_verifying(0.2, gains, costs, 1) == 2
    assert worth_verifying(1.0, [0.001, 0.001], costs, 1) == 1
    assert worth_verifying(1.0, [], costs, 1) == 0


@pytest.mark.parametrize("name", WEIGHING)
def test_a_drafter_that_promises_too_much_gets_fewer_candidates(name: str):
    gains = [0.5 * 0.8**node for node in range(40)]
    levels = [node // 10 for node in range(40)]
    sizes = []
    for accepted in (4, 0):
        controller = make(name, fixed_costs())
        for _ in range(30):
            controller.observe([0.8] * 4, accepted, accepted + 1, PLAIN_PASS)
        controller.spent = Evidence((1.0, 1.0))  # the same price for both
        controller.decide([], 1)  # a round begins
        sizes.append(controller.size([0.8] * 4, gains, levels))
    assert 40 > sizes[0] > 2 * sizes[1] >= 2


def test_a_deep_candidate_counts_for_what_its_level_is_worth_not_for_what_the_drafter_says():
    """A drafter that is far too modest and always right: its unlikely deep candidates are verified all the same."""
    controller = make("calibrated", Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.05))
    confidences, gains, levels = [0.3] * 4, [0.3, 0.09, 0.027, 0.0081], [0, 1, 2, 3]
    for _ in range(40):
        controller.observe(confidences, 4, 5, PLAIN_PASS)
    controller.spent = Evidence((1.0, 1.0))
    assert controller.size(confidences, gains, levels) == 4
    assert worth_verifying(1.0, gains, controller.costs, 1) == 2


@pytest.mark.parametrize("name", WEIGHING)
def test_levels_whose_candidates_are_cut_are_drafted_less(name: str):
    """Whatever their candidates' chances all together: nothing that is not verified is accepted."""
    lengths = []
    for cut in (0, 2):
        controller = make(name, fixed_costs(), prior_accepted=50.0)
        for _ in range(60):
            levels = length_of(controller)
            controller.size([0.7] * levels, [0.7], [0])
            kept = max(0, levels - cut)
            controller.observe([0.7] * kept, kept, kept + 1, PLAIN_PASS)
        lengths.append(mean(length_of(controller) for _ in range(10)))
    assert lengths[0] > lengths[1] + 1


@pytest.mark.parametrize("name", ["fixed", "confidence"])
def test_other_controllers_verify_all_candidates(name: str):
    assert make(name, fixed_costs()).size([0.6, 0.2], [0.5, 0.1, 0.0001], [0, 0, 1]) == 3


def test_the_oracle_is_never_slower_than_any_fixed_length_or_controller():
    costs = fixed_costs()
    for chance in (0.0, 0.5, 0.9):
        text = answer([chance], levels=8)
        least = oracle(text, 8, costs)
        assert least.tokens == 128
        for name in CONTROLLERS:
            assert least.seconds <= decode(make(name, costs), text, costs).seconds + 1e-12


def test_the_oracle_finds_the_least_of_all_ways_through_a_short_answer():
    costs = fixed_costs(begin=0.4, step=0.3, slope=0.1)
    text = answer([0.6], tokens=5, levels=3, seed=1)
    assert {draft.accepted for draft in text} >= {0, 1, 3}

    def ways(position: int):
        if position >= len(text):
            yield 0.0
            return
        for levels in range(4):
            emitted = 1 + min(levels, text[position].accepted)
            for rest in ways(position + emitted):
                yield round_seconds(costs, levels) + rest

    assert oracle(text, 3, costs).seconds == pytest.approx(min(ways(0)))


def test_plain_decoding_is_a_round_a_token():
    costs = fixed_costs()
    assert decode(make("fixed", costs, 0), answer([1.0]), costs) == Run(pytest.approx(128 * PLAIN_PASS), 128, 128, 0)
