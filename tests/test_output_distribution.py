"""End to end, sampled text has the target's output distribution: the first three tokens jointly, by a chi-square test.

The exact enumeration proves the rule in float64; this sees the whole path in the precision that users run, real model
and all. The p-value is printed (pytest -s).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scipy import stats

from models import tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.control import ControlSettings, Costs, Pacer
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train

Cells = dict[tuple[int, ...], float]


def exact_cells(target: Target, prompt: list[int], settings: SamplingSettings, least: float) -> Cells:
    """Exact probabilities of all beginnings of up to three tokens that are no rarer than `least`, by plain forwards;
    what is rarer stays in the cell of its own beginning. The cells are chosen before anything is sampled."""
    warper = Warper(settings, len(prompt), target.vocab_size)
    cells: Cells = {(): 1.0}
    for length in range(3):
        beginnings = [cell for cell in cells if len(cell) == length]
        for start in range(0, len(beginnings), 64):
            batch = beginnings[start : start + 64]
            ids = torch.tensor([prompt + list(cell) for cell in batch])
            with torch.inference_mode():
                logits = target.head(target.features(ids)[:, -1])
            for cell, row, prefix in zip(batch, logits, ids, strict=True):
                law = warper.probs_after(row, prefix) * cells[cell]
                for token in (law >= least).nonzero()[:, 0].tolist():
                    cells[(*cell, token)] = law[token].item()
                cells[cell] -= law[law >= least].sum().item()
    return {cell: max(0.0, probability) for cell, probability in cells.items()}


def p_value(samples: list[list[int]], cells: Cells) -> float:
    """Pearson's test of the samples against the cells, the rarest of which are pooled."""
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in samples:
        counts[next(cell for n in (3, 2, 1, 0) if (cell := tuple(sample[:n])) in cells)] += 1
    observed, expected, rest = [], [], [0.0, 0.0]
    for cell, probability in cells.items():
        if probability * len(samples) >= 5:
            observed.append(counts[cell])
            expected.append(probability * len(samples))
        else:
            rest[0] += counts[cell]
            rest[1] += probability * len(samples)
    if rest[1] > 0:
        observed.append(rest[0])
        expected.append(rest[1])
    assert len(observed) >= 20, "too few cells to see anything"
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.chi2.sf(statistic, len(observed) - 1))


def sample(
    model: SpeculativeModel, prompt: list[int], count: int, rows: int = 250, **settings: object
) -> list[list[int]]:
    """`count` texts of three tokens and one more, so that a round that is cut off at the end is among them."""
    samples: list[list[int]] = []
    accepted = drafted = 0
    for start in range(0, count, rows):
        out = model.generate([prompt] * rows, max_new_tokens=3, eos_token_id=[], seed=1000 + start, **settings)
        samples += out.tokens
        accepted, drafted = accepted + out.statistics.accepted, drafted + out.statistics.drafted
    assert 0 < accepted < drafted, "nothing was drafted, accepted or rejected"
    return samples


SHAPES = {
    "dynamic tree": {"tree_depth": 2, "tree_top_k": 3, "tree_size": 8},
    "chain of best guesses": {"num_speculative_tokens": 3, "candidates": "top-k"},
    "sampled chain": {"num_speculative_tokens": 3},
    "sampled tree": {"tree_depth": 2, "tree_top_k": 2, "tree_size": 7, "candidates": "sampled"},
}


