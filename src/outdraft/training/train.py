"""`train`: from a target, data and settings to a folder with a trained drafter and the record of how it was made.

Ties the rooms of training together; every decision is made in one of them. Does not know how a drafter decodes: the
real acceptance length is measured by a function that is handed in.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from outdraft.data.conversations import Conversation
from outdraft.data.provenance import peak_memory_bytes, portable, provenance
from outdraft.data.tokenization import tokenize
from outdraft.drafting.run_folder import BEGUN_WITH, RUN, last_checkpoint, step_of
from outdraft.errors import UserError
from outdraft.losses.features import TrainingExamples, weights_fingerprint
from outdraft.losses.objective import Objective
from outdraft.losses.target_like import TargetLike, shown_target
from outdraft.methods.checkpoint import Network, save_drafter, target_facts
from outdraft.methods.eesd.exit_choice import ExitChoice, choose_exit
from outdraft.methods.registry import method_called
from outdraft.training.callbacks import MeasureTau, OrderlyStop, ProgressReport, ReadingReport, TauMeter, measured
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import GIGABYTE, FeatureStore, feature_store
from outdraft.training.held_out_loss import CHAIN, BestWeights, HeldOut
from outdraft.training.model_card import CARD, model_card
from outdraft.training.objective import new_drafter, objective_for
from outdraft.training.preparation import Preparation, at_exit, prepare
from outdraft.training.trainer import ObjectiveTrainer, training_arguments

try:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
except ModuleNotFoundError as error:
    raise UserError("training needs the package's train extra; pip install 'outdraft[train]'") from error

CHOICE = "exit_choice"

BEFORE = {"embedding_scale": 1.0, "teacher_top_k": 0}
"""What runs did whose version did not have these settings, where that is not their default."""

# What may change between a run and its resumption without changing how it trains.
FREE = {
    "data", "output_dir", "on_bad_line", "preset", "epochs", "features", "feature_cache_gb", "feature_cache_dir",
    "save_steps", "save_total_limit", "logging_steps", "eval_steps", "patience", "report_to",
}  # fmt: skip


@dataclass
class TrainResult:
    """What a finished run leaves."""

    folder: Path
    """The drafter: `config.json`, `model.safetensors`, `provenance.json`, and its card in `README.md`."""
    steps: int
    """Optimizer steps that were made: fewer than planned where patience has ended the run."""
    seconds: float
    """Wall-clock of this process, data and measurement included."""
    peak_memory_bytes: int
    metrics: dict[str, float]
    """The last log entry: loss, loss_reg, loss_cls, acc, learning_rate."""
    tau: dict[str, float] | None
    """What was measured of the drafter that is saved."""
    best_step: int
    """The step whose weights are saved: the last one, unless an earlier did better on what is held out."""


def train(
    target: TargetLike,
    config: DrafterConfig,
    resume: bool = False,
    measure_tau: MeasureTau | None = None,
    console: Console | None = None,
    held_out: Sequence[Conversation] = (),
    callbacks: Sequence[TrainerCallback] = (),
    begun_with: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a drafter for `target` (arXiv 2408.15562 or 2406.03853) and save it to `config.output_dir`.

    Works alone or in every process of `torchrun` / `accelerate launch`; each then holds its own target.

    Args:
        target: stays as it is; its weights are frozen.
        config: the settings; the preset fills what was not set by hand.
        resume: go on from the last whole checkpoint of the output folder; begins anew when there is none.
        measure_tau: called with the drafter every `eval_steps` and at the end.
        console: where progress goes; stderr when not given.
        held_out: conversations that are not trained on, with answers: top-1 agreement on them is measured beside tau,
            and the weights that did best on them are the ones that are saved.
        callbacks: of `transformers`, told of every step and log entry.
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
    _check_devices(target, args)
    if not args.should_save:
        console = Console(quiet=True)
    for note in ready.notes:
        console.print(note, highlight=False)
    if config.exit_layer == "auto":
        ready = at_exit(ready, _exit_choice(target, ready, resume, console))
        config = ready.config
    drafter = new_drafter(target, config)
    method_called(config.method).adapt(drafter, ready.examples)
    objective = objective_for(target, config, drafter)
    checkpoint = _claim_folder(target, ready, resume, args, console, begun_with or {})
    store = feature_store(target, ready, objective)
    if store is not None:
        _read_target(store, ready, args, console)

    stop, progress = OrderlyStop(), ProgressReport(console)
    best = BestWeights(config.output_dir, objective.drafter, config.patience)
    measure = _measurement(target, ready, objective, measure_tau, held_out)
    if checkpoint is not None:
        best.resume()
    elif args.should_save:
        best.forget()
    meter = TauMeter(measure, objective.drafter, config.evaluation_for(ready.total_steps), best) if measure else None
    trainer = ObjectiveTrainer(
        objective,
        config,
        TrainingExamples(ready.examples, None if store is None else store.__getitem__),
        args,
        callbacks=[*([meter] if meter else []), progress, *callbacks, stop],  # stop sees a Ctrl-C during any of them
    )
    if meter is not None:
        meter.log = trainer.log
    _leave_group_at_exit()
    _run(trainer, checkpoint, stop, progress, console, ended=checkpoint is not None and best.out_of_patience)

    tau, step = None, trainer.state.global_step
    if args.should_save:
        if measure is not None:
            tau, step = _final(measure, best, trainer, console)
        metrics = next((dict(entry) for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
        result = TrainResult(
            folder=config.output_dir,
            steps=trainer.state.global_step,
            seconds=time.perf_counter() - began,
            peak_memory_bytes=peak_memory_bytes(target.device),
            metrics=metrics,
            tau=tau,
            best_step=step,
        )
        _save(target, ready, objective, result, checkpoint)
    else:
        seconds, peak = time.perf_counter() - began, peak_memory_bytes(target.device)
        result = TrainResult(config.output_dir, ready.total_steps, seconds, peak, {}, None, step)
    PartialState().wait_for_everyone()
    return result


def _measurement(
    target: TargetLike,
    ready: Preparation,
    objective: Objective,
    measure_tau: MeasureTau | None,
    conversations: Sequence[Conversation],
) -> MeasureTau | None:
    """All that is measured on what is held out; None where nothing is."""
    tokenizer: Any = target.tokenizer
    spoken = [
        one for one in conversations if one.text is not None or any(m["role"] == "assistant" for m in one.messages)
    ]
    held = None
    with contextlib.suppress(UserError):  # none is left within the length of training: then nothing is measured on them
        held = HeldOut(objective, tokenize(spoken, tokenizer, ready.config.max_length)) if spoken else None
    if measure_tau is None and held is None:
        return None

    def measure(network: Network) -> dict[str, float]:
        found = measure_tau(objective.finished()) if measure_tau is not None else {}
        return {**found, **(held.measure() if held is not None else {})}

    return measure


def _final(
    measure: MeasureTau, best: BestWeights, trainer: ObjectiveTrainer, console: Console
) -> tuple[dict[str, float], int]:
    """What is said of the weights that are saved, the last ones or better ones of before, and their step."""
    drafter = best.drafter
    found = measured(measure, drafter)  # type: ignore[arg-type]
    trainer.log(dict(found))
    if found.get(CHAIN, 0.0) < best.score:
        best.restore()
        found = measured(measure, drafter)  # type: ignore[arg-type]
        console.print(f"the weights of step {best.step} did best on what is held out: they are saved", highlight=False)
        return found, best.step
    return found, trainer.state.global_step


def _leave_group_at_exit() -> None:
    """Several processes part in order: one that ends with its group's threads still running aborts, and the launcher
    then calls a finished training a failure."""
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_devices(target: TargetLike, args: TrainingArguments) -> None:
    if target.device.type != args.device.type or (target.device.index or 0) != (args.device.index or 0):
        raise UserError(
            f"the target is on {target.device}, this process trains on {args.device}; load the target with "
            f"device={args.device}"
        )


def _exit_choice(target: TargetLike, ready: Preparation, resume: bool, console: Console) -> ExitChoice:
    """Where to exit: what this run has chosen before it was interrupted, else measured, once for all processes."""
    choice: ExitChoice | None = None
    if resume:
        try:
            choice = ExitChoice.recorded(json.loads((ready.config.output_dir / RUN).read_text())[CHOICE])
        except (OSError, ValueError, KeyError, TypeError):
            choice = None  # a run that has not got that far, or whose layer was set by hand
    if choice is None:
        found = [choose_exit(target, ready.examples) if PartialState().is_main_process else None]
        choice = broadcast_object_list(found)[0]
    assert choice is not None
    choice.show(console)
    return choice


def _claim_folder(
    target: TargetLike,
    ready: Preparation,
    resume: bool,
    args: TrainingArguments,
    console: Console,
    begun_with: Mapping[str, Any],
) -> Path | None:
    """The checkpoint to go on from; a folder that holds another run is never overwritten."""
    folder = ready.config.output_dir
    checkpoint, record = last_checkpoint(folder), folder / RUN
    if checkpoint is not None and not resume:
        raise UserError(
            f"{folder} holds a run with {checkpoint.name}; go on with --resume or choose another --output-dir"
        )
    identity = _identity(target, ready)
    if checkpoint is not None:
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
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            key = changed[0]
            raise UserError(
                f"{key} was {before.get(key)} in this run and is {identity[key]} now; resume with the same settings or "
                "choose another --output-dir"
            )
        console.print(f"going on from {checkpoint.name} of {ready.total_steps} steps", highlight=False)
    elif resume:
        console.print("no checkpoint yet: beginning at step 0", highlight=False)
    PartialState().wait_for_everyone()  # nobody writes before all have read
    if checkpoint is None and args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(record, {**identity, **_choice_record(ready), BEGUN_WITH: begun_with})
    return checkpoint


def _identity(target: TargetLike, ready: Preparation) -> dict[str, Any]:
    """What decides the final weights."""
    settings = {key: value for key, value in ready.config.record().items() if key not in FREE}
    return {
        **settings,
        "total_steps": ready.total_steps,
        "processes": ready.processes,
        "target": weights_fingerprint(target),
        "data": ready.examples.fingerprint(),
    }


def _choice_record(ready: Preparation) -> dict[str, Any]:
    return {} if ready.choice is None else {CHOICE: asdict(ready.choice)}


def _read_target(store: FeatureStore, ready: Preparation, args: TrainingArguments, console: Console) -> None:
    """Fill the store with what it lacks, in the first process; the others wait."""
    store.check_budget(ready.examples, ready.config.feature_cache_gb)
    missing = store.missing(ready.examples)
    if missing and args.should_save:
        size = store.nbytes(missing) / GIGABYTE
        console.print(f"features: {size:.3f} GB for {len(missing)} of {len(ready.examples)} examples", highlight=False)
        with ReadingReport(console, len(missing), sum(map(len, missing))) as report:
            store.build(ready.examples, report)
    PartialState().wait_for_everyone()
    store.reload()


def _run(
    trainer: ObjectiveTrainer,
    checkpoint: Path | None,
    stop: OrderlyStop,
    progress: ProgressReport,
    console: Console,
    ended: bool,
) -> None:
    """The loop itself; ends with the final weights in the drafter, or with KeyboardInterrupt after a checkpoint."""
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
        console.print(
            f"stopped; step {trainer.state.global_step} of {total} is saved, go on with --resume", highlight=False
        )
        raise KeyboardInterrupt


def _save(
    target: TargetLike, ready: Preparation, objective: Objective, result: TrainResult, resumed: Path | None
) -> None:
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
        **_choice_record(ready),
    )
    _write_json(result.folder / "provenance.json", record)
    _write(result.folder / CARD, model_card(record))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
