"""`outdraft train`: its flags, the settings that flags, a YAML file and key=value arguments make, and the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.methods.registry import trained
from outdraft.output import is_main_process, print_json, remarks, results

if TYPE_CHECKING:
    from outdraft.drafter_trainer import DrafterTrainer

AROUND = {**{name: name for name in ("model", "dtype", "device", "tp_plan", "hold_out")}, "eval_data": "eval_dataset"}
"""The settings of a run beyond `DrafterConfig`, mapped to the trainer's arguments."""


TRAINED = o.flags_of(
    *("training/config.py", "DrafterConfig"),
    *("data", "output_dir", "exit_layer", "init_from", "own_head", "loss", "preset", "max_length"),
    *("max_steps", "epochs", "batch_size", "learning_rate", "seed", "on_bad_line", "report_to"),
    optional=True,
)
METHODS = f"{o.TRAINING['method']} {'; '.join(f'{name}: {method.summary}' for name, method in trained().items())}."


@o.with_flags(TRAINED)
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Any training setting, such as learning_rate=5e-4; docs/reference/settings.md lists them.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.TARGET)] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; key=value and flags override it.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help=METHODS)] = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval-data", help="Prompts to measure tau on (the first 8), in place of held-out conversations."
        ),
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option("--hold-out", help="Conversations held out for evaluation, the last ones of the data (32)."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the last checkpoint in --output-dir, which also keeps the run's settings."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory and time; train nothing.")
    ] = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    tp: o.TensorParallel = False,
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Train a drafter for a model."""
    around = {name: value for name, value in locals().items() if name in AROUND}
    settings = {**flags, **around, "method": method, "chat_template_kwargs": chat_template_kwargs}
    settings["tp_plan"] = "auto" if tp else None
    trainer = trainer_of(read_settings(config, overrides or [], **settings), resume, remarks())
    if dry_run:
        from outdraft.training.plan import memory_table

        plan = None if trainer.only_described else trainer.plan()
        devices = trainer.memory()
        if json:
            print_json({**({} if plan is None else asdict(plan)), "devices": [asdict(one) for one in devices]})
            return
        if plan is not None:
            plan.show(results())
        if devices:
            results().print(memory_table(devices, trainer.config.method))
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
        model, drafter = (shlex.quote(str(name)) for name in (trainer.model, result.folder))
        after = f"next: outdraft bench --model {model} --draft-model {drafter}"
        remarks().print(after, style="dim", markup=False, soft_wrap=True)


def trainer_of(settings: dict[str, Any], resume: bool, remarks: Console) -> DrafterTrainer:
    """Make the trainer for the settings of a run.

    Args:
        settings: settings of `DrafterConfig` and of `AROUND`.
        resume: take settings that are not given from the run's folder.
    """
    from outdraft.drafter_trainer import DrafterTrainer
    from outdraft.drafting.run_folder import begun_with
    from outdraft.training.config import DrafterConfig

    if resume and "output_dir" in settings:
        begun = begun_with(settings["output_dir"])
        if begun is None and not {"model", "data"} <= settings.keys():
            raise UserError(
                f"{settings['output_dir']} keeps no settings of a run to go on with; give --model and --data"
            )
        settings = {**(begun or {}), **settings}
    around = {argument: settings[name] for name, argument in AROUND.items() if settings.get(name) is not None}
    config = DrafterConfig(**{name: value for name, value in settings.items() if name not in AROUND})
    if "model" not in around:
        raise UserError("no target to train for; give --model a folder or hub id")
    return DrafterTrainer(**around, config=config, console=remarks)


def read_settings(file: Path | None, overrides: Iterable[str], **flags: Any) -> dict[str, Any]:
    """Read settings from a YAML file, then `key=value` arguments, then flags; later ones win.

    Flags that are None or empty were not given.
    """
    settings = _from_file(file) if file is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is no setting; write key=value, such as learning_rate=1e-3")
        try:
            _put(settings, key.split("."), yaml.safe_load(value) if value else "")
        except yaml.YAMLError as error:
            raise UserError(f"the value in '{override}' is not YAML; quote it") from error
    settings.update({name: value for name, value in flags.items() if value not in (None, [])})
    return settings


def _from_file(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} cannot be read ({type(error).__name__}); check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"--config {file}{where} is not YAML ({getattr(error, 'problem', error)}); mend it") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"--config {file} must hold `key: value` lines, not a {type(settings).__name__}")
    return {str(key): value for key, value in settings.items()}


def _put(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `settings[a][b] = value` for the path a, b."""
    for name in path[:-1]:
        inner = settings.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{'.'.join(path)}' cannot be set: '{name}' is a value, not a section")
        settings = inner
    settings[path[-1]] = value
