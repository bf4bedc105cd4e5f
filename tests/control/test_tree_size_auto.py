"""`tree_size="auto"`: what it needs, what it bounds, and who decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import tiny
from outdraft.api.generation import load
from outdraft.api.settings import controller_of, default_controller, pacer_of, tree_shape
from outdraft.console.options import whole_or_auto
from outdraft.control import ControlSettings, Pacer
from outdraft.core.shape import CPU_TREE, GPU_TREE, TreeShape
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.methods.prompt_lookup import PromptLookup

CPU = torch.device("cpu")
AUTO = {"tree_size": "auto"}


class Plain(Drafter):
    """Has the defaults of a drafter that runs ahead."""

    method = "fspad"

    def begin(self, prompts, run):
        raise NotImplementedError


def test_bounds_are_twice_the_default_and_others_that_are_given_hold():
    for device in (CPU, torch.device("cuda")):
        default = Plain().default_shape(device)
        assert tree_shape(Plain(), device, AUTO) == TreeShape(2 * default.depth + 1, default.top_k, 2 * default.size)
    given = tree_shape(Plain(), CPU, AUTO | {"tree_depth": 2, "tree_top_k": 5})
    assert given == TreeShape(2, 5, 2 * CPU_TREE.size)


def test_where_the_default_is_a_chain_it_may_be_twice_as_long():
    assert tree_shape(Plain(), CPU, AUTO, sampling=True) == TreeShape.chain(8, candidates="sampled")
    assert tree_shape(PromptLookup(), CPU, AUTO) == TreeShape.chain(20)


def test_the_machine_decides_alone():
    assert controller_of(None, AUTO) == controller_of("fixed", AUTO) == "auto"
    pacer = pacer_of(None, AUTO)
    assert pacer is not None and pacer.settings.name == "auto" and pacer_of(pacer, AUTO) is pacer
    assert controller_of("auto", AUTO) == "auto"
    for wrong in ("confidence", "calibrated", ControlSettings("beta"), Pacer(ControlSettings("confidence"))):
        with pytest.raises(UserError, match=r"tree_size auto chooses whole trees.*leave the controller out"):
            pacer_of(wrong, AUTO)


def test_other_trees_change_no_controller():
    assert controller_of(None, {"tree_size": 8}) is None and controller_of("beta", {}) == "beta"
    assert pacer_of("fixed", {"tree_size": 8}) is None and pacer_of(None, {}) is None


def test_chains_by_the_machine_are_asked_for_as_trees_of_one_candidate_a_level():
    assert tree_shape(Plain(), CPU, AUTO | {"tree_top_k": 1}).top_k == 1
    with pytest.raises(UserError, match="give one"):
        tree_shape(Plain(), CPU, AUTO | {"num_speculative_tokens": 4})


def test_the_flag_takes_a_number_or_auto():
    assert whole_or_auto("12") == 12 and whole_or_auto("auto") == "auto" and whole_or_auto(None) is None
    with pytest.raises(UserError, match="--tree-size must be a whole number or auto, not 'large'"):
        whole_or_auto("large")


def test_on_a_cpu_chains_are_drafted_greedily_unless_a_tree_is_asked_for():
    assert tree_shape(Plain(), CPU, {}) == tree_shape(Plain(), CPU, {}, rows=3) == TreeShape.chain(4)
    assert tree_shape(Plain(), CPU, {}, rows=4) == tree_shape(Plain(), CPU, {}, rows=16) == TreeShape.chain(3)
    assert tree_shape(Plain(), CPU, {"tree_depth": 3}, rows=16) == CPU_TREE
    gpu = torch.device("cuda")
    assert tree_shape(Plain(), gpu, {}) == GPU_TREE == Plain().default_shape(gpu)
    assert tree_shape(Plain(), gpu, {}, rows=8) == replace(GPU_TREE, size=16)
    assert tree_shape(Plain(), gpu, {}, rows=32) == TreeShape.chain(3)
    assert tree_shape(Plain(), gpu, {}, rows=500) == TreeShape.chain(1)
    assert tree_shape(Plain(), gpu, {}, sampling=True, rows=8) == tree_shape(Plain(), gpu, {}, sampling=True)
    level_by_level, at_once = Plain(), Plain()
    at_once.stepwise = False
    assert tree_shape(at_once, CPU, {}) == CPU_TREE != tree_shape(level_by_level, CPU, {})
    assert tree_shape(PromptLookup(), CPU, {}, rows=16) == PromptLookup().default_shape(CPU)


def test_with_a_temperature_the_tree_depends_on_no_other_rows():
    """Or a row of a batch would not have the text that its seed has alone."""
    alone = tree_shape(Plain(), CPU, {}, sampling=True)
    assert all(tree_shape(Plain(), CPU, {}, sampling=True, rows=rows) == alone for rows in (4, 16))


@pytest.mark.clocked
def test_by_default_a_cpu_drafts_as_far_as_it_pays():
    gpu = torch.device("cuda")
    assert default_controller(Plain(), CPU, {}) == "calibrated"
    assert default_controller(Plain(), CPU, {"tree_size": None}) == "calibrated"
    for drafter, device, tree, seeded in (
        (None, CPU, {}, False),
        (Plain(), gpu, {}, False),
        (Plain(), CPU, {"num_speculative_tokens": 4}, False),
        (Plain(), CPU, {}, True),
    ):
        assert default_controller(drafter, device, tree, seeded) == "fixed"


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
