"""FSPAD's ablation study: EAGLE's head, either of FSPAD's two parts alone, and both, trained and measured alike.

Every variant gets the same data, steps and seeds, and is a switch of the one drafter class. What is finished is read
back from its folder, so the command can be killed and repeated. Train at any time, but measure with nothing else
running:

    OMP_NUM_THREADS=2 python benchmarks/ablation.py --output-dir study --train-only
    OMP_NUM_THREADS=2 python benchmarks/ablation.py --output-dir study

Writes `study.json`, `study.md` and `study.html` there. `docs/measurements/ablation.md` says how to read them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import studies
from rich.console import Console
from studies import SETTINGS, shown, spread, write

from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode
from outdraft.data.provenance import environment
from outdraft.evaluation.bench.measure import PLAIN, compare, speculative
from outdraft.output import plain
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train

BASE = "EAGLE"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"method": "eagle"},
    "+FS": {"method": "fspad", "partial_alignment": False},
    "+PAD": {"method": "fspad", "feature_sampling": False},
    "FSPAD": {"method": "fspad"},
}
"""Rows of the table, and the switches that make them."""


@dataclass(frozen=True)
class Study(studies.Study):
    """What is compared; equal studies can share a folder."""

    @property
    def measurement(self) -> dict[str, Any]:
        """What a kept measurement must have been made with."""
        prompts = None if self.prompts is None else str(self.prompts)
        names = ("limit", "max_new_tokens", "repetitions", "steps", "learning_rate")
        return {"prompts": prompts, "temperatures": list(self.temperatures), **{n: getattr(self, n) for n in names}}

    @property
    def runs(self) -> Iterator[tuple[str, int]]:
        """Seed by seed, so that what is there after an interruption can be compared."""
        return ((variant, seed) for seed in range(self.seeds) for variant in VARIANTS)

    def folder(self, variant: str, seed: int) -> Path:
        return self.output_dir / f"{variant.strip('+').lower()}-seed{seed}"

    def config(self, variant: str, seed: int) -> DrafterConfig:
        """Steps, data and all settings but switches and seed are the same in every run."""
        warmup = studies.warmup_of(self.steps)
        return DrafterConfig(
            data=self.data,
            output_dir=self.folder(variant, seed),
            feature_cache_dir=self.output_dir / "features",
            max_steps=self.steps,
            seed=seed,
            **{**SETTINGS, "learning_rate": self.learning_rate, "warmup_steps": warmup, **VARIANTS[variant]},
        )


# --- training --------------------------------------------------------------------------------------------------------


def train_all(study: Study, console: Console) -> None:
    """Every run that is not finished yet, one after the other."""
    missing = [run for run in study.runs if finished(study, *run) is None]
    if not missing:
        return
    target = load_target(study.model, backend="eager")
    studies.build_features(target, study.config(*missing[0]))
    for place, (variant, seed) in enumerate(missing, start=1):
        console.print(f"{variant}, seed {seed}: run {place} of {len(missing)} to be trained", highlight=False)
        train(target, study.config(variant, seed), resume=True, console=console)


def finished(study: Study, variant: str, seed: int) -> dict[str, Any] | None:
    """The record of a finished run; None when there is none.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    return studies.record_of(study.config(variant, seed), VARIANTS[variant])


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_all(study: Study, console: Console) -> list[dict[str, Any]]:
    """For every seed and temperature all variants in paired turns with plain decoding; kept ones are read back."""
    target: Target | None = None
    found: list[dict[str, Any]] = []
    for seed in range(study.seeds):
        path = study.output_dir / f"measured-seed{seed}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("settings") != study.measurement:
            if target is None:
                target = load_target(study.model)
                records = [finished(study, *run) for run in study.runs]
                studies.check_data(load_target(study.model, backend="eager"), study.config(BASE, 0), records)
            console.print(f"measuring the drafters of seed {seed}", highlight=False)
            kept = {
                "settings": study.measurement,
                "environment": environment(target),
                "rows": measured(study, target, seed),
            }
            write(path, json.dumps(plain(kept), indent=1))
            gc.collect()
        found += [{**row, "environment": kept["environment"]} for row in kept["rows"]]
    return found


