"""Reading the folder of Medusa's heads: settings and tensors.

There is no official layout: such heads come from training here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from outdraft.drafting.folder import find_folder, is_own, read_config
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, read_own
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads


def load_medusa(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint[MedusaHeads]:
    """Load Medusa's heads from a folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`."""
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if not is_own(config) or config["method"] != MedusaHeads.method:
        raise UserError(f"'{folder}' holds no Medusa heads; choose a folder that `outdraft train --method medusa` made")
    own = read_own(folder, config, MedusaConfig)
    return Checkpoint(own.assembled(MedusaHeads, dtype, device), target=own.target, training=own.training)
