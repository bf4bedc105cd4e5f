"""The shape tuner: which shapes there are, what each is believed to bring, and that the best is found and kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from statistics import fmean

import pytest

from outdraft.control import ControlSettings, Costs, Pacer
from outdraft.control.shape_grid import FIRST_CHANCE, PLAIN, ShapeGrid, levels_of
from outdraft.control.tuner import MOST, ShapeTuner
from outdraft.core.shape import CPU_CHAIN, CPU_TREE, GPU_TREE, TreeShape

TREES = CPU_TREE.doubled()
CHAINS = CPU_CHAIN.doubled()
GAUGE = TreeShape(0, 1, 2, "spine")
"""Stands for a round whose candidates nobody drafted."""

ANSWER = 96
"""Rounds of an answer."""


class Machine:
    """Seconds and verdicts of rounds: passes over more nodes take longer, all the more so with more rows.

    Args:
        chance: that a level of a chain is accepted if all above it are; trees leave a fifth less to be refused.
        node: what a node adds to a pass over one node, as a share.
        step: a draft step, likewise.
    """

    def __init__(self, chance: float, node: float = 0.02, step: float = 0.08, noise: float = 0.0, seed: int = 0):
        self.chance, self.node, self.step, self.noise = chance, node, step, noise
        self.random = random.Random(seed)

    def mean(self, shape: TreeShape, rows: int) -> float:
        return 0.02 * (1 + self.node * (rows * shape.size - 1) + self.step * levels_of(shape))

    def seconds(self, shape: TreeShape, rows: int) -> float:
        stall = 4.0 if self.noise and self.random.random() < 0.02 else 1.0
        return self.mean(shape, rows) * stall * self.random.uniform(1 - self.noise, 1 + self.noise)

    def chance_of(self, shape: TreeShape) -> float:
        return self.chance if shape.top_k == 1 or not self.chance else 1 - 0.8 * (1 - self.chance)

    def accepted(self, shape: TreeShape) -> int:
        count = 0
        while count < levels_of(shape) and self.random.random() < self.chance_of(shape):
            count += 1
        return count

    def tokens(self, shape: TreeShape) -> float:
        return sum(self.chance_of(shape) ** level for level in range(levels_of(shape) + 1))

    def rate(self, shape: TreeShape, rows: int) -> float:
        return rows * self.tokens(shape) / self.mean(shape, rows)


def run(tuner: ShapeTuner, machine: Machine, rows: int, rounds: int, start: int = 0) -> tuple[list[TreeShape], float]:
    """The shapes chosen, and tokens a second: those expected, so that luck is no part of it."""
    shapes, seconds, tokens, pending = [], 0.0, 0.0, 0
    for number in range(rounds):
        if number % ANSWER == 0:  # other rows, and the drafter has their prompts to take in
            pending = 40
        choice = tuner.choose(rows, pending)
        took, lasts = machine.seconds(choice.shape, rows), machine.mean(choice.shape, rows)
        if choice.gauges:  # nobody drafts, and nothing is accepted
            choice.observe([0] * rows, took - 0.02 * machine.step)
            pending, seconds, tokens = pending + 1, seconds + lasts - 0.02 * machine.step, tokens + rows
            shapes.append(GAUGE)
            continue
        if choice.shape != PLAIN:
            took, pending = took + 0.0005 * pending, 0
        accepted = [machine.accepted(choice.shape) for _ in range(rows)]
        choice.observe(accepted, took)
        pending += 1 + max(accepted)
        shapes.append(choice.shape)
        seconds, tokens = seconds + lasts, tokens + rows * machine.tokens(choice.shape)
    return shapes, tokens / seconds


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [TREES, CHAINS, GPU_TREE.doubled(), TreeShape(0, 3, 4), TreeShape.chain(1)], ids=str)
def test_all_shapes_are_within_the_bounds_and_the_largest_is_among_them(bounds: TreeShape):
    shapes = ShapeGrid(bounds).shapes
    assert shapes[0] == PLAIN and bounds in shapes and len(set(shapes)) == len(shapes)
    for shape in shapes[1:]:
        assert shape.depth <= bounds.depth and shape.top_k <= bounds.top_k and shape.size <= bounds.size
        assert shape.candidates == bounds.candidates


def test_defaults_are_in_the_grid_of_their_doubles():
    assert CPU_TREE in ShapeGrid(TREES).shapes and CPU_CHAIN in ShapeGrid(CHAINS).shapes
    assert GPU_TREE in ShapeGrid(GPU_TREE.doubled()).shapes


def test_it_begins_with_the_length_of_the_default_and_in_batches_shorter():
    assert ShapeGrid(CHAINS).start(1) == CPU_CHAIN and ShapeGrid(GPU_TREE.doubled()).start(1) == GPU_TREE
    assert ShapeGrid(TREES).start(1) == TreeShape.chain(CPU_TREE.depth + 1)
    assert ShapeGrid(TREES).start(8) == TreeShape.chain(2)
    assert ShapeGrid(PLAIN).start(1) == PLAIN


def test_every_shape_can_be_climbed_to():
    for bounds in (TREES, CHAINS, GPU_TREE.doubled()):
        grid = ShapeGrid(bounds)
        reached, new = set(), [PLAIN]
        while new:
            reached |= set(new)
            new = [other for shape in new for other in grid.beside(shape) if other not in reached]
        assert reached == set(grid.shapes)


def test_expected_tokens_are_those_of_the_levels_accepted():
    grid = ShapeGrid(CHAINS, discount=1.0)
    assert grid.tokens(PLAIN) == 1 and grid.tokens(grid.lines[0][0]) == pytest.approx(1 + FIRST_CHANCE)
    four = TreeShape.chain(4, candidates="sampled")
    for _ in range(2000):
        grid.observe(four, [0, 1, 2, 4])
    assert grid.chances(1)[:4] == pytest.approx([3 / 4, 2 / 3, 1 / 2, 1], rel=0.01)
    assert grid.tokens(TreeShape.chain(2, candidates="sampled")) == pytest.approx(1 + 3 / 4 + 1 / 2, rel=0.01)
    assert grid.tokens(four) == pytest.approx(1 + 3 / 4 + 1 / 2 + 1 / 4 + 1 / 4, rel=0.01)


def test_what_is_not_known_of_a_width_is_taken_from_others_and_of_a_level_from_the_one_above():
    grid = ShapeGrid(TREES)
    for _ in range(100):
        grid.observe(TreeShape.chain(3), [3, 3])
    assert min(grid.chances(1)[3:]) > 0.9 and min(grid.chances(3)) > 0.9
    for _ in range(100):
        grid.observe(TreeShape(2, 3, 8), [0, 0])
    assert grid.chances(3)[0] < 0.1 < 0.9 < grid.chances(1)[0]


def test_old_verdicts_fade():
    grid = ShapeGrid(CHAINS)
    for accepted in (8, 0):
        for _ in range(200):
            grid.observe(CHAINS, [accepted])
    assert grid.chances(1)[0] < 0.1


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [TREES, CHAINS], ids=["trees", "chains"])
@pytest.mark.parametrize("rows, node", [(1, 0.005), (1, 0.04), (8, 0.005), (8, 0.04), (16, 0.04)])
@pytest.mark.parametrize("chance", [0.4, 0.8])
def test_it_comes_near_the_best_shape_on_a_noisy_machine(bounds: TreeShape, rows: int, node: float, chance: float):
    first, later, gain = [], [], 0.0
    for seed in range(4):
        machine, tuner = Machine(chance, node, noise=0.2, seed=seed), ShapeTuner(bounds, Costs())
        best = max(machine.rate(shape, rows) for shape in tuner.grid.shapes)
        gain = best / machine.rate(PLAIN, rows)
        first.append(run(tuner, machine, rows, 48)[1] / best)
        later.append(run(tuner, machine, rows, 400)[1] / best)
    # Where a batch gains hardly more than it asks for, that is lost for not making drafters read prompts in vain.
    just = rows >= 4 and 1.1 < gain < 1.4
    assert fmean(first) > (0.76 if just else 0.8)
    assert fmean(later) > (0.8 if just else 0.92)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("node", [0.002, 0.02, 0.06])
def test_a_useless_drafter_costs_two_percent_in_the_long_run(rows: int, node: float):
    machine = Machine(0.0, node, noise=0.1)
    tuner = ShapeTuner(TREES, Costs())
    plain = machine.rate(PLAIN, rows)
    shapes, first = run(tuner, machine, rows, 128)
    assert first > 0.92 * plain
    _, later = run(tuner, machine, rows, 1000)
    assert later > 0.975 * plain
    assert shapes.count(PLAIN) > 0.7 * len(shapes)


def test_a_prompt_that_the_drafter_takes_in_counts_for_no_shape():
    """Once it did, sixteen rows never drafted again: their first draft had taken in sixteen prompts."""
    machine, tuner = Machine(0.8, 0.002), ShapeTuner(CHAINS, Costs())
    for _ in range(4):
        choice = tuner.choose(16, 500)
        choice.observe([0] * 16, 0.02)
    choice = tuner.choose(16, 500)
    choice.observe([2] * 16, 1.0)
    assert choice.shape != PLAIN and not tuner.timings[4].of(choice.shape).count
    shapes, _ = run(tuner, machine, 16, 60)
    assert shapes.count(PLAIN) <= 3


@pytest.mark.parametrize(("gauged", "pays"), [(0.024, True), (0.034, False)])
def test_a_batch_is_gauged_before_its_drafter_reads_the_prompts(gauged: float, pays: bool):
    """Plain rounds and such with an arbitrary candidate are timed twice each; then the drafter is asked, or not."""
    tuner = ShapeTuner(CHAINS, Costs())
    for gauges in (False, False, True, True):
        choice = tuner.choose(8, 500)
        assert choice.gauges == gauges and choice.shape == (tuner.grid.lines[0][0] if gauges else PLAIN)
        choice.observe([0] * 8, gauged if gauges else 0.02)
    assert not any(tuner.grid.judged[1]), "what was not drafted says nothing of the drafter"
    following = []
    for _ in range(40):
        choice = tuner.choose(8, 500)
        choice.observe([0] * 8, 0.02)
        following.append(choice)
    assert (following[0].shape != PLAIN) == pays
    assert any(choice.shape != PLAIN for choice in following) == pays
    assert not any(choice.gauges for choice in following)


def test_few_rows_draft_at_once():
    assert ShapeTuner(CHAINS, Costs()).choose(2, 500).shape != PLAIN


def test_a_trial_that_makes_the_drafter_read_in_vain_is_put_off_longer_each_time():
    machine, tuner = Machine(0.3, 0.06), ShapeTuner(CHAINS, Costs())
    shapes = [shape for _ in range(4) for shape in run(tuner, machine, 16, 400)[0]]
    asked = [number for number, shape in enumerate(shapes) if shape not in (PLAIN, GAUGE)]
    assert sum(shape == GAUGE for shape in shapes) <= 16 and len(asked) <= 40
    assert fmean(shape == PLAIN for shape in shapes[-800:]) > 0.985


@pytest.mark.parametrize(("left", "drafts"), [(400, True), (10, False)])
def test_what_the_drafter_must_read_must_be_regained_in_what_is_left(left: int, drafts: bool):
    machine, tuner = Machine(0.8, 0.002), ShapeTuner(CHAINS, Costs())
    run(tuner, machine, 8, 200)
    tuner.reading.value = 0.0005
    assert tuner.best(8) != PLAIN
    known = tuner.timings[3]
    known.drafted[PLAIN] = known.rounds
    assert deepcopy(tuner).choose(8, 300, left).shape != PLAIN, "who joins a batch that drafts waits for nothing"
    known.drafted = dict.fromkeys(known.drafted, known.rounds)
    known.rounds += 20  # of rows that all repeated themselves
    for pending, expected in ((300, drafts), (2, True)):
        assert (deepcopy(tuner).choose(8, pending, left).shape != PLAIN) == expected


def test_reading_that_was_timed_in_a_busy_minute_does_not_stop_drafting_for_good():
    machine, tuner = Machine(0.8, 0.002), ShapeTuner(CHAINS, Costs())
    run(tuner, machine, 8, 200)
    tuner.reading.value *= 30
    known = tuner.timings[3]
    drafted, pending = 0, 300
    for number in range(4000):
        if number % ANSWER == 0:  # other rows, after such that all repeated themselves
            pending, known.drafted = 300, {}
        choice = tuner.choose(8, pending, 64)
        drafted += choice.shape != PLAIN
        read = 0.0005 * pending if choice.shape != PLAIN else 0.0
        pending = 0 if choice.shape != PLAIN else pending + 1
        choice.observe([machine.accepted(choice.shape) for _ in range(8)], machine.mean(choice.shape, 8) + read)
        if number == 500:
            assert not drafted
    assert drafted > 500 and tuner.reading.value < 0.001


def test_a_long_time_without_trials_earns_no_more_than_an_answer_may_lose():
    machine, tuner = Machine(0.45, 0.02), ShapeTuner(CHAINS, Costs())
    run(tuner, machine, 8, 200)
    lost = []
    for pending in (0, 400):  # trials that cost nothing but their round, after others that cannot be afforded
        lost.append(tuner.credit)
        for _ in range(1000):
            choice = tuner.choose(8, pending, 5)
            choice.observe([machine.accepted(choice.shape) for _ in range(8)], machine.mean(choice.shape, 8))
    assert max(lost[1], tuner.credit) <= MOST == tuner.credit


def test_a_first_round_that_compiled_something_is_forgotten():
    tuner = ShapeTuner(CHAINS, Costs())
    for seconds in (30.0, 0.03):
        choice = tuner.choose(1, 1)
        assert choice.shape == CPU_CHAIN, "until it was timed twice"
        choice.observe([4], seconds)
    timing = tuner.timings[0].of(CPU_CHAIN)
    assert timing.value == 0.03
    timing.observe(0.09)
    assert 0.03 < timing.value < 0.06, "a stall counts twice at most"
    timing.observe(0.01)
    assert timing.value == 0.01, "so much faster that what was there before is nothing to go by"


def test_a_machine_that_becomes_busier_changes_no_order():
    """Shapes that were timed while it was idle do not look fast for that."""
    tuner = ShapeTuner(TREES, Costs())
    machine = Machine(0.8, 0.02)
    before = Counter(run(tuner, machine, 8, 300)[0][100:])
    mean = machine.mean
    machine.mean = lambda shape, rows: 3 * mean(shape, rows)  # type: ignore[method-assign]
    after = Counter(run(tuner, machine, 8, 60)[0])
    assert sum(after[shape] for shape, _ in before.most_common(2)) > 40


def test_text_that_becomes_hard_is_drafted_less_far():
    tuner, machine = ShapeTuner(CHAINS, Costs()), Machine(0.9, 0.03)
    easy, _ = run(tuner, machine, 4, 200)
    machine.chance = 0.2
    hard, _ = run(tuner, machine, 4, 200)
    assert sum(map(levels_of, easy[100:])) > 2 * sum(map(levels_of, hard[100:]))


def test_numbers_of_rows_are_timed_apart_and_begin_where_others_got_to():
    tuner = ShapeTuner(CHAINS, Costs())
    run(tuner, Machine(0.9, 0.002, step=0.01), 8, 300)
    assert levels_of(tuner.best(8)) > 4
    assert tuner.choose(16, 1).shape == tuner.best(8)
    run(tuner, Machine(0.9, 0.5), 16, 200)
    assert levels_of(tuner.best(16)) < levels_of(tuner.best(8))


@pytest.mark.parametrize(
    ("gain", "rows", "drafts"),
    [(1.05, 1, True), (1.05, 2, False), (1.15, 8, False), (1.2, 8, True), (1.2, 16, False), (1.3, 16, True)],
)
def test_a_batch_drafts_only_for_more_than_its_rows_ends_lie_apart(gain: float, rows: int, drafts: bool):
    """Chains of one level which bring, a second, so many times what plain rounds do."""
    tuner = ShapeTuner(TreeShape.chain(1), Costs.fixed(begin=0.0, step=0.0, verify_base=1.0, verify_per_node=0.0))
    for _ in range(60):
        choice = tuner.choose(rows, 1)
        choice.observe([1] * rows, 1.0)
    seconds = tuner.grid.tokens(TreeShape.chain(1)) / gain
    tuner.costs = Costs.fixed(begin=seconds - 1, step=0.0, verify_base=1.0, verify_per_node=0.0)
    assert (tuner.best(rows) != PLAIN) == drafts


def test_given_costs_make_choices_repeatable():
    def chosen(noise: Callable[[], float]) -> list[TreeShape]:
        costs = Costs.fixed(begin=0.1, step=0.1, verify_base=1.0, verify_per_node=0.02)
        tuner, dice, shapes = ShapeTuner(TREES, costs), random.Random(1), []
        for _ in range(60):
            choice = tuner.choose(4, 1)
            choice.observe([min(levels_of(choice.shape), dice.randrange(5)) for _ in range(4)], noise())
            shapes.append(choice.shape)
        return shapes

    assert chosen(lambda: 0.02) == chosen(random.Random(0).random)
    assert len(set(chosen(lambda: 0.02))) > 1


def test_a_pacer_keeps_what_was_found_and_bounds_have_their_own():
    pacer = Pacer(ControlSettings("auto"))
    assert pacer.tuner(TREES, 1) is pacer.tuner(TREES, 8) is not pacer.tuner(CHAINS, 1)


@pytest.mark.parametrize(
    ("name", "alone", "batched"),
    [
        ("fixed", False, False),
        ("confidence", False, False),
        ("beta", False, True),
        ("calibrated", False, True),
        ("auto", True, True),
    ],
)
def test_whole_shapes_are_chosen_for_batches_of_those_who_weigh_tokens_against_seconds(name, alone, batched):
    pacer = Pacer(ControlSettings(name))
    assert (pacer.tuner(TREES, 1) is not None) == alone
    assert (pacer.tuner(TREES, 2) is not None) == (pacer.tuner(CHAINS, 16) is not None) == batched
