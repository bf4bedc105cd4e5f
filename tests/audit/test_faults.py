"""The audit finds every planted fault, and says of the decoder as it is that the law is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import outdraft
import outdraft.core.verify
import outdraft.engine.round
import outdraft.evaluation.audit.stock
import outdraft.target.runner
from audit import faults
from audit.conftest import PROMPTS, SAMPLED, SMALL, Run
from models import tiny
from outdraft.control import Costs
from outdraft.control.shape_grid import PLAIN
from outdraft.control.tuner import ShapeChoice, ShapeTuner
from outdraft.core.coupling import Coupled
from outdraft.evaluation.audit import AuditSettings, run_audit
from outdraft.target.backends.native import why_not_native
from outdraft.target.runner import ModelRunner

TREE = {"tree_depth": 2, "tree_top_k": 2, "tree_size": 7}
GREEDY = {"num_speculative_tokens": 3}
LAWS = {
    "chain": SAMPLED,
    "tree of best guesses": {"temperature": 1.0, **TREE},
    "drawn tree": {"temperature": 1.0, **TREE, "candidates": "sampled"},
    "penalties": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "num_speculative_tokens": 2},
    "controller": {"temperature": 1.0, "num_speculative_tokens": 3, "controller": "calibrated"},
}


def failed(found: Any) -> set[str]:
    return {finding.name for finding in found.findings if not finding.passed}


# --- nothing is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_decoder_keeps_the_law(audit: Run, law: str) -> None:
    found = audit(LAWS[law], total_variation=0.1)
    assert found.kept, found.as_dict()
    assert found["greedy"].figures["identical"] == 6
    assert 0 < found["beginnings"].figures["drafting"]["accepted"] < found["beginnings"].figures["drafting"]["drafted"]


def test_the_decoder_keeps_greedy_texts(audit: Run) -> None:
    for generation in ({}, TREE, {"repetition_penalty": 1.3, **TREE}):
        found = audit(generation, dtype=torch.float64)
        assert found.kept and found["greedy"].figures["divergences"] == []
        assert found["forwards"].figures["variation_max"] < 1e-10
        assert {finding.name for finding in found.findings} == {"plain", "greedy", "candidates_greedy", "forwards"}


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.clocked
def test_a_drafter_that_never_pays_here_is_audited_all_the_same(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(tuner: ShapeTuner, rows: int, pending: int, *left: float) -> ShapeChoice:
        found = chosen(tuner, rows, pending, *left)
        return found if tuner.costs.given else ShapeChoice(PLAIN, tuner, rows, pending)

    chosen = ShapeTuner.choose
    monkeypatch.setattr(ShapeTuner, "choose", choose)
    monkeypatch.setattr(Costs, "plain_is_due", lambda costs, rows=1: not costs.given)
    found = audit({})
    assert found.kept and found["greedy"].figures["drafting"]["accepted"] > 0
    measured = audit({"controller": "calibrated"})
    assert measured.kept and measured["greedy"].figures["drafting"]["drafted"] == 0
    assert "nothing was drafted" in measured.verdict


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.clocked
def test_a_drafter_that_does_not_pay_here_is_audited_all_the_same(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def slow(costs: Costs, nodes: int, verify_seconds: float, rest_seconds: float, rows: int = 1) -> None:
        told.append(nodes)
        usual(costs, nodes, verify_seconds if nodes == 1 else 1000 * verify_seconds, rest_seconds, rows)

    usual = Costs.observe_round
    monkeypatch.setattr(Costs, "observe_round", slow)
    monkeypatch.setattr(ShapeTuner, "best", lambda tuner, rows: tuner.grid.start(rows) if tuner.costs.given else PLAIN)
    found = audit({}, max_new_tokens=24)
    assert found.kept and found["greedy"].figures["drafting"]["accepted"] > 0


def test_a_wrong_residual_is_found(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outdraft.core.verify, "residual", faults.no_residual)
    found = audit(SAMPLED, greedy=False, noise=0.3)
    assert not found.kept and "beginnings" in failed(found)


def test_acceptance_by_the_raw_law_is_found(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outdraft.core.verify, "acceptance", faults.untempered(0.6))
    found = audit({**SAMPLED, "temperature": 0.6}, greedy=False)
    assert not found.kept and "beginnings" in failed(found)


@pytest.mark.parametrize("generation", [{"num_speculative_tokens": 2}, SAMPLED], ids=["greedy", "sampled"])
def test_a_wrong_bonus_token_is_found(audit: Run, monkeypatch: pytest.MonkeyPatch, generation: dict[str, Any]) -> None:
    monkeypatch.setattr(outdraft.engine.round, "verify", faults.bonus_from_the_parent(outdraft.core.verify.verify))
    found = audit(generation, greedy=False)
    assert not found.kept
    assert ("greedy" if len(generation) == 1 else "tokens") in failed(found)


# --- the forward over trees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["positions", "mask", "features"])
@pytest.mark.parametrize(
    ("generation", "dtype"),
    [(GREEDY, torch.float32), (GREEDY, torch.bfloat16), (SAMPLED, torch.float32)],
    ids=["greedy-float32", "greedy-bfloat16", "sampled-float32"],
)
def test_a_wrong_forward_over_trees_is_found(
    audit: Run, monkeypatch: pytest.MonkeyPatch, fault: str, generation: dict[str, Any], dtype: torch.dtype
) -> None:
    """And is no noise, in low precision either."""
    if fault == "positions":
        monkeypatch.setattr(ModelRunner, "positions", faults.late_positions)
    else:
        broken = faults.blind_tree if fault == "mask" else faults.shifted_features(ModelRunner.tree)
        monkeypatch.setattr(ModelRunner, "tree", broken)
    found = audit(generation, greedy=False, dtype=dtype, total_variation=0.2)
    assert not found.kept and "forwards" in failed(found)
    if generation is GREEDY and dtype is torch.float32:
        assert found["greedy"].figures["bugs"] == len(found["greedy"].figures["divergences"])


def test_wrong_plain_decoding_is_found(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafted and plain texts agree, for both are wrong."""
    positions = ModelRunner.positions
    monkeypatch.setattr(ModelRunner, "positions", lambda self, tree: positions(self, tree) + 1)
    assert "plain" in failed(audit(TREE, max_new_tokens=20))


