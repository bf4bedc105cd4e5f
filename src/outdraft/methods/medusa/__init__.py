"""Medusa (arXiv 2401.10774): a head for every token ahead, on the target's newest feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.methods.registry import Method

if TYPE_CHECKING:
    from outdraft.methods.medusa.drafter import MedusaHeads
    from outdraft.target.target import Target


class MedusaMethod(Method):
    """Medusa, the method of this folder."""

    name = "medusa"
    summary = "a head for every token ahead"
    loader = "outdraft.methods.medusa.drafter:load_medusa"
    drafter = "outdraft.methods.medusa.drafter:Medusa"
    training = "outdraft.methods.medusa.loss:MedusaObjective"
    trained = True
    settings = frozenset({"own_head", "loss", "hard_weight", "medusa_num_heads", "medusa_num_layers"})
    # Heads of single layers bear a larger rate than FSPAD's published one; nobody has compared rates here.
    presets: ClassVar = {"base": {"learning_rate": 1e-3, "lr_schedule": "cosine"}}
    card = "a set of Medusa heads ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774))"
    no_export = "Medusa heads have no export; serve them with `outdraft serve`, or train another drafter"

    def more_facts(self, loaded: Any) -> Mapping[str, Any]:
        config = loaded.network.config
        return {"heads": config.num_heads, "layers_of_a_head": config.num_layers, "own_head": config.own_head}

    def new_network(self, target: Target, settings: Any) -> MedusaHeads:
        from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads

        sizes = (target.hidden_size, target.vocab_size, settings.medusa_num_heads, settings.medusa_num_layers)
        return MedusaHeads.beginning(target.model, MedusaConfig(*sizes, settings.own_head)).to(target.device)


METHODS = (MedusaMethod(),)
