"""Drafting with a smaller language model."""

from __future__ import annotations

from outdraft.methods.registry import Method


class DraftModelMethod(Method):
    """The draft-model method; its network is a language model, loaded as targets are (`api/loading.py`)."""

    name = "draft-model"
    summary = "a smaller language model"
    drafter = "outdraft.methods.draft_model.drafter:DraftModel"


METHODS = (DraftModelMethod(),)
