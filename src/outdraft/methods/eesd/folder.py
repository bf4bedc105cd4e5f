"""Reading the folder of an exit layer: its settings without the target, the layer itself with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from outdraft.drafting.folder import (
    CONFIG,
    find_folder,
    fitting,
    is_own,
    read_config,
    read_settings,
    read_weights,
    section,
    some,
    warn_of_unknown,
)
from outdraft.errors import UserError
from outdraft.methods.checkpoint import TARGET_FACTS, target_facts
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, empty


@dataclass
class ExitFolder:
    """The content of an exit layer's folder, read without its target."""

    config: ExitLayerConfig
    tensors: dict[str, Tensor]
    file: str
    """The file of the tensors, for messages."""
    target: dict[str, Any]
    training: dict[str, Any]


def read_exit_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> ExitFolder:
    """Read settings and tensors of an exit layer, without its target.

    Raises:
        UserError: nothing is there, or it is another kind of drafter or damaged; the message names the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    if not is_own(config) or config["method"] != ExitLayer.method:
        raise UserError(f"'{folder}' holds no exit layer; choose a folder that `outdraft train --method eesd` made")
    settings = read_settings(ExitLayerConfig, config, folder)
    file, tensors = read_weights(folder)
    target = section(config, "target")
    if missing := [name for name in TARGET_FACTS if name not in target]:
        raise UserError(f"'{folder / CONFIG}' says nothing of its target's {some(missing)}; copy or train it again")
    return ExitFolder(settings, tensors, file, target, section(config, "training"))


def load_exit_layer(
    folder_or_hub_id: str | Path,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> ExitLayer:
    """Load an exit layer from an outdraft folder or the Hugging Face Hub.

    Args:
        folder_or_hub_id: a folder, else a hub id.
        model: the target that it was trained for, whose family the layer belongs to.
        dtype: precision of the weights; as stored when None.
        device: device of the weights; the model's when None.
        revision: revision of a hub repository.

    Raises:
        UserError: nothing is there, or the drafter is damaged or another target's; the message names the fix.
    """
    found = read_exit_folder(folder_or_hub_id, revision)
    for name, value in target_facts(model).items():
        if found.target[name] != value:
            raise UserError(
                f"the drafter was trained for a target with {name} {found.target[name]}, this one has {value}; "
                "choose its own drafter or train one (outdraft train)"
            )
    exit_layer = empty(model, found.config)
    wanted = exit_layer.state_dict()
    weights = fitting(
        found.tensors, wanted, found.file, "this target", "choose its own drafter or train one (outdraft train)"
    )
    exit_layer.load_state_dict(weights, assign=True)
    warn_of_unknown([name for name in found.tensors if name not in wanted], found.file)
    place: Any = model.get_input_embeddings().weight.device if device is None else device
    return exit_layer.to(device=place, dtype=dtype or next(iter(weights.values())).dtype)