NETWORKS = {
    "fspad": lambda target: FeatureHead(feature_head_config(target)),
    "eesd": lambda target: ExitLayer.beginning(target.model, ExitLayerConfig(1)),
}
CONTROLLERS = ["confidence", "beta", "calibrated", "auto"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", NETWORKS)
def test_samples_of_a_random_target_have_its_law(method: str, shape: str) -> None:
    model = tiny("llama-gqa", dtype=torch.float32, initializer_range=0.15, num_hidden_layers=3)
    target = Target(model)
    fast = load(model, NETWORKS[method](target), backend="eager")
    settings = {"temperature": 0.8, "top_k": 20}
    cells = exact_cells(target, [1, 2, 3], SamplingSettings(**settings), 3e-3)  # type: ignore[arg-type]
    p = p_value(sample(fast, [1, 2, 3], 3000, **settings, **SHAPES[shape]), cells)
    print(f"{method}, {shape}: p = {p:.3f} over {len(cells)} cells")
    assert p > 1e-3


def test_the_test_sees_a_wrong_law() -> None:
    """Samples of temperature 1 are told from the law of temperature 0.8."""
    model = tiny("llama-gqa", dtype=torch.float32, initializer_range=0.15)
    fast = load(model, FeatureHead(feature_head_config(Target(model))), backend="eager")
    cells = exact_cells(Target(model), [1, 2, 3], SamplingSettings(temperature=0.8), 3e-3)
    assert p_value(sample(fast, [1, 2, 3], 3000, temperature=1.0), cells) < 1e-6


@dataclass
class Stories:
    """A real checkpoint, and drafters trained for a moment on the target's own samples."""

    target: Target
    fast: dict[str, SpeculativeModel]
    prompt: list[int]


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Stories:
    folder, work = shared / "models" / "stories260K", tmp_path_factory.mktemp("stories")
    plain = load(folder, dtype="float32", backend="eager")
    texts = plain.generate([[1]] * 48, max_new_tokens=96, temperature=1.0, seed=0).texts
    assert texts is not None
    (work / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    fast = {}
    for method, settings in (("fspad", {}), ("eesd", {"exit_layer": 2})):
        config = DrafterConfig(
            data=work / "data.jsonl",
            output_dir=work / method,
            method=method,
            max_steps=120,
            batch_size=8,
            max_length=96,
            learning_rate=3e-3,
            precision="fp32",
            report_to=["none"],
            **settings,
        )
        fast[method] = load(folder, train(plain.target, config).folder, dtype="float32", backend="eager")
    prompt = plain.tokenizer("Once upon a time, Tim went to")["input_ids"]  # type: ignore[misc]
    return Stories(plain.target, fast, prompt)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", NETWORKS)
def test_samples_of_stories260k_have_its_law(stories: Stories, method: str, shape: str) -> None:
    cells = exact_cells(stories.target, stories.prompt, SamplingSettings(temperature=1.0), 1e-3)
    p = p_value(sample(stories.fast[method], stories.prompt, 4000, temperature=1.0, **SHAPES[shape]), cells)
    print(f"stories260K, {method}, {shape}: p = {p:.3f} over {len(cells)} cells")
    assert p > 1e-3


@pytest.mark.parametrize("shape", ["dynamic tree", "sampled chain", "sampled tree"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_samples_of_stories260k_have_its_law_however_far_is_drafted(
    stories: Stories, controller: str, shape: str
) -> None:
    """Controllers weigh what rounds cost and what earlier rows found; the law is the same. The costs are given: by
    measured ones nobody drafts where another process has the cores."""
    fast = stories.fast["eesd" if shape == "sampled chain" else "fspad"]
    cells = exact_cells(stories.target, stories.prompt, SamplingSettings(temperature=1.0), 1e-3)
    pacer = Pacer(ControlSettings(controller), Costs.fixed(0.05, 0.03, 1.0, 0.01))
    settings = {"temperature": 1.0, "controller": pacer, **SHAPES[shape]}
    p = p_value(sample(fast, stories.prompt, 3000, rows=25, **settings), cells)
    print(f"stories260K, {controller}, {shape}: p = {p:.3f} over {len(cells)} cells")
    assert p > 1e-3


@pytest.mark.parametrize("method", NETWORKS)
def test_eight_rows_of_stories260k_are_eight_single_rows(stories: Stories, method: str) -> None:
    fast = stories.fast[method]
    prompts = [
        f"{name} had a {thing}" for name in ("Tim", "Lily") for thing in ("dog", "red ball", "box", "very big tree")
    ]
    together = fast.generate(prompts, temperature=1.0, seed=5, max_new_tokens=40)
    single = [
        fast.generate(p, temperature=1.0, seed=5 + row, max_new_tokens=40).tokens[0] for row, p in enumerate(prompts)
    ]
    assert together.tokens == single
    assert 0 < together.statistics.accepted < together.statistics.drafted
