"""One round under the rows' controllers: each decides for its row, and all are told what became of the round."""

from __future__ import annotations

import pytest
from simulated import PLAIN_PASS, fixed_costs, make

from outdraft.control import CONTROLLERS, Controller, Costs
from outdraft.engine.plan import DraftBudget

CONFIDENCES = [[0.9, 0.8, 0.9, 0.7], [0.2, 0.1, 0.3, 0.2], [0.6, 0.7, 0.5, 0.6]]
ACCEPTED = [4, 0, 2]


def batch(name: str, costs: Costs, rows: int = 3) -> list[Controller]:
    return [make(name, costs, 4, seed) for seed in range(rows)]


def depths_of(controllers: list[Controller], costs: Costs, rows: list[int], rounds: int = 20) -> list[list[int]]:
    """Levels of every round; of each row, by its place in the tables above."""
    found = []
    for _ in range(rounds):
        budget = DraftBudget(controllers, costs, 4, now=lambda: 0.0)
        level = 0
        while any(budget.going):
            budget.drafted([CONFIDENCES[row][level] for row in rows])
            budget.wants(1)
            level += 1
        depths = [len(kept) for kept in budget.confidences]
        accepted = [min(depth, ACCEPTED[row]) for depth, row in zip(depths, rows, strict=True)]
        nodes = [1 + depth for depth in depths]
        budget.observe(depths, accepted, [1 + n for n in accepted], nodes, PLAIN_PASS, 0.0)
        found.append(depths)
    return found


@pytest.mark.parametrize("name", CONTROLLERS)
def test_by_given_costs_a_row_of_a_batch_drafts_as_it_does_alone(name: str):
    costs = fixed_costs()
    together = depths_of(batch(name, costs), costs, [0, 1, 2])
    for row, controller in enumerate(batch(name, costs)):
        assert [depths[row] for depths in together] == [depth for (depth,) in depths_of([controller], costs, [row])]
    if name != "fixed":
        assert any(len(set(depths)) > 1 for depths in together)


def test_a_plain_round_is_measured_before_anything_is_drafted():
    costs = Costs()
    controllers = batch("calibrated", costs, 2)
    first = DraftBudget(controllers, costs, 4)
    assert first.going == [False, False]
    first.observe([0, 0], [0, 0], [1, 1], [1, 1], PLAIN_PASS, 0.0)
    assert DraftBudget(controllers, costs, 4).going == [True, True]


@pytest.mark.parametrize("pending, usual", [(1, True), (5, True), (6, False)])
def test_levels_are_timed_and_a_draft_that_takes_in_a_prompt_has_no_usual_beginning(pending: int, usual: bool):
    costs, clock, told = Costs(), [0.0], []
    costs.observe_round(1, PLAIN_PASS, 0.0)
    costs.observe_draft = lambda *seen: told.append(seen)  # type: ignore[method-assign]
    budget = DraftBudget(batch("fixed", costs, 1), costs, 4, pending=pending, now=lambda: clock[0])
    for seconds in (0.003, 0.002):
        clock[0] += seconds
        budget.drafted([0.5])
        budget.wants(1)
    budget.observe([2], [0], [1], [3], PLAIN_PASS, 0.0)
    ((first, later, rows, as_usual),) = told
    assert first == pytest.approx(0.003) and later == [pytest.approx(0.002)] and rows == 1 and as_usual is usual


def test_a_row_that_found_nothing_to_draft_is_not_asked_again():
    costs = fixed_costs()
    budget = DraftBudget(batch("fixed", costs, 2), costs, 4)
    budget.drafted([0.5, None])
    assert budget.wants(1) == [True, False] and budget.confidences == [[0.5], []]


def test_no_row_drafts_beyond_the_levels_of_the_round():
    costs = fixed_costs()
    budget = DraftBudget(batch("fixed", costs, 1), costs, 2)
    for going in ([True], [False]):
        budget.drafted([0.9])
        assert budget.wants(1) == going


def test_candidates_are_counted_row_by_row():
    costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.3)
    budget = DraftBudget([*batch("beta", costs, 1), *batch("fixed", costs, 2)], costs, 4)
    budget.drafted([0.9, 0.9, None])
    sizes = budget.sizes([[0.9, 0.01, 0.01], [0.9, 0.01, 0.01], []], [[0, 0, 0]] * 3)
    assert 1 <= sizes[0] < 3 and sizes[1:] == [3, 0]


def test_a_resting_row_is_not_asked_and_the_others_draft():
    costs = fixed_costs()
    rows = batch("calibrated", costs, 2)
    rows[0].resting = 1
    rows[0].decide = None  # type: ignore[assignment, method-assign]
    budget = DraftBudget(rows, costs, 4, now=lambda: 0.0)
    assert budget.going == [False, True]
    budget.drafted([None, 0.9])
    budget.observe([0, 1], [0, 1], [1, 2], [1, 2], PLAIN_PASS, 0.0)
    assert rows[0].resting == 0
