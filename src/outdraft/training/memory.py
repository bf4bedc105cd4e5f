"""The memory that each of several devices needs, for decoding with a target and for training a drafter for it.

It is counted from the target's configuration alone, on the meta device. Nothing is loaded, and no weights need be
there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from outdraft.errors import UserError, first_line
from outdraft.methods.fspad.beginning import inner_width
from outdraft.methods.registry import method_called
from outdraft.target.named import base_of, place_of
from outdraft.target.ranks import indivisible
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig

GIGABYTE = 1e9

DEVICES = (1, 2, 4, 8)

CACHED = 1000
"""The tokens of which the cache is counted."""

PARTED = ("colwise", "rowwise", "packed_colwise", "packed_rowwise", "embedding_rowwise", "grouped_gemm")
"""The beginnings of the names that `transformers` has for layers of which every process holds a part."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that each of so many devices needs, in bytes."""

    devices: int
    weights: int
    """The target's weights."""
    cache: int
    """Keys and values of 1,000 tokens."""
    drafter: int
    """The drafter beside the target, whole on every device."""
    training: int
    """All of a training run: the target, the drafter in float32 with gradients and AdamW's moments, a batch."""


def device_memory(source: str | Path, config: DrafterConfig, dtype: torch.dtype = torch.bfloat16) -> list[DeviceMemory]:
    """Count the memory for 1, 2, 4 and 8 devices that share a target by tensor parallelism.

    Numbers of devices that cannot share it are left out; all are if the drafter's size depends on the target's weights.

    Args:
        source: folder or hub id of the target; a folder may hold its config.json alone.
        config: the drafter's settings.
        dtype: precision of the target.

    Raises:
        UserError: the configuration cannot be read, or the model cannot be a target.
    """
    path = str(place_of(base_of(source) or source).path)
    try:
        found = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, dtype=dtype)
    except Exception as error:  # libraries under here have exceptions of their own
        raise UserError(f"the model '{path}' cannot be read: {first_line(error)}") from error
    with torch.device("meta"):
        target = Target(model)
        config = config.with_preset(target.num_parameters)
        exit_layer = {"exit_layer": max(1, target.num_layers // 4)} if config.exit_layer == "auto" else {}
        try:
            network = method_called(config.method).new_network(target, config.model_copy(update=exit_layer))
        except RuntimeError:  # it begins from the target's own outputs, which weights that are nowhere do not give
            return []
    drafter = sum(weight.numel() for weight in network.parameters())
    text, width = target.config, dtype.itemsize
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or target.hidden_size // (
        getattr(text, "num_attention_heads", None) or 1
    )
    counted = []
    for devices in DEVICES:
        if devices > 1 and (indivisible(text, devices) or not model.tp_plan):
            continue
        own, ends = _weights(model, devices)
        tokens = config.batch_size // config.gradient_accumulation_steps * min(config.max_length, target.context_length)
        reading = 8 * width * tokens * target.hidden_size  # of its width, a forward of the target holds some eight
        counted.append(
            DeviceMemory(
                devices,
                own,
                CACHED * 2 * width * target.num_layers * heads * head_dim // devices,
                width * drafter,
                own + ends + reading + drafting_bytes(target, config, drafter, tokens),
            )
        )
    return counted


def drafting_bytes(target: Target, config: DrafterConfig, drafter: int, tokens: int) -> int:
    """Return the bytes that training takes beside the target: drafter with gradients and AdamW's moments, a piece's
    activations, and a chunk's logits.

    Args:
        target: the model that the drafter is for.
        config: the settings with their preset filled in.
        drafter: parameters of the drafter.
        tokens: tokens of a piece, padding included.
    """
    # Every token has some twenty tensors of width d (inputs, noise, residuals, p, r, gradients) and eight of width i.
    inner = config.intermediate_size or inner_width(target)
    activations = 4 * tokens * (20 * target.hidden_size + 8 * inner)
    reduced = config.draft_vocabulary_for(target.vocab_size) if config.teacher_top_k else None
    logits = 4 * 4 * min(tokens, config.loss_chunk_size) * (reduced or target.vocab_size)
    return 16 * drafter + activations + logits


def _weights(model: Any, devices: int) -> tuple[int, int]:
    """Return the bytes of one device's part of the weights, and how many more it holds in training, where embedding and
    output layer are whole."""
    own = ends = 0
    outer = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, weight in model.named_parameters():
        general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = model.tp_plan.get(general) or model.tp_plan.get(general.rpartition(".")[0]) or ""
        part = weight.nbytes // devices if style.startswith(PARTED) else weight.nbytes
        own += part
        ends += weight.nbytes - part if id(weight) in outer else 0
    return own, ends


def memory_table(counted: Sequence[DeviceMemory], method: str) -> Table:
    """Make a table of the memory of each device."""
    table = Table(title=f"GB on each device that shares the target (--tp), with a drafter of method {method}")
    for name in ("devices", "weights", "cache of 1,000 tokens", "drafter", "decoding", "training the drafter"):
        table.add_column(name, justify="right")
    for one in counted:
        parts = (one.weights, one.cache, one.drafter, one.weights + one.cache + one.drafter, one.training)
        table.add_row(str(one.devices), *(f"{part / GIGABYTE:.2f}" for part in parts))
    return table
