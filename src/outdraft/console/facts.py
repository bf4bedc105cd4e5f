"""What a model or drafter folder is and what it can do here, without loading a model's weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from outdraft.api.loading import first_line, resolve_device
from outdraft.core.shape import GPU_TREE, GREEDY_CHAIN
from outdraft.drafting.folder import is_eagle3, is_hub_id, not_on_hub
from outdraft.drafting.run_folder import unfinished
from outdraft.errors import UserError
from outdraft.evaluation.environment import versions
from outdraft.methods.checkpoint import load_drafter, own_method
from outdraft.methods.eagle3.folder import Eagle3Checkpoint, load_eagle3
from outdraft.methods.eesd.folder import ExitFolder, read_exit_folder
from outdraft.methods.medusa.folder import MedusaCheckpoint, load_medusa
from outdraft.target.backends import default_backend, default_dtype
from outdraft.target.gguf_file import record_in
from outdraft.target.named import place_of
from outdraft.target.target import refuse_unfit
from outdraft.target.wrapped import base_of

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
BEYOND_THE_PAPER = ("tap_layers", "state_norm", "draft_vocab_size")
"""Settings of a feature head that are named only where they are not the paper's."""

EAGLE3_SWITCHES = (
    "draft_vocab_size",
    "tap_norms",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "head_norms",
)
"""Likewise of EAGLE-3's."""


def describe(path: str, device: str | None = None) -> dict[str, Any]:
    """Facts about a folder, GGUF file, name or hub id; of a drafter when it is one.

    Raises:
        UserError: nothing there that can be read.
    """
    asked, path = path, str(place_of(path).path)
    folder = Path(path).expanduser()
    if not is_hub_id(path):
        _check(folder)
    facts = _drafter(folder) if folder.is_dir() and _is_drafter(folder) else _model(path, folder, asked)
    place = resolve_device(device)
    dtype = default_dtype(place)
    tree = GREEDY_CHAIN if place.type == "cpu" else GPU_TREE
    return {
        **facts,
        "here": {
            "device": str(place),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": default_backend(place, dtype),
            "tree": {"depth": tree.depth, "top_k": tree.top_k, "size": tree.size},
        },
        "versions": versions(),
    }


def table(facts: dict[str, Any]) -> Table:
    """The same for people."""
    built = Table(show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if not isinstance(entry, dict | list))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = f"{value:.2f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            built.add_row(name.replace("_", " "), str(value))
    return built


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"no folder at '{folder}'; check the path")
    if (base := base_of(folder)) is not None:
        raise UserError(f"'{folder}' is an adapter for '{base}', whose facts it shares; ask for those of '{base}'")
    if not (folder / "config.json").is_file():
        raise UserError(
            unfinished(folder)
            or f"'{folder}' has no config.json, so it is neither a model nor a drafter; check the path"
        )


def _is_drafter(folder: Path) -> bool:
    """Our own folders and EAGLE-3's say so; other official ones are a one-layer config without a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"'{folder / 'config.json'}' is not JSON; copy or download it again") from None
    if "outdraft_version" in config or is_eagle3(config):
        return True
    return config.get("num_hidden_layers") == 1 and not any((folder / name).exists() for name in TOKENIZERS)


def _drafter(folder: Path) -> dict[str, Any]:
    method = own_method(folder)
    if method == "eesd":
        return _exit_layer(read_exit_folder(folder))
    if method == "medusa":
        return _medusa(load_medusa(folder))
    if method == "eagle3":
        return _eagle3(load_eagle3(folder))
    loaded = load_drafter(folder)
    config = loaded.head.config
    return _facts(
        loaded.head.method,
        loaded.layout,
        _size(loaded.head.parameters()),
        loaded.target_id,
        {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size},
        loaded.training,
        feature_sampling=config.feature_sampling,
        partial_alignment=config.partial_alignment,
        context=config.max_position_embeddings,
        **{name: value for name in BEYOND_THE_PAPER if (value := getattr(config, name))},
    )


def _exit_layer(found: ExitFolder) -> dict[str, Any]:
    return _facts(
        "eesd",
        "outdraft",
        _size(found.tensors.values()),
        found.target.get("id"),
        {name: value for name, value in found.target.items() if name != "id"},
        found.training,
        exit_layer=found.config.exit_layer,
        own_head=found.config.own_head,
    )


def _medusa(loaded: MedusaCheckpoint) -> dict[str, Any]:
    config = loaded.heads.config
    return _facts(
        "medusa",
        "outdraft",
        _size(loaded.heads.parameters()),
        loaded.target.get("id"),
        {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size},
        loaded.training,
        heads=config.num_heads,
        layers_of_a_head=config.num_layers,
        own_head=config.own_head,
    )


def _eagle3(loaded: Eagle3Checkpoint) -> dict[str, Any]:
    config = loaded.head.config
    ids = ", ".join(map(str, config.tap_ids))
    return _facts(
        "eagle3",
        loaded.layout,
        _size(loaded.head.parameters()),
        loaded.target_id,
        loaded.head.fits,
        {},
        reads=f"the {config.tap_unit} of layers {ids} (counted from 0)" if ids else "layers 2, L/2 and L-3 of L",
        **{name: value for name in EAGLE3_SWITCHES if (value := getattr(config, name))},
        own_head=config.own_head,
        own_embedding=loaded.head.embed_tokens is not None,
        context=config.max_position_embeddings,
    )


def _facts(
    method: str, layout: str, parameters: int, target: str | None, fits: dict[str, Any], training: Any, **own: Any
) -> dict[str, Any]:
    """What is said of every drafter, with its method's own facts."""
    return {
        "kind": "drafter",
        "method": method,
        "layout": layout,
        "parameters": parameters,
        "trained_for": target,
        "fits_targets_with": fits,
        **own,
        "tau_at_end_of_training": (training.get("tau") or {}).get("tau"),
    }


def _size(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _model(path: str, folder: Path, asked: str) -> dict[str, Any]:
    _check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # libraries under here have exceptions of their own
        if isinstance(error, OSError) and is_hub_id(path):
            raise not_on_hub(path, error) from error
        raise UserError(f"the model '{path}' cannot be read: {first_line(error)}") from error
    reason = None
    try:
        refuse_unfit(model)
    except UserError as error:
        reason = str(error)
    text = config.get_text_config()
    made_from = record_in(folder) or {}
    return {
        "kind": "model",
        **({"file": made_from["file"], "weights": f"{made_from['weights']}, as bfloat16"} if made_from else {}),
        "family": config.model_type,
        "class": type(model).__name__,
        "parameters": _size(model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "context": getattr(text, "max_position_embeddings", None),
        "tokenizer": any((folder / name).exists() for name in TOKENIZERS) if folder.is_dir() else None,
        "chat_template": _has_chat_template(folder) if folder.is_dir() else None,
        "verifies_trees": reason is None,
        "why_not": reason,
        "memory": _memory(text, _size(model.parameters())),
        "what_pays_here": f"outdraft advise --model {shlex.quote(asked)}" if reason is None else None,
    }


def _memory(text: Any, parameters: int) -> str:
    """Of decoding in 16 bits: the weights, and the cache where the config has the usual words for its shape."""
    said = f"{2 * parameters / 1e9:.2f} GB of weights in 16 bits"
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return said
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    token = 2 * 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    return f"{said}, {token / 1e3:.1f} MB of cache for 1,000 tokens"


def _check_weights(folder: Path) -> None:
    """Open every weight file's header, which also compares its size."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"'{file}' is damaged ({first_line(error)}); copy or download it again") from error


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except OSError:
        return False
