"""One torch thread, the tiny target, and a folder of chats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import ExampleSet, tokenize
from outdraft.target.target import Target
from outdraft.training import feature_store

from .tiny import tiny_target, write_chats


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def target() -> Target:
    return tiny_target()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """26 chats: neither a multiple of the batches nor of the pieces used in the tests."""
    return write_chats(tmp_path / "chats.jsonl", 26)


@pytest.fixture
def examples(target: Target, chats: Path) -> ExampleSet:
    return tokenize(read_conversations(chats), target.tokenizer, 128)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of examples in every forward."""
    monkeypatch.setitem(feature_store.BATCH_TOKENS, "cpu", 400)
