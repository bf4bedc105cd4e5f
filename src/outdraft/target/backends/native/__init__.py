"""Kernels of our own for CPUs, and the modules that call them."""

from outdraft.target.backends.native.modules import native_view, why_not_native_model, why_not_parts
from outdraft.target.backends.native.operations import why_not_native

__all__ = ["native_view", "why_not_native", "why_not_native_model", "why_not_parts"]
