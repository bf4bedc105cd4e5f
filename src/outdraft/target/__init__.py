"""The target: a stock `transformers` model that decides tokens, its cache, and how it is run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outdraft.target.target import Target as Target


def __getattr__(name: str) -> Any:
    """Import `outdraft.target.Target` on first access, as it needs torch and transformers."""
    if name == "Target":
        from outdraft.target.target import Target

        return Target
    raise AttributeError(f"module 'outdraft.target' has no attribute '{name}'")
