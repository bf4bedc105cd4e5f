"""What the studies of trained drafters share: arguments, settings, reading back what is finished, rows, tables, a plot.

A study trains variants alike and decodes with them; which variants, and how alike, is its own affair
(`ablation.py`, `recipes.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.api.prompts import Prompt, read_prompts
from outdraft.console.app import quiet_libraries
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import Contender, Run
from outdraft.evaluation.bench.summary import summarise
from outdraft.methods.fspad.folder import load_drafter
from outdraft.output import number, plain, remarks
from outdraft.reference import DATA, load_prompts
from outdraft.target.named import REFERENCE
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import feature_store
from outdraft.training.preparation import objective_for, prepare

TRAINING = Path(DATA) / "train_conversations.jsonl"
SETTINGS: dict[str, Any] = {
    "max_length": 384,
    "batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 40,
    "precision": "bf16",
    "features": "cached",
    "logging_steps": 20,
    "save_steps": 50,
    "report_to": ["none"],
}
"""Those of the drafter that ships for the reference target."""


@dataclass(frozen=True)
class Study:
    """What every study compares with what; equal studies can share a folder."""

    model: str
    data: Path
    prompts: Path | None
    """To decode; None: the shipped held-out ones."""
    output_dir: Path
    steps: int
    seeds: int
    limit: int
    max_new_tokens: int
    repetitions: int
    temperatures: tuple[float, ...]
    learning_rate: float

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "limit", "max_new_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if any(temperature < 0 for temperature in self.temperatures):
            raise UserError("temperatures must be 0 (greedy) or more")


def parser_of(documentation: str | None, steps_of: str, steps: int, seeds: int) -> argparse.ArgumentParser:
    """The arguments that every study takes.

    Args:
        documentation: of the study.
        steps_of: whose steps are given.
        steps: by default.
        seeds: by default.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REFERENCE)
    parser.add_argument("--data", type=Path, help="to train on; the target's own answers that ship with the package")
    parser.add_argument("--prompts", type=Path, help="to decode, as for `outdraft bench`; the shipped held-out ones")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps, help=f"of {steps_of}")
    parser.add_argument("--seeds", type=int, default=seeds, help="each variant is trained with seeds 0, 1, ...")
    parser.add_argument("--learning-rate", type=float, default=SETTINGS["learning_rate"])
    parser.add_argument("--limit", type=int, default=24, help="prompts to decode")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=1, help="of the prompts, where decoding is timed")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--train-only", action="store_true", help="measure nothing yet")
    return parser


