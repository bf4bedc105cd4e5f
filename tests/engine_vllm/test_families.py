"""Heads of every kind on targets of every family that they are exported for: vLLM's texts and counters are ours.

Random targets and heads of 32 tokens: drafts of no sense are right now and then, which is enough for a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engine import CHAIN, Engine, since

import outdraft
from models import tiny
from outdraft.export.export import export_drafter
from outdraft.methods.checkpoint import save_drafter
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIG = FeatureHeadConfig(**SHAPE, vocab_size=32)

CASES: dict[str, tuple[str, dict[str, bool], str]] = {
    "llama, EAGLE's head without bias": (
        "llama-gqa",
        {"feature_sampling": False, "partial_alignment": False, "fc_bias": False},
        "EagleLlamaForCausalLM",
    ),
    "mistral, FSPAD": ("mistral", {}, "EagleFspadLlamaForCausalLM"),
    "qwen2, FSPAD with attention biases, none in fc": (
        "qwen2",
        {"attention_bias": True, "fc_bias": False},
        "EagleFspadLlamaForCausalLM",
    ),
    "qwen3, feature sampling alone": ("qwen3", {"partial_alignment": False}, "EagleFspadLlamaForCausalLM"),
}


EAGLE3: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, EAGLE-3": ("llama-gqa", {}),
    "qwen3, EAGLE-3.1 of the whole vocabulary": (
        "qwen3",
        {"tap_norms": True, "norm_output": True, "draft_vocab_size": 0},
    ),
    "qwen2, other norms and two layers": (
        "qwen2",
        {"norm_before_fc": True, "norm_before_residual": True, "tap_ids": (2, 5), "num_taps": 2},
    ),
}


def saved(root: Path, family: str, changes: dict[str, bool]) -> tuple[str, str]:
    """Folders of a random target and of a random head whose drafts vary."""
    return saved_with(root, family, 3, lambda: FeatureHead(replace(CONFIG, **changes)))


def saved_eagle3(root: Path, family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """The same for EAGLE-3, on three layers of six, drafting all tokens but a few."""
    taps = {"target_hidden_size": 128, "tap_ids": (1, 3, 5), "tap_unit": "input", "draft_vocab_size": 28}

    def build() -> Eagle3Head:
        head = Eagle3Head(Eagle3Config(**{**SHAPE, "vocab_size": 32, **taps, **changes}))
        if head.draft_tokens is not None:
            head.draft_tokens += 2
        return head

    return saved_with(root, family, 6, build)


def saved_with(root: Path, family: str, layers: int, build: Callable[[], Any]) -> tuple[str, str]:
    model = tiny(family, dtype=torch.float32, num_hidden_layers=layers, **SHAPE)
    model.generation_config.eos_token_id = model.config.eos_token_id = 31
    model.save_pretrained(root / "target")
    torch.manual_seed(5)
    head = build()
    with torch.no_grad():
        for weight in head.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return str(root / "target"), str(save_drafter(root / "head", head, target_id="random"))


@pytest.mark.parametrize("case", CASES)
def test_texts_and_counters_are_ours(tmp_path: Path, case: str) -> None:
    family, changes, architecture = CASES[case]
    assert_texts_and_counters_are_ours(tmp_path, *saved(tmp_path, family, changes), architecture)


@pytest.mark.parametrize("case", EAGLE3)
def test_an_eagle3_heads_texts_and_counters_are_ours(tmp_path: Path, case: str) -> None:
    assert_texts_and_counters_are_ours(tmp_path, *saved_eagle3(tmp_path, *EAGLE3[case]), "LlamaForCausalLMEagle3")


def assert_texts_and_counters_are_ours(tmp_path: Path, target: str, head: str, architecture: str) -> None:
    exported = export_drafter(target, head, "vllm", tmp_path / "exported")
    assert exported.architecture == architecture
    prompts = [[1 + (7 * k + j) % 30 for j in range(5 + k)] for k in range(12)]
    model = outdraft.load(target, head, dtype="float32", backend="eager")
    ours = model.generate(prompts, max_new_tokens=64, num_speculative_tokens=CHAIN, prompt_lookup_min=0)
    with Engine(target, exported, skip_tokenizer_init=True) as engine:
        assert engine.greedy(prompts, 64) == ours.tokens
        counts = since({}, engine.counts())
    own = ours.statistics
    assert 0 < own.accepted < own.drafted
    assert counts == {
        "num_drafts": own.rounds,
        "num_draft_tokens": own.drafted,
        "num_accepted_tokens": own.accepted,
        "num_accepted_tokens_per_pos": [*own.accepted_at, *[0] * CHAIN][:CHAIN],
    }
