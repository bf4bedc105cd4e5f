"""Kernels of our own for CPUs, and the modules that call them."""

from outdraft.target.backends.native.build import why_not_native
from outdraft.target.backends.native.modules import (
    NativeStack,
    native_view,
    quantised_view,
    why_not_native_model,
    why_not_parts,
    why_not_quantised,
)

__all__ = [
    "NativeStack",
    "native_view",
    "quantised_view",
    "why_not_native",
    "why_not_native_model",
    "why_not_parts",
    "why_not_quantised",
]
