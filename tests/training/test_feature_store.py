"""The store of what the target says: it is the target's own, of a known size, and found by what it holds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import ExampleSet, tokenize
from outdraft.errors import UserError
from outdraft.losses.objective import Reading, TrainingExamples, collate, reader_of, weights_fingerprint
from outdraft.target.target import Target
from outdraft.training.feature_store import FeatureStore, batches_of_like_length

from .tiny import tiny_target

TOP_K = 20
READINGS: dict[str, Callable[[Target], Reading]] = {
    "features": Reading,
    "exit": lambda target: Reading(target, exit_layer=1),
    "taps": lambda target: Reading(target, [1, 3]),
    "packed": lambda target: Reading(reader_of(target)),
}


def store_of(folder: Path, target: Target, top_k: int = TOP_K) -> FeatureStore:
    return FeatureStore(folder, target, Reading(target), top_k)


@pytest.mark.parametrize("kind", READINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_the_target_says(
    chats: Path, tmp_path: Path, dtype: torch.dtype, kind: str, small_batches: None
) -> None:
    target = tiny_target(dtype, layers=4)
    examples = tokenize(read_conversations(chats), target.tokenizer, 128)
    store = FeatureStore(tmp_path, target, READINGS[kind](target), TOP_K)
    assert len(store.missing(examples)) == 26
    store.build(examples)
    store = FeatureStore(tmp_path, target, READINGS[kind](target), TOP_K)
    assert store.missing(examples) == []
    exact = dtype == torch.float32
    for example in (examples[0], examples[13], examples[25]):
        ids = example.input_ids.long()[None]
        with torch.no_grad():
            out = target.model(ids, use_cache=False, output_hidden_states=True)
        last, hidden = out.hidden_states[-1][0], [state[0] for state in out.hidden_states]
        direct = {"exit": [hidden[1], last], "taps": [last, hidden[1], hidden[3]]}.get(kind, [last])
        rows, said = store[example]
        assert rows.dtype == dtype
        torch.testing.assert_close(rows, torch.cat(direct, dim=-1), atol=1e-5 if exact else 0.15, rtol=0.05)
        law = out.logits[0, :-1].float().softmax(-1)[example.loss_mask[1:]]
        assert said.ids.shape == (int(example.loss_mask[1:].sum()), TOP_K)
        torch.testing.assert_close(said.probs, law.gather(1, said.ids), atol=1e-7 if exact else 0.05, rtol=1e-3)
        best = law.topk(TOP_K).values
        torch.testing.assert_close(said.probs.sum(-1), best.sum(-1), atol=1e-5 if exact else 0.05, rtol=1e-3)
        assert (said.probs[:, :-1] >= said.probs[:, 1:]).all()


def test_padding_repeats_the_example(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    reading = Reading(target)
    monkeypatch.setattr(reading, "_run", lambda ids: seen.append(ids) or torch.zeros(*ids.shape, reading.width))
    reading(torch.tensor([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]), torch.tensor([5, 2]))
    assert seen[0].tolist() == [[5, 6, 7, 8, 9], [3, 4, 3, 4, 3]]


def test_its_size_is_known_beforehand(target: Target, examples: ExampleSet, tmp_path: Path) -> None:
    store = store_of(tmp_path, target)
    responses = sum(int(example.loss_mask[1:].sum()) for example in examples.examples)
    assert store.nbytes(examples.examples) == examples.tokens * 16 * 4 + responses * TOP_K * (4 + 2)
    store.build(examples)
    assert sum(file.stat().st_size for file in store.folder.glob("*.bin")) == store.nbytes(examples.examples)


def test_a_batch_has_the_teacher_of_its_predicting_positions_row_by_row(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    store = store_of(tmp_path, target)
    store.build(examples)
    data = TrainingExamples(examples, store.__getitem__)
    batch = collate([data[index] for index in (3, 4)])
    assert batch["features"].shape == (*batch["input_ids"].shape, 16)
    assert torch.equal(batch["teacher_ids"], torch.cat([store[examples[index]][1].ids for index in (3, 4)]))
    assert len(batch["teacher_ids"]) == int(batch["loss_mask"][:, 1:].sum())


def test_without_a_teacher_features_alone_are_kept(target: Target, examples: ExampleSet, tmp_path: Path) -> None:
    store = store_of(tmp_path, target, top_k=0)
    store.build(examples)
    rows, said = store[examples[0]]
    assert said.ids.shape[1] == 0 and rows.shape == (len(examples[0]), 16)
    batch = collate([TrainingExamples(examples, store.__getitem__)[0]])
    assert "features" in batch and "teacher_ids" not in batch
    assert (store.folder / "teacher_probs.bin").stat().st_size == 0


def test_other_weights_another_reading_and_another_teacher_get_their_own(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    keys = {store_of(tmp_path, target, top_k).key for top_k in (0, 5, 20)}
    keys.add(FeatureStore(tmp_path, target, Reading(target, exit_layer=1), 20).key)
    keys.add(store_of(tmp_path, tiny_target(torch.bfloat16)).key)
    assert store_of(tmp_path, tiny_target()).key in keys
    assert store_of(tmp_path, target, 500).key == store_of(tmp_path, target, 260).key  # more than there are
    with torch.no_grad():
        target.model.model.norm.weight[3] += 0.01
    keys.add(store_of(tmp_path, target).key)
    assert len(keys) == 6


def test_readings_go_by_the_names_under_which_stores_were_made_before(tmp_path: Path) -> None:
    target = tiny_target(layers=4)
    names = [Reading(target).name, Reading(target, (1, 3)).name, Reading(target, exit_layer=2).name]
    assert names == ["", "features and layers 1, 3", "layer 2 and features"]
    parts = [weights_fingerprint(target), "torch.float32", names[1], "20"]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    assert FeatureStore(tmp_path, target, Reading(target, (1, 3)), 20).key == key


def test_a_store_over_the_budget_is_refused_with_what_is_enough_before_anything_is_written(
    target: Target, examples: ExampleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, target)
    monkeypatch.setattr(FeatureStore, "nbytes", lambda self, examples: 37_214_000_000 // 26 * len(examples))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e12))
    with pytest.raises(UserError) as raised:
        store.check_budget(examples, 0.1)
    assert str(raised.value) == (
        "the features of these examples need 37.21 GB, more than feature_cache_gb = 0.1; "
        "raise it to 37.22, or use features = online"
    )
    store.check_budget(examples, 37.22)
    assert list(tmp_path.glob("*/*.bin")) == []


def test_a_disk_with_too_little_left_is_named_and_what_is_there_already_needs_none(
    target: Target, examples: ExampleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    store = store_of(tmp_path / "not" / "there", target)
    with pytest.raises(UserError) as raised:
        store.check_budget(examples, 50)
    said = str(raised.value)
    assert (
        f"only 0.00 GB are free under {tmp_path}; set feature_cache_dir to a larger disk" in said and "\n" not in said
    )
    store.build(examples)
    store.check_budget(examples, 50)


def test_batches_hold_every_example_once_and_no_more_tokens_than_allowed(examples: ExampleSet) -> None:
    batches = list(batches_of_like_length(examples.examples, 300))
    assert sorted(map(id, examples.examples)) == sorted(id(one) for batch in batches for one in batch)
    assert all(len(batch) * max(map(len, batch)) <= 300 for batch in batches) and len(batches) < 26
    alone = list(batches_of_like_length(examples.examples[:3], 1))
    assert [len(batch) for batch in alone] == [1, 1, 1]