def measured(study: Study, target: Target, seed: int) -> list[dict[str, Any]]:
    """One row for every variant and temperature."""
    rivals = [speculative(PLAIN, target, None)]
    for variant in VARIANTS:
        drafter = load_drafter_for(target, study.folder(variant, seed), backend=target.backend)
        rivals.append(speculative(variant, target, drafter))
    encoded = encode(studies.held_out(study), target)
    rows = []
    for temperature in study.temperatures:
        runs = compare(
            rivals,
            encoded,
            repetitions=study.repetitions,
            max_new_tokens=study.max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        for rival in rivals[1:]:
            own = runs[rival.name]
            against = studies.timed(rival, own, runs[BASE])
            rows.append(
                {
                    "variant": rival.name,
                    "seed": seed,
                    "temperature": temperature,
                    **studies.counted(own),
                    **studies.timed(rival, own, runs[PLAIN]),
                    "speed_against_eagle": against["speedup"],
                }
            )
    return rows


# --- reporting -------------------------------------------------------------------------------------------------------

FIGURES = ("tau", "acceptance_rate", "tokens_per_second", "speedup", "speed_against_eagle")


def summed_up(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of every variant's training, and of its decoding at every temperature."""
    table = []
    for variant in VARIANTS:
        records = [record for seed in range(study.seeds) if (record := finished(study, variant, seed)) is not None]
        if not records:
            continue
        # A run that was interrupted has counted the seconds of its last stretch only.
        whole = [record["seconds"] for record in records if record["resumed_from"] is None]
        entry: dict[str, Any] = {
            "variant": variant,
            "seeds": len(records),
            "parameters": parameters(study, variant, rows),
            "agreement": spread([record["metrics"]["acc"] for record in records]),
            "training_seconds": spread(whole),
            "decoding": {},
        }
        for temperature in study.temperatures:
            own = [row for row in rows if (row["variant"], row["temperature"]) == (variant, temperature)]
            if own:
                entry["decoding"][f"{temperature:g}"] = studies.decoding_of(own, FIGURES)
        table.append(entry)
    return table


def parameters(study: Study, variant: str, rows: Sequence[dict[str, Any]]) -> int:
    counted = [row["parameters"] for row in rows if row["variant"] == variant]
    if counted:
        return counted[0]
    seed = next(seed for seed in range(study.seeds) if finished(study, variant, seed) is not None)
    return studies.parameters_of(study.folder(variant, seed))


def markdown(study: Study, table: Sequence[dict[str, Any]]) -> str:
    """One table of the trainings, one for every temperature."""
    lines = [f"Each trained {study.steps} steps on the same data; {studies.over_seeds(table)}.", ""]
    lines += studies.markdown_rows(
        table,
        ["parameters", "agreement on the training data", "seconds of training"],
        lambda entry: [
            f"{entry['parameters']:,}",
            shown(entry["agreement"], ".3f"),
            shown(entry["training_seconds"], ".0f"),
        ],
    )
    for temperature in study.temperatures:
        law = studies.law_of(temperature).capitalize()

        def cells(entry: dict[str, Any], key: str = f"{temperature:g}") -> list[str] | None:
            found = entry["decoding"].get(key)
            if found is None:
                return None
            forms = {"tau": ".2f", "tokens_per_second": ".1f", "speedup": ".2f", "speed_against_eagle": ".3f"}
            return [*(shown(found[name], form) for name, form in forms.items()), studies.by_position(found)]

        head = ["tau", "tokens/s", "speed-up", f"speed against {BASE}", "accepted at position 1, 2, ..."]
        body = studies.markdown_rows(table, head, cells)
        lines += (
            [f"{law}, {study.limit} prompts of up to {study.max_new_tokens} new tokens:", "", *body] if body else []
        )
    return "\n".join(lines)


def report(study: Study, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """All three files; the table on stdout too."""
    table = summed_up(study, rows)
    studies.publish(study, table, rows, markdown(study, table))
    if rows:
        title = f"FSPAD's parts, {study.steps} steps of training each"
        figures = {"tau": "tau", "speedup": "speed-up"}
        studies.plot(study, table, figures, title, study.output_dir / "study.html", console)


def work(console: Console) -> None:
    """Train and measure what is missing, then report."""
    parser = studies.parser_of(__doc__, "every drafter", steps=600, seeds=3)
    given = parser.parse_args()
    study = Study(**studies.fields_of(parser, given))
    study.output_dir.mkdir(parents=True, exist_ok=True)
    train_all(study, console)
    report(study, [] if given.train_only else measure_all(study, console), console)


def main() -> None:
    studies.run("ablation", work)


if __name__ == "__main__":
    main()
