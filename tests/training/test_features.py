"""The feature cache: its size, its key, and that it can be killed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from outdraft.errors import UserError
from outdraft.target import Target
from outdraft.training.config import TrainingConfig
from outdraft.training.conversations import read_conversations
from outdraft.training.features import FeatureCache, TrainingExamples, collate, target_features
from outdraft.training.tokenization import ExampleSet, tokenize
from outdraft.training.train import train

from .tiny import tiny_target


@pytest.fixture
def examples(target: Target, chats: Path) -> ExampleSet:
    return tokenize(read_conversations(chats), target.tokenizer, 128)


def counted_forwards(target: Target, fail_at: int | None = None) -> list[int]:
    """Rows of every forward of `features` from now on."""
    forward, rows = target.features, []

    def counting(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if len(rows) == fail_at:
            raise KeyboardInterrupt
        rows.append(len(ids))
        return forward(ids, mask)

    target.features = counting  # type: ignore[method-assign]
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_are_the_targets(examples: ExampleSet, tmp_path: Path, dtype: torch.dtype) -> None:
    target = tiny_target(dtype)
    cache = FeatureCache(tmp_path, target, examples, 128)
    cache.build(batch_size=4)
    assert cache.complete and (cache.folder / "features.bin").stat().st_size == cache.nbytes
    assert cache.nbytes == examples.tokens * 16 * dtype.itemsize
    for index in (0, 13, 25):
        ids = examples[index].input_ids.long()[None]
        alone = target_features(target, ids, torch.tensor([ids.shape[1]]))[0]
        assert cache[index].dtype == dtype
        torch.testing.assert_close(cache[index], alone, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.05)
    batch = collate([TrainingExamples(examples, cache)[index] for index in (3, 4)])
    assert batch["features"].shape == (*batch["input_ids"].shape, 16)


def test_a_killed_build_goes_on_where_it_stopped(target: Target, examples: ExampleSet, tmp_path: Path) -> None:
    counted_forwards(target, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, target, examples, 128).build(batch_size=4)
    whole = tiny_target()
    again = FeatureCache(tmp_path, whole, examples, 128)
    assert again.done == 12 and not again.complete
    with pytest.raises(RuntimeError, match="not complete"):
        again[0]
    rows = counted_forwards(whole)
    again.build(batch_size=4)
    assert sum(rows) == 26 - 12
    undisturbed = FeatureCache(tmp_path / "other", tiny_target(), examples, 128)
    undisturbed.build(batch_size=4)
    assert all(torch.equal(again[i], undisturbed[i]) for i in range(26))


def test_a_complete_cache_is_reused_and_other_weights_get_their_own(examples: ExampleSet, tmp_path: Path) -> None:
    first = FeatureCache(tmp_path, tiny_target(), examples, 128)
    first.build(batch_size=8)
    target = tiny_target()
    rows = counted_forwards(target)
    second = FeatureCache(tmp_path, target, examples, 128)
    second.build(batch_size=8)
    assert second.key == first.key and rows == []
    with torch.no_grad():
        target.model.model.norm.weight[3] += 0.01
    assert FeatureCache(tmp_path, target, examples, 128).key != first.key
    assert FeatureCache(tmp_path, tiny_target(), examples, 64).key != first.key


def test_a_cache_over_the_budget_is_refused_with_its_size_before_anything_is_written(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path, target, examples, 128)
    examples.examples *= 10_000
    needed = cache.nbytes / 1e9
    with pytest.raises(UserError, match=rf"needs {needed:.2f} GB.*raise it to {needed:.2f}, or use features = online"):
        cache.check_budget(0.1)
    assert list(tmp_path.glob("*/features.bin")) == []


def test_training_on_cached_features_is_training_online(chats: Path, tmp_path: Path) -> None:
    metrics, said = [], io.StringIO()
    for features in ("online", "cached"):
        config = TrainingConfig(
            data=chats,
            output_dir=tmp_path / features,
            features=features,
            max_steps=6,
            batch_size=4,
            logging_steps=1,
            precision="fp32",
            report_to=["none"],
        )
        target = tiny_target()
        rows = counted_forwards(target)
        metrics.append(train(target, config, console=Console(file=said, width=200)).metrics)
        assert sum(rows) == {"online": 6 * 4, "cached": 26}[features]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-4)
    assert "feature cache: 0.000 GB for" in said.getvalue()
