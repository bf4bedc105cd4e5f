"""A tiny target, a draft model near it, and audits small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import perturbed, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.drafting.base import Drafter
from outdraft.evaluation.audit import Audit, AuditSettings, run_audit
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.target.target import Target

PROMPTS = [[5, 9, 9, 3, 5, 9], [7, 1], [1, 2, 3, 4, 1, 2, 3], [30, 8, 30], [11, 3, 21, 4], [2, 2, 9]]
SAMPLED = {"temperature": 0.8, "num_speculative_tokens": 2}
SMALL = {
    "max_new_tokens": 12,
    "total_variation": 0.08,
    "prefixes": 2,
    "text_prompts": 4,
    "texts": 40,
    "permutations": 1999,
    "trees": 6,
}

Run = Callable[..., Audit]


def pair(dtype: torch.dtype = torch.float32, noise: float = 0.1) -> tuple[Target, Drafter]:
    """A target with something to say, and a draft model that is often right, the more noise the less often."""

    def build() -> Any:
        return tiny("llama-gqa", dtype=dtype, initializer_range=0.2)

    target = Target(build())
    return target, DraftModel(Target(perturbed(build(), build, noise)), target)


@pytest.fixture
def audit() -> Run:
    """Runs a small audit of the tiny pair, its drafter wrapped if asked for."""

    def run(
        generation: dict[str, Any] | None = None,
        wrap: Callable[[Drafter], Drafter] = lambda drafter: drafter,
        dtype: torch.dtype = torch.float32,
        noise: float = 0.1,
        **settings: Any,
    ) -> Audit:
        target, drafter = pair(dtype, noise)
        model = SpeculativeModel(target, wrap(drafter))
        return run_audit(model, AuditSettings(generation or {}, **{**SMALL, **settings}), prompts=PROMPTS)

    return run
