"""`outdraft export`: a trained drafter as a folder that an engine loads, written only after it was checked.

Every tensor that the engine's loader asks for is compared by name and shape, and what the folder computes, read from
its files, with the drafter's own forward in float32. What an engine cannot run as ours is refused with the reason. The
folder appears whole or not at all. Knows no engine's code; what goes into the folders is in `head_folder.py` and
`exit_model.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import outdraft
from outdraft.api.loading import load_target, resolve_dtype
from outdraft.drafting.folder import CONFIG, WEIGHTS, some
from outdraft.errors import UserError, first_line
from outdraft.export import head_folder
from outdraft.export.commands import assisted, vllm_server
from outdraft.export.vllm_plugin import EAGLE
from outdraft.methods.checkpoint import load_drafter, own_method
from outdraft.methods.eagle3.network import Eagle3Head
from outdraft.methods.eesd.exit_model import exit_model
from outdraft.methods.eesd.folder import load_exit_layer
from outdraft.methods.eesd.network import ExitLayer
from outdraft.methods.fspad.network import FeatureHead
from outdraft.methods.medusa.drafter import MedusaHeads
from outdraft.target.named import named, place_of, shipped_drafter
from outdraft.target.target import Target
from outdraft.target.views import Reads

ENGINES = ("vllm", "hf")

TOKENS = 48
"""Tokens of the comparison with our own forward."""

TOLERANCE = 1e-3
"""Largest difference in it, as a part of the largest value: float32 rounding stays a hundred times below."""


@dataclass
class Exported:
    """What was written and how to run it."""

    folder: str
    engine: str
    method: str
    """The drafter's, in our words."""
    architecture: str
    """What the engine runs it as."""
    target: str
    """The target's folder or hub id, as the engine takes it."""
    difference: float
    """The largest difference from the drafter's own forward, as a part of the largest value."""
    command: str
    """What starts the engine with it."""
    plugin: bool
    """Whether the engine needs outdraft installed beside it."""


def export_drafter(
    model: str | Path,
    draft_model: str | Path,
    engine: str,
    output_dir: str | Path,
    *,
    method: str | None = None,
    target_dir: str | Path | None = None,
    dtype: str | None = None,
    num_speculative_tokens: int = 4,
) -> Exported:
    """Write a drafter for an engine.

    Args:
        model: its target: a folder, a GGUF file, a hub id, `smollm2` or `reference`.
        draft_model: the drafter: a folder, a hub id, or `smollm2` or `reference` for those that ship.
        engine: `vllm`, or `hf` for `transformers`' assisted generation.
        output_dir: a folder that is new or empty.
        method: which of the shipped drafters; of any other folder, what it must be.
        target_dir: also write the target there, as an ordinary folder, where it is none: a shipped one or a GGUF file.
        dtype: precision of the written weights; as stored when None.
        num_speculative_tokens: of the command.

    Raises:
        UserError: it cannot run there as it runs here, or something cannot be read or written.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine '{engine}'; choose one of {', '.join(ENGINES)}")
    if num_speculative_tokens < 1:
        raise UserError(f"--num-speculative-tokens must be at least 1, not {num_speculative_tokens}")
    place = place_of(model)
    if target_dir is not None and not place.made_here:
        raise UserError(f"--target-dir is for the shipped target; give the engine '{model}' itself")
    if target_dir is not None:
        drafted, copied = _absolute(output_dir), _absolute(target_dir)
        if drafted == copied or drafted in copied.parents or copied in drafted.parents:
            raise UserError("--target-dir and --output-dir must not lie in each other; choose folders side by side")
    if named(draft_model) is not None:
        draft_model = shipped_drafter(str(draft_model), method)
    kind = own_method(draft_model)
    if kind == MedusaHeads.method:
        raise UserError("Medusa heads have no export; serve them with `outdraft serve`, or train another drafter")
    if kind == Eagle3Head.method:
        raise UserError(
            f"'{draft_model}' is an EAGLE-3 folder already, which engines read as it is (vLLM: method eagle3)"
        )
    here = Path(place.path).expanduser()
    source = here if here.exists() else place.path
    with _new_folder(output_dir) as folder:
        if kind == ExitLayer.method:
            exported = _export_exit(draft_model, source, folder, dtype)
        else:
            exported = _export_head(draft_model, source, folder, engine, dtype)
        found, name, difference = exported
        if method is not None and method != found:
            raise UserError(f"--method {method}, but {draft_model} is a '{found}' drafter; leave --method out")
        if target_dir is not None:
            with _new_folder(target_dir) as copy:
                shutil.copytree(source, copy, dirs_exist_ok=True)
            source = _absolute(target_dir)
    where = str(_absolute(output_dir))
    target = str(_absolute(source)) if Path(source).exists() else str(source)
    if engine == "hf":
        command = assisted(target, where, num_speculative_tokens)
    else:
        vllm_method = "draft_model" if found == ExitLayer.method else "eagle"
        command = vllm_server(target, where, vllm_method, num_speculative_tokens)
    plugin = engine == "vllm" and found != ExitLayer.method and name != EAGLE
    return Exported(where, engine, found, name, target, difference, command, plugin)


# --- FSPAD and EAGLE's head ----------------------------------------------------------------------------------------


def _export_head(
    draft_model: str | Path, source: str | Path, folder: Path, engine: str, dtype: str | None
) -> tuple[str, str, float]:
    if engine == "hf":
        raise UserError(
            "transformers' assistant_model takes whole language models, which FSPAD's and EAGLE's heads are not; "
            "use --engine vllm, or stock models' generate(..., custom_generate=outdraft.custom_generate(drafter))"
        )
    checkpoint = load_drafter(draft_model)
    head = checkpoint.head.eval()
    target = _target_config(source)
    head_folder.refuse_unexportable(head.config, target)
    if dtype is not None:
        head.to(resolve_dtype(dtype, torch.device("cpu")))
    stored = head.fusion.fc.weight.dtype
    config = {
        **head_folder.engine_config(head.config, target, stored),
        "outdraft_export": {"version": outdraft.__version__, "method": head.method, "target": checkpoint.target_id},
    }
    tensors = {name: tensor.contiguous() for name, tensor in head_folder.engine_tensors(head).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    written, read = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    head_folder.check_tensors(written, read)
    return head.method, config["architectures"][0], _compare_head(head, written, read)


@torch.inference_mode()
def _compare_head(head: FeatureHead, config: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    """The drafter's own forward against what the written files say, on values of the size of features."""
    head = head.float()
    noise = torch.Generator().manual_seed(0)
    tokens = min(TOKENS, head.config.max_position_embeddings)
    embeddings, features = torch.randn(2, tokens, head.config.hidden_size, generator=noise)
    if head.embed_tokens is not None:
        ids = torch.randint(head.config.vocab_size, (tokens,), generator=noise)
        embeddings = head.embed_tokens(ids)
    ours = head(embeddings[None], features[None])
    theirs = head_folder.read_forward(config, tensors, embeddings, features)
    return max(_difference(one[0], other) for one, other in zip(ours, theirs, strict=True))


