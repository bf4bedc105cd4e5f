"""`tree_size="auto"`: what it needs, what it bounds, and who decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outdraft.console.options import whole_or_auto
from outdraft.control import WEIGHING, ControlSettings, Costs
from outdraft.control.pacing import Pacer
from outdraft.drafters.base import Drafter, TreeShape
from outdraft.drafters.prompt_lookup import PromptLookup
from outdraft.errors import UserError
from outdraft.settings import AUTO_TREE, controller_of, pacer_of, tree_shape

CPU = torch.device("cpu")
AUTO = {"tree_size": "auto"}


class Plain(Drafter):
    """Has the defaults of a drafter that runs ahead."""

    method = "fspad"

    def begin(self, prompts, run):
        raise NotImplementedError


def test_the_bounds_are_large_and_others_that_are_given_hold():
    assert tree_shape(Plain(), CPU, AUTO, controlled=True) == AUTO_TREE
    on_gpu = tree_shape(Plain(), torch.device("cuda"), AUTO, controlled=True)
    assert on_gpu == replace(AUTO_TREE, top_k=10), "no narrower than the default there"
    given = tree_shape(Plain(), CPU, AUTO | {"tree_depth": 2, "tree_top_k": 5}, controlled=True)
    assert given == TreeShape(2, 5, AUTO_TREE.size)


def test_where_the_default_is_a_chain_it_may_be_twice_as_long():
    assert tree_shape(Plain(), CPU, AUTO, sampling=True, controlled=True) == TreeShape.chain(8, candidates="sampled")
    assert tree_shape(PromptLookup(), CPU, AUTO, controlled=True) == TreeShape.chain(20)


def test_a_controller_that_weighs_costs_decides_and_no_other_is_taken():
    assert controller_of(None, AUTO) == "calibrated"
    for name in WEIGHING:
        assert controller_of(name, AUTO) == name
    pacer = Pacer(ControlSettings("beta"), Costs())
    assert pacer_of(pacer, AUTO) is pacer
    for wrong in (
        "fixed",
        "confidence",
        "ucb",
        ControlSettings("beta", rule="bernoulli"),
        Pacer(ControlSettings("ucb")),
    ):
        with pytest.raises(
            UserError, match=r"tree_size auto weighs tokens against seconds.*choose of beta, calibrated"
        ):
            pacer_of(wrong, AUTO)


def test_other_trees_change_no_controller():
    assert controller_of(None, {"tree_size": 8}) is None
    assert pacer_of("fixed", {"tree_size": 8}) is None and pacer_of(None, {}) is None


def test_chains_by_the_machine_are_asked_for_by_controller_not_by_tree_size():
    with pytest.raises(UserError, match="give one"):
        tree_shape(Plain(), CPU, AUTO | {"num_speculative_tokens": 4}, controlled=True)


def test_the_flag_takes_a_number_or_auto():
    assert whole_or_auto("12") == 12 and whole_or_auto("auto") == "auto" and whole_or_auto(None) is None
    with pytest.raises(UserError, match="--tree-size must be a whole number or auto, not 'large'"):
        whole_or_auto("large")
