"""What a user asks for, by Hugging Face's names, checked and turned into our own settings before anything runs.

Knows which settings would change the law of the output, and the tree that suits a drafter and a device. Does not know
how anything is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from outdraft.control import ControlSettings
from outdraft.control.by_machine import ShapePacer
from outdraft.control.pacing import Pacer
from outdraft.core.sampling_settings import SamplingSettings, whole
from outdraft.core.shape import BATCH, BATCH_CHAIN, CPU_TREE, GPU_TREE, GREEDY_CHAIN, TreeShape, gpu_tree
from outdraft.drafting.base import Drafter
from outdraft.drafting.repeats import Repeats
from outdraft.errors import UserError, meant
from outdraft.target.target import Target

LOSSY = {
    "num_beams": "beam search is not speculative sampling; leave num_beams out",
    "penalty_alpha": "contrastive search is not supported; leave penalty_alpha out",
    "guidance_scale": "classifier-free guidance runs a second model; leave guidance_scale out",
    "watermarking_config": "watermarking keeps state of its own, which a tree breaks; leave it out",
}
"""Settings of Hugging Face's `generate` that are refused, with the reason."""

TREE_SETTINGS = ("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens", "candidates")
"""Those that say what to draft."""


LOOKUP_SETTINGS = ("prompt_lookup_min", "prompt_lookup_num_tokens")
"""Those that say when a repetition is drafted in the drafter's place, and how much of it."""

OTHER_SETTINGS = (
    "do_sample",
    "max_new_tokens",
    "eos_token_id",
    "stop_strings",
    "seed",
    "logits_processor",
    "response_format",
    "streamer",
    "controller",
    "exact",
    "coupling",
)
"""Those that `generate` takes beside sampling, trees and repetitions."""

AUTO = "auto"
"""`tree_size` for trees by the machine: every round has the shape that brings the most tokens a second here."""

EXACT_TREE = {"num_speculative_tokens": 3}
"""What exact mode drafts unless told otherwise: its attention costs by the node, so short chains win."""


ADAPTIVE = "calibrated"
"""The controller where the machine decides how far to draft."""


KEPT = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
)
"""Settings of a model's own generation config that apply wherever none are given, as in transformers."""

