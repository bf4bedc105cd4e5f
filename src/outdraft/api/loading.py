"""Loads a target and a drafter from a folder, GGUF file, name or hub id, with errors that name the fix.

This module tells a drafter's folder from a language model's; the registry knows which method reads it.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from outdraft.drafting.base import Drafter
from outdraft.drafting.folder import find_folder, is_own
from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import Network, method_of, recognised
from outdraft.methods.registry import NONE, method_called
from outdraft.target.backends import (
    QUANTISED,
    accelerate,
    best_backend,
    default_dtype,
    refuse_before_loading,
    simple_backend,
)
from outdraft.target.gguf_blocks import refuse_without_blocks, store_blocks
from outdraft.target.gguf_file import gguf_in
from outdraft.target.named import (
    base_of,
    class_for,
    is_hub_id,
    merged,
    named,
    not_on_hub,
    place_of,
    shipped_drafter,
    unwrapped,
)
from outdraft.target.ranks import sharding
from outdraft.target.target import Target
from outdraft.target.trial import tried

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


SPREAD = "auto"
"""The device that stands for all devices: layers are put where there is room for them."""


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the given device, else the first GPU, else the CPU."""
    if device is None or device == SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used here ({first_line(error)}); try --device cpu") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; None or `auto` gives the dtype that is fastest on the device."""
    if dtype is None or dtype == "auto":
        return default_dtype(device)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_target(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    tp_plan: str | None = None,
    whole_ends: bool = False,
    trust_remote_code: bool = False,
) -> Target:
    """Load a target from a folder (an adapter's, too), a GGUF file, a hub id, `smollm2`, `reference`, or a loaded
    model.

    A loaded model stays as it is and may be wrapped by torch.compile or PEFT. `tp_plan` shares its layers among the
    processes of `torchrun` (`target/ranks.py`, whose `whole_ends` this is).

    Raises:
        UserError: it cannot be loaded or cannot be a target, with the reason.
    """
    words = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    shown_as = None
    model = unwrapped(model)
    if tp_plan is not None and isinstance(model, PreTrainedModel):
        raise UserError("tp_plan shares a model as it is loaded, and this one is; give a folder or a hub id")
    if tp_plan is not None and backend not in (None, "auto", "eager"):
        raise UserError(f"backend '{backend}' cannot run layers that processes share (--tp); leave the backend out")
    if isinstance(model, PreTrainedModel):
        loaded: Any = model.eval()
        folder = tokenizer
    elif not isinstance(model, str | Path):
        raise UserError(
            f"a model is a folder, a hub id or a loaded causal language model, not a {type(model).__name__}"
        )
    else:
        where = resolve_device(device)
        options: dict[str, Any] = {"dtype": resolve_dtype(dtype, where), "trust_remote_code": trust_remote_code}
        if device == SPREAD:
            options["spread"] = True
        if tp_plan is not None:
            options |= {"sharing": partial(sharding, plan=tp_plan, device=device, whole_ends=whole_ends)}
        if backend in QUANTISED:
            options["quantised"] = backend
        if backend == "native-gguf" and base_of(model) is not None:
            raise UserError("quantize=gguf cannot change the file's weights by an adapter; quantize int8 or int4")
        loaded, path, shown_as = _load_place(model, where, **options)
        if shown_as is not None:  # otherwise records would name a local folder
            loaded.config._name_or_path = loaded.name_or_path = shown_as
        folder = tokenizer or path
    if words is None and folder is not None:
        words = _load_tokenizer(str(folder), trust_remote_code)
        if words is not None and shown_as is not None and tokenizer is None:
            words.name_or_path = shown_as
    if backend is None or backend == "auto":
        backend = best_backend(loaded)
    if backend in QUANTISED and loaded is model:
        raise UserError("quantize changes weights, and a loaded model's are its owner's; give a folder or a hub id")
    if loaded._forward_pre_hooks:  # some quantisers unpack weights at the first forward of the whole model
        with torch.no_grad():
            loaded(input_ids=torch.zeros(1, 1, dtype=torch.long, device=loaded.device))
    target = Target(loaded, words)
    windows = tried(target)
    return Target(loaded, words, backend, windows, owned=loaded is not model)


