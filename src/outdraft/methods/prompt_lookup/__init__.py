"""Prompt lookup: n-gram drafts from the text so far."""

from __future__ import annotations

from outdraft.methods.registry import Method


class PromptLookupMethod(Method):
    """Prompt lookup, the method of this folder."""

    name = "prompt-lookup"
    summary = "what followed the newest words before"
    needs_model = False
    drafter = "outdraft.methods.prompt_lookup.drafter:PromptLookup.of_any"


METHODS = (PromptLookupMethod(),)