NOT_KEPT = {
    **{"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "guidance_scale": 1, "watermarking_config": None},
    **{"encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0, "constraints": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None},
    **{"remove_invalid_values": False, "top_h": None, "dola_layers": None, "force_words_ids": None},
}
"""Those that are refused, with the value that asks for nothing."""


def model_settings(target: Target) -> dict[str, Any]:
    """The sampling settings and bans of the model's own generation config, where it has any.

    Raises:
        UserError: one of them that is not kept when drafting.
    """
    config = target.model.generation_config
    if target.ignores_generation_config or config is None:
        return {}
    for name, nothing in NOT_KEPT.items():
        if getattr(config, name, None) not in (None, nothing):
            raise UserError(
                f"the model's generation config sets {name}, which is not kept here; take it out, or ignore that file "
                "with generation_config='vllm' (--generation-config vllm)"
            )
    neutral = SamplingSettings(temperature=1.0)
    own = {name: getattr(config, name, None) for name in KEPT}
    own = {name: value for name, value in own.items() if value not in (None, getattr(neutral, name, False))}
    return {name: value for name, value in own.items() if value or name != "temperature"}


def in_effect(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the model's own settings that decide something beside what was given."""
    drawn = sampling_settings(dict(given), own).temperature > 0
    filters = () if drawn else KEPT[1:8]
    return {
        name: value
        for name, value in own.items()
        if name != "do_sample" and given.get(name) is None and name not in filters
    }


def sampling_settings(settings: dict[str, Any], own: Mapping[str, Any] | None = None) -> SamplingSettings:
    """Hugging Face's sampling arguments as ours; greedy unless `do_sample` or a temperature above 0 is given.

    Args:
        settings: as `generate` takes them.
        own: of the model (`model_settings`), where `settings` says nothing.

    Raises:
        UserError: a name that is not known here.
    """
    known = {field.name for field in fields(SamplingSettings)}
    unknown = sorted(set(settings) - known - {"do_sample"})
    if unknown:
        every = sorted({*known, *OTHER_SETTINGS, *TREE_SETTINGS, *LOOKUP_SETTINGS})
        said = meant(unknown[0], every) or f"; known are {', '.join(every)}"
        raise UserError(f"unknown setting '{unknown[0]}'{said}")
    given = {name: settings[name] for name in known if settings.get(name) is not None}
    own = dict(own or {})
    do_sample, drawn_by_itself = settings.get("do_sample"), own.pop("do_sample", False)
    if do_sample is None:
        do_sample = given["temperature"] != 0 if "temperature" in given else drawn_by_itself
    given = own | given
    if not do_sample:
        given["temperature"] = 0.0
    elif given.setdefault("temperature", 1.0) == 0:
        raise UserError("do_sample=True with temperature 0 contradicts itself; leave one of them out")
    return SamplingSettings(**given)


def tree_shape(
    drafter: Drafter | None,
    device: torch.device,
    settings: dict[str, Any],
    sampling: bool = False,
    controlled: bool = False,
    rows: int = 1,
) -> TreeShape:
    """The tree asked for, else the one that suits drafter and device.

    Args:
        drafter: None drafts nothing.
        device: of the target.
        settings: some of `TREE_SETTINGS`; None is as good as absent. With `tree_size` `auto` the others are bounds.
        sampling: whether the temperature is above 0. Chains are then sampled from the drafter's law, which the target
            accepts far more often than the most probable tokens; trees that are asked for stay EAGLE-2's.
        controlled: whether a controller decides how far to draft; what is asked for is then the most that it may.
        rows: decoded together. Only what is drafted greedily depends on it: a seed's text does not.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    if drafter is None:
        return TreeShape(0, 1, 1)
    auto = asked.get("tree_size") == AUTO
    if auto:
        del asked["tree_size"]
    chain = asked.pop("num_speculative_tokens", None)
    sizes = {name.removeprefix("tree_"): whole(name, value) for name, value in asked.items() if name != "candidates"}
    if chain is not None and (sizes or auto):
        raise UserError(
            "num_speculative_tokens is for chains, tree_depth, tree_top_k and tree_size for trees; give one"
        )
    if chain is not None:
        length = whole("num_speculative_tokens", chain)
        base = TreeShape.chain(length, candidates="sampled" if sampling and drafter.limits.probs else "top-k")
    else:
        base = drafter.default_shape(device, sampling and not sizes)
        if controlled or auto:
            base = base.doubled()
        elif base == CPU_TREE and drafter.limits.stepwise and not sizes:
            base = BATCH_CHAIN if rows >= BATCH else GREEDY_CHAIN
        elif base == GPU_TREE and not sizes:
            base = gpu_tree(rows)
    return replace(base, **sizes, candidates=asked.get("candidates", base.candidates))


def repeats_of(drafter: Drafter | None, given: Mapping[str, Any], shape: TreeShape | None = None) -> Repeats | None:
    """When rows draft what their texts repeat in the drafter's place; None for never.

    Args:
        drafter: one that looks back itself, or None, leaves no place.
        given: some of `LOOKUP_SETTINGS` as `generate` takes them, a least of 0 being never; None is as good as absent.
        shape: of the trees, where candidates cost so much that repetitions may be no larger.

    Raises:
        UserError: impossible numbers, or nobody whose place could be taken.
    """
    known = {name: whole(name, given[name]) for name in LOOKUP_SETTINGS if given.get(name) is not None}
    if drafter is None or drafter.limits.looks_back:
        if any(known.values()):
            both = "prompt_lookup_min and prompt_lookup_num_tokens"
            if drafter is None:
                raise UserError(f"{both} are for rounds with a drafter; give one (--draft-model)")
            raise UserError(
                f"{both} do nothing beside {drafter.method}, which looks back itself; "
                "num_speculative_tokens is the length of its drafts"
            )
        return None
    least, most = LOOKUP_SETTINGS
    if known.get(least) == 0:
        return None
    repeats = Repeats(known.get(least, Repeats.least), known.get(most, Repeats.most))
    return repeats if shape is None else replace(repeats, most=max(1, min(repeats.most, shape.size - 1)))


def default_controller(
    drafter: Drafter | None, device: torch.device, tree: Mapping[str, Any], seeded: bool = False
) -> str:
    """The controller where none is asked for.

    On a CPU a draft step costs so much of a pass that a fixed length loses where a drafter is weak, so drafts are as
    long as they pay, and none is drafted that does not. Where somebody asks for a shape, or drafts and texts share
    dice that must fall the same way again, no clock decides. On a GPU whole drafts are recorded, of a fixed shape.

    Args:
        drafter: of the rows.
        device: of the target.
        tree: some of `TREE_SETTINGS`.
        seeded: whether rows have seeded dice, which drafts share with verification.
    """
    asked = any(value is not None for value in tree.values())
    if drafter is None or asked or device.type != "cpu" or seeded:
        return "fixed"
    return ADAPTIVE


def controller_of(controller: Any, tree: Mapping[str, Any]) -> Any:
    """The controller asked for; `auto` where trees follow the machine, which need none.

    Args:
        controller: as `generate` takes it.
        tree: some of `TREE_SETTINGS`.

    Raises:
        UserError: a tree by the machine, and a controller.
    """
    if tree.get("tree_size") != AUTO or isinstance(controller, ShapePacer):
        return controller
    settings = controller.settings if isinstance(controller, Pacer) else control_settings(controller or "fixed")
    if settings.name != "fixed":
        raise UserError(
            f"tree_size auto chooses whole trees, before controller {settings.name} could stop one; "
            "leave the controller out, or give tree_size a number"
        )
    return AUTO


def control_settings(controller: Any) -> ControlSettings:
    return controller if isinstance(controller, ControlSettings) else ControlSettings(str(controller))


def pacer_of(controller: Any, tree: Mapping[str, Any] | None = None) -> Pacer | None:
    """What `generate` was given as `controller`: a name, settings, a ready pacer, or None for drafts of full length.

    Args:
        controller: the same.
        tree: the settings of the tree given with it.

    Raises:
        UserError: no such controller, or one that the tree cannot do with.
    """
    controller = controller_of(controller, tree or {})
    if controller == AUTO:
        return ShapePacer()
    if controller is None or isinstance(controller, Pacer):
        return controller
    settings = control_settings(controller)
    return None if settings.name == "fixed" else Pacer(settings)


def check_prompt(ids: Sequence[int], target: Target) -> None:
    """Raise UserError for a prompt that the model cannot continue."""
    if len(ids) >= target.context_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {target.context_length}; shorten the prompt"
        )
    if max(ids) >= target.vocab_size or min(ids) < 0:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"the prompt holds token {wrong}, the vocabulary ends at {target.vocab_size - 1}")
