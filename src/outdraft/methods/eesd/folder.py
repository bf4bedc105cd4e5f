"""Reading the folder of an exit layer: its settings without the target, the layer itself with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from outdraft.drafting.folder import CONFIG, find_folder, is_own, read_config, some
from outdraft.errors import UserError
from outdraft.methods.checkpoint import TARGET_FACTS, OwnFolder, assembled, read_own, refuse_another, target_facts
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, empty


def read_exit_folder(folder_or_hub_id: str | Path) -> OwnFolder:
    """Read settings and tensors of an exit layer, without its target."""
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if not is_own(config) or config["method"] != ExitLayer.method:
        raise UserError(f"'{folder}' holds no exit layer; choose a folder that `outdraft train --method eesd` made")
    own = read_own(folder, config, ExitLayerConfig)
    if missing := [name for name in TARGET_FACTS if name not in own.target]:
        raise UserError(f"'{folder / CONFIG}' says nothing of its target's {some(missing)}; copy or train it again")
    return own


def load_exit_layer(
    folder_or_hub_id: str | Path,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExitLayer:
    """Load an exit layer from an outdraft folder or the Hugging Face Hub.

    Args:
        model: the target that it was trained for, whose family the layer belongs to.
        dtype: precision of the weights; as stored when None.
        device: device of the weights; the model's when None.
    """
    found = read_exit_folder(folder_or_hub_id)
    facts = target_facts(model)
    refuse_another({name: found.target[name] for name in facts}, facts)
    place: Any = model.get_input_embeddings().weight.device if device is None else device
    return assembled(
        lambda: empty(model, found.config),
        found.tensors,
        found.file,
        dtype=dtype,
        device=place,
        asked_by="this target",
        fix="choose its own drafter or train one (outdraft train)",
    )
