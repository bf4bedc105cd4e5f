"""The facts of a model or drafter folder on this machine, without loading a model's weights."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open

from outdraft.api.loading import checked_folder, first_line, holds_tokenizer, resolve_device
from outdraft.core.shape import GPU_TREE, GREEDY_CHAIN
from outdraft.data.provenance import versions
from outdraft.drafting.run_folder import unfinished
from outdraft.errors import UserError
from outdraft.methods.checkpoint import count, method_of, recognised
from outdraft.target.backends import default_backend, default_dtype, unloaded, why_not_native
from outdraft.target.gguf_blocks import FOLDER
from outdraft.target.gguf_file import blocks_serve, record_in
from outdraft.target.named import base_of, is_hub_id, place_of
from outdraft.target.target import refuse_unfit
from outdraft.training.config import DrafterConfig
from outdraft.training.plan import DeviceMemory, described, device_memory, memory_table


def describe(path: str, device: str | None = None) -> dict[str, Any]:
    """Return facts about a folder, GGUF file, name or hub id of a model or drafter."""
    asked, path = path, str(place_of(path).path)
    folder = Path(path).expanduser()
    if not is_hub_id(path):
        if (base := base_of(folder)) is not None:
            raise UserError(f"'{folder}' is an adapter for '{base}', whose facts it shares; ask for those of '{base}'")
        if (begun := unfinished(folder)) is not None:
            raise UserError(begun)
        checked_folder(folder, "model or drafter")
    facts = _drafter(folder) if folder.is_dir() and _is_drafter(folder) else _model(path, folder, asked)
    place = resolve_device(device)
    dtype = default_dtype(place)
    why = "it is quantised" if facts.get("quantised_by") else why_not_native()
    tree = GREEDY_CHAIN if place.type == "cpu" else GPU_TREE
    return {
        **facts,
        "here": {
            "device": str(place),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": "eager" if facts.get("quantised_by") else default_backend(place, dtype),
            **({} if place.type != "cpu" or why is None else {"not_native_because": why}),
            "tree": {"depth": tree.depth, "top_k": tree.top_k, "size": tree.size},
        },
        "versions": versions(),
    }


def tables(facts: dict[str, Any]) -> list[Table]:
    """Make the tables of the facts for the terminal: all but the memory of several devices, and that."""
    devices = [DeviceMemory(**one) for one in facts.get("devices", ())]
    return [table(facts), *([memory_table(devices, "fspad")] if devices else [])]


def table(facts: dict[str, Any]) -> Table:
    built = Table(show_header=False)
    for name, value in facts.items():
        if name == "devices":  # a table of its own
            continue
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


def _is_drafter(folder: Path) -> bool:
    """Return True for outdraft's folders, those a method recognises, and one-layer configs without a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"'{folder / 'config.json'}' is not JSON; copy or download it again") from None
    if "outdraft_version" in config or recognised(config) is not None:
        return True
    return config.get("num_hidden_layers") == 1 and not holds_tokenizer(folder)


def _drafter(folder: Path) -> dict[str, Any]:
    found = method_of(folder).describe(folder)
    return {
        "kind": "drafter",
        "method": found.method,
        "layout": found.layout,
        "parameters": found.parameters,
        "trained_for": found.trained_for,
        "fits_targets_with": found.fits,
        **found.more,
        "tau_at_end_of_training": (found.training.get("tau") or {}).get("tau"),
    }


def _model(path: str, folder: Path, asked: str) -> dict[str, Any]:
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(f"{FOLDER}/*")]):
        # Reading a header also checks the file's size.
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"'{file}' is damaged ({first_line(error)}); copy or download it again") from error
    model = described(path)
    config, reason = model.config, None
    try:
        refuse_unfit(model)
    except UserError as error:
        reason = str(error)
    devices = device_memory(path, DrafterConfig(output_dir=Path())) if reason is None else []
    text, parameters = config.get_text_config(), count(model.parameters())
    memory = f"{2 * parameters / 1e9:.2f} GB of weights in 16 bits"
    if devices:
        memory += f", {devices[0].cache / 1e6:.1f} MB of cache for 1,000 tokens"
    quantised: Any = getattr(config, "quantization_config", None) or {}
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
    made_from = record_in(folder) or {}
    own = ""
    if (folder / FOLDER).is_dir():
        own = blocks_serve(unloaded(config, torch.bfloat16), made_from["weights"])
    own = f" (--quantize gguf: {own})" if own else ""
    return {
        "kind": "model",
        **({"file": made_from["file"], "weights": f"{made_from['weights']}, as bfloat16{own}"} if made_from else {}),
        **({"quantised_by": quantised.get("quant_method", "an unnamed quantiser")} if quantised else {}),
        "family": config.model_type,
        "class": type(model).__name__,
        "parameters": parameters,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "context": getattr(text, "max_position_embeddings", None),
        "tokenizer": holds_tokenizer(folder) if folder.is_dir() else None,
        "chat_template": _has_chat_template(folder) if folder.is_dir() else None,
        "verifies_trees": reason is None,
        "why_not": reason,
        "memory": memory,
        "devices": [asdict(one) for one in devices],
        "what_pays_here": f"outdraft advise --model {shlex.quote(asked)}" if reason is None else None,
    }


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except OSError:
        return False
