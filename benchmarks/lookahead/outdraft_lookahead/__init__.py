"""Lookahead decoding as a drafting method of outdraft, `--method lookahead` once this package is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outdraft.methods.registry import Method

if TYPE_CHECKING:
    from outdraft.target.target import Target
    from outdraft_lookahead.drafter import Lookahead


class LookaheadMethod(Method):
    """The method of this package."""

    name = "lookahead"
    summary = "Jacobi iteration of the target beside its verification"
    needs_model = False

    def bind(self, network: Any, target: Target) -> Lookahead:
        from outdraft_lookahead.drafter import Lookahead

        return Lookahead.for_device(target.device)


LOOKAHEAD = LookaheadMethod()
