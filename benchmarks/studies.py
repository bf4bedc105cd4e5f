"""What the studies of trained drafters share: data and settings, reading back what is finished, rows, tables, a plot.

A study trains variants alike and decodes with them; which variants, and how alike, is its own affair
(`ablation.py`, `recipes.py`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from outdraft.console.output import number
from outdraft.drafters.checkpoint import load_drafter
from outdraft.errors import UserError
from outdraft.evaluation.measure import Contender, Run
from outdraft.evaluation.prompts import Prompt, read_prompts
from outdraft.evaluation.summary import summarise
from outdraft.reference import load_prompts
from outdraft.reference.prompts import DATA
from outdraft.statistics import Statistics
from outdraft.target import Target
from outdraft.training.config import TrainingConfig
from outdraft.training.features import FeatureCache
from outdraft.training.objective import objective_for
from outdraft.training.preparation import prepare

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


class Decoding(Protocol):
    """What a study decodes, and how."""

    @property
    def prompts(self) -> Path | None:
        """None: the shipped held-out ones."""

    @property
    def limit(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def temperatures(self) -> tuple[float, ...]: ...


def check_sizes(study: Decoding, names: Sequence[str]) -> None:
    """Raise UserError for a size that cannot be."""
    for name in names:
        if getattr(study, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(study, name)}")
    if any(temperature < 0 for temperature in study.temperatures):
        raise UserError("temperatures must be 0 (greedy) or more")


# --- training --------------------------------------------------------------------------------------------------------


def warmup_of(steps: int) -> int:
    """Warm-up steps of a run of so many; at most a quarter of it."""
    return min(SETTINGS["warmup_steps"], max(1, steps // 4))


def build_features(target: Target, config: TrainingConfig) -> None:
    """Compute the features that a training reads, beforehand: their time is nobody's."""
    ready = prepare(target, config)
    assert config.feature_cache_dir is not None
    reading = objective_for(target, ready.config).reading
    cache = FeatureCache(config.feature_cache_dir, target, ready.examples, ready.config.max_length, reading)
    cache.check_budget(ready.config.feature_cache_gb)
    cache.build(ready.config.batch_size)


def record_of(config: TrainingConfig, switches: Iterable[str]) -> dict[str, Any] | None:
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


def check_data(target: Target, config: TrainingConfig, records: Iterable[dict[str, Any] | None]) -> None:
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


def held_out(study: Decoding) -> Sequence[Prompt]:
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


def plot(
    study: Decoding, table: Sequence[dict[str, Any]], figures: dict[str, str], title: str, path: Path, console: Console
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
