"""`train`: from a target, data and settings to a folder with a trained drafter and the record of how it was made.

The caller passes the function that measures the real acceptance length.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from outdraft.data.conversations import Conversation
from outdraft.data.provenance import peak_memory_bytes, portable, provenance
from outdraft.drafting.run_folder import BEGUN_WITH, RUN, step_of
from outdraft.errors import UserError
from outdraft.losses.objective import Objective, TrainingExamples
from outdraft.losses.teacher import shown_target
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.registry import method_called
from outdraft.output import write_whole
from outdraft.target.ranks import leave_group_at_exit
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import GIGABYTE, FeatureStore, feature_store
from outdraft.training.held_out import BestWeights, MeasureTau, TauMeter, measurement
from outdraft.training.preparation import (
    Preparation,
    checkpoint_of,
    new_drafter,
    objective_for,
    prepare,
    run_identity,
    with_measured,
)
from outdraft.training.progress import ProgressReport, ReadingReport
from outdraft.training.trainer import ObjectiveTrainer, training_arguments

try:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
except ModuleNotFoundError as error:
    raise UserError("training needs the package's train extra; pip install 'outdraft[train]'") from error

CARD = "README.md"
"""The name of the model card in a drafter's folder."""

NOT_SHOWN = {
    *("data", "output_dir", "feature_cache_dir", "report_to", "logging_steps", "save_steps", "save_total_limit")
}
"""Settings that do not change how the drafter was trained, and that its card leaves out."""

SAME_WISH_SECONDS = 1.0
"""The time within which two signals count as one request."""


@dataclass
class TrainResult:
    """The outcome of a finished run."""

    folder: Path
    """The drafter's folder: `config.json`, `model.safetensors`, `provenance.json`, and its card in `README.md`."""
    steps: int
    """The number of optimizer steps; fewer than planned where patience ended the run."""
    seconds: float
    """The wall-clock time of this process, data and measurement included."""
    peak_memory_bytes: int
    metrics: dict[str, float]
    """The last log entry: loss, loss_reg, loss_cls, acc, learning_rate."""
    tau: dict[str, float] | None
    """The held-out metrics of the saved drafter."""
    best_step: int
    """The step whose weights are saved: the last one, unless an earlier one did better on the held-out data."""


