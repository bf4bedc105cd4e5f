"""`DrafterTrainer`, the public way into training, which `outdraft train` calls, too.

It takes target and data in any form, keeps conversations out of training, has `training/train.py` train, and hands the
trained drafter on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from outdraft.api.loading import load_network, load_target, resolve_device, resolve_dtype
from outdraft.api.prompts import read_prompts
from outdraft.data.conversations import Conversation
from outdraft.data.records import json_lines
from outdraft.drafting.folder import CONFIG, WEIGHTS, push_to_hub
from outdraft.drafting.run_folder import last_checkpoint
from outdraft.errors import UserError
from outdraft.evaluation.rounds import TrainingVerdict, training_verdict
from outdraft.losses.objective import reader_of
from outdraft.losses.teacher import target_id
from outdraft.methods.checkpoint import Network
from outdraft.output import is_main_process, write_whole
from outdraft.target.named import base_of
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import HELD_OUT, beginnings, hold_out, tau_meter
from outdraft.training.plan import DeviceMemory, TrainPlan, device_memory, plan
from outdraft.training.preparation import NO_DATA, refuse_another_run, refuse_missing_trackers
from outdraft.training.train import CARD, TrainResult, train
from outdraft.training.trainer import keep_freed_memory

TAU_PROMPTS = 8
"""Held-out prompts that are decoded for tau; agreement is measured on all that is held out."""

DRAFTER_FILES = (CONFIG, WEIGHTS, "provenance.json", CARD)

Rows = str | Path | Iterable[Mapping[str, Any] | str]
"""A file, a folder or `hf:NAME`, or the rows themselves."""


class DrafterTrainer:
    """Trains a drafter for a model, saves it, and hands it on.

        trainer = outdraft.DrafterTrainer("M", outdraft.DrafterConfig(output_dir="drafter"), train_dataset=answers)
        trainer.train()
        model = outdraft.load("M", trainer.drafter)

    Args:
        model: the target: a folder, a GGUF file, a hub id, `smollm2` or `reference`, a loaded `transformers` model, or
            a `Target` on backend eager. A loaded model stays where it is; its weights are frozen.
        config: the settings of the run.
        train_dataset: the data, in place of `config.data`: a path as there, a list of dictionaries (`messages`,
            `conversations`, `prompt` and `completion`, `text`, ...) or of strings, which are texts, or a
            `datasets.Dataset`. Rows are kept in the output folder, so that a run can be resumed without them.
        eval_dataset: prompts that tau is measured on, in the same forms; in place of held-out conversations.
        tokenizer: where the model's folder has none; of a loaded model the one of its name when not given.
        callbacks: `transformers.TrainerCallback`s, told of every step and log entry, tau's among them.
        hold_out: so many of the last conversations, at most a tenth, are kept out of training and measured on.
        dtype: of the target, as in `load`.
        device: of the target, as in `load`.
        tp_plan: `auto` shares the target's layers among the processes of `torchrun`, as in `load`.
        console: where progress goes; stderr when not given.

    Raises:
        UserError: there is no data, or a setting cannot work.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | Target,
        config: DrafterConfig,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        hold_out: int = HELD_OUT,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        tp_plan: str | None = None,
        console: Console | None = None,
    ):
        data = config.data if train_dataset is None else train_dataset
        if data is None:
            raise UserError(NO_DATA)
        if train_dataset is not None and config.data is not None:
            raise UserError("both train_dataset and the configuration's data are given; leave one out")
        if not isinstance(hold_out, int) or hold_out < 0:
            raise UserError(f"--hold-out must be 0 or more conversations, not {hold_out}")
        if tokenizer is not None and isinstance(model, Target):
            raise UserError("a Target has its own tokenizer; leave tokenizer out, or give the model itself")
        self.model, self.config, self.tokenizer, self.callbacks = model, config, tokenizer, tuple(callbacks)
        self.hold_out, self.dtype, self.device, self.tp_plan = hold_out, dtype, device, tp_plan
        self.console = console or Console(stderr=True, highlight=False)
        self._data, self._eval = _repeatable(data), None if eval_dataset is None else _repeatable(eval_dataset)
        self._target: Target | None = None
        self._drafter: Network | None = None
        self._folder: Path | None = None  # of the trained drafter

    @property
    def target(self) -> Target:
        """The model that the drafter is trained for; loaded when first asked for."""
        if self._target is None:
            self._target = self._load()
        return self._target

    @property
    def drafter(self) -> Network:
        """The trained drafter, which `outdraft.load(model, trainer.drafter)` takes.

        Raises:
            UserError: nothing is trained yet.
        """
        if self._drafter is None:
            network: Any = load_network(self._trained(), self.target, device=self.target.device)
            self._drafter = network
        return self._drafter

    def memory(self) -> list[DeviceMemory]:
        """Tell what 1, 2, 4 and 8 devices need each, by the target's configuration alone; nothing is loaded.

        Raises:
            UserError: the configuration cannot be read, or the model cannot be a target.
        """
        if not isinstance(self.model, str | Path):
            return []
        dtype = resolve_dtype(self.dtype, resolve_device(self.device))
        return device_memory(self.model, self.config, dtype)

    @property
    def only_described(self) -> bool:
        """True if the target is a folder with a configuration and no weights."""
        folder = Path(self.model).expanduser() if isinstance(self.model, str | Path) else Path()
        files = [file for file in folder.glob("*.*") if file.suffix in (".safetensors", ".bin", ".gguf")]
        return (folder / CONFIG).is_file() and not files and base_of(folder) is None

    def plan(self) -> TrainPlan:
        """Tell what the run would cost: one step is timed, nothing is left on disk.

        Raises:
            UserError: settings, target or data that cannot work.
        """
        keep_freed_memory()
        refuse_missing_trackers(self.config)  # before the target is loaded
        with tempfile.TemporaryDirectory() as name:
            aside = Path(name)
            data, asked = self._files(aside)
            if asked is None:
                data = hold_out(Path(data), self.hold_out, self.config.on_bad_line).write(aside)
            return plan(self.target, self._on(data))

    def train(self, resume_from_checkpoint: bool = False) -> TrainResult:
        """Train, and save the drafter with its record and card in the output folder.

        Args:
            resume_from_checkpoint: go on from the folder's last checkpoint; begin where there is none.

        Returns:
            Steps, time, the last log entry, tau.

        Raises:
            UserError: settings, target or data that cannot work, or a folder that holds another run.
            KeyboardInterrupt: after Ctrl-C, once the running step is finished and saved.
        """
        keep_freed_memory()
        console = self.console if is_main_process() else Console(quiet=True)
        folder = self.config.output_dir / "data"
        data, asked = self._files(folder)
        refuse_missing_trackers(self.config)  # before the target is loaded
        refuse_another_run(self.config.output_dir, resume_from_checkpoint)
        begun_with, held_out = self._begun_with(data, asked), list[Conversation]()
        switches = self.config.chat_template_kwargs
        if asked is not None:
            beginning = beginnings(read_prompts(asked, max(self.hold_out, 1)), self.target, switches)
        else:
            split = hold_out(Path(data), self.hold_out, self.config.on_bad_line)
            beginning, held_out = beginnings(split.prompts, self.target, switches), split.held_out
            for note in split.notes:
                console.print(note, markup=False)
            data = split.write(folder)
        reader = reader_of(self.target)  # tau is measured where it is decoded, on the fast layers
        measure = tau_meter(reader, beginning[:TAU_PROMPTS])
        config, resume = self._on(data), resume_from_checkpoint
        result = train(self.target, config, resume, measure, console, held_out, self.callbacks, begun_with)
        self._folder, self._drafter, self._result = result.folder, None, (result, beginning[:TAU_PROMPTS])
        return result

    def verdict(self) -> TrainingVerdict | None:
        """Judge the trained drafter on this machine by its tau and timed rounds.

        Returns:
            None where no tau was measured, or where processes share the target.

        Raises:
            UserError: nothing is trained yet.
        """
        folder = self._trained()
        if self.target.shared:  # the first process alone cannot run it
            return None
        result, prompts = self._result
        reader = reader_of(self.target)
        return training_verdict(reader, folder, (result.tau or {}).get("tau"), result.best_step, prompts)

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Put the trained drafter, its record and its card into a folder; they are in the run's without this.

        Args:
            output_dir: made when absent; the run's own when not given.

        Returns:
            The folder.

        Raises:
            UserError: nothing is trained yet.
        """
        trained = self._trained()
        folder = trained if output_dir is None else Path(output_dir).expanduser()
        if folder.resolve() != trained.resolve() and is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            for name in DRAFTER_FILES:
                shutil.copy2(trained / name, folder / name)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the trained drafter, its record and its card to the Hugging Face Hub.

        Args:
            repo_id: `owner/name`; the repository is made when absent.
            private: True makes a new repository private.
            token: the Hub's; the one that is logged in with when not given.

        Returns:
            The address of the commit.

        Raises:
            UserError: nothing is trained yet, or the Hub refuses.
        """
        return push_to_hub(self._trained(), repo_id, private=private, token=token)

    def _trained(self) -> Path:
        if self._folder is None:
            raise UserError("there is no trained drafter yet; call train() first")
        return self._folder

    def _load(self) -> Target:
        """Load the target on the plain backend, for gradients go through its head; each process has its own device."""
        if isinstance(self.model, Target):
            return self.model
        device, words = self.device, self.tokenizer
        if isinstance(self.model, PreTrainedModel):
            words = words or self.model.name_or_path or None
        elif device is None and self.tp_plan is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        sharing: dict[str, Any] = {"tp_plan": self.tp_plan, "whole_ends": True}
        return load_target(self.model, words, dtype=self.dtype, device=device, backend="eager", **sharing)

    def _files(self, folder: Path) -> tuple[str | Path, str | Path | None]:
        """The paths of data and prompts; rows are written to `folder`."""
        data = self._file(self._data, folder / "given.jsonl")
        return data, None if self._eval is None else self._file(self._eval, folder / "given_eval.jsonl")

    def _file(self, rows: Rows, place: Path) -> str | Path:
        if isinstance(rows, str | Path):
            return rows
        text = json_lines(rows)
        if place.is_file() and place.read_text(encoding="utf-8") != text and last_checkpoint(self.config.output_dir):
            raise UserError(
                f"{self.config.output_dir} holds a run on other rows; give those of {place}, or choose "
                "another output_dir"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, text)
        return place

    def _on(self, data: str | Path) -> DrafterConfig:
        return self.config.model_copy(update={"data": Path(data)})

    def _begun_with(self, data: str | Path, asked: str | Path | None) -> dict[str, Any]:
        """The settings that `outdraft train` would have to be given for this run, from any folder."""
        config = self.config
        origins = {
            "model": self.model if isinstance(self.model, str | Path) else target_id(self.target),
            "data": data,
            "eval_data": asked,
            "feature_cache_dir": config.feature_cache_dir and config.feature_cache_dir.absolute(),
        }
        around = {"dtype": self.dtype, "device": self.device, "tp_plan": self.tp_plan}
        return {
            **config.model_dump(mode="json", include=config.model_fields_set - {"output_dir"}),
            **{name: _found_from_anywhere(place) for name, place in origins.items() if place is not None},
            **{name: str(value).removeprefix("torch.") for name, value in around.items() if value is not None},
            "hold_out": self.hold_out,
        }


def _repeatable(rows: Rows) -> Rows:
    """The rows in a form that can be read twice."""
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, rows))
        raise UserError(f"the data set is a dictionary of {keys}; give one of its splits, or a list of rows")
    return rows if isinstance(rows, str | Path | Sized) else list(rows)


def _found_from_anywhere(place: str | Path) -> str:
    """The path in full where something lies there; names and hub ids as they are."""
    path = Path(place).expanduser()
    return str(path.resolve() if path.exists() else place)
