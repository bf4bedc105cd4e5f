"""Who decides how far to draft: the machine, where nobody says otherwise or `tree_size="auto"` is asked for."""

from __future__ import annotations

import pytest

from models import tiny
from outdraft.api.generation import load
from outdraft.console.options import whole_or_auto
from outdraft.control import ControlSettings
from outdraft.errors import UserError


def test_the_flag_takes_a_number_or_auto():
    assert whole_or_auto("12") == 12 and whole_or_auto("auto") == "auto" and whole_or_auto(None) is None
    with pytest.raises(UserError, match="--tree-size must be a whole number or auto, not 'large'"):
        whole_or_auto("large")


@pytest.mark.clocked
def test_without_a_word_a_drafter_that_is_no_use_is_hardly_asked():
    """One that costs as much as the target and is never right: the safeguard stops it."""
    target, wrong = tiny("llama-gqa"), tiny("llama-mha")
    model = load(target, wrong, backend="eager")
    out = model.generate([1, 2, 3], max_new_tokens=50, prompt_lookup_min=0)
    assert out.tokens == load(target, method="none", backend="eager").generate([1, 2, 3], max_new_tokens=50).tokens
    fixed = model.generate([1, 2, 3], max_new_tokens=50, prompt_lookup_min=0, controller="fixed")
    assert out.statistics.drafted < fixed.statistics.drafted / 2


def test_a_batch_is_tuned_and_a_row_is_not_and_options_come_with_the_name():
    target, near = tiny("llama-gqa"), tiny("llama-gqa", initializer_range=0.021)
    model, plain = load(target, near, backend="eager"), load(target, method="none", backend="eager")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    out = model.generate(prompts, max_new_tokens=24, controller="calibrated,memory=0", prompt_lookup_min=0)
    assert out.tokens == plain.generate(prompts, max_new_tokens=24).tokens
    (pacer,) = model._pacers.values()
    assert pacer is not None and pacer.settings == ControlSettings("calibrated", memory=0.0)
    (tuner,) = pacer._tuners.values()
    assert tuner.timings[2].rounds > 1 and 0 not in tuner.timings
    with pytest.raises(UserError, match="did you mean 'memory'"):
        model.generate(prompts, controller="calibrated,memry=0")