# --- EESD ----------------------------------------------------------------------------------------------------------


def _export_exit(
    draft_model: str | Path, source: str | Path, folder: Path, dtype: str | None
) -> tuple[str, str, float]:
    stored = getattr(_target_config(source), "dtype", None)
    precision = resolve_dtype(dtype, torch.device("cpu")) if dtype is not None else stored or torch.float32
    target = load_target(source, dtype=precision, device="cpu", backend="eager")
    exit_layer = load_exit_layer(draft_model, target.model, dtype=precision).eval()
    small = exit_model(exit_layer, target.model)
    small.save_pretrained(folder)
    if target.tokenizer is not None:
        target.tokenizer.save_pretrained(folder)
    return exit_layer.method, type(small).__name__, _compare_exit(exit_layer, target, folder)


@torch.inference_mode()
def _compare_exit(exit_layer: ExitLayer, target: Target, folder: Path) -> float:
    """Logits of the written model, read back by transformers, against those of our views on the target's layers."""
    target.model.float()
    exit_layer.float()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # every library under here has exceptions of its own
        raise UserError(f"the exported model cannot be read ({first_line(error)}); use `outdraft serve`") from error
    read, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise UserError(
                f"the exported model has {what.replace('_', ' ')} {some(map(str, report[what]))}; report it"
            )
    tokens = min(TOKENS, target.context_length)
    ids = torch.randint(target.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]
    inputs: dict[str, Any] = {"position_ids": positions, "attention_mask": None, "use_cache": False}
    split = exit_layer.config.exit_layer
    hidden = target.reader(Reads(False, (split,), split)).lower(input_ids=ids, **inputs)
    bound = exit_layer.bind(target)
    ours = bound.head(bound.features(hidden, **inputs))
    return _difference(ours, read.eval()(input_ids=ids, use_cache=False).logits)


# --- what both need ------------------------------------------------------------------------------------------------


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, as a part of the largest value.

    Raises:
        UserError: it is more than rounding.
    """
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE:
        raise UserError(
            f"what was exported does not compute what the drafter does (they differ by {difference:.1e} of the largest "
            "value); nothing was written, please report it"
        )
    return difference


def _target_config(source: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(source)).get_text_config()
    except Exception as error:  # every library under here has exceptions of its own
        raise UserError(
            f"the target's config in '{source}' cannot be read ({first_line(error)}); check --model"
        ) from error


@contextmanager
def _new_folder(place: str | Path) -> Iterator[Path]:
    """A folder beside the place, which takes it in the end; nothing is left where something goes wrong."""
    final = _absolute(place)
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise UserError(f"'{place}' is there already and not an empty folder; choose another --output-dir")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise UserError(f"cannot write to '{place}' ({first_line(error)}); choose another folder") from error
    try:
        yield beside
        beside.chmod(0o755)
        for file in beside.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors makes files that only their owner can read
        os.replace(beside, final)
    except SafetensorError as error:
        raise UserError(f"cannot write to '{place}' ({first_line(error)}); choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _absolute(place: str | Path) -> Path:
    return Path(place).expanduser().resolve()
