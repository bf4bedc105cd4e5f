"""EAGLE-3 (arXiv 2503.01840) and 3.1: one layer on several layers of the target, trained here or by others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.methods.registry import Method, Reading

if TYPE_CHECKING:
    from outdraft.data.tokenization import ExampleSet
    from outdraft.target.target import Target

SWITCHES = (
    "draft_vocab_size", "tap_norms", "norm_before_fc", "norm_before_residual", "norm_output", "head_norms",
)  # fmt: skip
"""The settings that `describe` names only where they differ from the paper's."""


class Eagle3(Method):
    """EAGLE-3, the method of this folder."""

    name = "eagle3"
    summary = "a layer on several layers of the target, trained as it drafts"
    loader = "outdraft.methods.eagle3.folder:load_eagle3"
    drafter = "outdraft.methods.eagle3.drafter:Eagle3Drafter"
    beginning = "outdraft.methods.eagle3.loss:new_head"
    training = "outdraft.methods.eagle3.loss:Eagle3Objective"
    exporter = "outdraft.methods.eagle3.folder:export_eagle3"
    trained = True
    settings = frozenset({
        "intermediate_size", "tap_layers", "state_norm", "draft_vocab_size", "init_from", "token_loss", "token_top_k",
        "token_top_k_weight", "unroll_steps", "unroll_decay", "unroll_from", "patience",
    })  # fmt: skip
    # The paper unrolls seven steps, each at the cost of one more forward; the preset small has fewer.
    presets: ClassVar = {"tiny": {"unroll_steps": 4}, "base": {"unroll_steps": 7}}
    card = "an EAGLE-3 head ([arXiv 2503.01840](https://arxiv.org/abs/2503.01840))"
    no_export = None

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return is_eagle3(config)

    def readings(self, network: Any, target: Target) -> Iterable[Reading]:
        from outdraft.methods.eagle3.folder import TAP_IDS
        from outdraft.methods.tapped import other_layers, other_ropes

        config, count = network.config, target.num_layers
        for layers in other_layers(config.taps(count), (2, count // 2, count - 3)[: config.num_taps], count):
            unit = "output" if config.tap_unit == "output" else "input"
            ids = tuple(layer - (unit == "output") for layer in layers)
            yield Reading({TAP_IDS: list(ids)}, {"tap_ids": ids, "tap_unit": unit})
        for flag in ("norm_before_residual", "norm_output"):
            yield Reading({flag: not getattr(config, flag)}, {flag: not getattr(config, flag)})
        for rope in other_ropes(config.rope, target):
            yield Reading({"rope_parameters": rope, "rope_scaling": None}, {"rope": rope})

    def more_facts(self, loaded: Any) -> Mapping[str, Any]:
        config = loaded.network.config
        return {
            "reads": config.reads("layers 2, L/2 and L-3 of L"),
            **{name: value for name in SWITCHES if (value := getattr(config, name))},
            "own_head": config.own_head,
            "own_embedding": loaded.network.embed_tokens is not None,
            "context": config.max_position_embeddings,
        }

    def adapt(self, network: Any, examples: ExampleSet) -> None:
        from outdraft.methods.fspad.beginning import keep_frequent

        if network.fresh:  # a drafter that training goes on with keeps its tokens
            keep_frequent(network, examples)


METHODS = (Eagle3(),)


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Return True if a config.json is that of an EAGLE-3 drafter, whoever wrote it; tensors are not read."""
    if "outdraft_version" in config:
        return False
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    named = any("eagle3" in str(name).lower() for name in config.get("architectures") or [])
    return named or "eagle_config" in config or "draft_vocab_size" in config
