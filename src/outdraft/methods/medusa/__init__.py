"""Medusa (arXiv 2401.10774): a head for every token ahead, on the target's newest feature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.methods.registry import DrafterFacts, Method

if TYPE_CHECKING:
    import torch

    from outdraft.losses.teacher import TargetLike
    from outdraft.methods.medusa.drafter import Medusa, MedusaHeads
    from outdraft.methods.medusa.loss import MedusaObjective
    from outdraft.target.target import Target


class MedusaMethod(Method):
    """Medusa, the method of this folder."""

    name = "medusa"
    summary = "a head for every token ahead"
    trained = True
    settings = frozenset({"own_head", "loss", "hard_weight", "medusa_num_heads", "medusa_num_layers"})
    # Heads of single layers bear a larger rate than FSPAD's published one; nobody has compared rates here.
    presets: ClassVar = {"base": {"learning_rate": 1e-3, "lr_schedule": "cosine"}}
    card = "a set of Medusa heads ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774))"
    no_export = "Medusa heads have no export; serve them with `outdraft serve`, or train another drafter"

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> MedusaHeads:
        from outdraft.methods.medusa.folder import load_medusa

        return load_medusa(source, dtype=dtype, device=device).network

    def bind(self, network: Any, target: Target) -> Medusa:
        from outdraft.methods.medusa.drafter import Medusa

        return Medusa(network, target)

    def describe(self, folder: Path) -> DrafterFacts:
        from outdraft.methods.medusa.folder import load_medusa

        loaded = load_medusa(folder)
        config = loaded.network.config
        return loaded.facts(
            {"heads": config.num_heads, "layers_of_a_head": config.num_layers, "own_head": config.own_head}
        )

    def new_network(self, target: TargetLike, settings: Any) -> MedusaHeads:
        from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads

        sizes = (target.hidden_size, target.vocab_size, settings.medusa_num_heads, settings.medusa_num_layers)
        return MedusaHeads.beginning(target.model, MedusaConfig(*sizes, settings.own_head)).to(target.device)

    def objective(self, target: TargetLike, settings: Any, network: Any) -> MedusaObjective:
        from outdraft.methods.medusa.loss import MedusaObjective

        return MedusaObjective(target, settings, network)


METHODS = (MedusaMethod(),)
