"""Lossless speculative decoding for Hugging Face causal language models.

What is public is imported when first used, so that the command line's help does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from outdraft.errors import UserError
from outdraft.moved import install

if TYPE_CHECKING:
    from outdraft.api.draft_settings import DraftSettings
    from outdraft.api.generation import SpeculativeModel, load
    from outdraft.api.hugging_face import custom_generate
    from outdraft.api.output import GenerationOutput
    from outdraft.drafter_trainer import DrafterTrainer
    from outdraft.training.config import DrafterConfig

try:
    __version__ = version("outdraft")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

install()

__all__ = [
    "DraftSettings",
    "DrafterConfig",
    "DrafterTrainer",
    "GenerationOutput",
    "SpeculativeModel",
    "UserError",
    "__version__",
    "custom_generate",
    "load",
]

ROOMS = {
    "DraftSettings": "api.draft_settings",
    "DrafterConfig": "training.config",
    "DrafterTrainer": "drafter_trainer",
    "GenerationOutput": "api.output",
    "SpeculativeModel": "api.generation",
    "custom_generate": "api.hugging_face",
    "load": "api.generation",
}
"""Where the public names are made."""


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return getattr(import_module(f"outdraft.{ROOMS[name]}"), name)
    raise AttributeError(f"module 'outdraft' has no attribute '{name}'")
