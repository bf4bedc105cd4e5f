"""From a target and a configuration to what a run needs: settings, data, steps. Shared by `train` and `plan`.

Trains nothing and writes nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import ExampleSet, tokenize
from outdraft.errors import UserError
from outdraft.losses.target_like import TargetLike, parameter_count
from outdraft.methods.eesd.exit_choice import ExitChoice
from outdraft.training.config import DrafterConfig

NO_DATA = "training needs data; give --data a file or folder, DrafterTrainer a train_dataset"

ADVISED_EXAMPLES = 5000
"""Conversations from which drafters learn well; a fifth of them is few."""


@dataclass
class Preparation:
    """Everything decided before the first step."""

    config: DrafterConfig
    """With the preset filled in."""
    examples: ExampleSet
    skipped: list[str]
    """Lines of the data that were left out, with the reason."""
    processes: int
    total_steps: int
    choice: ExitChoice | None = None
    """How the exit layer was chosen where it was left to us."""

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data, a line each."""
        data = self.examples
        counts = (
            (len(self.skipped), f"lines could not be used (first: {self.skipped[0] if self.skipped else ''})"),
            (len(data.refused), f"conversations were left out (first: {data.refused[0] if data.refused else ''})"),
            (data.cut_answers, "answers were cut off before their end, and no end token is learned after them"),
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


def prepare(target: TargetLike, config: DrafterConfig) -> Preparation:
    """Read and tokenise the data, fill in the preset.

    Raises:
        UserError: settings that contradict each other or the target, or data that cannot be used.
    """
    config = fitted(target, config)
    if config.data is None:
        raise UserError(NO_DATA)
    found = read_conversations(config.data, config.on_bad_line)
    if target.tokenizer is None:
        raise UserError("the target has no tokenizer; load it from a folder that has one, or pass a tokenizer")
    examples = tokenize(found, target.tokenizer, config.max_length)
    largest = max(int(example.input_ids.max()) for example in examples.examples)
    if largest >= target.vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest}, the target knows {target.vocab_size}; use its own tokenizer"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Preparation(
        config,
        examples,
        found.skipped,
        processes,
        steps_of(config, len(examples), processes),
    )


def at_exit(ready: Preparation, choice: ExitChoice) -> Preparation:
    """The same with the layer that was chosen, and why among the notes."""
    config = ready.config
    settled = DrafterConfig.model_construct(
        _fields_set=set(config.model_fields_set), **{**dict(config), "exit_layer": choice.layer}
    )
    return replace(ready, config=settled, choice=choice)


def fitted(target: TargetLike, config: DrafterConfig) -> DrafterConfig:
    """The configuration with its preset, checked against the target."""
    by_hand = "max_length" in config.model_fields_set
    if getattr(target, "backend", "eager") != "eager":  # packed layers compute no gradients, and hide their weights
        raise UserError(f"a target on backend '{target.backend}' cannot train a drafter; load it with backend eager")  # type: ignore[attr-defined]
    config = config.with_preset(parameter_count(target))
    if config.max_length > target.context_length:
        if by_hand:
            raise UserError(
                f"max_length {config.max_length} exceeds the target's context of {target.context_length}; lower it"
            )
        config = DrafterConfig.model_construct(
            _fields_set=set(config.model_fields_set), **{**dict(config), "max_length": target.context_length}
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size {config.batch_size} does not split into {config.gradient_accumulation_steps} pieces; "
            "make it a multiple of gradient_accumulation_steps"
        )
    return config


def steps_of(config: DrafterConfig, examples: int, processes: int) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    pieces = math.ceil(examples / (config.batch_size // config.gradient_accumulation_steps * processes))
    return max(1, math.ceil(config.epochs * math.ceil(pieces / config.gradient_accumulation_steps)))