def train(
    target: Target,
    config: DrafterConfig,
    resume: bool = False,
    measure_tau: MeasureTau | None = None,
    console: Console | None = None,
    held_out: Sequence[Conversation] = (),
    callbacks: Sequence[TrainerCallback] = (),
    begun_with: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a drafter for `target` (arXiv 2408.15562 or 2406.03853) and save it to `config.output_dir`.

    It runs in a single process, or in each of `torchrun` / `accelerate launch`. Every process trains the drafter on
    batches of its own; the target is whole in each, or its layers are shared among them (`Target.shared`).

    Args:
        target: stays as it is; its weights are frozen.
        config: the settings; the preset fills what was not set by hand.
        resume: go on from the last whole checkpoint of the output folder; begins anew when there is none.
        measure_tau: called with the drafter every `eval_steps` and at the end.
        console: where progress goes; stderr when not given.
        held_out: conversations that are not trained on, with answers: top-1 agreement on them is measured beside tau,
            and the weights that did best on them are the ones that are saved.
        callbacks: callbacks of `transformers`, called for every step and log entry.
        begun_with: settings that the run's folder keeps for whoever resumes it.

    Raises:
        UserError: settings, data or folder that cannot work.
        KeyboardInterrupt: after Ctrl-C, once the running step is finished and saved.
    """
    began = time.perf_counter()
    console = console or Console(stderr=True)
    ready = prepare(target, config)
    config = ready.config
    target.model.eval().requires_grad_(False)
    args = training_arguments(config, target.device, ready.total_steps)
    if target.device.type != args.device.type or (target.device.index or 0) != (args.device.index or 0):
        raise UserError(
            f"the target is on {target.device}, this process trains on {args.device}; load the target with "
            f"device={args.device}"
        )
    shared = target.shared
    if not args.should_save:
        console = Console(quiet=True)
    for note in ready.notes:
        console.print(note, highlight=False)
    ready = _measured(target, ready, resume, console)
    config = ready.config
    drafter = new_drafter(target, config)
    method_called(config.method).adapt(drafter, ready.examples)
    objective = objective_for(target, config, drafter)
    identity = run_identity(target, ready)
    checkpoint = checkpoint_of(ready, identity, resume)
    if checkpoint is not None:
        console.print(f"going on from {checkpoint.name} of {ready.total_steps} steps", highlight=False)
    elif resume:
        console.print("no checkpoint yet: beginning at step 0", highlight=False)
    PartialState().wait_for_everyone()  # nobody writes before all have read
    if checkpoint is None and args.should_save:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(config.output_dir / RUN, {**identity, **_measured_record(ready), BEGUN_WITH: begun_with or {}})
    store = feature_store(target, ready, objective)
    if store is not None:
        _read_target(store, ready, args, console)

    stop, progress = OrderlyStop(), ProgressReport(console)
    best = BestWeights(config.output_dir, objective.drafter, config.patience)
    measure = measurement(objective, measure_tau, held_out, target.tokenizer, config)
    if checkpoint is not None:
        best.resume()
    elif args.should_save:
        best.forget()
    meter = TauMeter(measure, config.evaluation_for(ready.total_steps), best, shared) if measure else None
    trainer = ObjectiveTrainer(
        objective,
        config,
        TrainingExamples(ready.examples, None if store is None else store.__getitem__),
        args,
        callbacks=[*([meter] if meter else []), progress, *callbacks, stop],  # stop sees a Ctrl-C during any of them
    )
    if meter is not None:
        meter.log = trainer.log
    leave_group_at_exit()
    _run(trainer, checkpoint, stop, progress, ended=checkpoint is not None and best.out_of_patience)

    tau, step = None, trainer.state.global_step
    if meter is not None and (args.should_save or shared):
        tau, restored = meter.last()
        if restored:
            step = best.step
            console.print(f"the weights of step {step} did best on what is held out: they are saved", highlight=False)
    result = TrainResult(
        folder=config.output_dir,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - began,
        peak_memory_bytes=peak_memory_bytes(target.device),
        metrics=next((dict(entry) for entry in reversed(trainer.state.log_history) if "loss" in entry), {}),
        tau=tau,
        best_step=step,
    )
    if args.should_save:
        _save(target, ready, objective, result, checkpoint)
    PartialState().wait_for_everyone()
    return result


def _measured(target: Target, ready: Preparation, resume: bool, console: Console) -> Preparation:
    """Decide a setting that is left open once for all processes: as an interrupted run did, else by measurement."""
    record: dict[str, Any] = {}
    if resume:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((ready.config.output_dir / RUN).read_text())
    method = method_called(ready.config.method)
    main = PartialState().is_main_process or target.shared
    found = [method.measure(target, ready.config, ready.examples, record) if main else None]
    measured = broadcast_object_list(found)[0]
    if measured is not None:
        measured.show(console)
    return with_measured(ready, measured)


def _measured_record(ready: Preparation) -> dict[str, Any]:
    measured: Any = ready.measured
    return {} if measured is None else {method_called(ready.config.method).measured: asdict(measured)}


def _read_target(store: FeatureStore, ready: Preparation, args: TrainingArguments, console: Console) -> None:
    """Fill the store with the missing examples, in the first process; the others wait."""
    store.check_budget(ready.examples, ready.config.feature_cache_gb)
    missing = store.missing(ready.examples)
    if missing and args.should_save:
        size = store.nbytes(missing) / GIGABYTE
        console.print(f"features: {size:.3f} GB for {len(missing)} of {len(ready.examples)} examples", highlight=False)
        try:
            with ReadingReport(console, len(missing), sum(map(len, missing))) as report:
                store.build(ready.examples, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped before the first step; what was read is kept, {_resuming(args)}"
            ) from None
    PartialState().wait_for_everyone()
    store.reload()


def _run(
    trainer: ObjectiveTrainer, checkpoint: Path | None, stop: OrderlyStop, progress: ProgressReport, ended: bool
) -> None:
    """Run the training loop; it ends with the final weights in the drafter, or KeyboardInterrupt after a checkpoint."""
    total = trainer.args.max_steps
    if checkpoint is not None and (ended or step_of(checkpoint) >= total):
        trainer.load_finished(checkpoint)
        return
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    if stop.asked and trainer.state.global_step < total:
        step = trainer.state.global_step
        raise KeyboardInterrupt(f"stopped; step {step} of {total} is saved, {_resuming(trainer.args)}")


def _resuming(args: TrainingArguments) -> str:
    """Return the half-sentence that says how a stopped run goes on."""
    return f"go on with `outdraft train --resume --output-dir {args.output_dir}`"


def _save(target: Target, ready: Preparation, objective: Objective, result: TrainResult, resumed: Path | None) -> None:
    settings = portable(ready.config.record())
    summary = {"config": settings, "metrics": result.metrics, "tau": result.tau, "weights_of_step": result.best_step}
    name, facts, drafter = shown_target(target), target_facts(target.model), objective.finished()
    save_drafter(result.folder, drafter, target_id=name, training=summary, target=facts)
    record = provenance(
        target=name,
        parameters=sum(weight.numel() for weight in drafter.parameters() if weight.requires_grad),
        config=settings,
        data_sha256=ready.examples.fingerprint(),
        examples=len(ready.examples),
        tokens=ready.examples.tokens,
        processes=ready.processes,
        steps=result.steps,
        resumed_from=resumed.name if resumed else None,
        seconds=result.seconds,
        peak_memory_bytes=result.peak_memory_bytes,
        metrics=result.metrics,
        tau=result.tau,
        **_measured_record(ready),
    )
    _write_json(result.folder / "provenance.json", record)
    write_whole(result.folder / CARD, _card(record))


def _card(record: Mapping[str, Any]) -> str:
    """Return the model card, made from the provenance record and nothing else."""
    config, target, tau = record["config"], str(record["target"]), record["tau"] or {}
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", target)  # the Hub refuses any other name
    tags = ["speculative-decoding", config["method"]]
    card = ModelCard.from_template(
        ModelCardData(library_name="outdraft", base_model=target if on_hub else None, tags=tags),
        str(Path(__file__).parent / "model_card.md.j2"),
        **{**record, "tau": tau},
        card=method_called(config["method"]).card,
        settings={name: value for name, value in config.items() if name not in NOT_SHOWN and value is not None},
        agreement=[tau[name] for k in range(1, 17) if (name := f"held_out_top1_{k}") in tau],
    )
    return str(card)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


class OrderlyStop(TrainerCallback):
    """A callback for Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A context manager; outside the main thread, where signals cannot be caught, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> OrderlyStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # A launcher forwards the Ctrl-C that the terminal has sent already: that is one wish, not two.
        if self.asked and number == signal.SIGINT and now - self._asked_at > SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # all processes must stop at the same step
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(flag)
        if self.asked:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:  # a short run's figures are those of its end
            control.should_log = True
