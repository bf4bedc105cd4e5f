"""`transformers.Trainer` for a drafter: the objective's loss, clipping by value, whole checkpoints, and batches that
give the same step however they are split over pieces and processes.

Every random number comes from (seed, step, example): no global generator is read after the first weights, so a run
that is killed and resumed ends in the same bits.

A batch is computed in groups of examples of like length, so that little work goes to padding. Its loss is a sum over
positions, so the same sums come out however it is divided, rounded differently.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from outdraft.drafting.folder import WEIGHTS
from outdraft.drafting.run_folder import PARTIAL, publish
from outdraft.losses.objective import Objective, TrainingExamples, collate
from outdraft.losses.teacher import shown_target
from outdraft.methods.checkpoint import UNFOLDED, Network, save_drafter, target_facts
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import use_bf16

GROUPS = "groups"

GROUP_COST = {"cpu": 128, "cuda": 1024}
"""The fixed cost of a forward and backward, in tokens: all weights are read once more, and a GPU needs that many rows
to be busy. The values are estimates, not tuned."""

# Parameters of glibc's mallopt(3) and their values: no mapped blocks, nothing given back, much asked for at once.
KEEP_FREED = {-4: 0, -1: 2**31 - 1, -2: 2**28}


class ObjectiveTrainer(Trainer):
    """A Trainer of a drafter on the features of its target.

    Args:
        objective: the drafter with its loss; only the drafter's weights train and are saved. Its target is in every
            process, never wrapped, never changed.
        args: from `training_arguments`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        config: DrafterConfig,
        data: TrainingExamples,
        args: TrainingArguments,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.objective: Objective = objective
        self.config = config
        self._sums: dict[str, Tensor] = {}
        super().__init__(
            model=objective.loss,
            args=args,
            data_collator=self._in_groups,
            train_dataset=data,
            callbacks=[ClipByValue(config.clip_value), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)

    # --- batches -----------------------------------------------------------------------------------------------

    def _in_groups(self, items: Sequence[dict[str, object]]) -> dict[str, list[dict[str, Tensor]]]:
        """Divide a batch into groups of examples of like length, each padded to its own, or leave it one group."""
        shared = self.objective.reading.target.shared  # processes run its layers equally often
        if not self.config.length_groups or shared:
            return {GROUPS: [collate(items)]}
        lengths = [len(item["example"]) for item in items]  # type: ignore[arg-type]
        cost = GROUP_COST.get(self.args.device.type, GROUP_COST["cuda"])
        divided = groups_of_like_length(lengths, cost)
        return {GROUPS: [collate([items[i] for i in group]) for group in divided]}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of a batch group by group; processes exchange them with the last."""
        *groups, last = inputs[GROUPS]
        loss = torch.zeros((), device=self.args.device)
        for group in groups:
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, group, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    # --- the loss ----------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Count the positions of the whole step that carry loss, over all pieces and processes."""
        groups = [group for batch in batch_samples for group in batch[GROUPS]]
        counts = [self.objective.counted(group["loss_mask"]).sum() for group in groups]
        count = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        return self.accelerator.reduce(count, reduction="sum") if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute this group's share of the step's mean loss."""
        ids, lengths = inputs["input_ids"], inputs["lengths"]
        features = inputs["features"] if "features" in inputs else self.objective.reading(ids, lengths)
        progress = self.state.global_step / self.args.max_steps
        sums = model(*self.objective.arguments(inputs, features, self.state.global_step, progress))
        for name, part in sums._asdict().items():
            self._sums[name] = self._sums.get(name, 0.0) + part.detach().double()  # on its device, without a sync
        count = torch.as_tensor(sums.positions if num_items_in_batch is None else num_items_in_batch)
        # The gradients of several processes are averaged: the factor turns their mean into a sum.
        loss = self.objective.total(sums, progress) * (self.args.world_size / count.clamp(min=1))
        return (loss, sums) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the top-1 agreement since the last entry to a training entry."""
        if "loss" in logs and self._sums:
            sums = torch.stack(list(self._sums.values())).float().to(self.args.device)
            sums = self.accelerator.reduce(sums, reduction="sum") if self.args.world_size > 1 else sums
            found = dict(zip(self._sums, sums.tolist(), strict=True))
            if positions := found["positions"]:
                logs |= {name: found[part] / positions for name, part in self.objective.parts.items()}
                logs["acc"] = found["agreed"] / positions
            self._sums.clear()
        super().log(logs, start_time)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Return the temporary folder of a checkpoint; `_save_checkpoint` publishes it."""
        return str(self.config.output_dir / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(self.config.output_dir, f"checkpoint-{self.state.global_step}", self.config.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the weights in training as a drafter's folder, so that a checkpoint can be tried."""
        target, about = self.objective.target, {"step": self.state.global_step, UNFOLDED: self.objective.scale}
        place, facts = output_dir or self.config.output_dir, target_facts(target.model)
        save_drafter(place, self._drafter, target_id=shown_target(target), training=about, target=facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._drafter.load_stored(safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def load_finished(self, checkpoint: Path) -> None:
        """Load weights and log of a run that has finished its steps."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    @property
    def _drafter(self) -> Network:
        return self.accelerator.unwrap_model(self.model).drafter


class ClipByValue(TrainerCallback):
    """A callback that clips every entry of the gradient, as published; the Trainer itself clips norms only."""

    def __init__(self, value: float):
        self.value = value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.value > 0:
            torch.nn.utils.clip_grad_value_(model.parameters(), self.value)


def groups_of_like_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Divide rows so that the sum of padded tokens and of `cost` for every group is least.

    Args:
        lengths: tokens of every row.
        cost: cost of one more group, in tokens.

    Returns:
        Indices into `lengths`, every one once; the longest rows come first, so that the most memory is held at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # least[n]: the least sum for the n longest rows, and where their last group begins. In sorted order a group is a
    # stretch, whose padded length is that of its first row.
    least: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        options = ((least[begin][0] + cost + (end - begin) * lengths[order[begin]], begin) for begin in range(end))
        least.append(min(options))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        begin = least[end][1]
        groups.append(order[begin:end])
        end = begin
    return groups[::-1]


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks in this process from now on; return False where the allocator cannot be set.

    By default glibc returns large blocks to the system, so that every layer of every step has its pages mapped and
    cleared anew; training and prefill on a CPU spend a tenth of their time or more on that.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    told = [mallopt(parameter, value) == 1 for parameter, value in KEEP_FREED.items()]
    return all(told)


def training_arguments(config: DrafterConfig, device: torch.device, total_steps: int) -> TrainingArguments:
    """Return the Trainer's arguments for a configuration with its preset filled in.

    Raises:
        UserError: a tracker that is unknown or not installed.
    """
    args = TrainingArguments(
        output_dir=str(config.output_dir),
        per_device_train_batch_size=config.batch_size // config.gradient_accumulation_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=total_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule),
        warmup_steps=config.warmup_for(total_steps),
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        weight_decay=config.weight_decay,
        optim="adamw_torch",
        max_grad_norm=0.0,
        bf16=use_bf16(config, device),
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None,  # rotation is ours: a checkpoint is deleted only when its successor is whole
        logging_steps=config.logging_steps,
        logging_first_step=True,
        report_to=config.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        label_names=[],
        log_level="error",
    )
    _ = args.device  # several visible GPUs in one process would mean DataParallel, which cannot add up our sums
    args._n_gpu = min(args.n_gpu, 1)
    return args