# --- drafters --------------------------------------------------------------------------------------------------------


def test_dropped_improbable_candidates_are_found(audit: Run) -> None:
    found = audit(SAMPLED, faults.Peeking, greedy=False)
    assert not found.kept and {"draws", "tokens"} & failed(found)
    assert found["declared_laws"].figures["draws"] > found["declared_laws"].figures["candidates"]


@pytest.mark.parametrize("hidden", [False, True], ids=["through its dice", "with dice of its own"])
def test_laws_that_were_not_drawn_from_are_found(audit: Run, hidden: bool) -> None:
    found = audit(SAMPLED, lambda drafter: faults.Undeclared(drafter, hidden), greedy=False)
    assert not found.kept and "draws" in failed(found)
    assert ("declared_laws" in failed(found)) is not hidden


def test_random_candidates_declared_as_a_point_mass_are_found(audit: Run) -> None:
    found = audit(SAMPLED, faults.RandomPoint, greedy=False)
    assert not found.kept and "candidates" in failed(found)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeded_texts_are_stock_generates(audit: Run) -> None:
    processed = {"top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "bad_words_ids": [[3]]}
    for generation in (SAMPLED, {**SAMPLED, **processed}, {**SAMPLED, "top_k": 5, "candidates": "sampled"}):
        found = audit(generation, greedy=False, total_variation=0.3, texts=4)["seeded"]
        assert found.passed and found.figures["identical"] == found.figures["texts"] == 16
        assert 0 < found.figures["drafting"]["accepted"] < found.figures["drafting"]["drafted"]


def test_seeded_texts_in_low_precision_differ_by_near_ties_alone(audit: Run) -> None:
    found = audit(
        SAMPLED, greedy=False, total_variation=0.3, texts=2, seeds=8, seed=1, max_new_tokens=40, dtype=torch.bfloat16
    )["seeded"]
    assert found.passed, found.as_dict()
    assert 0 < found.figures["identical"] < found.figures["texts"] and found.figures["divergences"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_of_the_wrong_position_is_found(audit: Run, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Its texts have the right distribution, so no statistical test can see it."""

    def late(self: Coupled, depth: int) -> torch.Tensor:
        return self.noise.step(len(self._decided) + max(0, depth - 1))[self._row]

    monkeypatch.setattr(Coupled, "at", late)
    found = audit(SAMPLED, greedy=False, total_variation=0.3, texts=4, dtype=dtype)
    assert failed(found) == {"seeded"} and not found.kept
    assert found["seeded"].figures["bugs"] > 0


def test_settings_that_stock_generate_lacks_are_not_compared_with_it(audit: Run) -> None:
    found = audit({**SAMPLED, "presence_penalty": 0.5}, greedy=False, total_variation=0.3, texts=4)
    assert "seeded" not in {finding.name for finding in found.findings}


# --- weights of few bits ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
def test_the_law_of_a_quantised_target_is_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They round inputs, as stock modules on the same weights do not, and give the same bits however a text is cut."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.3}
    tiny("llama-gqa", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path)
    model = outdraft.load(tmp_path, method="prompt-lookup", quantize="int8")

    def run() -> Any:
        given = {**SMALL, "max_new_tokens": 10, "total_variation": 0.15}
        return run_audit(model, AuditSettings({"temperature": 0.8}, **given), prompts=PROMPTS)

    found = run()
    assert found.kept, found.as_dict()
    assert found.noise.gap == 0 == found["forwards"].figures["variation_max"] and found.noise.positions > 0
    assert "seeded" not in {finding.name for finding in found.findings}
    assert found["tokens"].figures["drafting"]["accepted"] > 0
    monkeypatch.setattr(outdraft.evaluation.audit.stock, "QUANTISED", {})
    assert run().noise.gap > 0
