"""The language model that decides: a stock `transformers` model, its cache, and how it is run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outdraft.target.target import Target as Target


def __getattr__(name: str) -> Any:
    """`outdraft.target.Target`, imported when it is first asked for, as it brings torch and transformers."""
    if name == "Target":
        from outdraft.target.target import Target

        return Target
    raise AttributeError(f"module 'outdraft.target' has no attribute '{name}'")
