"""Under the null p-values are uniform, sample sizes have their stated power, corrections are Holm's."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from audit.conftest import PROMPTS, SAMPLED, pair
from outdraft.api.generation import SpeculativeModel
from outdraft.evaluation.audit import AuditSettings, run_audit
from outdraft.evaluation.audit.equality import too_many
from outdraft.evaluation.audit.findings import Finding, holm, judge
from outdraft.evaluation.audit.goodness_of_fit import (
    Ranks,
    energy_p_value,
    fit,
    found_distance,
    needed_samples,
    pooled,
    power_of,
)
from outdraft.evaluation.audit.sampled import exact_cells, same_cells
from outdraft.evaluation.audit.stock import StockProbs, stock_logits

LEAST = 1e-3
"""Of a Kolmogorov-Smirnov test on fixed seeds."""


def test_sample_sizes_have_the_power_that_they_state() -> None:
    """Against the error that is hardest to see, and more against others; simulated."""
    samples = needed_samples(0.05, 9, 0.01, 0.9)
    assert samples is not None
    assert power_of(samples, 0.05, 9, 0.01) >= 0.9 > power_of(samples - 1, 0.05, 9, 0.01)
    assert found_distance(samples, 9, 0.01, 0.9) == pytest.approx(0.05, rel=1e-2)
    p = np.full(10, 0.1)
    generator = np.random.default_rng(0)
    for error, least in ((np.resize([0.01, -0.01], 10), 0.87), (np.array([0.05, -0.05] + [0.0] * 8), 0.99)):
        assert np.abs(error).sum() / 2 == pytest.approx(0.05)
        drawn = generator.multinomial(samples, p + error, size=600)
        assert np.mean([fit(list(row), list(p * samples)).p_value() < 0.01 for row in drawn]) > least


def test_rounding_is_forgiven_and_costs_samples() -> None:
    plain, widened = needed_samples(0.05, 9, 0.01, 0.9), needed_samples(0.05, 9, 0.01, 0.9, allowed=0.001)
    assert plain is not None and widened is not None and plain < widened
    assert needed_samples(0.02, 9, 0.01, 0.9, allowed=0.0016) is None


def test_rare_cells_are_pooled() -> None:
    groups = pooled([50.0, 0.0, 2.0, 4.0, 9.0, 1e-9])
    assert sorted(place for group in groups for place in group) == list(range(6))
    assert {frozenset(group) for group in groups} == {frozenset({1, 5, 2, 3}), frozenset({4}), frozenset({0})}
    assert pooled([1.0, 2.0]) == [[0, 1]]


def test_pearsons_p_values_are_uniform() -> None:
    generator, p = np.random.default_rng(1), np.array([0.4, 0.3, 0.2, 0.05, 0.03, 0.02])
    found = [fit(list(generator.multinomial(2000, p)), list(p * 2000)).p_value() for _ in range(500)]
    assert stats.kstest(found, "uniform").pvalue > LEAST


def test_ranks_are_uniform_only_if_the_laws_are_those_drawn_from() -> None:
    def p_value(seed: int, power: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        laws = torch.randn(400, 12, generator=generator).mul(2).softmax(-1)
        laws[:, 3] = laws[:, 4]  # equal probabilities
        ranks = Ranks(seed)
        ranks.add(laws, torch.multinomial(laws**power, 1, generator=generator)[:, 0])
        return ranks.fit().p_value()

    assert stats.kstest([p_value(seed, 1.0) for seed in range(300)], "uniform").pvalue > LEAST
    assert np.median([p_value(seed, 1.5) for seed in range(20)]) < 1e-3


def test_permutation_p_values_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)

    def p_value(seed: int, shift: float) -> float:
        pairs = [
            (torch.randn(12, 3, generator=generator).double(), torch.randn(12, 3, generator=generator).double() + shift)
            for _ in range(3)
        ]
        return energy_p_value(pairs, 199, seed)[1]

    assert stats.kstest([p_value(seed, 0.0) for seed in range(300)], "uniform").pvalue > LEAST
    assert np.median([p_value(seed, 1.0) for seed in range(10)]) == 1 / 200


def test_the_audits_own_p_values_are_uniform() -> None:
    """All four tests on real decoding, many seeds."""
    target, drafter = pair()
    model = SpeculativeModel(target, drafter)
    found: dict[str, list[float]] = {}
    for seed in range(12):
        settings = AuditSettings(
            {**SAMPLED},
            greedy=False,
            seed=1000 * seed,
            total_variation=0.3,
            max_new_tokens=6,
            prefixes=1,
            text_prompts=2,
            texts=16,
            permutations=199,
            trees=1,
        )
        audit = run_audit(model, settings, prompts=PROMPTS[:2])
        for finding in audit.findings:
            if finding.p_value is not None:
                found.setdefault(finding.name, []).append(finding.p_value)
    assert set(found) == {"beginnings", "draws", "samples", "tokens"}
    for name, p_values in found.items():
        assert stats.kstest(p_values, "uniform").pvalue > LEAST, name


def test_the_same_seed_gives_the_same_p_values() -> None:
    def p_values() -> list[float | None]:
        target, drafter = pair()
        settings = AuditSettings(
            SAMPLED, greedy=False, total_variation=0.3, max_new_tokens=6, prefixes=1, text_prompts=1, texts=8, trees=1
        )
        audit = run_audit(SpeculativeModel(target, drafter), settings, prompts=PROMPTS[:1])
        return [finding.p_value for finding in audit.findings]

    assert p_values() == p_values()


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    findings = [Finding("a", "?", True, "", p) for p in (0.0006, 0.0008, None)]
    judge(findings, 0.001)
    assert [finding.passed for finding in findings] == [True, True, True]
    judge(findings, 0.0015)
    assert [finding.passed for finding in findings] == [False, False, True]


def test_near_ties_must_not_be_more_frequent_than_noise() -> None:
    assert too_many(0, 1000, 0, 1000) == 1
    assert too_many(5, 1000, 2, 700) > 0.05
    assert too_many(60, 1000, 2, 700) < 1e-3


# --- exact laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3, None])
@torch.inference_mode()
def test_stock_forwards_of_any_piece_say_the_same(piece: int | None) -> None:
    target, _ = pair(torch.float64)
    prompt, texts = PROMPTS[0], [[1, 2, 3, 4], [9]]
    for place, logits in enumerate(stock_logits(target, prompt, texts, piece)):
        expected = target.model(torch.tensor([prompt + texts[0][:place]])).logits[0, -1]
        assert torch.allclose(logits[0], expected, atol=1e-10)
    assert place == 4


def test_cells_have_the_products_of_the_laws() -> None:
    target, _ = pair(torch.float64)
    laws = StockProbs(target, {"temperature": 0.8})
    cells = exact_cells(laws, PROMPTS[0], 3, 10)
    assert len(cells) == 10 and sum(cells.values()) == pytest.approx(1) and max(map(len, cells)) > 1
    for piece in (4, None):
        assert same_cells(laws, PROMPTS[0], cells, piece) == pytest.approx(cells, abs=1e-12)
    children = {cell[:-1] for cell in cells if cell}
    for cell, probability in cells.items():
        if cell not in children:
            product = 1.0
            for place, token in enumerate(cell):
                product *= float(laws.after(PROMPTS[0], [cell[:place]], None)[0, token])
            assert probability == pytest.approx(product)


def test_near_base_seeds_share_no_sample() -> None:
    """Decoding counts on from a seed, one a row: no base seed and no use comes within a million of another."""
    uses = [("plain texts", 0), ("plain texts", 1), ("drafted texts", 0), ("beginnings", 0, 0), ("beginnings", 0, 256)]
    seeds = sorted(AuditSettings(seed=base).seed_for(*use) for base in range(-20, 200) for use in uses)
    assert min(b - a for a, b in pairwise(seeds)) > 10**6
    assert AuditSettings(seed=3).seed_for("plain texts", 1) == AuditSettings(seed=3).seed_for("plain texts", 1)
