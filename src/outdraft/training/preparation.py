"""Preparation of a run from target and configuration: settings, data, steps, network, and the checkpoint to resume
from.

`train` and `plan` share this preparation, which writes nothing.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks

from outdraft.api.prompts import check_switches
from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import ExampleSet, tokenize
from outdraft.drafting.run_folder import RUN, last_checkpoint
from outdraft.errors import UserError, first_line
from outdraft.losses.objective import Objective, weights_fingerprint
from outdraft.methods.checkpoint import Network
from outdraft.methods.registry import MeasuredSetting, method_called
from outdraft.target.backends import default_dtype
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig

NO_DATA = "training needs data; give --data a file or folder, DrafterTrainer a train_dataset"

ADVISED_EXAMPLES = 5000
"""The number of conversations from which drafters learn well; a fifth of it is few."""

BEFORE = {"embedding_scale": 1.0, "teacher_top_k": 0}
"""The values of settings in runs of older versions without them, where they are not the defaults."""

# Settings that may change between a run and its resumption without changing how it trains.
FREE = {
    "data", "output_dir", "on_bad_line", "preset", "epochs", "features", "feature_cache_gb", "feature_cache_dir",
    "save_steps", "save_total_limit", "logging_steps", "eval_steps", "patience", "report_to",
}  # fmt: skip


@dataclass
class Preparation:
    """The decisions that are made before the first step."""

    config: DrafterConfig
    """The configuration with its preset filled in."""
    examples: ExampleSet
    skipped: list[str]
    """The data lines that were left out, with the reason."""
    processes: int
    total_steps: int
    measured: MeasuredSetting | None = None
    """The setting that was measured on the data, where one was left open."""

    @property
    def notes(self) -> list[str]:
        """Remarks for the user about the data, a line each."""
        data = self.examples
        counts = (
            (len(self.skipped), f"lines could not be used (first: {self.skipped[0] if self.skipped else ''})"),
            (len(data.refused), f"conversations were left out (first: {data.refused[0] if data.refused else ''})"),
            (data.cut_answers, "answers were cut off before their end, and no end token is learned after them"),
            (data.untrained, "answers have weight 0 in the data and are not learned"),
            (data.truncated, f"examples were cut to {self.config.max_length} tokens"),
            (data.without_response, "conversations have no response token left and were dropped"),
            (data.unmarked_turns, "assistant turns carry no loss: the template renders them differently later on"),
        )
        notes = [f"{count} {text}" for count, text in counts if count]
        if len(data) < ADVISED_EXAMPLES // 5:
            notes.append(
                f"{len(data)} examples are few to learn from: {ADVISED_EXAMPLES:,} answers by the target itself are "
                "advised (outdraft regenerate)"
            )
        return notes


def prepare(target: Target, config: DrafterConfig) -> Preparation:
    """Read and tokenise the data, fill in the preset.

    Raises:
        UserError: settings that contradict each other or the target, or data that cannot be used.
    """
    config = fitted(target, config)
    refuse_missing_trackers(config)
    if config.data is None:
        raise UserError(NO_DATA)
    found = read_conversations(config.data, config.on_bad_line)
    if target.tokenizer is None:
        raise UserError("the target has no tokenizer; load it from a folder that has one, or pass a tokenizer")
    switches = check_switches(config.chat_template_kwargs)
    examples = tokenize(found, target.tokenizer, config.max_length, switches)
    largest = max(int(example.input_ids.max()) for example in examples.examples)
    if largest >= target.vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest}, the target knows {target.vocab_size}; use its own tokenizer"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Preparation(config, examples, found.skipped, processes, steps_of(config, len(examples), processes))


def refuse_missing_trackers(config: DrafterConfig) -> None:
    """Raise the UserError for a tracker of `report_to` that is unknown or not installed."""
    trackers = [name for name in config.report_to if name not in ("all", "none")]
    try:
        for tracker in get_reporting_integration_callbacks(trackers):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        said = first_line(error).rstrip(".")
        raise UserError(f"report_to {', '.join(config.report_to)}: {said}; or choose another") from error


def with_measured(ready: Preparation, measured: MeasuredSetting | None) -> Preparation:
    """Return the preparation with the values of a measured setting; None changes nothing."""
    if measured is None:
        return ready
    return replace(ready, config=ready.config.with_decided(**measured.settings), measured=measured)


def fitted(target: Target, config: DrafterConfig) -> DrafterConfig:
    """Return the configuration with its preset filled in, checked against the target."""
    by_hand = "max_length" in config.model_fields_set
    if target.backend != "eager":  # packed layers compute no gradients, and hide their weights
        raise UserError(f"a target on backend '{target.backend}' cannot train a drafter; load it with backend eager")
    if target.gathered_on is not None:
        raise UserError("a target in several places cannot train a drafter; share it among processes (torchrun, --tp)")
    config = config.with_preset(target.num_parameters)
    if config.max_length > target.context_length:
        if by_hand:
            raise UserError(
                f"max_length {config.max_length} exceeds the target's context of {target.context_length}; lower it"
            )
        config = config.with_decided(max_length=target.context_length)
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size {config.batch_size} does not split into {config.gradient_accumulation_steps} pieces; "
            "make it a multiple of gradient_accumulation_steps"
        )
    return config


def use_bf16(config: DrafterConfig, device: torch.device) -> bool:
    """Return True if the drafter trains in bf16 autocast on this device."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return default_dtype(device) == torch.bfloat16


