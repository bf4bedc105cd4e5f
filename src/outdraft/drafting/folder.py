"""The files of a drafter's folder: its location, config and tensors, with one-line errors if they cannot be read.

It reads safetensors, pickled state dictionaries and sharded weights, from local folders or the hub. Our own layout is
the same for every kind of network. It is written whole or not at all, its settings are read back into the network's
dataclass, and its tensors are compared with what the network asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import outdraft
from outdraft.drafting.run_folder import unfinished
from outdraft.errors import UserError, first_line
from outdraft.reference import PACKED, unpack
from outdraft.target.named import is_hub_id, not_on_hub

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", PACKED)
"""Names of weight files, the preferred one first."""

AROUND = {"method", "outdraft_version", "target", "training"}
"""Keys of every config that are not settings of the network."""

Settings = TypeVar("Settings")


def find_folder(source: str | Path) -> Path:
    """Return the folder itself, or the local copy of a hub repository."""
    path = Path(source).expanduser()
    if path.exists():
        return local_folder(path)
    if not is_hub_id(source):
        raise UserError(f"there is no folder '{source}'; check the path of the drafter")
    import huggingface_hub

    text = str(source)
    try:
        fetch = huggingface_hub.snapshot_download
        folder = Path(fetch(text, allow_patterns=["*.json", "*.safetensors"]))
        if not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
            folder = Path(fetch(text, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise not_on_hub(text, error) from error
    return folder


def local_folder(path: Path) -> Path:
    """Return the folder as it is, or raise the UserError that says why it is none."""
    if not path.exists():
        raise UserError(f"there is no folder '{path}'; check the path of the drafter")
    if not path.is_dir():
        raise UserError(f"'{path}' is a file; give the folder that holds the drafter's config.json and weights")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of config.json, or raise the UserError that says what is wrong with it."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            unfinished(folder)
            or f"'{folder}' has no config.json, so it is no drafter; give the folder that was trained or saved"
        )
    config = _read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"'{file}' must hold a JSON object; copy or train the drafter again")
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({first_line(error)}); copy or train the drafter again") from error


def read_weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the name of the file that locates the weights (for messages), and all tensors."""
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"'{folder}' has no weights ({WEIGHTS} or pytorch_model.bin); copy or train the drafter again")
    if not found.endswith(".index.json"):
        return f"'{folder / found}'", _read_tensors(folder / found)
    index = _read_json(folder / found)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"'{folder / found}' has no weight_map; download the drafter again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"'{folder / found}' names '{name}', which is not in the folder; download it again")
        tensors.update(_read_tensors(folder / name))
    return f"'{folder / found}'", tensors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return unpack(load_file(file)) if file.name == PACKED else load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise anything
        raise UserError(
            f"'{file}' is damaged or no file of plain weights ({first_line(error)}); copy or download it again"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"'{file}' is no dictionary of tensors; save the drafter's state_dict there")
    return loaded


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
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
            commit_message=f"Drafter written by outdraft {outdraft.__version__}",
        )
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(f"cannot upload to '{repo_id}' ({first_line(error)}); log in with `hf auth login`") from error
    return str(commit.commit_url)


# --- our own layout --------------------------------------------------------------------------------------------


def is_own(config: Mapping[str, Any]) -> bool:
    """Return True if this config.json has our layout."""
    return "outdraft_version" in config and "method" in config


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the section `target` or `training` of a config of ours; empty if it is missing."""
    value = config.get(name) if is_own(config) else None
    return value if isinstance(value, dict) else {}


def write_folder(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write both files, each beside its place and renamed, a new folder as a whole; other files in it stay."""
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
    """Read the network's dataclass from a config of ours."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(config) - set(known) - AROUND):
        version = config["outdraft_version"]
        warnings.warn(
            f"'{folder}' was written by outdraft {version} and has settings unknown here: {some(unknown)}; ignored",
            stacklevel=4,
        )
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in config]:
        raise UserError(f"'{folder / CONFIG}' lacks {some(missing)}; it is incomplete, copy or train it again")
    values = {name: config[name] for name in known if name in config}
    for name, value in values.items():
        default = known[name].default
        if type(value) is type(default) and value == default:
            continue
        kind_of = dict if known[name].default_factory is not MISSING else str if isinstance(default, str) else None
        if kind_of is not None:
            if not isinstance(value, kind_of):
                raise UserError(f"'{folder / CONFIG}': {name} cannot be {value!r}; copy or train the drafter again")
            continue
        if isinstance(default, tuple):
            values[name] = _layers(name, value, folder)
            continue
        types = (int,) if default is MISSING else (int, float) if isinstance(default, float) else (type(default),)
        check_value(name, value, types, folder)
    return kind(**values)


def _layers(name: str, value: Any, folder: Path) -> tuple[int, ...]:
    """Convert a list of layers to a tuple, which JSON does not have."""
    if not isinstance(value, list):
        raise UserError(f"'{folder / CONFIG}': {name} must be a list, not {value!r}; copy or train the drafter again")
    for one in value:
        if one != 0 or not name.endswith("_ids"):  # ids count from 0
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
    """Copy the tensors that the network wants, all in the precision of the first.

    Args:
        wanted: the network's own state dictionary, its weights on any device.
        asked_by: what the wanted shapes follow from, for messages.
        fix: what to do about a shape that does not fit.
        shown: names in the file that differ from the network's own.

    Raises:
        UserError: a tensor is missing, of another shape, or quantised.
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
    """Warn of the tensors of `file` that have no place in the network, if any."""
    if unknown:
        warnings.warn(
            f"{file} holds {some(unknown)}, which this drafter has no place for; left out, so drafts may be poor "
            "(what is decoded stays exact)",
            stacklevel=4,
        )


# --- messages ----------------------------------------------------------------------------------------------------


def check_value(name: str, value: Any, kinds: tuple[type, ...], folder: Path) -> None:
    """Raise UserError unless the value has one of these types and, as a number, is positive."""
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not right or (bool not in kinds and value <= 0):
        number = "a positive whole number" if kinds == (int,) else "a positive number"
        kind = "true or false" if bool in kinds else number
        raise UserError(f"'{folder / CONFIG}': {name} must be {kind}, not {value!r}; copy or train the drafter again")


def some(names: Iterable[str]) -> str:
    """Join at most four names for a message."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def shape_of(tensor: Tensor) -> str:
    """Format a tensor's shape: `2x3` for two rows and three columns."""
    return "x".join(str(size) for size in tensor.shape) or "a single number"
