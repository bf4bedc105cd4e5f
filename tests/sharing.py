"""Run by the tests as a program of its own, under torchrun: processes that share a target decode and train with it.

Usage: sharing.py MODEL_FOLDER decode OUT.json | train SETTINGS_JSON...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft.api.generation import SpeculativeModel, load
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.ranks import end_in_group
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 4, 11]]
TREE: dict[str, Any] = {"tree_depth": 2, "tree_top_k": 8, "tree_size": 20}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {**TREE, "max_new_tokens": 12},
    "sampled": {**TREE, "max_new_tokens": 12, "temperature": 1.0, "seed": 3, "coupling": "dice"},
    "seed": {"max_new_tokens": 12, "temperature": 1.0, "seed": 3},
    "clocked": {"max_new_tokens": 12, "controller": "calibrated"},
    "auto": {"max_new_tokens": 12, "tree_size": "auto"},
    "unseeded": {"max_new_tokens": 12, "temperature": 1.0},
}
"""The last two depend on a clock and on the system's random numbers, which differ between processes."""


def written(folder: Path, tokenizer: Any, tied: bool = False) -> Path:
    """Write a random Llama that two or four processes can share; its head may be its embedding."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[16:] *= 0.1  # few tokens are likely, so that drafts are accepted
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def networks(target: Target) -> dict[str, Any]:
    """Random drafters, the same in every process."""
    torch.manual_seed(1)
    return {
        "fspad": FeatureHead(feature_head_config(target)),
        "eesd": ExitLayer.beginning(target.model, ExitLayerConfig(1)),
    }


def decoded(folder: str | Path, **loading: Any) -> dict[str, Any]:
    """Decode in every way with every drafter: tokens, whether they were drafted, and tokens of two streams."""
    model = load(folder, method="none", dtype="float32", **loading)
    found = {}
    for name, network in {"none": None, "prompt-lookup": None, **networks(model.target)}.items():
        method = name if network is None else None
        own = SpeculativeModel(model.target, load_drafter_for(model.target, network, method=method))
        for way, settings in WAYS.items():
            shaped = {key for key in settings if key.startswith("tree") or key == "controller"}
            if name == "none" and shaped:
                settings = {key: value for key, value in settings.items() if key not in shaped}
            output = own.generate(PROMPTS, **settings)
            found[f"{name} {way}"] = [output.tokens, output.accepted]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, work, *rest = sys.argv[1:]
    if work == "decode":
        Path(f"{rest[0]}.{os.environ['RANK']}").write_text(json.dumps(decoded(folder, tp_plan="auto")))
    else:
        target = load_target(folder, dtype="float32", backend="eager", tp_plan="auto", whole_ends=True)
        for settings in map(json.loads, rest):
            train(target, DrafterConfig(**settings))
    end_in_group(0)
