"""With each drafter vLLM gives the greedy texts of plain decoding, and accepts exactly the drafts that we accept."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_engine import CHAIN, NEW_TOKENS, since

import outdraft

OURS: dict[str, Any] = {}


@pytest.fixture
def ours(engine: Any, prompts: list[list[int]]) -> Any:
    """Our own decoding of the prompts, drafting chains of the same length."""
    _, method = engine
    if method not in OURS:
        model = outdraft.load("reference", "reference", method=method, dtype="float32", backend="eager")
        OURS[method] = model.generate(
            prompts, max_new_tokens=NEW_TOKENS, num_speculative_tokens=CHAIN, prompt_lookup_min=0
        )
    return OURS[method]


def test_texts_and_counters_are_ours(engine: Any, ours: Any, prompts: Any, plain_texts: Any) -> None:
    running, _ = engine
    before = running.counts()
    assert running.greedy(prompts) == ours.tokens == plain_texts
    counts, own = since(before, running.counts()), ours.statistics
    per_position = [*own.accepted_at, *[0] * CHAIN][:CHAIN]
    assert own.accepted > 0 and own.drafted > own.accepted  # some were accepted, some refused
    assert counts == {
        "num_drafts": own.rounds,
        "num_draft_tokens": own.drafted,
        "num_accepted_tokens": own.accepted,
        "num_accepted_tokens_per_pos": per_position,
    }
