"""DFlash (arXiv 2602.06036) and DSpark (arXiv 2607.05147): drafters that others have trained, which draft a whole block
in one forward, from their folders as they are, and training that goes on with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.errors import UserError
from outdraft.methods.registry import Method, Reading

if TYPE_CHECKING:
    from outdraft.target.target import Target

OTHERS = {
    "DFlash2": ("dflash2", "selector_rank", "selector_top_k", "conv_kernel_size"),
    "Domino": ("domino",),
    "DSpine": ("dspine",),
    "TreeFlash": ("treeflash",),
    "DFlare": ("dflare",),
    "LiLiCorr": ("lilicorr",),
}
"""Drafters of the same family that cannot be loaded, with the words by which their configs are recognised."""


class DFlashMethod(Method):
    """DFlash and DSpark, the methods of this folder."""

    loader = "outdraft.methods.dflash.folder:load_dflash"
    drafter = "outdraft.methods.dflash.drafter:DFlash"
    beginning = "outdraft.methods.dflash.loss:begun_from"
    training = "outdraft.methods.dflash.loss:BlockObjective"
    trained = True
    settings = frozenset({"init_from", "anchors", "token_loss", "token_top_k", "token_top_k_weight", "patience"})
    # The weights are trained already: the rates of those presets are for new ones.
    presets: ClassVar = {"tiny": {"learning_rate": 5e-4}, "small": {"learning_rate": 1e-4}}
    no_export = "'{folder}' is a folder of {method} already, which engines read as it is (vLLM: method {method})"

    def __init__(self, name: str, title: str, paper: str):
        self.name, self.summary = name, f"{title} drafters that others have trained"
        self.card = f"a {title} drafter ([arXiv {paper}](https://arxiv.org/abs/{paper}))"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return kind_of(config) == self.name

    def check(self, settings: Any) -> None:
        if settings.init_from is None:
            raise UserError(
                f"{self.name} from nothing takes about a million answers to learn from, so training goes on with a "
                f"drafter that is there: give it with --init-from, or train with --method fspad-1f or fspad"
            )
        if settings.teacher_top_k == 0:
            raise UserError(f"{self.name} learns from the most probable tokens; give teacher_top_k a number above 0")

    def readings(self, network: Any, target: Target) -> Iterable[Reading]:
        from outdraft.methods.dflash.network import spaced
        from outdraft.methods.tapped import other_layers, other_ropes

        config, count = network.config, target.num_layers
        for flag in [not config.anchor_first] if config.block_size > 1 else []:
            yield Reading({"sample_from_anchor": flag}, {"anchor_first": flag})
        for layers in other_layers(config.taps(count), spaced(config.num_taps, count), count):
            if config.tap_unit == "input":
                yield Reading({"aux_hidden_state_layer_ids": list(layers)}, {"tap_ids": layers})
            else:
                ids = tuple(layer - 1 for layer in layers)
                yield Reading({"target_layer_ids": list(ids)}, {"tap_ids": ids, "tap_unit": "output"})
        for causal in (True, False):
            if (flags := (causal,) * config.num_hidden_layers) != tuple(flag for flag, _ in config.sights):
                yield Reading({"causal_head": causal}, {"causal": flags})
        for rope in other_ropes(config.rope, target):
            yield Reading({"rope_parameters": rope, "rope_scaling": None}, {"rope": rope})

    def more_facts(self, loaded: Any) -> Mapping[str, Any]:
        config = loaded.network.config
        return {
            "reads": config.reads("equally spaced layers"),
            "block_size": config.block_size,
            "proposals": f"{config.proposals}, {loaded.slots}",
            "causal_layers": sum(config.causal),
            "windows": max(config.windows, default=0) or None,
            "draft_vocab_size": config.draft_vocab_size or None,
            "markov_rank": config.markov_rank or None,
            "unused": ", ".join(loaded.unused),
            "own_head": config.own_head,
            "own_embedding": config.own_embedding,
            "context": config.max_position_embeddings,
        }


METHODS = (
    DFlashMethod("dflash", "DFlash", "2602.06036"),
    DFlashMethod("dspark", "DSpark", "2607.05147"),
)


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return the method (`dflash` or `dspark`) that a config.json belongs to, whoever wrote it; None for other methods.
    `OTHERS` go to DFlash, whose loader refuses them by name."""
    if "outdraft_version" in config:
        return next((method.name for method in METHODS if method.name == config.get("method")), None)
    words = _words(config)
    if "dspark" in words:
        return "dspark"
    return "dflash" if "dflash" in words or other_kind(config) else None


def other_kind(config: Mapping[str, Any]) -> str | None:
    """Return the name of the drafter in `OTHERS` that the config describes; None if it describes none."""
    inner = config.get("dflash_config")
    more = [*inner, inner.get("projector_type")] if isinstance(inner, dict) else []
    words = " ".join(map(str, [_words(config), *more])).lower()
    return next((name for name, signs in OTHERS.items() if any(sign in words for sign in signs)), None)


def _words(config: Mapping[str, Any]) -> str:
    """Join the parts of a config that name its kind: classes, speculators' type, and keys."""
    classes = config.get("architectures")
    named = [*(classes if isinstance(classes, list) else []), config.get("speculators_model_type", "")]
    return " ".join(map(str, [*named, *config])).lower()
