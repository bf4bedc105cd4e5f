"""`outdraft train`: its flags, and how the result is shown. The run itself is in `training.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.output import print_json, remarks, results


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Any setting as key=value; an unknown one is answered with the nearest that there is."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.TARGET)] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; key=value and flags override it.")
    ] = None,
    data: Annotated[Path | None, o.training("data")] = None,
    output_dir: Annotated[Path | None, o.training("output_dir")] = None,
    method: Annotated[str | None, o.training("method")] = None,
    exit_layer: Annotated[str | None, o.training("exit_layer")] = None,
    init_from: Annotated[str | None, o.training("init_from")] = None,
    own_head: Annotated[bool, typer.Option("--own-head", help=o.TRAINING["own_head"])] = False,
    loss: Annotated[str | None, o.training("loss")] = None,
    preset: Annotated[str | None, o.training("preset")] = None,
    max_length: Annotated[int | None, o.training("max_length")] = None,
    max_steps: Annotated[int | None, o.training("max_steps")] = None,
    epochs: Annotated[float | None, o.training("epochs")] = None,
    batch_size: Annotated[int | None, o.training("batch_size")] = None,
    learning_rate: Annotated[float | None, o.training("learning_rate")] = None,
    seed: Annotated[int | None, o.training("seed")] = None,
    on_bad_line: Annotated[str | None, o.training("on_bad_line")] = None,
    report_to: Annotated[list[str] | None, o.training("report_to")] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval-data", help="Prompts to measure tau on (the first 8), in place of held-out conversations."
        ),
    ] = None,
    hold_out: Annotated[
        int | None, typer.Option("--hold-out", help="Last conversations kept out of training and measured on (32).")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last checkpoint of --output-dir, with the settings it was begun with."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time; train nothing.")] = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Train a drafter for a model."""
    from outdraft.console.settings import read_settings
    from outdraft.console.training import trainer_of
    from outdraft.drafter_trainer import is_main_process

    settings = read_settings(
        config,
        overrides or [],
        model=model,
        data=data,
        output_dir=output_dir,
        method=method,
        exit_layer=exit_layer,
        init_from=init_from,
        own_head=own_head or None,
        loss=loss,
        preset=preset,
        max_length=max_length,
        max_steps=max_steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        on_bad_line=on_bad_line,
        report_to=report_to or None,
        eval_data=eval_data,
        hold_out=hold_out,
        dtype=dtype,
        device=device,
    )
    trainer = trainer_of(settings, resume, remarks())
    if dry_run:
        plan = trainer.plan()
        print_json(asdict(plan)) if json else plan.show(results())
        return
    result = trainer.train(resume_from_checkpoint=resume)
    verdict = trainer.verdict() if is_main_process() else None
    if not is_main_process():
        return
    if json:
        print_json({**asdict(result), "verdict": None if verdict is None else verdict.as_dict()})
    else:
        tau = (result.tau or {}).get("tau")
        measured = f", tau {tau:.2f}" if tau is not None else ""
        results().print(f"{result.folder}: {result.steps} steps in {result.seconds:.0f} s{measured}", markup=False)
        if verdict is not None:
            results().print(str(verdict), markup=False)
