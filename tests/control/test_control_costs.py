"""What rounds cost is learned from timings that are noisy, change, and rarely show more than one size."""

from __future__ import annotations

import random

import pytest
import torch

from outdraft.control import Costs
from outdraft.control.averages import Average
from outdraft.control.costs import DOUBTED, bucket
from outdraft.control.settings import PRACTICE, ControlSettings, Pacer


def seen(rounds: int, base: float = 0.02, per_node: float = 0.0004, sizes: tuple[int, ...] = (1, 5, 9)) -> Costs:
    costs = Costs()
    for number in range(rounds):
        nodes = sizes[number % len(sizes)]
        costs.observe_draft(0.003, [0.002, 0.002])
        costs.observe_round(nodes, base + per_node * (nodes - 1), 0.0005)
    return costs


def test_before_anything_was_seen_drafting_is_a_small_share_of_a_pass():
    costs = Costs()
    for draft in (costs.begin(), costs.step()):
        assert draft / costs.verify(1) == pytest.approx(0.08)
    assert costs.added(10) / costs.verify(1) == pytest.approx(0.2)


def test_steady_timings_are_learned():
    costs = seen(60)
    assert costs.begin() == pytest.approx(0.003)
    assert costs.step() == pytest.approx(0.002)
    assert costs.rest() == pytest.approx(0.0005)
    assert costs.verify(1) == pytest.approx(0.02, rel=0.02)
    assert costs.added(8) == pytest.approx(8 * 0.0004, rel=0.1)


def test_a_step_not_yet_seen_is_taken_to_cost_what_beginning_costs():
    costs = Costs()
    costs.observe_draft(0.003, [])
    assert costs.step() == costs.begin() == 0.003


def test_with_one_size_seen_a_further_node_is_believed_to_add_two_percent():
    costs = seen(40, base=0.05, sizes=(1,))
    assert costs.verify(1) == pytest.approx(0.05)
    assert costs.added(1) == pytest.approx(0.001, rel=0.01)


def test_the_slope_survives_a_thousand_rounds_of_one_node():
    costs = seen(60, per_node=0.002)
    before = costs.added(8)
    for _ in range(1000):
        costs.observe_round(1, 0.02, 0.0005)
    assert before == pytest.approx(0.016, rel=0.1)
    assert costs.added(8) == pytest.approx(before, rel=0.1)


def test_the_level_follows_a_machine_that_becomes_slower():
    costs = seen(60)
    for _ in range(100):
        costs.observe_round(1, 0.04, 0.0005)
    assert costs.verify(1) == pytest.approx(0.04, rel=0.02)


def test_more_nodes_never_cost_less():
    costs = Costs()
    for number in range(50):
        nodes = 1 + number % 9
        costs.observe_round(nodes, 0.03 - 0.001 * nodes, 0.0)
        assert costs.added(20) >= 0


def test_a_stall_moves_an_average_by_no_more_than_a_round_in_ten():
    costs = seen(60)
    before = costs.begin(), costs.verify(1)
    costs.observe_draft(5.0, [5.0])
    costs.observe_round(1, 5.0, 5.0)
    assert costs.begin() < 1.11 * before[0]
    assert costs.verify(1) < 1.11 * before[1]


def test_a_first_round_that_compiled_something_is_forgotten_at_once():
    costs = Costs()
    costs.observe_draft(9.0, [9.0])
    costs.observe_round(5, 30.0, 9.0)
    for _ in range(2):
        costs.observe_draft(0.003, [0.002])
        costs.observe_round(5, 0.02, 0.0005)
    assert costs.begin() == pytest.approx(0.003) and costs.step() == pytest.approx(0.002)
    assert costs.verify(5) == pytest.approx(0.02) and costs.rest() == pytest.approx(0.0005)


def test_noise_leaves_the_slope_within_a_third():
    rng, costs = random.Random(0), Costs()
    for _ in range(400):
        nodes = rng.randint(1, 9)
        costs.observe_round(nodes, (0.02 + 0.0006 * (nodes - 1)) * rng.uniform(0.97, 1.05), 0.0)
    assert costs.added(8) == pytest.approx(8 * 0.0006, rel=0.33)


def test_batches_of_other_sizes_learn_apart_and_lend_what_they_know():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    costs = seen(30)
    assert costs.verify(1, rows=8) == costs.verify(8, rows=1), "what counts is how many nodes there are in all"
    costs.observe_round(1, 0.05, 0.0, rows=8)
    costs.observe_round(1, 0.05, 0.0, rows=6)
    assert costs.verify(1, rows=7) == pytest.approx(0.05, rel=0.02)
    assert costs.verify(1, rows=1) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("rows", [1, 6, 8, 16])