def fields_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Study` from its arguments."""
    if given.model != REFERENCE and (given.data is None or given.prompts is None):
        parser.error("another model than the shipped one needs --data and --prompts of its own")
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(Study)}
    temperatures = tuple(float(part) for part in given.temperatures.split(","))
    return {**values, "data": given.data or TRAINING, "temperatures": temperatures}


def run(name: str, work: Callable[[Console], None]) -> None:
    """Do it; a user's mistake ends the program with one line."""
    quiet_libraries()
    try:
        work(remarks())
    except UserError as error:
        sys.exit(f"{name}: {error}")


# --- training --------------------------------------------------------------------------------------------------------


def warmup_of(steps: int) -> int:
    """Warm-up steps of a run of so many; at most a quarter of it."""
    return min(SETTINGS["warmup_steps"], max(1, steps // 4))


def build_features(target: Target, config: DrafterConfig) -> None:
    """Compute the features that a training reads, beforehand: their time is nobody's."""
    ready = prepare(target, config)
    store = feature_store(target, ready, objective_for(target, ready.config))
    assert store is not None
    store.check_budget(ready.examples, ready.config.feature_cache_gb)
    store.build(ready.examples)


def record_of(config: DrafterConfig, switches: Iterable[str]) -> dict[str, Any] | None:
    """The record of a finished training; None when there is none.

    Args:
        config: of the training, with its output folder.
        switches: settings that must be equal beside steps, seed and `SETTINGS`.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    path = config.output_dir / "provenance.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted = config.record()
    names = {*SETTINGS, *switches, "max_steps", "seed"} - {"save_steps", "logging_steps", "report_to"}
    for name in sorted(names):
        if record["config"].get(name) != wanted[name]:
            raise UserError(
                f"{path.parent} was trained with {name} {record['config'].get(name)}, not {wanted[name]}; "
                "choose another --output-dir"
            )
    return record


def check_data(target: Target, config: DrafterConfig, records: Iterable[dict[str, Any] | None]) -> None:
    """All of these runs must have been trained on the data that the configuration names.

    Raises:
        UserError: one was not.
    """
    fingerprint = prepare(target, config).examples.fingerprint()
    for record in records:
        if record is not None and record["data_sha256"] != fingerprint:
            folder = record["config"]["output_dir"]
            raise UserError(f"{folder} was trained on other data than {config.data}; choose another folder")


def parameters_of(folder: Path) -> int:
    return sum(weight.numel() for weight in load_drafter(folder).head.parameters())


# --- measuring -------------------------------------------------------------------------------------------------------

COUNTED = ("tau", "acceptance_rate")
"""Figures that do not depend on the machine."""


def held_out(study: Study) -> Sequence[Prompt]:
    """Prompts that nothing here was trained on."""
    return load_prompts("heldout")[: study.limit] if study.prompts is None else read_prompts(study.prompts, study.limit)


def counted(runs: Sequence[Run]) -> dict[str, Any]:
    """What was accepted, over all runs."""
    total = Statistics.sum(answer.statistics for run in runs for answer in run.answers)
    return {**{name: getattr(total, name) for name in COUNTED}, "acceptance_by_position": total.acceptance_by_position}


def timed(rival: Contender, runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """How fast it was beside plain decoding in the same turns."""
    one = summarise(rival.name, rival.method, rival.parameters, runs, plain, None)
    return {
        "tokens_per_second": one.tokens_per_second,
        "speedup": one.speedup,
        "speedup_interval": list(one.speedup_interval),
        "draft_seconds_per_round": one.statistics.draft_seconds / max(1, one.statistics.rounds),
        "parameters": rival.parameters,
    }


# --- reporting -------------------------------------------------------------------------------------------------------


def decoding_of(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> dict[str, Any]:
    """Mean and spread of the rows of one drafter at one temperature."""
    positions = zip(*(row["acceptance_by_position"] for row in rows), strict=False)
    return {
        **{name: spread([row[name] for row in rows]) for name in figures},
        "acceptance_by_position": [spread(list(values)) for values in positions],
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, and the standard deviation over seeds where there are several."""
    real = [value for value in values if value is not None and math.isfinite(value)]
    if not real:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.mean(real), "deviation": statistics.stdev(real) if len(real) > 1 else None}


def shown(value: dict[str, float | None], form: str) -> str:
    text = number(value["mean"], form)
    return text if value["deviation"] is None else f"{text} +- {number(value['deviation'], form)}"


def by_position(found: dict[str, Any]) -> str:
    return ", ".join(number(one["mean"]) for one in found["acceptance_by_position"])


def over_seeds(table: Sequence[dict[str, Any]]) -> str:
    seeds = max((entry["seeds"] for entry in table), default=0)
    return f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def law_of(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def markdown_rows(
    table: Sequence[dict[str, Any]], head: Sequence[str], cells: Callable[[dict[str, Any]], list[str] | None]
) -> list[str]:
    """A table with a line for every entry that has cells; nothing when none has."""
    body = [f"| {entry['variant']} | {' | '.join(found)} |" for entry in table if (found := cells(entry))]
    return [f"| drafter | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|", *body, ""] if body else []


def publish(
    study: Study,
    table: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    text: str,
    more: dict[str, Any] | None = None,
) -> None:
    """The study's figures as JSON, and its tables, on stdout too.

    Args:
        study: what was compared.
        table: an entry for every variant.
        rows: the measurements behind it.
        text: the tables.
        more: entries of the JSON beside these.
    """
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(study).items()
    }
    everything = {"settings": given, **(more or {}), "table": list(table), "measured": list(rows)}
    write(study.output_dir / "study.json", json.dumps(plain(everything), indent=1))
    write(study.output_dir / "study.md", text)
    print(text)


def plot(
    study: Study, table: Sequence[dict[str, Any]], figures: dict[str, str], title: str, path: Path, console: Console
) -> None:
    """For every temperature bars of some figures with their spread, and acceptance by position.

    Args:
        study: what was decoded.
        table: of entries with `variant` and `decoding` by temperature.
        figures: keys of the entries' decoding and what they are called.
        title: of the page.
        path: the HTML file.
        console: told where plotly is missing.
    """
    try:
        from plotly import graph_objects, subplots
    except ImportError:
        console.print("no plot: it needs plotly; pip install 'outdraft[report]'", markup=False)
        return
    laws = [law_of(temperature) for temperature in study.temperatures]
    columns = [*figures.values(), "accepted at a position"]
    titles = [f"{what}, {law}" for law in laws for what in columns]
    figure = subplots.make_subplots(rows=len(laws), cols=len(columns), subplot_titles=titles)
    for row, temperature in enumerate(study.temperatures, start=1):
        entries = [entry for entry in table if f"{temperature:g}" in entry["decoding"]]
        names = [entry["variant"] for entry in entries]
        found = [entry["decoding"][f"{temperature:g}"] for entry in entries]
        for column, name in enumerate(figures, start=1):
            errors = {"type": "data", "array": [one[name]["deviation"] or 0 for one in found]}
            heights = [one[name]["mean"] for one in found]
            figure.add_bar(x=names, y=heights, error_y=errors, showlegend=False, row=row, col=column)
        for place, (name, one) in enumerate(zip(names, found, strict=True)):
            heights = [at["mean"] for at in one["acceptance_by_position"]]
            line = graph_objects.Scatter(
                x=list(range(1, len(heights) + 1)),
                y=heights,
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                line={"color": COLOURS[place % len(COLOURS)]},
            )
            figure.add_trace(line, row=row, col=len(columns))
    figure.update_layout(height=380 * len(laws), title=title)
    write(path, figure.to_html(include_plotlyjs=True))


COLOURS = ("#636efa", "#ef553b", "#00cc96", "#ab63fa", "#ffa15a", "#19d3f3", "#ff6692", "#8c8c52", "#7f7f7f", "#1f3b73")


def write(path: Path, text: str) -> None:
    """Aside and renamed, so that a killed run leaves no half file."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
