"""`TopP` against the warper of `transformers`: the same scores bit for bit, mostly without its sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import generation as hf

from outdraft.core.sampling import TopP

NONE = torch.empty(0, 0, dtype=torch.long)
VOCAB = 5000


def logits(rows: int, spread: float, dtype: torch.dtype, rounded: bool, seed: int = 0) -> Tensor:
    """Random logits; rounded ones, as bfloat16 models give them, have many equal ones."""
    found = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return (found.bfloat16() if rounded else found).to(dtype)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounded", [False, True])
def test_scores_are_those_of_transformers(top_p: float, spread: float, dtype: torch.dtype, rounded: bool):
    scores = logits(12, spread, dtype, rounded)
    assert torch.equal(TopP(top_p)(NONE, scores), hf.TopPLogitsWarper(top_p)(NONE, scores))


def test_logits_ruled_out_before_stay_ruled_out():
    scores = logits(6, 3.0, torch.float32, True)
    scores[:, ::3] = -torch.inf
    scores[0, 1:] = -torch.inf
    assert torch.equal(TopP(0.9)(NONE, scores), hf.TopPLogitsWarper(0.9)(NONE, scores))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_no_distribution_in_their_row_alone(bad: float):
    scores = logits(3, 3.0, torch.float32, False)
    scores[1, 7] = bad
    probs = TopP(0.9)(NONE, scores).softmax(-1)
    assert probs[1].isnan().any() and probs[[0, 2]].isfinite().all()


def test_equal_logits_at_the_edge_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch):
    sorted_rows = []
    whole = hf.TopPLogitsWarper.__call__
    monkeypatch.setattr(
        hf.TopPLogitsWarper, "__call__", lambda self, ids, scores: sorted_rows.append(0) or whole(self, ids, scores)
    )
    apart = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    equal = torch.tensor([[4.0, 4.0, 4.0, 4.0, 0.0]])
    found = TopP(0.6)(NONE, torch.cat([apart, equal]))
    assert len(sorted_rows) == 1
    assert found.isfinite().sum(-1).tolist() == [1, 3]


def test_most_rows_need_no_sort(monkeypatch: pytest.MonkeyPatch):
    def whole(self: hf.TopPLogitsWarper, ids: Tensor, scores: Tensor) -> Tensor:
        raise AssertionError("sorted")

    monkeypatch.setattr(hf.TopPLogitsWarper, "__call__", whole)
    TopP(0.9)(NONE, logits(12, 3.0, torch.float32, False))