def steps_of(config: DrafterConfig, examples: int, processes: int) -> int:
    """Return the number of optimizer steps of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    pieces = math.ceil(examples / (config.batch_size // config.gradient_accumulation_steps * processes))
    return max(1, math.ceil(config.epochs * math.ceil(pieces / config.gradient_accumulation_steps)))


def run_identity(target: Target, ready: Preparation) -> dict[str, Any]:
    """Return all facts that determine the final weights of a run."""
    settings = {key: value for key, value in ready.config.record().items() if key not in FREE}
    return {
        **settings,
        "total_steps": ready.total_steps,
        "processes": ready.processes,
        "target": weights_fingerprint(target),
        "data": ready.examples.fingerprint(),
    }


def refuse_another_run(folder: Path, resume: bool) -> None:
    """Raise the UserError for a folder that holds a run with a checkpoint, unless that run is resumed."""
    if not resume and (checkpoint := last_checkpoint(folder)) is not None:
        raise UserError(
            f"{folder} holds a run with {checkpoint.name}; go on with --resume, in Python with "
            "train(resume_from_checkpoint=True), or choose another --output-dir"
        )


def checkpoint_of(ready: Preparation, identity: dict[str, Any], resume: bool) -> Path | None:
    """Return the checkpoint in the output folder to resume from; None for a new run.

    Raises:
        UserError: the folder holds another run, or one that is not to be resumed.
    """
    folder = ready.config.output_dir
    refuse_another_run(folder, resume)
    checkpoint, record = last_checkpoint(folder), folder / RUN
    if checkpoint is None:
        return None
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{record} is missing or broken, so the run cannot be resumed; start in another folder"
        ) from None
    # A setting that the run's version did not have was at what is its default now, with a few exceptions.
    fields = DrafterConfig.model_fields
    defaults = {key: fields[key].default for key in identity.keys() & fields.keys()}
    before = {**defaults, **{key: BEFORE[key] for key in identity.keys() & BEFORE.keys()}, **before}
    for key, value in identity.items():
        if before.get(key) != value:
            raise UserError(
                f"{key} was {before.get(key)} in this run and is {value} now; resume with the same settings or "
                "choose another --output-dir"
            )
    return checkpoint


def new_drafter(target: Target, config: DrafterConfig) -> Network:
    """Build a drafter with initial float32 weights (of the seed, another drafter or the target) on the target's device.

    Args:
        config: the settings, with the preset filled in and the exit layer a number.
    """
    return method_called(config.method).new_network(target, config)


def objective_for(target: Target, config: DrafterConfig, drafter: Network | None = None) -> Objective:
    """Return the objective of the configuration's method; arguments as in `new_drafter`, `drafter` is to be trained."""
    return method_called(config.method).objective(target, config, drafter or new_drafter(target, config))
