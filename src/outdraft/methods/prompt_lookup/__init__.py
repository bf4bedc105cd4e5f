"""Prompt lookup: n-gram drafts from the text so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outdraft.methods.registry import Method

if TYPE_CHECKING:
    from outdraft.methods.prompt_lookup.drafter import PromptLookup
    from outdraft.target.target import Target


class PromptLookupMethod(Method):
    """Prompt lookup, the method of this folder."""

    name = "prompt-lookup"
    summary = "what followed the newest words before"
    needs_model = False

    def bind(self, network: Any, target: Target) -> PromptLookup:
        from outdraft.methods.prompt_lookup.drafter import PromptLookup

        return PromptLookup()


METHODS = (PromptLookupMethod(),)
