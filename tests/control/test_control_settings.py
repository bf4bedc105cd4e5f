"""Settings are checked when they are made, in one line that names the fix."""

from __future__ import annotations

from dataclasses import fields

import pytest
from simulated import fixed_costs, generator

from outdraft.control import CONTROLLERS, ControlSettings
from outdraft.control.base import Evidence
from outdraft.control.settings import KINDS
from outdraft.errors import UserError


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_can_be_made(name: str):
    controller = ControlSettings(name).make(fixed_costs(), 4, generator())
    assert controller.limit == 4 and controller.rows == 1


@pytest.mark.parametrize(
    "given, named",
    [
        ({"name": "ucb"}, "fixed, confidence, beta, calibrated, auto, not 'ucb'"),
        ({"threshold": 1.5}, "threshold must be in"),
        ({"threshold": "high"}, "threshold must be a finite number"),
        ({"prior_accepted": 0}, "prior_accepted must be more than 0"),
        ({"prior_rejected": float("nan")}, "prior_rejected must be a finite number"),
        ({"confidence_weight": -1}, "confidence_weight must be 0"),
        ({"discount": 0}, "discount must be in"),
        ({"discount": 1.01}, "discount must be in"),
        ({"memory": -1}, "memory must be 0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given: dict, named: str):
    with pytest.raises(UserError, match=named) as problem:
        ControlSettings(**given)
    assert "\n" not in str(problem.value)


def test_a_controller_with_options_is_one_word():
    assert ControlSettings.parse("calibrated") == ControlSettings("calibrated")
    given = ControlSettings.parse("calibrated,discount=0.95, confidence_weight = 2,memory=0")
    assert given == ControlSettings("calibrated", discount=0.95, confidence_weight=2.0, memory=0.0)


def test_every_option_can_be_given_to_a_controller_that_reads_it():
    options = {field.name for field in fields(ControlSettings)} - {"name"}
    assert options == {option for _, read in KINDS.values() for option in read}
    for name, (_, read) in KINDS.items():
        for option in read:
            controller = ControlSettings.parse(f"{name},{option}=0.75").make(fixed_costs(), 4, generator())
            assert 0.75 in _numbers_of(controller), f"{name} does not read {option}"


def _numbers_of(controller: object) -> list[float]:
    """What a controller keeps, sums of evidence included."""
    kept = list(vars(controller).values())
    return [*kept, *(number for one in kept if isinstance(one, Evidence) for number in one.start)]


@pytest.mark.parametrize(
    "text, named",
    [
        ("ucb", "fixed, confidence, beta, calibrated, auto, not 'ucb'"),
        ("bandit,discount=1", "must be one of"),
        ("calibrated,discont=0.9", "no option 'discont'; did you mean 'discount'?"),
        ("beta,threshold=0.9", "no option 'threshold'; it reads prior_accepted"),
        ("fixed,discount=0.9", "no option 'discount'; it reads none"),
        ("calibrated,discount", "option=value"),
        ("calibrated,", "option=value"),
        ("calibrated,discount=much", "discount must be a finite number"),
    ],
)
def test_what_is_wrong_in_such_a_word_is_named(text: str, named: str):
    with pytest.raises(UserError) as problem:
        ControlSettings.parse(text)
    assert named in str(problem.value) and "\n" not in str(problem.value)


def test_numbers_may_be_text_as_a_command_line_has_them():
    assert ControlSettings(threshold="0.5").threshold == 0.5  # type: ignore[arg-type]


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match="limit"):
        ControlSettings().make(fixed_costs(), -1, generator())
