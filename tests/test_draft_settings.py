"""What drafts are by default and what settings make of them: decided in one place, for any drafter, watched or not."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from outdraft_lookahead.drafter import Lookahead

import outdraft
from models import perturbed, tiny
from outdraft.api.draft_settings import AUTO, DraftKeywords, DraftSettings, ResolvedDraft, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.settings import GenerateSettings, SamplingKeywords
from outdraft.control import ControlSettings
from outdraft.control.settings import Pacer
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import CPU_TREE, GPU_TREE, TreeShape
from outdraft.drafting.base import Drafter, Limits
from outdraft.drafting.ngrams import NgramSettings
from outdraft.errors import UserError
from outdraft.evaluation.audit.rounds import Watch
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.target import Target
from test_losslessness import DRAFTERS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Plain(Drafter):
    """Has the defaults of a drafter that runs ahead."""

    method = "fspad"

    def begin(self, prompts, run):
        raise NotImplementedError


class AtOnce(Plain):
    """All levels of a draft in one step."""

    limits = Limits(stepwise=False)


def shape(drafter: Drafter | None, device: torch.device = CPU, sampling: bool = False, rows: int = 1, **settings: Any):
    """Of drafts whose length no controller decides; by dice where the rows sample."""
    asked = DraftSettings(**{"controller": "fixed", "coupling": "dice"} | settings)
    return resolve(asked, drafter, device, sampling=sampling, rows=rows).shape


# --- watched or not --------------------------------------------------------------------------------------------------


@pytest.mark.clocked
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_under_watch_is_asked_for_the_same_drafts(name: str) -> None:
    """Or an audit would vouch for other drafts than those that `generate` makes."""
    model = tiny("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[name](target, perturbed(model, lambda: tiny("llama-gqa"), 0.1))
    watched = Watch(Watch(drafter))
    for asked in ({}, {"tree_size": 6}, {"tree_size": AUTO}, {"num_speculative_tokens": 3}, {"controller": "fixed"}):
        for device, sampling, rows in ((d, s, r) for d in (CPU, GPU) for s in (False, True) for r in (1, 8)):
            for coupling in ("noise", "dice"):
                settings, given = DraftSettings(**asked, coupling=coupling), {"sampling": sampling, "rows": rows}
                with_it, without = (resolve(settings, one, device, **given) for one in (watched, drafter))
                assert facts(with_it) == facts(without), (asked, device, given)
                assert watched.slots(with_it.shape) == drafter.slots(with_it.shape)
    assert (watched.method, watched.num_parameters) == (drafter.method, drafter.num_parameters)
    for attribute in dir(Drafter):
        if not attribute.startswith("_") and not callable(getattr(drafter, attribute)):
            assert getattr(watched, attribute) == getattr(drafter, attribute)


def facts(draft: ResolvedDraft) -> tuple[Any, ...]:
    return draft.shape, draft.ngrams, draft.controller, type(draft.pacer), draft.dice


def test_medusa_is_audited_with_its_tree() -> None:
    model = tiny("llama-gqa")
    drafter = DRAFTERS["medusa"](Target(model), model)
    as_deep_as_its_heads = replace(CPU_TREE, depth=2)
    assert shape(Watch(drafter)) == shape(drafter) == as_deep_as_its_heads, "its levels cost no steps of their own"
    assert shape(Watch(DRAFTERS["fspad"](Target(model), model))) == TreeShape.chain(4)


# --- default shapes --------------------------------------------------------------------------------------------------


def test_on_a_cpu_chains_are_drafted_greedily_unless_a_tree_is_asked_for() -> None:
    assert shape(None).size == 1
    assert shape(Plain()) == shape(Plain(), rows=3) == TreeShape.chain(4)
    assert shape(Plain(), rows=4) == shape(Plain(), rows=16) == TreeShape.chain(3)
    assert shape(Plain(), rows=16, tree_depth=3) == CPU_TREE
    assert shape(Plain(), rows=4, tree_size=6) == TreeShape(3, 3, 6)
    assert shape(AtOnce()) == CPU_TREE
    assert shape(PromptLookup(), rows=16) == PromptLookup().default_shape(CPU)


def test_on_a_gpu_trees_are_as_large_as_the_rows_leave_room_for() -> None:
    assert shape(Plain(), GPU) == GPU_TREE == Plain().default_shape(GPU)
    assert shape(Plain(), GPU, rows=8) == replace(GPU_TREE, size=16)
    assert shape(Plain(), GPU, rows=32) == TreeShape.chain(3)
    assert shape(Plain(), GPU, rows=500) == TreeShape.chain(1)
    assert shape(Plain(), GPU, True, rows=8) == shape(Plain(), GPU, True) == TreeShape.chain(5, candidates="sampled")


def test_with_dice_the_shape_depends_on_no_other_rows() -> None:
    """Or a row of a batch would not have the text that its seed has alone."""
    alone = shape(Plain(), sampling=True)
    assert alone == TreeShape.chain(4, candidates="sampled")
    assert all(shape(Plain(), sampling=True, rows=rows) == alone for rows in (4, 16))
    assert shape(Plain(), sampling=True, coupling="noise") == shape(Plain()), "noise asks for no sampled candidates"
    assert shape(Plain(), sampling=True, tree_size=6) == TreeShape(3, 3, 6)


def test_chains_are_sampled_where_there_are_probabilities() -> None:
    assert shape(PromptLookup(), sampling=True, num_speculative_tokens=5) == TreeShape.chain(5)
    assert shape(Plain(), sampling=True, num_speculative_tokens=5) == TreeShape.chain(5, candidates="sampled")
    assert shape(Plain(), num_speculative_tokens=5, candidates="sampled").candidates == "sampled"
    assert shape(Plain(), controller="calibrated", num_speculative_tokens=5) == TreeShape.chain(5), "never longer"


# --- the coupling and the controller ---------------------------------------------------------------------------------


def test_candidates_that_are_drawn_need_dice_and_others_share_noise() -> None:
    for settings, dice in (({}, False), ({"candidates": "sampled"}, True), ({"coupling": "dice"}, True)):
        assert resolve(DraftSettings(**settings), Plain(), CPU, sampling=True).dice == dice
    with pytest.raises(UserError, match="drawn need coupling='dice'"):
        DraftSettings(candidates="sampled", coupling="noise")
    with pytest.raises(UserError, match="coupling must be dice or noise, not 'both'"):
        DraftSettings(coupling="both")


@pytest.mark.clocked
def test_by_default_a_cpu_drafts_as_far_as_it_pays() -> None:
    for sampling in (False, True):  # noise gives the same text however far is drafted
        assert resolve(DraftSettings(), Plain(), CPU, sampling=sampling, seeded=True).controller == "calibrated"
    assert resolve(DraftSettings(coupling="dice"), Plain(), CPU, seeded=True).controller == "calibrated"
    assert resolve(DraftSettings(), Plain(), CPU, served=True).controller == "calibrated"
    dice = {"sampling": True, "seeded": True}
    for drafter, device, settings, given in (
        (None, CPU, {}, {}),
        (Plain(), GPU, {}, {}),
        (Plain(), CPU, {"num_speculative_tokens": 4}, {}),
        (Plain(), CPU, {"exact": True}, {}),
        (Plain(), CPU, {"coupling": "dice"}, dice),
        (Plain(), CPU, {"coupling": "dice"}, {"served": True}),
    ):
        assert resolve(DraftSettings(**settings), drafter, device, **given).controller == "fixed"


def test_a_pacer_serves_later_calls_with_the_same_settings() -> None:
    pacers: dict[Any, Pacer] = {}

    def pacer(**settings: Any) -> Pacer | None:
        return resolve(DraftSettings(**settings), Plain(), CPU, pacers=pacers).pacer

    assert pacer(controller="beta") is pacer(controller=ControlSettings("beta"), tree_depth=2) is not None
    assert pacer(controller="beta") is not pacer(controller=ControlSettings("beta", memory=1))
    assert pacer(tree_size=AUTO) is pacer(tree_size=AUTO, tree_depth=2)
    own = Pacer(ControlSettings("confidence"))
    assert pacer(controller=own) is own and pacer(controller="fixed") is None
    assert resolve(DraftSettings(controller="beta"), None, CPU, pacers=pacers).pacer is None
    with pytest.raises(UserError, match="controller must be one of"):
        pacer(controller="often")


# --- by the machine --------------------------------------------------------------------------------------------------


def test_bounds_are_twice_the_default_and_others_that_are_given_hold() -> None:
    for device in (CPU, GPU):
        default = Plain().default_shape(device)
        assert shape(Plain(), device, tree_size=AUTO) == TreeShape(
            2 * default.depth + 1, default.top_k, 2 * default.size
        )
    assert shape(Plain(), tree_size=AUTO, tree_depth=2, tree_top_k=5) == TreeShape(2, 5, 2 * CPU_TREE.size)
    assert shape(Plain(), tree_size=AUTO, tree_top_k=1).top_k == 1
    assert shape(Plain(), sampling=True, tree_size=AUTO) == TreeShape.chain(8, candidates="sampled")
    assert shape(PromptLookup(), tree_size=AUTO) == TreeShape.chain(20)


def test_the_machine_decides_alone() -> None:
    for controller in (None, "fixed"):
        draft = resolve(DraftSettings(tree_size=AUTO, controller=controller), Plain(), CPU)
        assert draft.pacer is not None and draft.pacer.settings.name == "auto"
        assert resolve(DraftSettings(tree_size=AUTO, controller=draft.pacer), Plain(), CPU).pacer is draft.pacer
    for wrong in ("confidence", "calibrated", ControlSettings("beta"), Pacer(ControlSettings("confidence"))):
        with pytest.raises(UserError, match=r"tree_size auto chooses whole trees.*leave the controller out"):
            resolve(DraftSettings(tree_size=AUTO, controller=wrong), Plain(), CPU)
    with pytest.raises(UserError, match="give one"):
        DraftSettings(tree_size=AUTO, num_speculative_tokens=4)


# --- n-grams of the text ---------------------------------------------------------------------------------------------


def test_beside_drafters_repetitions_are_on_unless_they_look_back() -> None:
    def ngrams(drafter: Drafter | None, **settings: Any) -> NgramSettings | None:
        return resolve(DraftSettings(**settings), drafter, CPU).ngrams

    assert ngrams(Plain()) == ngrams(Plain(), prompt_lookup_min=None) == NgramSettings(4, 20)
    assert ngrams(Plain(), prompt_lookup_min=2, prompt_lookup_num_tokens=5) == NgramSettings(2, 5)
    assert ngrams(Plain(), prompt_lookup_min=0, prompt_lookup_num_tokens=5) is None
    for back in (None, PromptLookup(), Lookahead(window=5, ngram=3, pool=3)):
        assert ngrams(back) is None and ngrams(back, prompt_lookup_min=0) is None
    assert ngrams(Plain(), exact=True) == ngrams(Plain(), exact=True, num_speculative_tokens=3) == NgramSettings(4, 3)
    assert ngrams(Plain(), exact=True, prompt_lookup_num_tokens=2) == NgramSettings(4, 2)
    assert ngrams(Plain(), exact=True, tree_depth=0, tree_size=1) == NgramSettings(4, 1)


# --- the keywords ----------------------------------------------------------------------------------------------------


def test_every_setting_is_a_keyword_that_an_editor_completes() -> None:
    assert set(DraftKeywords.__annotations__) == {field.name for field in fields(DraftSettings)}
    assert set(SamplingKeywords.__annotations__) == {"do_sample", *(field.name for field in fields(SamplingSettings))}
    for method in (SpeculativeModel.generate, SpeculativeModel.stream):
        (rest,) = (one for one in inspect.signature(method).parameters.values() if one.kind is one.VAR_KEYWORD)
        assert rest.annotation == "Unpack[GenerateSettings]"
    assert set(DraftKeywords.__annotations__) | {"draft"} < set(GenerateSettings.__annotations__)


def test_settings_may_be_given_together_and_keywords_beside_them_win() -> None:
    model = outdraft.load(tiny("llama-gqa"), method="prompt-lookup", backend="eager")
    draft = outdraft.DraftSettings(num_speculative_tokens=2)
    prompt = [[1, 2, 3, 4] * 6]
    assert model._rows(prompt, {"max_new_tokens": 4, "draft": draft})[1].shape == TreeShape.chain(2)
    both = {"max_new_tokens": 4, "draft": draft, "num_speculative_tokens": 5}
    assert model._rows(prompt, both)[1].shape == TreeShape.chain(5)
    assert draft.num_speculative_tokens == 2, "what the caller holds stays as it is"
    together = model.generate(prompt, max_new_tokens=12, draft=draft)
    assert together.tokens == model.generate(prompt, max_new_tokens=12, num_speculative_tokens=2).tokens
    with pytest.raises(UserError, match="draft must be DraftSettings"):
        model.generate(prompt, draft={"num_speculative_tokens": 2})  # type: ignore[arg-type]


def test_a_stock_models_drafter_takes_the_same_settings() -> None:
    with pytest.raises(UserError, match="did you mean 'tree_depth'"):
        outdraft.custom_generate("reference", tree_dept=2)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="exact=True is not for custom_generate"):
        outdraft.custom_generate("reference", exact=True)
    with pytest.raises(UserError, match="tree_depth must be a whole number"):
        outdraft.custom_generate("reference", tree_depth=2.5)  # type: ignore[arg-type]
