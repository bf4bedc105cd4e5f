"""Drafter folders: our own, and the official FSPAD and EAGLE-1/2 ones as they are.

A folder is `config.json` and weights. Our own is written whole or not at all; official ones are recognised from the
names and shapes of their tensors (`official.py`). It knows how a `FeatureHead` is put together from tensors, and
nothing of targets, decoding or training beyond the record that it carries along.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import outdraft
from outdraft.drafters.feature_head import FeatureHead, FeatureHeadConfig
from outdraft.drafters.folder import (
    CONFIG,
    WEIGHTS,
    check_value,
    find_folder,
    local_folder,
    read_config,
    read_weights,
    shape_of,
    some,
)
from outdraft.drafters.official import REMADE, official_config, official_name, our_name
from outdraft.errors import UserError, first_line

Layout = Literal["outdraft", "fspad", "eagle"]


@dataclass
class DrafterCheckpoint:
    """A loaded drafter and what its folder says about it."""

    head: FeatureHead
    target_id: str | None
    """The target it was trained for; official folders do not say."""
    training: dict[str, Any] = field(default_factory=dict)
    """The training's own record: settings, data, metrics."""
    layout: Layout = "outdraft"
    target: dict[str, Any] = field(default_factory=dict)
    """Facts about the target: id, hidden_size, vocab_size and whatever else was saved."""


# --- writing ---------------------------------------------------------------------------------------------------


def save_drafter(
    folder: str | Path,
    head: FeatureHead,
    *,
    target_id: str,
    training: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
) -> Path:
    """Write a drafter's folder; each file is written beside and renamed, a new folder as a whole.

    Args:
        folder: made when absent; other files in it stay.
        head: the drafter, in the precision in which it shall be stored.
        target_id: hub name or folder of its target.
        training: a record that is kept with it, anything that JSON can say.
        target: further facts about the target, `num_hidden_layers` for one.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    config = {
        "method": head.method,
        "outdraft_version": outdraft.__version__,
        **asdict(head.config),
        "target": {
            "id": target_id,
            "hidden_size": head.config.hidden_size,
            "vocab_size": head.config.vocab_size,
            **(target or {}),
        },
        "training": dict(training or {}),
    }
    text = json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = (folder if folder.exists() else folder.parent) / f".{folder.name}.{os.getpid()}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            (beside / CONFIG).write_text(text, encoding="utf-8")
            # safetensors makes files that only their owner can read, which breaks folders that are shared.
            (beside / WEIGHTS).chmod(stat.S_IMODE((beside / CONFIG).stat().st_mode))
            if folder.exists():
                for name in (WEIGHTS, CONFIG):
                    os.replace(beside / name, folder / name)
            else:
                os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write a drafter to '{folder}' ({first_line(error)}); choose another folder") from error
    return folder


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a drafter's folder to the Hugging Face Hub, creating the repository when absent.

    Returns:
        The address of the commit.

    Raises:
        UserError: not a drafter's folder, or the Hub refuses.
    """
    import huggingface_hub

    folder = local_folder(Path(folder).expanduser())
    read_config(folder)
    try:
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            allow_patterns=[CONFIG, WEIGHTS, "README.md", "LICENSE*", "provenance.json"],
            commit_message=message or f"Drafter written by outdraft {outdraft.__version__}",
        )
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(f"cannot upload to '{repo_id}' ({first_line(error)}); log in with `hf auth login`") from error
    return str(commit.commit_url)


# --- reading ---------------------------------------------------------------------------------------------------


def load_drafter(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> DrafterCheckpoint:
    """A drafter from our own folder or an official FSPAD or EAGLE-1/2 one, here or on the Hugging Face Hub.

    Args:
        folder_or_hub_id: a folder, else a hub id.
        dtype: precision of the weights; as stored when None.
        device: where they go.
        revision: of a hub repository.

    Raises:
        UserError: nothing there, no drafter, or a damaged one, with the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    file, tensors = read_weights(folder)
    own = "outdraft_version" in config and "method" in config
    head_config = _own_config(config, folder) if own else official_config(config, tensors, folder)
    names = {} if own else {our_name(name): name for name in tensors if not REMADE.search(name)}
    head = _build(head_config, {name: tensors[names.get(name, name)] for name in names or tensors}, names, file)
    if head.embed_tokens is not None:
        head.embed_tokens.requires_grad_(False)
    head.to(device=device, dtype=dtype or head.fusion.fc.weight.dtype)
    target = config.get("target") if own and isinstance(config.get("target"), dict) else {}
    training = config.get("training") if own and isinstance(config.get("training"), dict) else {}
    layout: Layout = "outdraft" if own else "eagle" if head.method == "eagle" else "fspad"
    return DrafterCheckpoint(head, (target or {}).get("id"), training or {}, layout, target or {})


def _build(config: FeatureHeadConfig, tensors: dict[str, Tensor], names: Mapping[str, str], file: str) -> FeatureHead:
    """A head with these weights, or the error that says which do not fit; `names` are those of the file."""
    with torch.device("meta"):  # no random start, which would be overwritten
        head = FeatureHead(config)
        if "embed_tokens.weight" in tensors:
            head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    wanted = head.state_dict()
    shown = {name: official_name(name, config) if names else name for name in wanted}
    if missing := [shown[name] for name in wanted if name not in tensors]:
        raise UserError(f"{file} lacks {some(missing)}; it is incomplete or no drafter, download or train it again")
    for name, place in wanted.items():
        if tensors[name].shape != place.shape:
            raise UserError(
                f"{file}: {shown[name]} is {shape_of(tensors[name])} where config.json asks for {shape_of(place)}; "
                "put the config.json beside it that belongs to it"
            )
        if not tensors[name].is_floating_point():
            raise UserError(
                f"{file}: {shown[name]} holds {tensors[name].dtype}; only unquantised drafters can be loaded"
            )
    if unknown := [names.get(name, name) for name in tensors if name not in wanted]:
        warnings.warn(
            f"{file} holds {some(unknown)}, which this drafter has no place for; left out, so drafts may be poor "
            "(what is decoded stays exact)",
            stacklevel=3,
        )
    # Copies: what was read may be mapped from the file, which must be free to change.
    dtype = tensors["fusion.fc.weight"].dtype
    weights = {name: tensors[name].to(dtype, copy=True) for name in wanted}
    head.load_state_dict(weights, assign=True)
    return head


# --- our own layout ----------------------------------------------------------------------------------------------


def _own_config(config: dict[str, Any], folder: Path) -> FeatureHeadConfig:
    method = config.get("method")
    if method not in ("fspad", "eagle"):
        raise UserError(f"'{folder}' holds a drafter of method '{method}', not fspad or eagle; give --method {method}")
    known = {f.name: f for f in fields(FeatureHeadConfig)}
    other = {"method", "outdraft_version", "target", "training"}
    if unknown := sorted(set(config) - set(known) - other):
        version = config["outdraft_version"]
        warnings.warn(
            f"'{folder}' was written by outdraft {version} and has settings unknown here: {some(unknown)}; ignored",
            stacklevel=3,
        )
    required = [name for name, f in known.items() if f.default is MISSING]
    if missing := [name for name in required if name not in config]:
        raise UserError(f"'{folder / CONFIG}' lacks {some(missing)}; it is incomplete, copy or train it again")
    values = {name: config[name] for name in known if name in config}
    for name, value in values.items():
        default = known[name].default
        kind = (int,) if default is MISSING else (int, float) if isinstance(default, float) else (type(default),)
        check_value(name, value, kind, folder)
    return FeatureHeadConfig(**values)