def test_a_pass_costs_what_all_rows_nodes_together_cost(rows: int):
    def seconds(nodes: int) -> float:
        return 0.02 + 0.0003 * rows * nodes

    costs = Costs()
    for number in range(60):
        nodes = (1, 3, 5)[number % 3]
        costs.observe_round(nodes, seconds(nodes), 0.0, rows)
    for nodes in (1, 3, 8):
        assert costs.verify(nodes, rows) == pytest.approx(seconds(nodes), rel=0.03)


def test_fewer_rows_of_a_bucket_cost_less():
    """A batch whose rows end one after another is looked up at the size that it has."""
    costs = Costs()
    for number in range(80):
        rows, nodes = 9 + number % 8, 1 + number % 3
        costs.observe_round(nodes, 0.02 + 0.0003 * rows * nodes, 0.0, rows)
    for rows in (9, 16):
        assert costs.verify(2, rows) == pytest.approx(0.02 + 0.0006 * rows, rel=0.03)


def test_a_draft_that_did_other_rounds_work_says_how_long_a_beginning_takes_at_most():
    costs = Costs()
    costs.observe_draft(0.5, [0.002], usual=False)
    assert costs.step() == 0.002 and costs.begin() == pytest.approx(0.002)
    costs.observe_draft(0.003, [])
    costs.observe_draft(0.5, [], usual=False)
    assert costs.begin() == 0.003
    costs.observe_draft(0.0005, [], usual=False)
    assert costs.begin() == 0.0005


def test_what_was_measured_in_a_busy_minute_falls_together():
    costs = Costs()
    for _ in range(20):
        costs.observe_draft(0.3, [0.2])
        costs.observe_round(1, 0.02, 0.0)
    costs.observe_draft(0.003, [])
    assert costs.begin() == 0.003 and costs.step() == pytest.approx(0.002) and costs.plain_is_due()


def test_what_drafts_cost_becomes_uncertain_while_none_is_made():
    costs = Costs()
    for _ in range(20):
        costs.observe_draft(0.006, [0.004])
        costs.observe_round(3, 0.03, 0.0)
        assert costs.certainty() == 1.0
    for _ in range(DOUBTED // 2):
        costs.observe_round(1, 0.02, 0.0)
        costs.count_undrafted()
    assert costs.certainty() == pytest.approx(0.5) and costs.certainty(rows=4) == 1.0
    costs.observe_draft(0.003, [0.004])
    assert costs.certainty() == 1.0
    assert 0.0055 < costs.begin() + 0.003 / 12 < 0.006  # one observation beside ten, no longer beside twenty
    given = Costs.fixed(0.1, 0.1, 1.0, 0.0)
    for _ in range(DOUBTED):
        given.count_undrafted()
    assert given.certainty() == 1.0


def test_a_plain_round_is_due_at_first_and_after_a_hundred_others():
    costs = Costs()
    assert costs.plain_is_due(4)
    costs.observe_round(1, 0.02, 0.0, rows=4)
    assert not costs.plain_is_due(4) and not costs.plain_is_due(3) and costs.plain_is_due(5)
    for _ in range(99):
        costs.observe_round(5, 0.03, 0.0, rows=4)
    assert not costs.plain_is_due(4)
    costs.observe_round(5, 0.03, 0.0, rows=4)
    assert costs.plain_is_due(4)
    assert not Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.0).plain_is_due()


def test_fixed_costs_never_change():
    costs = Costs.fixed(begin=0.1, step=0.2, verify_base=1.0, verify_per_node=0.03, rest=0.01)
    costs.observe_draft(9, [9])
    costs.observe_round(9, 9, 9)
    assert (costs.begin(), costs.step(), costs.rest()) == (0.1, 0.2, 0.01)
    assert costs.verify(4) == pytest.approx(1.09) and costs.plain() == pytest.approx(1.01)


def test_an_average_that_settles_begins_with_the_least_of_its_first_values():
    average = Average(settling=2)
    for value, expected in ((0.04, 0.04), (0.03, 0.03), (0.05, 0.03 + 0.02 / 3), (0.009, 0.009)):
        average.observe(value)
        assert average.value == pytest.approx(expected)
    assert average.count == 2


def test_first_drafts_run_to_their_limit_and_no_others() -> None:
    """A pacer's measured costs let controllers cut drafts only after some; other costs do so at once."""
    settings = ControlSettings.parse("calibrated")
    for costs, drafts in ((Pacer(settings).costs, PRACTICE), (Costs(), 0), (Costs.fixed(1.0, 1.0, 0.1, 0.1), 0)):
        controller = settings.make(costs, 3, torch.Generator().manual_seed(0))
        for _ in range(6):  # a drafter that costs ten target passes a level
            costs.observe_round(1, 0.1, 0.0)
        cut = 0
        for draft in range(drafts + 3):
            wanted = [controller.decide([0.01] * level, 1) for level in range(4)]
            if draft < drafts:
                assert wanted == [True, True, True, False], (drafts, draft)
            cut += not wanted[0]
            costs.observe_draft(1.0, [1.0, 1.0])
            costs.observe_round(4, 0.12, 0.0)
        assert cut >= 2