def _load_place(model: str | Path, device: torch.device, **options: Any) -> tuple[Any, str, str | None]:
    """Load a model by name, folder or file; return it, its tokenizer's location, and its name in records if set."""
    if (base := base_of(model)) is not None:
        if "sharing" in options:
            raise UserError(f"the adapter '{model}' cannot be merged into layers that processes share; merge it first")
        loaded, path, _ = _load_place(base, device, **options)
        loaded = merged(loaded, model).eval()
        loaded.config._name_or_path = loaded.name_or_path = str(model)
        return loaded, str(model) if _has_words(Path(model).expanduser()) else path, None
    found = place_of(model)
    path = str(found.path if is_hub_id(found.path) else checked_folder(Path(found.path).expanduser()))
    return _load_model(path, device, **options), path, found.shown_as


def quantised_backend(backend: str | None, quantize: str | None) -> str | None:
    """Return the backend for a backend and a quantisation, each as the user gave it.

    Raises:
        UserError: an unknown quantisation, or one that the backend does not do.
    """
    if quantize is None:
        return backend
    if f"native-{quantize}" not in QUANTISED:
        raise UserError(f"quantize must be int8, int4 or gguf, not {quantize!r}")
    if backend not in (None, "auto", "native"):
        raise UserError(f"quantize={quantize} is done by backend native, not {backend}; leave the backend out")
    return f"native-{quantize}"


def load_drafter_for(
    target: Target,
    draft_model: str | Path | Network | Target | PreTrainedModel | None,
    *,
    method: str | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
) -> Drafter | None:
    """Load a drafter bound to its target; None for plain decoding.

    Args:
        target: the target; the drafter takes its device and precision.
        draft_model: a drafter's folder, a smaller language model, `reference` or `smollm2` for the drafters that ship
            for these, or a loaded drafter.
        method: required method; by default whatever the folder holds.

    Raises:
        UserError: nothing loadable there, another method than asked for, or another target's drafter.
    """
    asked = None if method in (None, NONE) else method_called(method)
    if backend is None or backend == "auto":
        backend = target.backend if target.backend != "eager" else simple_backend(target.device, target.dtype)
    if method == NONE or (method is None and draft_model is None):
        return None
    if asked is not None and not asked.needs_model:
        drafter = asked.bind(None, target)
        if drafter.method != asked.name:  # or reports would not find it by the name that it was asked for
            raise UserError(f"method '{asked.name}' binds a drafter of method '{drafter.method}'; give both one name")
        return drafter
    if draft_model is None:
        raise UserError(f"method '{method}' needs a drafter; give its folder with --draft-model")
    if named(draft_model) is not None:
        draft_model = shipped_drafter(str(draft_model), method)
    drafter = _load_drafter(target, draft_model, backend, trust_remote_code)
    if method is not None and drafter.method != method:
        raise UserError(f"--method {method}, but {draft_model} is a '{drafter.method}' drafter; leave --method out")
    return drafter


def _load_drafter(target: Target, source: Any, backend: str, trust_remote_code: bool) -> Drafter:
    if isinstance(source, Network):
        network = copy.deepcopy(source).to(target.device, target.dtype).eval()  # the caller may be training it
        return method_called(network.method).bind(accelerate(network, backend), target)
    source, smaller = unwrapped(source), method_called("draft-model")
    if isinstance(source, Target):
        return smaller.bind(source, target)
    if isinstance(source, PreTrainedModel):
        return smaller.bind(load_target(source, backend="eager"), target)
    if not isinstance(source, str | Path):
        raise UserError(f"a drafter is a folder, a hub id or a loaded model, not a {type(source).__name__}")
    if base_of(source) is not None or gguf_in(source) is not None or _is_language_model(find_folder(source)):
        own = "native" if backend == "native-gguf" else backend  # a smaller model may come from no GGUF file
        options: dict[str, Any] = {"dtype": target.dtype, "device": target.device, "backend": own}
        return smaller.bind(load_target(source, trust_remote_code=trust_remote_code, **options), target)
    network = load_network(source, target, target.dtype, target.device)
    return method_called(network.method).bind(accelerate(network, backend), target)


