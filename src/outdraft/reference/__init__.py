"""The small chat model that ships with outdraft for its demo, tests and documentation.

Exports the loader and the shipped prompts; how the model was made is in ``build_target`` and ``CARD.md``.
"""

from outdraft.reference.prompts import load_prompts
from outdraft.reference.quantize import load_reference_target, reference_target_path

__all__ = ["load_prompts", "load_reference_target", "reference_target_path"]
