"""A target whose layers lie in several places decodes what it decodes in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import sharing
from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.errors import UserError
from outdraft.target.cache import SlotCache
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train
from training.tiny import byte_tokenizer

PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharing.written(tmp_path_factory.mktemp("model"), byte_tokenizer())


@pytest.fixture(scope="module")
def spread(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    aside = tmp_path_factory.mktemp("offload")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=dict(PLACES), offload_folder=aside
    )


@pytest.mark.parametrize("name", ["none", "prompt-lookup", "fspad", "eesd"])
def test_layers_on_disk_give_the_same_tokens(folder: Path, spread: PreTrainedModel, name: str) -> None:
    whole = load_target(folder, dtype="float32", device="cpu", backend="eager")
    parts = load_target(spread, folder)
    assert parts.gathered_on == torch.device("cpu") and parts.backend == "eager"
    network = sharing.networks(whole).get(name)
    found = []
    for target in (whole, parts):
        method = name if network is None else None
        model = SpeculativeModel(target, load_drafter_for(target, network, method=method, backend="eager"))
        ways = [way for way in ("greedy", "sampled", "seed") if name != "none" or way == "seed"]
        found.append([model.generate(sharing.PROMPTS, **sharing.WAYS[way]).tokens for way in ways])
    assert found[0] == found[1]


def test_a_reduced_vocabulary_reads_a_head_on_disk(folder: Path, spread: PreTrainedModel) -> None:
    whole, parts = load_target(folder, dtype="float32", device="cpu", backend="eager"), load_target(spread)
    kept, features = torch.tensor([2, 5, 9]), torch.randn(1, 4, 32)
    both = [DraftVocabulary(kept, target).head(features) for target in (whole, parts)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(whole.embedding_rows, parts.embedding_rows)


def test_layers_in_several_places_train_no_drafter(spread: PreTrainedModel, tmp_path: Path) -> None:
    config = DrafterConfig(data=tmp_path / "chats.jsonl", output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="--tp"):
        train(load_target(spread), config)


def test_every_device_has_cache_buffers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outdraft.target.cache.sent", lambda numbers, device: torch.tensor(numbers, device=device))
    cache = SlotCache(2, 1, 8)
    places = ["cpu", "cpu", "meta"]
    cache.reserve(3, "cpu")
    for layer, place in enumerate(places):
        states: Any = torch.ones(2, 2, 3, 4, device=place)
        keys, values = cache.update(states, states, layer)
        assert keys.device.type == values.device.type == place and keys.shape == (2, 2, 3, 4)
    cache.commit([[0, 2], [1]])
    cache.reserve(1, "cpu")  # rows of two lengths, whose slots every device is told
    for layer, place in enumerate(places):
        states = torch.full((2, 2, 1, 4), 2.0, device=place)
        keys, _ = cache.update(states, states, layer)
        assert keys.device.type == place
    assert cache.lengths == [2, 1]
