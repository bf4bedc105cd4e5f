"""EESD (arXiv 2406.03853): the target's own first layers, one trained layer after them, and a head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.errors import UserError
from outdraft.methods.registry import DrafterFacts, Method

if TYPE_CHECKING:
    import torch

    from outdraft.data.tokenization import ExampleSet
    from outdraft.methods.eesd.exit_choice import ExitChoice
    from outdraft.methods.eesd.network import ExitLayer
    from outdraft.target.target import Target


class Eesd(Method):
    """EESD, the method of this folder."""

    name = "eesd"
    summary = "the target's own first layers and a trained exit layer"
    drafter = "outdraft.methods.eesd.drafter:EarlyExit"
    training = "outdraft.methods.eesd.loss:ExitObjective"
    exporter = "outdraft.methods.eesd.network:export_exit"
    trained = True
    settings = frozenset({"exit_layer", "own_head", "loss", "hard_weight"})
    # The layer begins as the target's last one and not at random. On the reference target (20M, exit after layer 3),
    # 60 steps at 3e-4, 1e-3, 3e-3, 6e-3 and 1e-2 ended at agreements of 0.45, 0.52, 0.56, 0.56 and 0.55. The other
    # rates follow FSPAD's; nobody has compared them.
    presets: ClassVar = {
        "tiny": {"learning_rate": 3e-3},
        "small": {"learning_rate": 6e-4, "batch_size": 16},
        "base": {"learning_rate": 5e-5},
    }
    card = "an exit layer, EESD ([arXiv 2406.03853](https://arxiv.org/abs/2406.03853))"
    no_export = None

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> ExitLayer:
        from outdraft.methods.eesd.network import load_exit_layer

        return load_exit_layer(source, target.model, dtype=dtype, device=device)

    def describe(self, folder: Path) -> DrafterFacts:
        from outdraft.methods.checkpoint import count
        from outdraft.methods.eesd.network import read_exit_folder

        found = read_exit_folder(folder)
        return DrafterFacts(
            self.name,
            "outdraft",
            count(found.tensors.values()),
            found.target.get("id"),
            {name: value for name, value in found.target.items() if name != "id"},
            found.training,
            {"exit_layer": found.config.exit_layer, "own_head": found.config.own_head},
        )

    def check(self, settings: Any) -> None:
        if settings.exit_layer is None:
            raise UserError('method eesd needs "exit_layer"; give a number of layers or auto with --exit-layer')
        if isinstance(settings.exit_layer, int) and settings.exit_layer < 1:
            raise UserError(f'"exit_layer" must be at least 1, not {settings.exit_layer}')

    measured = "exit_choice"

    def measure(
        self, target: Target, settings: Any, examples: ExampleSet, record: Mapping[str, Any]
    ) -> ExitChoice | None:
        from outdraft.methods.eesd.exit_choice import ExitChoice, choose_exit

        if settings.exit_layer != "auto":
            return None
        try:
            return ExitChoice.recorded(record[self.measured])
        except (KeyError, TypeError):  # a run that has not got that far, or whose layer was set by hand
            return choose_exit(target, examples)

    def new_network(self, target: Target, settings: Any) -> ExitLayer:
        from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig

        return ExitLayer.beginning(target.model, ExitLayerConfig(settings.exit_layer, settings.own_head))


METHODS = (Eesd(),)
