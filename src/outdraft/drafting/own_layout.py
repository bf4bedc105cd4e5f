"""Our own drafter folders: `config.json` and `model.safetensors`, the same for every kind of network.

A folder is written whole or not at all, its settings are read back into the network's dataclass, and its tensors are
compared with what the network asks for. Knows nothing of any network's meaning.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from outdraft.drafting.folder import CONFIG, WEIGHTS, check_value, shape_of, some
from outdraft.errors import UserError, first_line

AROUND = {"method", "outdraft_version", "target", "training"}
"""Keys of every config that are no setting of the network."""

Settings = TypeVar("Settings")


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is one of ours."""
    return "outdraft_version" in config and "method" in config


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`target` or `training` of one of our configs; empty where it is missing."""
    value = config.get(name) if is_own(config) else None
    return value if isinstance(value, dict) else {}


def write_folder(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write both files, each beside its place and renamed, a new folder as a whole; other files in it stay.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    text = json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
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


def read_settings(kind: type[Settings], config: Mapping[str, Any], folder: Path) -> Settings:
    """The network's dataclass from one of our configs.

    Raises:
        UserError: a setting that is missing or cannot be.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(config) - set(known) - AROUND):
        version = config["outdraft_version"]
        warnings.warn(
            f"'{folder}' was written by outdraft {version} and has settings unknown here: {some(unknown)}; ignored",
            stacklevel=4,
        )
    required = [name for name, f in known.items() if f.default is MISSING]
    if missing := [name for name in required if name not in config]:
        raise UserError(f"'{folder / CONFIG}' lacks {some(missing)}; it is incomplete, copy or train it again")
    values = {name: config[name] for name in known if name in config}
    for name, value in values.items():
        default = known[name].default
        if type(value) is type(default) and value == default:
            continue
        if isinstance(default, tuple):
            values[name] = _layers(name, value, folder)
            continue
        types = (int,) if default is MISSING else (int, float) if isinstance(default, float) else (type(default),)
        check_value(name, value, types, folder)
    return kind(**values)


def _layers(name: str, value: Any, folder: Path) -> tuple[int, ...]:
    """A list of layers, which JSON has no tuple for."""
    if not isinstance(value, list):
        raise UserError(f"'{folder / CONFIG}': {name} must be a list, not {value!r}; copy or train the drafter again")
    for one in value:
        check_value(name, one, (int,), folder)
    return tuple(value)


def fitting(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    file: str,
    asked_by: str = "config.json",
    fix: str = "put the config.json beside it that belongs to it",
    shown: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Copies of the tensors that the network wants, all in the precision of the first.

    Args:
        tensors: what was read.
        wanted: the network's own state dictionary, its weights on any device.
        file: where they were read, for messages.
        asked_by: what the wanted shapes follow from, for messages.
        fix: what to do about a shape that does not fit.
        shown: names in the file where they are not the network's own.

    Raises:
        UserError: one is missing, of another shape, or quantised.
    """
    names = shown or {}
    if missing := [names.get(name, name) for name in wanted if name not in tensors]:
        raise UserError(f"{file} lacks {some(missing)}; it is incomplete or no drafter, download or train it again")
    for name, place in wanted.items():
        label = names.get(name, name)
        if tensors[name].shape != place.shape:
            raise UserError(
                f"{file}: {label} is {shape_of(tensors[name])} where {asked_by} asks for {shape_of(place)}; {fix}"
            )
        if not tensors[name].is_floating_point():
            raise UserError(f"{file}: {label} holds {tensors[name].dtype}; only unquantised drafters can be loaded")
    # Copies: what was read may be mapped from the file, which must be free to change.
    dtype = tensors[next(iter(wanted))].dtype
    return {name: tensors[name].to(dtype, copy=True) for name in wanted}


def warn_of_unknown(unknown: list[str], file: str) -> None:
    """Say which tensors of `file` have no place; silent where there is none."""
    if unknown:
        warnings.warn(
            f"{file} holds {some(unknown)}, which this drafter has no place for; left out, so drafts may be poor "
            "(what is decoded stays exact)",
            stacklevel=4,
        )
