"""The settings of drafting, by the names that users give them, checked without a drafter or a device.

`resolved_draft.py` fills in what a user leaves open. This module imports no torch, because the command line's help is
made of the docstrings here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from outdraft.core.sampling_settings import whole
from outdraft.core.shape import Choice
from outdraft.errors import UserError

if TYPE_CHECKING:
    from outdraft.control.pacer import Pacer
    from outdraft.control.settings import ControlSettings

AUTO = "auto"
"""The `tree_size` that autotunes: every round has the shape that brings the most tokens per second on this machine."""

Coupling = Literal["noise", "dice"]


@dataclass
class DraftSettings:
    """Settings of drafting. A setting that is None follows from the drafter, the device and the sampling settings."""

    tree_depth: int | None = None
    """Draft steps after the root's own expansion; paths are at most depth + 1 candidates long."""
    tree_top_k: int | None = None
    """Nodes expanded per level, and children considered of each; 1 is a chain."""
    tree_size: int | Literal["auto"] | None = None
    """Nodes that the target verifies, the root included. `auto` chooses depth, width and size by their measured cost on
    this machine."""
    num_speculative_tokens: int | None = None
    """Draft a chain of so many tokens instead of a tree."""
    candidates: Choice | None = None
    """`top-k` drafts the most probable candidates in EAGLE-2's dynamic tree; `sampled` and `sampled-with-replacement`
    draft `tree_top_k` chains sampled from the drafter's probabilities; `spine` one such chain, and beside it the most
    probable candidates of a drafter that has all levels at once."""
    prompt_lookup_min: int | None = None
    """N-gram drafts override the drafter if so many tokens at the end of the text occurred before; 0 is off.  [4]"""
    prompt_lookup_num_tokens: int | None = None
    """Most tokens of an n-gram draft, which also has at most twice as many as tokens matched; no longer than other
    drafts if a temperature is set.  [20]"""
    controller: str | ControlSettings | Pacer | None = None
    """Controller of draft lengths; by default drafts are as long as they pay (CPU) unless a shape is asked for. `fixed`
    drafts to the limit; `confidence` while the drafter is confident; `beta` and `calibrated` learn by Thompson
    sampling, the second from the drafter's confidence too; `auto` chooses whole shapes. Options follow:
    `calibrated,discount=0.95`."""
    coupling: Coupling | None = None
    """Randomness with a temperature: `noise` (a seed gives the tokens that transformers samples) or `dice`.  [noise]"""
    exact: bool = False
    """Make greedy text equal to plain decoding's even at near-ties; this is slower."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not (name == "tree_size" and value == AUTO):
                setattr(self, name, whole(name, value))
        if self.num_speculative_tokens is not None and self.asked("tree_depth", "tree_top_k", "tree_size"):
            raise UserError(
                "num_speculative_tokens is for chains, tree_depth, tree_top_k and tree_size for trees; give one"
            )
        if self.coupling not in (None, "dice", "noise"):
            raise UserError(f"coupling must be dice or noise, not {self.coupling!r}")
        if self.coupling == "noise" and self.drawn:
            raise UserError("candidates that are drawn need coupling='dice'; leave one of the two out")

    @classmethod
    def taken(cls, settings: dict[str, Any], beside: DraftSettings | None = None) -> DraftSettings:
        """Take the settings of drafting out of `settings`.

        Args:
            settings: keywords as `generate` takes them; None counts as absent.
            beside: settings that hold where the keywords say nothing.

        Raises:
            UserError: impossible settings.
        """
        if beside is not None and not isinstance(beside, cls):
            raise UserError(f"draft must be DraftSettings, not {beside!r}")
        found = {field.name: settings.pop(field.name, None) for field in fields(cls)}
        return replace(beside or cls(), **{name: value for name, value in found.items() if value is not None})

    def asked(self, *names: str) -> bool:
        """Return True if any of these settings was given."""
        return any(getattr(self, name) is not None for name in names)

    @property
    def shaped(self) -> bool:
        """True if any setting of the shape of drafts was given."""
        return self.asked("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens", "candidates")

    @property
    def drawn(self) -> bool:
        """True if candidates are drawn from the drafter's probabilities."""
        return self.candidates not in (None, "top-k")


NUMBERS = (
    *("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens"),
    *("prompt_lookup_min", "prompt_lookup_num_tokens"),
)


class DraftKeywords(TypedDict, total=False):
    """The fields of `DraftSettings` as keywords of `generate`."""

    tree_depth: int | None
    tree_top_k: int | None
    tree_size: int | Literal["auto"] | None
    num_speculative_tokens: int | None
    candidates: Choice | None
    prompt_lookup_min: int | None
    prompt_lookup_num_tokens: int | None
    controller: str | ControlSettings | Pacer | None
    coupling: Coupling | None
    exact: bool | None
