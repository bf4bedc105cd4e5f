"""EAGLE-3 (arXiv 2503.01840) and 3.1: drafters that others have trained, from their folders as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outdraft.methods.registry import DrafterFacts, Method, Reading

if TYPE_CHECKING:
    import torch

    from outdraft.methods.eagle3.drafter import Eagle3Drafter
    from outdraft.methods.eagle3.network import Eagle3Head
    from outdraft.target.target import Target

SWITCHES = (
    "draft_vocab_size",
    "tap_norms",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "head_norms",
)
"""The settings that `describe` names only where they differ from the paper's."""


class Eagle3(Method):
    """EAGLE-3, the method of this folder."""

    name = "eagle3"
    summary = "EAGLE-3 and 3.1 drafters that others have trained"
    no_export = "'{folder}' is an EAGLE-3 folder already, which engines read as it is (vLLM: method eagle3)"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return is_eagle3(config)

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> Eagle3Head:
        from outdraft.methods.eagle3.folder import load_eagle3

        return load_eagle3(source, dtype=dtype, device=device).head

    def bind(self, network: Any, target: Target) -> Eagle3Drafter:
        from outdraft.methods.eagle3.drafter import Eagle3Drafter

        return Eagle3Drafter(network, target)

    def readings(self, network: Any, target: Target) -> Iterable[Reading]:
        from outdraft.methods.checkpoint import other_layers, other_ropes
        from outdraft.methods.eagle3.folder import TAP_IDS

        config, count = network.config, target.num_layers
        for layers in other_layers(config.taps(count), (2, count // 2, count - 3)[: config.num_taps], count):
            unit = "output" if config.tap_unit == "output" else "input"
            ids = tuple(layer - (unit == "output") for layer in layers)
            yield Reading({TAP_IDS: list(ids)}, {"tap_ids": ids, "tap_unit": unit})
        for flag in ("norm_before_residual", "norm_output"):
            yield Reading({flag: not getattr(config, flag)}, {flag: not getattr(config, flag)})
        for rope in other_ropes(config.rope, target):
            yield Reading({"rope_parameters": rope, "rope_scaling": None}, {"rope": rope})

    def describe(self, folder: Path) -> DrafterFacts:
        from outdraft.methods.checkpoint import count
        from outdraft.methods.eagle3.folder import load_eagle3

        loaded = load_eagle3(folder)
        head, config = loaded.head, loaded.head.config
        ids = ", ".join(map(str, config.tap_ids))
        more = {
            "reads": f"the {config.tap_unit} of layers {ids} (counted from 0)" if ids else "layers 2, L/2 and L-3 of L",
            **{name: value for name in SWITCHES if (value := getattr(config, name))},
            "own_head": config.own_head,
            "own_embedding": head.embed_tokens is not None,
            "context": config.max_position_embeddings,
        }
        return DrafterFacts(self.name, loaded.layout, count(head.parameters()), loaded.target_id, head.fits, more=more)


METHODS = (Eagle3(),)


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Return True if a config.json is that of an EAGLE-3 drafter, whoever wrote it; tensors are not read."""
    if "outdraft_version" in config:
        return False
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    named = any("eagle3" in str(name).lower() for name in config.get("architectures") or [])
    return named or "eagle_config" in config or "draft_vocab_size" in config
