"""Who decides how far to draft: the machine, where nobody says otherwise or `tree_size="auto"` is asked for."""

from __future__ import annotations

import pytest

from models import tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.console.options import whole_or_auto
from outdraft.control import ControlSettings, Costs, Pacer
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits
from outdraft.errors import UserError
from outdraft.target.target import Target


def test_the_flag_takes_a_number_or_auto():
    assert whole_or_auto("12") == 12 and whole_or_auto("auto") == "auto" and whole_or_auto(None) is None
    with pytest.raises(UserError, match="--tree-size must be a whole number or auto, not 'large'"):
        whole_or_auto("large")


@pytest.mark.clocked
def test_without_a_word_a_drafter_that_is_no_use_is_hardly_asked(monkeypatch):
    """One that costs as much as the target, a second a pass, and is never right: the safeguard stops it."""
    target, wrong = tiny("llama-gqa"), tiny("llama-mha")
    passes = []
    for model in (target, wrong):
        model.model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("time.perf_counter", lambda: float(len(passes)))
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


class Deaf(Drafter):
    """Drafts to the shape's limit, always the same token, and asks no budget."""

    method = "deaf"
    limits = Limits(probs=False)

    def begin(self, prompts, run):
        return DeafState()


class DeafState(DraftState):
    def propose(self, update, shape, rows):
        return Tree.listed([[root, *[0] * (shape.size - 1)] for root in update.roots.tolist()], update.tokens.device)

    def select_rows(self, rows):
        pass


def test_a_drafter_that_asks_no_budget_is_given_whole_shapes():
    """Controllers cannot stop it level by level, so the tuner decides for it, and hardly asks it where it is no use."""
    target = Target(tiny("llama-gqa"))
    pacer = Pacer(ControlSettings("calibrated"), Costs.fixed(0.2, 0.2, 1.0, 0.05))
    model = SpeculativeModel(target, Deaf())
    settings = {"max_new_tokens": 50, "prompt_lookup_min": 0}
    out = model.generate([1, 2, 3], controller=pacer, **settings)
    assert out.tokens == model.with_drafter(None).generate([1, 2, 3], max_new_tokens=50).tokens
    fixed = model.generate([1, 2, 3], controller="fixed", **settings)
    assert out.statistics.drafted < fixed.statistics.drafted / 4
    assert sum(depth > 0 for depth in out.statistics.depths) >= 1, "the first round drafted and showed it"
