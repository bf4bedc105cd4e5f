"""The folder of Medusa's heads, read back: settings and tensors put together.

There is no official layout: such heads come from training here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outdraft.drafting.folder import (
    find_folder,
    fitting,
    is_own,
    read_config,
    read_settings,
    read_weights,
    section,
    warn_of_unknown,
)
from outdraft.errors import UserError
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads


@dataclass
class MedusaCheckpoint:
    """Loaded heads and what their folder says about them."""

    heads: MedusaHeads
    target: dict[str, Any]
    training: dict[str, Any]


def load_medusa(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> MedusaCheckpoint:
    """Medusa's heads from our own folder, here or on the Hugging Face Hub; arguments as in `checkpoint.load_drafter`.

    Raises:
        UserError: nothing there, another kind of drafter, or a damaged one, with the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    if not is_own(config) or config["method"] != MedusaHeads.method:
        raise UserError(f"'{folder}' holds no Medusa heads; choose a folder that `outdraft train --method medusa` made")
    settings = read_settings(MedusaConfig, config, folder)
    file, tensors = read_weights(folder)
    with torch.device("meta"):  # no random start, which would be overwritten
        heads = MedusaHeads(settings)
    wanted = heads.state_dict()
    weights = fitting(tensors, wanted, file)
    heads.load_state_dict(weights, assign=True)
    warn_of_unknown([name for name in tensors if name not in wanted], file)
    heads = heads.to(device=device, dtype=dtype or next(iter(weights.values())).dtype).eval()
    return MedusaCheckpoint(heads, section(config, "target"), section(config, "training"))
