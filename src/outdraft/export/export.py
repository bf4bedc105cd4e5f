"""`outdraft export`: a trained drafter as a folder that an engine loads, written only after it was checked.

Every tensor that the engine's loader asks for is compared by name and shape, and the outputs of the written files with
the drafter's own forward in float32. A drafter that an engine cannot run like outdraft is refused with the reason. The
folder appears whole or not at all. The content is written by the methods.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from outdraft.api.loading import load_target, resolve_dtype
from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import method_of
from outdraft.target.named import named, place_of, shipped_drafter
from outdraft.target.target import Target

ENGINES = ("vllm", "hf")

TOLERANCE = 1e-3
"""The largest relative difference in that comparison; float32 rounding stays a hundred times below."""


@dataclass
class Exported:
    """The facts of an export, and the command that runs it."""

    folder: str
    engine: str
    method: str
    """The drafter's method, as outdraft names it."""
    architecture: str
    """The architecture as which the engine runs it."""
    target: str
    """The target's folder or hub id, as the engine takes it."""
    difference: float
    """The largest difference from the drafter's own forward, as a part of the largest value."""
    command: str
    """The command that starts the engine with the drafter."""
    plugin: bool
    """True if the engine needs outdraft installed beside it."""


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
        model: the target: a folder, a GGUF file, a hub id, `smollm2` or `reference`.
        draft_model: the drafter: a folder, a hub id, or `smollm2` or `reference` for those that ship.
        engine: `vllm`, or `hf` for `transformers`' assisted generation.
        output_dir: a folder that is new or empty.
        method: the method of the shipped drafter to take; for any other folder, the method that it must have.
        target_dir: also write a shipped or GGUF target there, as an ordinary folder.
        dtype: precision of the written weights; as stored when None.
        num_speculative_tokens: draft tokens in the command.

    Raises:
        UserError: the engine cannot run the drafter as outdraft does, or something cannot be read or written.
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
    kind = method_of(draft_model)
    if kind.no_export is not None:
        raise UserError(kind.no_export.format(method=kind.name, folder=draft_model))
    here = Path(place.path).expanduser()
    source = here if here.exists() else place.path
    with _new_folder(output_dir) as folder:
        precision = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
        written = kind.export(draft_model, _Target(source), folder, engine, precision)
        difference = max(_difference(*both) for both in written.compared)
        if method is not None and method != written.method:
            raise UserError(f"--method {method}, but {draft_model} is a '{written.method}' drafter; leave --method out")
        if target_dir is not None:
            with _new_folder(target_dir) as copy:
                shutil.copytree(source, copy, dirs_exist_ok=True)
            source = _absolute(target_dir)
    where = str(_absolute(output_dir))
    target = str(_absolute(source)) if Path(source).exists() else str(source)
    if engine == "hf":
        command = _assisted(target, where, num_speculative_tokens)
    else:
        command = _vllm_server(target, where, written.vllm_method, num_speculative_tokens)
    plugin = engine == "vllm" and written.plugin
    return Exported(where, engine, written.method, written.architecture, target, difference, command, plugin)


class _Target:
    """The target as an `ExportTarget`."""

    def __init__(self, source: str | Path):
        self.source = source

    @cached_property
    def config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(str(self.source)).get_text_config()
        except Exception as error:  # every library under here has exceptions of its own
            raise UserError(
                f"the target's config in '{self.source}' cannot be read ({first_line(error)}); check --model"
            ) from error

    def load(self, dtype: torch.dtype | None) -> Target:
        return load_target(self.source, dtype=dtype, device="cpu", backend="eager")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE:
        raise UserError(
            f"what was exported does not compute what the drafter does (they differ by {difference:.1e} of the largest "
            "value); nothing was written, please report it"
        )
    return difference


@contextmanager
def _new_folder(place: str | Path) -> Iterator[Path]:
    """Yield a folder beside the place, and move it there in the end; an error leaves nothing."""
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


# --- what starts an engine with the folder --------------------------------------------------------------------------


def _vllm_server(target: str, folder: str, method: str, tokens: int) -> str:
    """Return the command of vLLM's OpenAI server with the folder as its drafter and chains of `tokens` tokens."""
    speculative = json.dumps({"method": method, "model": folder, "num_speculative_tokens": tokens})
    return shlex.join(["vllm", "serve", target, "--speculative-config", speculative])


def _assisted(target: str, folder: str, tokens: int) -> str:
    """Return Python statements that decode with the folder as `assistant_model`."""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({target!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({target!r})",
            f"assistant = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=model.dtype)",
            f"assistant.generation_config.num_assistant_tokens = {tokens}",
            "prompt = tokenizer('Once upon a time', return_tensors='pt')",
            "print(tokenizer.decode(model.generate(**prompt, assistant_model=assistant, max_new_tokens=64)[0]))",
        ]
    )
