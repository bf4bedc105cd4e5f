"""Models and prompts for scale curves: trained ones as they are, and ones of random weights in any shape.

Knows how they are made; what is measured of them is in `scale.py`.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from outdraft.api.loading import load_drafter_for, load_target, resolve_device, resolve_dtype
from outdraft.api.prompts import encode, read_prompts
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.reference import load_prompts
from outdraft.target.target import Target

PUBLISHED = {
    "8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Llama 3's."""
SMALL_VOCABULARY = 4096
RANDOM_PROMPT = 128
"""Tokens before what a target of random weights decodes."""


@dataclass(frozen=True)
class Models:
    """A target, its drafter and prompts for them."""

    target: Target
    drafter: Drafter
    prompts: list[list[int]]

    @classmethod
    def load(cls, given: argparse.Namespace) -> Models:
        """Those of `--model` and `--draft-model`."""
        target = load_target(given.model, dtype=given.dtype, device=given.device, backend=given.backend)
        drafter = load_drafter_for(target, given.draft_model, method=given.method, backend=given.backend)
        if drafter is None:
            raise UserError("the curves compare a drafter with plain decoding; give --draft-model or another --method")
        prompts = encode(read_prompts(given.data, None) if given.data else load_prompts("heldout"), target)
        fitting = [ids for ids in prompts if len(ids) + given.tokens < target.context_length]
        if not fitting:
            raise UserError(f"no prompt leaves room for {given.tokens} tokens; give a smaller --tokens or other --data")
        return cls(target, drafter, fitting)

    @classmethod
    def random(cls, shape: str, given: argparse.Namespace) -> Models:
        """Of random weights in a shape such as `12x768`, `8b` or `70b:8`, with an FSPAD drafter of random weights."""
        config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=shape.partition(":")[0] not in PUBLISHED)
        for name, size in sizes_of(shape).items():
            setattr(config, name, size)
        config.head_dim = config.hidden_size // config.num_attention_heads
        device = resolve_device(given.device)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(given.dtype, device))
        target = load_target(model, backend=given.backend)
        head = FeatureHeadConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
        )
        with torch.device(device):
            drafter = load_drafter_for(target, FeatureHead(head), backend=given.backend)
        assert drafter is not None
        dice = random.Random(0)
        prompts = [dice.choices(range(config.vocab_size), k=RANDOM_PROMPT) for _ in range(max(1, given.turns))]
        return cls(target, drafter, prompts)

    def long(self, length: int, count: int) -> list[list[int]]:
        """So many prompts of this length: one after the other of the prompts, cut at the front."""
        found = []
        for first in range(count):
            ids: list[int] = []
            place = first
            while len(ids) < length:
                ids = self.prompts[place % len(self.prompts)] + ids
                place += 1
            found.append(ids[-length:])
        return found


def sizes_of(shape: str) -> dict[str, int]:
    """Of a Llama in this shape, by the names of its configuration.

    Raises:
        UserError: it is none.
    """
    name, _, fewer = shape.partition(":")
    layers = width = 0
    try:
        if name in PUBLISHED:
            layers = int(fewer or PUBLISHED[name]["num_hidden_layers"])
        else:
            layers, width = (int(part) for part in shape.split("x"))
    except ValueError:
        layers = 0
    if layers >= 1 and name in PUBLISHED:
        return {**PUBLISHED[name], "num_hidden_layers": layers}
    if layers < 1 or width < 64 or width % 64:
        raise UserError(f"'{shape}' is no shape; write layers x width (of 64s) such as 12x768, or 8b, 70b, 70b:8")
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "vocab_size": SMALL_VOCABULARY,
    }
