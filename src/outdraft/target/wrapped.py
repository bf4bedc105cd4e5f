"""Unwraps models: torch.compile, data parallelism, PEFT's adapters, and folders of those.

Decoding needs the stock model itself, whose cache and layers it uses. A wrapper is recognised by its attributes, so
that no unused package has to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from outdraft.errors import UserError, first_line

ADAPTER = "adapter_config.json"


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
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # packages have exceptions of their own
        raise UserError(f"the adapter '{folder}' cannot be merged into its base model: {first_line(error)}") from error


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
