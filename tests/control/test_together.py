"""Rows of a batch decide together: for all of them or for none, by what all of them may expect."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from simulated import PLAIN_PASS, answer, fixed_costs, make

from outdraft.control import Controller, Costs, Experience
from outdraft.control.pacing import RoundPace
from outdraft.control.safeguard import START, Safeguard
from outdraft.control.simulation import Answer, Draft, Run
from outdraft.control.together import Together, summed


class Machine(Costs):
    """What rounds of a batch cost in truth, in seconds: every node of every row adds to a pass."""

    def __init__(self, node: float = 0.02, step: float = 0.08, step_row: float = 0.0):
        super().__init__()
        self.node, self.one_step, self.step_row = node, step, step_row

    def verify(self, nodes: float, rows: int = 1) -> float:
        return PLAIN_PASS * (1 + self.node * (rows * nodes - 1))

    def step(self, rows: int = 1) -> float:
        return PLAIN_PASS * (self.one_step + self.step_row * rows)

    def begin(self, rows: int = 1) -> float:
        return 1.2 * self.step(rows)

    def rest(self, rows: int = 1) -> float:
        return 0.0

    def plain_is_due(self, rows: int = 1) -> bool:
        return False

    @property
    def given(self) -> bool:
        return True


def decode(
    controllers: Sequence[Controller], answers: Sequence[Answer], truth: Costs, known: Costs, levels: int
) -> Run:
    """A batch in simulated time, chains of at most so many levels; rows leave as they end."""
    clock, run, places = [0.0], Run(), [0] * len(answers)
    while rows := [row for row, place in enumerate(places) if place < len(answers[row])]:
        drafts = [answers[row][places[row]] for row in rows]
        own = [controllers[row] for row in rows]
        pace = RoundPace(own, known, levels, 1, 0, lambda: clock[0])
        start, level = clock[0], 0
        while any(pace.going):
            clock[0] += truth.step(len(rows)) if level else truth.begin(len(rows))
            pace.drafted([draft.confidences[level] for draft in drafts])
            pace.wants(1)
            level += 1
        depths = [len(kept) for kept in pace.confidences]
        verify = truth.verify(1 + max(depths), len(rows))
        accepted = [min(depth, draft.accepted) for depth, draft in zip(depths, drafts, strict=True)]
        clock[0] += verify
        pace.observe(depths, accepted, [1 + n for n in accepted], [1 + depth for depth in depths], verify, 0.0)
        for row, n in zip(rows, accepted, strict=True):
            places[row] += 1 + n
            if places[row] >= len(answers[row]):
                controllers[row].finish()
        run.add(Run(clock[0] - start, 0, 1, sum(depths)))
    run.tokens = sum(len(one) for one in answers)
    return run


def batch(name: str, rows: int, costs: Costs, experience: Experience | None = None, **options) -> list[Controller]:
    return [make(name, costs, 8, seed, experience, **options) for seed in range(rows)]


def fixed_seconds(answers: Sequence[Answer], truth: Costs, length: int) -> float:
    controllers = [make("fixed", truth, length) for _ in answers]
    return decode(controllers, answers, truth, truth, length).seconds


def sure(costs: Costs, theta: float, seed: int = 0) -> Controller:
    """A controller that is all but certain of this chance, has credit, and need not probe."""
    one = make("beta", costs, 8, seed, prior_accepted=1e6 * theta, prior_rejected=1e6 * (1 - theta))
    one.safeguard = Safeguard(credit=5.0, waited=0.0)
    return one


@pytest.mark.parametrize("name", ["beta", "calibrated"])
def test_one_row_together_is_that_row_alone(name: str):
    costs = fixed_costs()
    (alone,), controllers = batch(name, 1, costs), batch(name, 1, costs)
    text = answer([0.9, 0.5, 0.7] * 40)
    for place in range(0, 120, 2):
        draft, together = text[place], Together(controllers, costs)
        kept: list[float] = []
        while len(kept) < 8 and (goes := alone.decide(kept, 1)) == together.decide([kept], [True], 1) and goes:
            kept.append(draft.confidences[len(kept)])
        assert len(kept) == 8 or not goes
        accepted = min(len(kept), draft.accepted)
        seconds = costs.round(len(kept), 1 + len(kept))
        alone.observe(kept, accepted, 1 + accepted, seconds)
        together.observe([len(kept)], len(kept), [kept], [accepted], [1 + accepted], seconds)
        assert controllers[0].safeguard.credit == pytest.approx(alone.safeguard.credit)


def test_what_one_row_would_like_is_weighed_against_what_it_costs_the_others():
    costs = Costs.fixed(begin=0.3, step=0.3, verify_base=1.0, verify_per_node=0.05)
    assert sure(costs, 0.9).decide([], 1) and not sure(costs, 0.05).decide([], 1)
    few = Together([sure(costs, theta) for theta in (0.6, 0.05, 0.05, 0.05)], costs)
    assert not few.decide([[]] * 4, [True] * 4, 1)
    many = Together([sure(costs, theta) for theta in (0.9, 0.9, 0.9, 0.05)], costs)
    assert many.decide([[]] * 4, [True] * 4, 1), "the fourth row comes along, which costs nothing more"


def test_a_batch_that_would_rather_not_begin_tries_once():
    """Sixteen rows that know nothing are of one doubting mind, where a row alone would have drawn a bold theta."""
    costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.6)
    controllers = [make("beta", costs, 8, seed) for seed in range(16)]
    together = Together(controllers, costs)
    assert not together.safeguard.allows(False, 0.7, False) and together.decide([[]] * 16, [True] * 16, 1)
    together.observe([1] * 16, 1, [[0.5]] * 16, [0] * 16, [1] * 16, 1.7)
    assert not Together(controllers, costs).decide([[]] * 16, [True] * 16, 1)


def test_rows_that_found_nothing_to_draft_expect_nothing_of_a_further_level():
    costs = Costs.fixed(begin=0.1, step=0.3, verify_base=1.0, verify_per_node=0.05)
    for able, goes in (([True, True], True), ([True, False], False)):
        together = Together([sure(costs, 0.7), sure(costs, 0.7)], costs)
        together.decide([[], []], [True, True], 1)
        assert together.decide([[0.7], [0.7] if able[1] else []], able, 1) is goes


def test_candidates_are_verified_while_a_column_of_them_pays_for_itself():
    costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.06)
    controllers = [make("calibrated", costs, 8, seed) for seed in range(2)]
    together = Together(controllers, costs)
    price = together.price
    assert price == pytest.approx(0.5), "of a token where two rows share a round"
    gains = [[0.5, 0.3, 0.1, 0.04], [0.5, 0.2]]
    likely = [one.likely([0.8], row, [0] * len(row)) for one, row in zip(controllers, gains, strict=True)]
    columns = summed(likely)
    expected = sum(1 for gain in columns if price * gain > 0.06)
    assert 0 < expected < 4
    assert together.size([[0.8], [0.8]], gains, [[0] * 4, [0] * 2]) == expected
    assert summed([[1.0, 2.0], [], [0.5]]) == [1.5, 2.0]


def test_rows_pool_their_credit_and_share_it_from_then_on():
    costs = fixed_costs()
    controllers = batch("beta", 3, costs)
    controllers[0].safeguard = Safeguard(8.0, 0.0, 0.0)
    together = Together(controllers, costs)
    together.observe([0, 0, 0], 0, [[], [], []], [0, 0, 0], [1, 1, 1], PLAIN_PASS)
    for controller in controllers:
        assert controller.safeguard.credit == pytest.approx((8 + 2 * START) / 3 + 0.02)
    controllers[0].safeguard.credit = 0.0
    assert controllers[1].safeguard.credit > 0, "each has its own again when the batch changes"


@pytest.mark.parametrize("name", ["beta", "calibrated"])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("node", [0.002, 0.02, 0.06])
def test_a_useless_drafter_costs_a_batch_no_more_than_a_row(name: str, rows: int, node: float):
    """Also while the costs are still being learned."""
    boastful = [[Draft([0.99] * 8, 0)] * 128] * rows
    truth = Machine(node)
    plain = fixed_seconds(boastful, truth, 0)
    for known in (truth, Costs()):
        run = decode(batch(name, rows, known), boastful, truth, known, 8)
        assert run.drafted > 0
        assert run.seconds < 1.05 * plain


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("node, step_row", [(0.002, 0.0), (0.01, 0.002), (0.03, 0.01)])
def test_a_batch_comes_near_its_best_fixed_length_and_is_not_slower_than_plain(rows: int, node: float, step_row: float):
    """From nearly free nodes to a machine that sixteen rows fill: there, drafting must stop by itself."""
    truth, experience, known = Machine(node, step_row=step_row), Experience(), Costs()
    batches = [
        [answer([0.9] * 20 + [0.5] * 20, seed=100 * turn + row, levels=8) for row in range(rows)] for turn in range(3)
    ]
    seconds = [
        decode(batch("calibrated", rows, known, experience), answers, truth, known, 8).seconds for answers in batches
    ]
    fixed = [sum(fixed_seconds(answers, truth, length) for answers in batches) for length in range(9)]
    assert sum(seconds) < 1.02 * fixed[0]
    assert sum(seconds) < 1.08 * min(fixed)


def test_where_sixteen_rows_fill_the_machine_fewer_levels_are_drafted_than_for_one():
    lengths = []
    for rows in (1, 4, 16):
        truth = Machine(0.03)
        answers = [answer([0.7], seed=row, levels=8) for row in range(rows)]
        run = decode(batch("calibrated", rows, truth), answers, truth, truth, 8)
        lengths.append(run.drafted / run.rounds / rows)
    assert lengths[0] > lengths[1] + 0.3 > lengths[2] + 0.6


@pytest.mark.parametrize("name, options", [("confidence", {}), ("ucb", {}), ("beta", {"rule": "bernoulli"})])
def test_controllers_that_weigh_no_tokens_decide_row_by_row(name: str, options: dict):
    costs = fixed_costs()
    pace = RoundPace(batch(name, 3, costs, **options), costs, 4)
    assert pace.together is None
    assert RoundPace(batch("calibrated", 3, costs), costs, 4).together is not None
    mixed = [*batch("calibrated", 2, costs), *batch(name, 1, costs, **options)]
    assert RoundPace(mixed, costs, 4).together is None


def test_a_plain_round_is_measured_before_anything_is_drafted():
    costs = Costs()
    controllers = batch("calibrated", 2, costs)
    first = RoundPace(controllers, costs, 4)
    assert first.going == [False, False]
    first.observe([0, 0], [0, 0], [1, 1], [1, 1], PLAIN_PASS, 0.0)
    assert RoundPace(controllers, costs, 4).going == [True, True]
