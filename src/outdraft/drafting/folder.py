"""The files of a drafter's folder: where it is, its config, its tensors, and one-line errors where they cannot be read.

Knows safetensors, pickled state dictionaries, sharded weights and the hub; nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from outdraft.data.int8_rows import PACKED, unpack
from outdraft.drafting.run_folder import unfinished
from outdraft.errors import UserError, first_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", PACKED)
"""Where weights may lie, best first."""


def find_folder(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or the local copy of a hub repository."""
    path = Path(source).expanduser()
    if path.exists():
        return local_folder(path)
    if not is_hub_id(source):
        raise UserError(f"there is no folder '{source}'; check the path of the drafter")
    import huggingface_hub

    text = str(source)
    try:
        fetch = huggingface_hub.snapshot_download
        folder = Path(fetch(text, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
            folder = Path(fetch(text, revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise not_on_hub(text, error) from error
    return folder


def is_hub_id(source: str | Path) -> bool:
    """Whether nothing lies there and it reads as a hub repository, `name` or `owner/name`."""
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None


def not_on_hub(hub_id: str, error: Exception) -> UserError:
    """What to say of a hub id that the hub, or the network, has refused."""
    return UserError(
        f"'{hub_id}' is no folder here and cannot be had from the Hugging Face Hub ({first_line(error)}); "
        "check the name and the network, or give a folder"
    )


def local_folder(path: Path) -> Path:
    """The folder as it is, or the UserError that says why it is none."""
    if not path.exists():
        raise UserError(f"there is no folder '{path}'; check the path of the drafter")
    if not path.is_dir():
        raise UserError(f"'{path}' is a file; give the folder that holds the drafter's config.json and weights")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """What its config.json holds, or the UserError that says what is wrong with it."""
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
    """The file that says where the weights are, for messages, and all tensors."""
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"'{folder}' has no weights ({WEIGHTS} or pytorch_model.bin); copy or train the drafter again")
    if not found.endswith(".index.json"):
        return f"'{folder / found}'", _read_tensors(folder / found)
    index = _read_json(folder / found)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"'{folder / found}' has no weight_map; download the drafter again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
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


# --- messages ----------------------------------------------------------------------------------------------------


def check_value(name: str, value: Any, kinds: tuple[type, ...], folder: Path) -> None:
    """Raise UserError unless the value has one of these types and, as a number, is positive."""
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not right or (bool not in kinds and value <= 0):
        number = "a positive whole number" if kinds == (int,) else "a positive number"
        kind = "true or false" if bool in kinds else number
        raise UserError(f"'{folder / CONFIG}': {name} must be {kind}, not {value!r}; copy or train the drafter again")


def some(names: Iterable[str]) -> str:
    """At most four names."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def shape_of(tensor: Tensor) -> str:
    """`2x3` for a tensor of two rows and three columns."""
    return "x".join(str(size) for size in tensor.shape) or "a single number"
