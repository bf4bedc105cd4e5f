"""FSPAD (arXiv 2408.15562) and EAGLE (arXiv 2401.15077): a one-layer drafter on the target's features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.methods.registry import Method, Reading

if TYPE_CHECKING:
    from outdraft.data.tokenization import ExampleSet
    from outdraft.methods.checkpoint import Checkpoint
    from outdraft.target.target import Target

FSPAD = "EagleFspadLlamaForCausalLM"
"""The vLLM architecture of an exported FSPAD drafter, also with only one of its two switches on."""

EAGLE_WITH_BIAS = "EagleFcBiasLlamaForCausalLM"
"""The vLLM architecture of an exported EAGLE head with a bias in the fusion layer, which vLLM's own lacks."""

EAGLE = "EagleLlamaForCausalLM"
"""The architecture of vLLM's own EAGLE head, which needs no plug-in."""

BEYOND_THE_PAPER = ("tap_layers", "state_norm", "draft_vocab_size")
"""The settings that `describe` names only where they differ from the paper's."""


class Fspad(Method):
    """FSPAD; EAGLE is the same network with both of its switches off, and reads the same folders."""

    name = "fspad"
    summary = "feature sampling and partial alignment"
    loader = "outdraft.methods.fspad.folder:load_drafter"
    drafter = "outdraft.methods.fspad.drafter:FeatureDrafter"
    beginning = "outdraft.methods.fspad.beginning:new_head"
    training = "outdraft.methods.fspad.loss:FeatureObjective"
    exporter = "outdraft.methods.fspad.folder:export_head"
    network = "outdraft.methods.fspad.network:FeatureHead"
    """The class of the network."""
    trained = True
    settings = frozenset({
        "intermediate_size", "feature_sampling", "partial_alignment", "tap_layers", "state_norm", "draft_vocab_size",
        "init_from", "embedding_scale", "w_reg", "w_reg_schedule", "w_cls", "token_loss", "token_top_k",
        "token_top_k_weight", "feature_noise", "unroll_steps", "unroll_decay", "unroll_from", "patience",
    })  # fmt: skip
    paper_preset = True
    card = "an FSPAD head ([arXiv 2408.15562](https://arxiv.org/abs/2408.15562))"
    shown: ClassVar[tuple[str, ...]] = ("feature_sampling", "partial_alignment")
    """The settings that `describe` names."""
    no_export: str | None = None

    def checkpoint(self, source: str | Path, **where: Any) -> Checkpoint[Any]:
        return super().checkpoint(source, kind=resolve_name(self.network), **where)

    def readings(self, network: Any, target: Target) -> Iterable[Reading]:
        from outdraft.methods.tapped import other_layers, other_ropes

        config = network.config
        if config.tap_layers:
            for layers in other_layers(config.tap_layers, config.tap_layers, target.num_layers):
                yield Reading({"tap_layers": list(layers)}, {"tap_layers": layers})
        for rope in other_ropes({"rope_type": "default", "rope_theta": config.rope_theta}, target):
            if rope["rope_type"] == "default":
                theta = {"rope_theta": rope["rope_theta"]}
                yield Reading(theta, theta)

    def more_facts(self, loaded: Any) -> Mapping[str, Any]:
        config = loaded.network.config
        return {
            **{name: getattr(config, name) for name in self.shown},
            "context": config.max_position_embeddings,
            **{name: value for name in BEYOND_THE_PAPER if (value := getattr(config, name))},
        }

    def adapt(self, network: Any, examples: ExampleSet) -> None:
        from outdraft.methods.fspad.beginning import keep_frequent

        keep_frequent(network, examples)


class Eagle(Fspad):
    """The method EAGLE: FSPAD's network with both switches off."""

    name = "eagle"
    summary = "FSPAD's network without either"
    presets: ClassVar = {"base": {"learning_rate": 3e-5}, "paper": {"learning_rate": 3e-5}}
    card = "an EAGLE head ([arXiv 2401.15077](https://arxiv.org/abs/2401.15077))"


METHODS = (Fspad(), Eagle())