def load_network(
    source: str | Path, target: Target, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Network:
    """Load the network in a drafter's folder or hub repository; arguments as in `Method.load`.

    Raises:
        UserError: no drafter there, or a damaged one.
    """
    return method_of(source).load(source, target, dtype, device)


def _is_language_model(folder: Path) -> bool:
    """Return True if the folder's config names a causal language model and the folder has a tokenizer.

    Drafters' configs may name a Llama class too. FSPAD and EAGLE folders hold no tokenizer, and a config that a method
    recognises is a drafter's, whatever else the folder holds.
    """
    config = _config_of(folder)
    return "model_type" in config and recognised(config) is None and holds_tokenizer(folder)


def _is_drafter(folder: Path) -> bool:
    """Return True if the folder's config is outdraft's own or one that a method recognises."""
    config = _config_of(folder)
    return is_own(config) or recognised(config) is not None


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json; empty where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def holds_tokenizer(folder: Path) -> bool:
    """Return True if a folder has the file of a tokenizer's vocabulary."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


AGAIN = "check its files, or copy or download them again"
"""The fix where another library cannot read a model's folder."""


def _load_model(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    sharing: Any = None,
    spread: bool = False,
    quantised: str | None = None,
) -> Any:
    more: dict[str, Any] = {}
    if quantised is not None:
        if quantised == "native-gguf":
            refuse_without_blocks(path)
        refuse_before_loading(path, dtype, device, trust_remote_code, quantised)
    if sharing is not None:
        more = sharing(path, trust_remote_code=trust_remote_code)
    elif spread:
        if find_spec("accelerate") is None:
            raise UserError("device auto needs accelerate: pip install accelerate")
        more["device_map"] = "auto"
    elif device.type != "cpu" and find_spec("accelerate") is not None:
        more["device_map"] = {"": device}  # straight to where it will live, never whole in the host's memory
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = class_for(config).from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code, **more)
    except Exception as error:  # every library under here has exceptions of its own; the user needs their first line
        if isinstance(error, OSError) and is_hub_id(path):
            raise not_on_hub(path, error) from error
        if _is_drafter(Path(path)):
            raise UserError(
                f"'{path}' is a drafter; give it with --draft-model, and the model that it was trained for with --model"
            ) from error
        raise UserError(f"the model '{path}' cannot be loaded: {first_line(error)}; {AGAIN}") from error
    if quantised == "native-gguf":
        store_blocks(model, path)
    # What a device map has put in its places stays there; quantised models refuse to be moved, and need not be here.
    return model.eval() if "device_map" in more or model.device == device else model.eval().to(device)


def _load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside the model; None if there is none, so that only token ids can be decoded."""
    if Path(path).is_dir() and not _has_words(Path(path)):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"the tokenizer in '{path}' cannot be loaded: {first_line(error)}; {AGAIN}") from error


def _has_words(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def checked_folder(folder: Path, what: str = "model") -> Path:
    """Return the folder itself, or raise the UserError that says why it is none of a model (or `what`)."""
    if folder.is_file():
        raise UserError(f"'{folder}' is a file; give the folder of a {what}, a hub id or a GGUF file")
    if not folder.is_dir():
        raise UserError(f"no {what} folder at '{folder}'; check the path")
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' has no config.json, so it is no {what} folder; check the path")
    return folder
