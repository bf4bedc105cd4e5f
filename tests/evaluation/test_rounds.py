"""What rounds cost, the speed that follows, and that nothing but time decides it."""

from __future__ import annotations

import pytest
import torch

from models import tiny
from outdraft.core.shape import TreeShape
from outdraft.evaluation import rounds
from outdraft.evaluation.rounds import NOTHING, Guesses, Lap, RoundCost, Way, head_seconds, timed
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny("llama-gqa", dtype=torch.float32, initializer_range=0.2))


def test_the_speed_up_is_tau_over_one_plus_draft_plus_verify() -> None:
    plain = Lap(draft=0.0, verify=0.09, rest=0.01)
    cost = RoundCost.of(plain, Lap(draft=0.02, verify=0.115, rest=0.015), TreeShape.chain(4))
    assert (cost.draft, cost.verify, cost.step_seconds) == pytest.approx((0.2, 0.3, 0.005))
    assert cost.tau_to_pay == pytest.approx(1.5)
    assert [cost.speedup(tau) for tau in (1.5, 3)] == pytest.approx([1.0, 2.0])


def test_a_draft_that_has_done_a_part_of_the_pass_makes_it_shorter() -> None:
    cost = RoundCost.of(Lap(0.0, 0.1, 0.0), Lap(0.06, 0.08, 0.0), TreeShape.chain(2))
    assert cost.verify == pytest.approx(-0.2) and cost.tau_to_pay == pytest.approx(1.4)


def test_medians_are_not_moved_by_one_stall() -> None:
    laps = [Lap(0.0, 0.1, 0.01), Lap(0.0, 9.0, 0.01), Lap(0.0, 0.1, 0.01)]
    assert Lap.median(laps) == Lap(0.0, 0.1, 0.01)


def test_ways_take_turns_and_the_first_turn_and_rounds_do_not_count(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    inner = rounds._laps

    def watched(target: Target, drafter: object, shape: TreeShape, prompt: list[int], count: int) -> list[Lap]:
        found = inner(target, drafter, shape, prompt, count)  # type: ignore[arg-type]
        order.append(f"{shape.size}:{len(found)}")
        return found

    monkeypatch.setattr(rounds, "_laps", watched)
    ways: dict[str, Way] = {"plain": (None, NOTHING), "five": (Guesses(), TreeShape.chain(4))}
    laps = timed(target, ways, [5, 9, 3, 7], rounds=3, turns=2)
    # One round of each is left of the first turn, which warms up; then three each, another one first in every turn.
    assert order == ["1:1", "5:1", "5:3", "1:3", "1:3", "5:3"]
    assert laps["plain"].whole > 0 and laps["five"].verify > 0


@pytest.mark.parametrize("kind", ["guesses", "prompt-lookup", "itself"])
def test_every_kind_of_drafter_can_be_timed(target: Target, kind: str) -> None:
    drafter = {"guesses": Guesses, "prompt-lookup": PromptLookup, "itself": lambda: DraftModel(target, target)}[kind]()
    laps = timed(target, {kind: (drafter, TreeShape.chain(3))}, [5, 9, 5, 9, 5], rounds=2, turns=1)
    assert laps[kind].draft > 0 and laps[kind].verify > 0 and laps[kind].rest > 0


def test_no_turn_is_begun_after_the_time_there_is(target: Target) -> None:
    texts = []
    timed(target, {"plain": (None, NOTHING)}, [5, 9], turns=50, end=0.0, progress=lambda: texts.append(1))
    assert len(texts) == 2, "the warm-up and one turn that counts"


def test_the_output_layer_takes_time(target: Target) -> None:
    assert head_seconds(target) > 0
