"""Reading the folder of Medusa's heads: settings and tensors.

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
    """The loaded heads and their folder's facts about them."""

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
    """Load Medusa's heads from an outdraft folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`.

    Raises:
        UserError: nothing is there, or it is another kind of drafter or damaged; the message names the fix.
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
