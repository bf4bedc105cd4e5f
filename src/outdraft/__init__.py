"""Lossless speculative decoding for Hugging Face causal language models."""

from importlib.metadata import PackageNotFoundError, version

from outdraft.errors import UserError

try:
    __version__ = version("outdraft")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["UserError", "__version__"]
