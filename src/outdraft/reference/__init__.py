"""The small chat model that ships with outdraft for its demo, tests and documentation, and a drafter for it.

Exports the loaders and the shipped prompts; how they were made is in ``build_target`` and ``CARD.md``.
"""

from pathlib import Path

from outdraft.errors import UserError
from outdraft.reference.prompts import load_prompts
from outdraft.reference.quantize import load_reference_target, reference_target_path

__all__ = ["load_prompts", "load_reference_target", "reference_drafter_path", "reference_target_path"]


def reference_drafter_path() -> Path:
    """The folder of the FSPAD drafter that ships for the reference target."""
    folder = Path(__file__).parent / "drafter"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing: reinstall the package, or train a drafter with `outdraft train`")
    return folder
