"""Folders for tests of the command line and the examples: a tiny chat model, drafters for it and for others, data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft.methods.checkpoint import save_drafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from training.tiny import byte_tokenizer, write_chats

CONTEXT = 1024
VOCAB = 260
WIDTH = 16


@dataclass(frozen=True)
class Folders:
    """What the tests give to the command line."""

    target: str
    """A random chat Llama, 2 layers x 16."""
    drafter: str
    """A random FSPAD drafter for it."""
    eagle: str
    """A random EAGLE drafter for it."""
    wider: str
    """A drafter for a target of another hidden size."""
    larger_vocabulary: str
    """A drafter for a target of another vocabulary."""
    small_model: str
    """A smaller language model with the same tokenizer."""
    chats: Path
    """Twelve conversations."""


def make_folders(root: Path) -> Folders:
    """All of them below `root`."""
    return Folders(
        target=save_model(root / "target", layers=2),
        drafter=save_head(root / "drafter"),
        eagle=save_head(root / "eagle", feature_sampling=False, partial_alignment=False),
        wider=save_head(root / "wider", hidden_size=32),
        larger_vocabulary=save_head(root / "larger_vocabulary", vocab_size=300),
        small_model=save_model(root / "small", layers=1),
        chats=write_chats(root / "chats.jsonl", 12),
    )


def save_model(folder: Path, layers: int) -> str:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def save_head(folder: Path, **changes: int | bool | tuple[int, ...]) -> str:
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        head = FeatureHead(FeatureHeadConfig(**settings))  # type: ignore[arg-type]
    save_drafter(folder, head, target_id="tiny")
    return str(folder)


def write_lines(path: Path, *records: object) -> Path:
    """JSON lines; a text among the records stands as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
