"""Lossless speculative decoding for Hugging Face causal language models.

`load`, `SpeculativeModel`, `GenerationOutput` and `custom_generate` are imported when first used, so that the command
line's help does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from outdraft.errors import UserError

if TYPE_CHECKING:
    from outdraft.generation import GenerationOutput, SpeculativeModel, load
    from outdraft.hugging_face import custom_generate

try:
    __version__ = version("outdraft")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["GenerationOutput", "SpeculativeModel", "UserError", "__version__", "custom_generate", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        room = "hugging_face" if name == "custom_generate" else "generation"
        return getattr(import_module(f"outdraft.{room}"), name)
    raise AttributeError(f"module 'outdraft' has no attribute '{name}'")
