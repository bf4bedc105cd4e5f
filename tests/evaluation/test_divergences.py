"""Texts that differ from plain decoding's are judged rightly."""

from __future__ import annotations

import math

import pytest
import torch

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.core.tree import Tree
from outdraft.evaluation.audit.stock import Divergence, Noise, stock_logits
from outdraft.evaluation.bench import measure as judging
from outdraft.evaluation.bench.measure import (
    Answer,
    Difference,
    Run,
    divergences,
    divergences_by_method,
    last_place,
)
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target
from training.tiny import tiny_target

PROMPTS = [[10, 20, 30], [40, 50, 60, 70]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(torch.float64)


def judged(target: Target, plain: list[list[int]], others: list[list[int]]) -> list[Divergence]:
    """Of texts after `PROMPTS`, by the way the benchmark goes."""

    def runs(texts: list[list[int]]) -> list[Run]:
        return [Run(place, 0, Answer(tokens, 1.0, Statistics())) for place, tokens in enumerate(texts)]

    return divergences_by_method(target, PROMPTS, runs(plain), {"other": runs(others)})["other"]


def test_equal_texts_have_no_divergence(target: Target) -> None:
    assert judged(target, [[1, 2], [3]], [[1, 2], [3]]) == []


def test_a_divergence_names_place_gap_and_noise(target: Target) -> None:
    plain = SpeculativeModel(target).generate(PROMPTS, max_new_tokens=14).tokens
    other = [list(tokens) for tokens in plain]
    place = min(11, len(plain[1]) - 1)
    other[1][place] = (plain[1][place] + 1) % target.vocab_size
    (found,) = judged(target, plain, other)
    ids = torch.tensor([[*PROMPTS[1], *plain[1][:place]]])
    logits = target.model(ids).logits[0, -1].detach()
    assert (found.prompt, found.position, found.turn) == (1, place, 0)
    assert found.gap == pytest.approx(float(logits[plain[1][place]] - logits[other[1][place]]), rel=1e-4)
    assert 0 <= found.noise < 1e-6 < found.gap and not found.tie


def test_a_text_that_just_ends_diverges_without_a_gap(target: Target) -> None:
    for plain, other in (([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3])):
        (found,) = judged(target, [plain], [other])
        assert found.position == 2 and math.isnan(found.gap) and not found.tie


def test_contenders_that_leave_one_text_are_judged_alike(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SpeculativeModel(target).generate(PROMPTS[0], max_new_tokens=9).tokens[0]
    others = [[*plain[:place], (plain[place] + 1) % target.vocab_size] for place in (7, 2, 0)]
    alone = [divergences(target, [Difference(0, PROMPTS[0], plain, other)])[0] for other in others]
    measured = []
    monkeypatch.setattr(judging, "measured_noise", lambda laws, ids, texts, advance: measured.append(texts) or Noise())
    together = divergences(target, [Difference(0, PROMPTS[0], plain, other) for other in others])
    assert [(one.position, one.gap) for one in together] == [(one.position, one.gap) for one in alone]
    assert [one.position for one in together] == [7, 2, 0]
    assert measured == [[plain]], "the noise of a text that several leave is measured once"


def test_low_precision_ties_are_told_from_defects() -> None:
    target = tiny_target(torch.bfloat16)
    plain = SpeculativeModel(target).generate(PROMPTS[0], max_new_tokens=30).tokens[0]
    single = torch.cat(list(stock_logits(target, PROMPTS[0], [plain[:-1]])))
    assert [int(best) for best in single.argmax(-1)] == plain
    worst = int(single[-1].argmin())
    (found,) = judged(target, [plain], [[*plain[:-1], worst]])
    assert found.gap > found.noise > 0 and not found.tie


def test_one_unit_in_the_last_place_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that parts early leaves few positions to measure noise on, and they can all happen to round alike."""
    monkeypatch.setattr(judging, "measured_noise", lambda *given: Noise(positions=2))
    target = tiny_target(torch.bfloat16)
    for start in range(200):
        prompt = [start % 90 + 1, start // 7 + 2, 3]
        (logits,) = next(stock_logits(target, prompt, [[0]]))
        (first, second), (one, other) = logits.topk(2)
        if 0 < float(first - second) <= last_place(float(first), logits.dtype):
            break
    else:
        pytest.fail("no two logits one unit apart")
    third = int(logits.argmin())
    tie, far = divergences(target, [Difference(0, prompt, [int(one)], [token]) for token in (int(other), third)])
    assert tie.gap == tie.noise > 0 and tie.tie
    assert not far.tie
    (reversed_,) = divergences(target, [Difference(0, prompt, [third], [int(one)])])
    assert reversed_.gap < 0 and not reversed_.tie, "plain decoding far from the stock model's choice is a defect too"

    # In single precision the same two tokens are well apart, however little noise was measured.
    (exact,) = divergences(tiny_target(torch.float32), [Difference(0, prompt, [int(one)], [int(other)])])
    assert abs(exact.gap) > 100 * exact.noise > 0 and not exact.tie


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [
        (8.0, torch.bfloat16, 0.0625),
        (15.9, torch.bfloat16, 0.0625),
        (7.9, torch.bfloat16, 0.03125),
        (1.0, torch.float32, 2**-23),
        (0.75, torch.float16, 2**-11),
    ],
)
def test_the_last_place(magnitude: float, dtype: torch.dtype, expected: float) -> None:
    assert last_place(magnitude, dtype) == expected
    number = torch.tensor(magnitude, dtype=dtype)
    assert float(torch.nextafter(number, number + 100) - number) == expected


def test_a_broken_tree_cannot_pass_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is measured without the code that is under suspicion."""
    target = tiny_target(torch.float32)
    plain = SpeculativeModel(target).generate(PROMPTS, max_new_tokens=14).tokens
    whole = ModelRunner.tree

    def broken(self: ModelRunner, tree: Tree) -> Output:
        output = whole(self, tree)
        return output if tree.nodes == 1 else Output(output.features.roll(1, dims=-1), output.taps)

    monkeypatch.setattr(ModelRunner, "tree", broken)
    wrong = SpeculativeModel(target, DraftModel(tiny_target(torch.float32), target)).generate(
        PROMPTS, max_new_tokens=14
    )
    found = judged(target, plain, wrong.tokens)
    assert found and not any(one.tie for one in found)
