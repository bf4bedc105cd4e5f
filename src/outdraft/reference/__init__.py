"""The small chat model that ships with outdraft for its demo, tests and documentation, and drafters for it and SmolLM2.

The module exports the loaders and the shipped prompts. ``CARD.md`` tells how they were made, by the scripts of the
source tree in ``scripts/reference_model``.
"""

from pathlib import Path

from outdraft.errors import UserError
from outdraft.reference.prompts import load_prompts
from outdraft.reference.quantize import load_reference_target, reference_target_path

__all__ = ["SHIPPED", "load_prompts", "load_reference_target", "reference_drafter_path", "reference_target_path"]


SHIPPED = {"fspad": "drafter", "eagle": "eagle", "eesd": "eesd"}
"""The methods of the drafters that ship for the reference target, and their folders."""


def reference_drafter_path(method: str | None = None) -> Path:
    """Return the folder of this method's shipped drafter for the reference target; FSPAD's when None."""
    method = method or "fspad"
    if method not in SHIPPED:
        raise UserError(f"no drafter of method '{method}' ships with the package; there are {', '.join(SHIPPED)}")
    folder = Path(__file__).parent / SHIPPED[method]
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing: reinstall the package, or train a drafter with `outdraft train`")
    return folder
