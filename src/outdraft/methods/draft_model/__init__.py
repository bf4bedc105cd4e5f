"""Drafting with a smaller language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outdraft.methods.registry import Method

if TYPE_CHECKING:
    from outdraft.methods.draft_model.drafter import DraftModel
    from outdraft.target.target import Target


class DraftModelMethod(Method):
    """The draft-model method; its network is a language model, loaded as targets are (`api/loading.py`)."""

    name = "draft-model"
    summary = "a smaller language model"

    def bind(self, network: Any, target: Target) -> DraftModel:
        from outdraft.methods.draft_model.drafter import DraftModel

        return DraftModel(network, target)


METHODS = (DraftModelMethod(),)
