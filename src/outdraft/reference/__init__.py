"""The small chat model that ships with outdraft for its demo, tests and documentation, and drafters for it and SmolLM2.

``CARD.md`` tells how they were made, by the scripts of the source tree in ``scripts/reference_model``. Weights are int8
rows with a float32 scale each, half the size of bfloat16. The packed rows are the definition of the target: unpacking
rounds ``int8 * scale`` to bfloat16 once, so that the bfloat16 and the float32 target have the same weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from outdraft.data.records import split_lines
from outdraft.errors import UserError
from outdraft.output import made_once

__all__ = [
    "DATA",
    "SHIPPED",
    "load_prompts",
    "load_reference_target",
    "reference_drafter_path",
    "reference_target_path",
]

DATA = Path(__file__).parent / "data"
Messages = list[dict[str, str]]

SHIPPED = {"fspad": "drafter", "eagle": "eagle", "eesd": "eesd"}
"""The methods of the drafters that ship for the reference target, and their folders."""


def load_prompts(which: Literal["heldout", "train"]) -> list[Messages]:
    """Return the conversations of a shipped file, each a list of user messages.

    ``heldout`` prompts come from conversations that the target never saw, ``train`` prompts from ones it was trained
    on. The script ``build_prompts`` draws them.
    """
    lines = split_lines((DATA / f"{which}_prompts.jsonl").read_text(encoding="utf-8"))
    return [json.loads(line)["messages"] for line in lines]


def reference_drafter_path(method: str | None = None) -> Path:
    """Return the folder of this method's shipped drafter for the reference target; FSPAD's when None."""
    method = method or "fspad"
    if method not in SHIPPED:
        raise UserError(f"no drafter of method '{method}' ships with the package; there are {', '.join(SHIPPED)}")
    folder = Path(__file__).parent / SHIPPED[method]
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing: reinstall the package, or train a drafter with `outdraft train`")
    return folder


# --- packed weights ---------------------------------------------------------------------------------------------


PACKED = "model.int8.safetensors"
"""The name of the file of packed weights in a folder of a model or a drafter."""

SCALE = ".scale"


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the bfloat16 state that a packed state stands for."""
    state = {name: tensor for name, tensor in packed.items() if not name.endswith(SCALE)}
    for name, rows in state.items():
        if rows.dtype == torch.int8:
            state[name] = (rows.float() * packed[name + SCALE].float()[:, None]).to(torch.bfloat16)
    return state


PACKAGED = Path(__file__).parent / "target"
UNPACKED = "model.safetensors"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def unpack_folder(source: Path, destination: Path) -> None:
    """Write the Hugging Face folder that the packed folder ``source`` stands for."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in _files(source):
        if path.name != PACKED:
            shutil.copyfile(path, destination / path.name)
    save_file(unpack(load_file(source / PACKED)), destination / UNPACKED, metadata={"format": "pt"})


def _files(folder: Path) -> Iterator[Path]:
    return (folder / name for name in sorted((PACKED, *COMPANIONS)) if (folder / name).exists())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def reference_target_path(packaged: Path = PACKAGED) -> Path:
    """Return the folder of the reference target for ``from_pretrained``; the first call writes it."""
    if not (packaged / PACKED).exists():
        raise UserError(
            f"{packaged / PACKED} is missing: this copy of outdraft was installed without the reference target's "
            "weights; reinstall the package, or build them with `python scripts/reference_model/build_target.py`"
        )
    return made_once(f"reference-target-{_digest(packaged)}", lambda folder: unpack_folder(packaged, folder))


def load_reference_target(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the reference target in evaluation mode and its tokenizer; without ``dtype`` the model is in bfloat16."""
    path = reference_target_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(path)
