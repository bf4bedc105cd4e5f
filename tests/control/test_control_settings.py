"""Settings are checked when they are made, in one line that names the fix."""

from __future__ import annotations

import pytest
from simulated import fixed_costs, generator

from outdraft.control import CONTROLLERS, ControlSettings
from outdraft.errors import UserError


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_can_be_made(name: str):
    controller = ControlSettings(name).make(fixed_costs(), 4, generator())
    assert controller.limit == 4 and controller.rows == 1


@pytest.mark.parametrize(
    "given, named",
    [
        ({"name": "bandit"}, "fixed, confidence, beta, calibrated, ucb"),
        ({"rule": "hope"}, "worth, bernoulli"),
        ({"calibration": "none"}, "platt, isotonic"),
        ({"threshold": 1.5}, "threshold must be in"),
        ({"threshold": "high"}, "threshold must be a finite number"),
        ({"prior_accepted": 0}, "prior_accepted must be more than 0"),
        ({"prior_rejected": float("nan")}, "prior_rejected must be a finite number"),
        ({"confidence_weight": -1}, "confidence_weight must be 0"),
        ({"exploration": -0.1}, "exploration must be 0"),
        ({"discount": 0}, "discount must be in"),
        ({"discount": 1.01}, "discount must be in"),
        ({"memory": -1}, "memory must be 0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given: dict, named: str):
    with pytest.raises(UserError, match=named) as problem:
        ControlSettings(**given)
    assert "\n" not in str(problem.value)


def test_numbers_may_be_text_as_a_command_line_has_them():
    assert ControlSettings(threshold="0.5").threshold == 0.5  # type: ignore[arg-type]


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match="limit"):
        ControlSettings().make(fixed_costs(), -1, generator())
