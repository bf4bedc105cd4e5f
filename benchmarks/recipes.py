"""What goes beyond FSPAD's paper in training, each alone and all together, at equal steps and at equal seconds.

Every variant is the paper's recipe with one switch turned; what is finished is read back from its folder, so the
command can be killed and repeated. Costs are measured first, with nothing else running; the rest at any time, for what
is counted does not depend on the machine:

    OMP_NUM_THREADS=2 python benchmarks/recipes.py --output-dir study --costs        # twice or more; the median counts
    OMP_NUM_THREADS=2 python benchmarks/recipes.py --output-dir study --train-only
    OMP_NUM_THREADS=2 python benchmarks/recipes.py --output-dir study
    OMP_NUM_THREADS=2 python benchmarks/recipes.py --output-dir study --speed        # with nothing else running

Writes `study.json`, `study.md` and `study.html` there. `docs/measurements/recipes.md` says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import studies
from rich.console import Console
from studies import SETTINGS, shown, spread, write

from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode
from outdraft.data.provenance import environment
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import PLAIN, compare, speculative
from outdraft.output import number, plain
from outdraft.target.target import Target
from outdraft.training.config import PRESETS, DrafterConfig
from outdraft.training.train import train
from outdraft.training.trainer import ObjectiveTrainer

BASE = "FSPAD"
CORPUS = "corpus answers"
STEPS, SECONDS = "steps", "seconds"

PAPER = {
    name: PRESETS["paper"][name]
    for name in ("w_reg", "w_reg_schedule", "w_cls", "token_loss", "feature_noise", "unroll_steps", "state_norm")
}
"""The paper's loss and inputs, whatever a preset of the target's size says."""

SWITCHES: dict[str, dict[str, Any]] = {
    BASE: {},
    "unrolled": {"unroll_steps": 3},
    "top-k": {"token_loss": "top-k"},
    "total variation": {"token_loss": "total-variation"},
    "log acceptance": {"token_loss": "log-acceptance"},
    "w_reg to 0": {"w_reg_schedule": "linear"},
    "several layers": {"tap_layers": "auto"},
    "norm": {"state_norm": True},
    "all": {
        "unroll_steps": 3,
        "token_loss": "top-k",
        "w_reg_schedule": "linear",
        "tap_layers": "auto",
        "state_norm": True,
    },
}
"""Rows of the table, and what each sets."""

SAME_COST = 0.15
"""A step that costs the base's to within this share gets no training of its own for equal seconds."""

SKIPPED_COSTS = 2
"""Steps of a measurement that pay for allocation."""


class Training(NamedTuple):
    """One drafter of the study."""

    variant: str
    budget: str
    """`steps` or `seconds`: what it has as much of as the base."""
    seed: int

    @property
    def name(self) -> str:
        """Of its row; the base has both budgets."""
        return self.variant if self.budget == STEPS else f"{self.variant}, equal seconds"


@dataclass(frozen=True)
class Study(studies.Study):
    """What is compared; equal studies can share a folder."""

    corpus_data: Path | None
    variants: tuple[str, ...]
    budgets: tuple[str, ...]
    unroll_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unroll_steps < 2:
            raise UserError(f"--unroll-steps must be at least 2, not {self.unroll_steps}; one step is the base's")
        known = [*SWITCHES, *([CORPUS] if self.corpus_data is not None else [])]
        for names, among, flag in ((self.variants, known, "variants"), (self.budgets, [STEPS, SECONDS], "budgets")):
            if odd := [name for name in names if name not in among]:
                raise UserError(f"--{flag} knows {', '.join(among)}, not {odd[0]}")
        if BASE not in self.variants or STEPS not in self.budgets:
            raise UserError(f"the study needs the variant {BASE} and the budget {STEPS}, with which all is compared")

    @property
    def measurement(self) -> dict[str, Any]:
        """What a kept measurement must have been made with."""
        prompts = None if self.prompts is None else str(self.prompts)
        names = ("limit", "max_new_tokens", "steps", "learning_rate")
        return {"prompts": prompts, **{name: getattr(self, name) for name in names}}

    def trainings(self, seed: int) -> Iterator[Training]:
        """Equal steps first, so that what is there after an interruption can be compared."""
        for budget in self.budgets:
            for variant in self.variants:
                if budget == STEPS or self.costs_differ(variant):
                    yield Training(variant, budget, seed)

    @property
    def runs(self) -> Iterator[Training]:
        return (training for seed in range(self.seeds) for training in self.trainings(seed))

    def switches(self, variant: str) -> dict[str, Any]:
        given = {**PAPER, **SWITCHES.get(variant, {})}
        return {**given, "unroll_steps": self.unroll_steps} if given["unroll_steps"] > 1 else given

    def folder(self, training: Training) -> Path:
        name = training.variant.lower().replace(" ", "-")
        return self.output_dir / f"{name}-{training.budget}-seed{training.seed}"

    def config(self, training: Training) -> DrafterConfig:
        """Data and all settings but steps, switches and seed are the same in every run."""
        steps = self.steps if training.budget == STEPS else self.equal_seconds(training.variant)
        settings = {**SETTINGS, "learning_rate": self.learning_rate, "warmup_steps": studies.warmup_of(steps)}
        return DrafterConfig(
            data=self.corpus_data if training.variant == CORPUS else self.data,
            output_dir=self.folder(training),
            feature_cache_dir=self.output_dir / "features",
            max_steps=steps,
            seed=training.seed,
            **{**settings, **self.switches(training.variant)},
        )

    def costs_differ(self, variant: str) -> bool:
        """Whether equal seconds are other steps than equal steps, by more than noise; so it is taken to be until both
        were measured."""
        costs = costs_of(self)
        if variant in (BASE, CORPUS):
            return False
        return not {BASE, variant} <= costs.keys() or abs(costs[variant] / costs[BASE] - 1) > SAME_COST

    def equal_seconds(self, variant: str) -> int:
        """Steps of the variant that take as long as the base's steps, with nothing else running.

        Raises:
            UserError: nobody has measured what a step costs.
        """
        costs = costs_of(self)
        if missing := [name for name in (BASE, variant) if name not in costs]:
            raise UserError(f"what a step of {missing[0]} costs is not measured yet; run with --costs, alone")
        return max(1, round(self.steps * costs[BASE] / costs[variant]))


# --- costs -----------------------------------------------------------------------------------------------------------


def measure_costs(study: Study, steps: int, console: Console) -> None:
    """One more turn of real training steps for every variant, added to what was measured before.

    Raises:
        UserError: steps in seconds have been trained by what was measured before.
    """
    if any(
        (study.folder(training) / "training_run.json").is_file()
        for training in study.runs
        if training.budget == SECONDS
    ):
        raise UserError("trainings of equal seconds have begun with the costs as they are; choose another --output-dir")
    target = load_target(study.model, backend="eager")
    path = study.output_dir / "costs.json"
    samples: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    folder = study.output_dir / "costs"
    # The process's first training pays for what all later ones find there: it counts for none.
    for place, variant in enumerate([BASE, *study.variants]):
        if variant == CORPUS:
            continue
        config = study.config(Training(variant, STEPS, 0))
        config = config.model_copy(update={"output_dir": folder, "max_steps": steps + SKIPPED_COSTS + 1})
        studies.build_features(target, config)
        shutil.rmtree(folder, ignore_errors=True)
        with stamped_steps() as stamps:
            train(target, config, console=Console(file=io.StringIO()))
        shutil.rmtree(folder, ignore_errors=True)
        if place == 0:
            continue
        between = [after - before for before, after in itertools.pairwise(stamps)]
        samples.setdefault(variant, []).append(statistics.median(between[SKIPPED_COSTS:]))
        console.print(f"{variant}: {samples[variant][-1]:.3f} s a step", highlight=False)
    write(path, json.dumps(samples, indent=1))


@contextmanager
def stamped_steps() -> Iterator[list[float]]:
    """Notes when each step of a training begins."""
    stamps: list[float] = []
    step = ObjectiveTrainer.training_step

    def stamping(self: ObjectiveTrainer, *args: Any, **more: Any) -> Any:
        stamps.append(time.perf_counter())
        return step(self, *args, **more)

    ObjectiveTrainer.training_step = stamping  # type: ignore[method-assign]
    try:
        yield stamps
    finally:
        ObjectiveTrainer.training_step = step  # type: ignore[method-assign]


def costs_of(study: Study) -> dict[str, float]:
    """Seconds a step of every variant that was measured: the median of the turns."""
    path = study.output_dir / "costs.json"
    samples = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {variant: statistics.median(found) for variant, found in samples.items()}


# --- training --------------------------------------------------------------------------------------------------------


def train_all(study: Study, console: Console) -> None:
    """Every run that is not finished yet, one after the other."""
    missing = [run for run in study.runs if finished(study, run) is None]
    if not missing:
        return
    target = load_target(study.model, backend="eager")
    check_corpus(study, target)
    for place, training in enumerate(missing, start=1):
        console.print(
            f"{training.name}, seed {training.seed}: run {place} of {len(missing)} to be trained", highlight=False
        )
        config = study.config(training)
        studies.build_features(target, config)
        train(target, config, resume=True, console=console)


def finished(study: Study, training: Training) -> dict[str, Any] | None:
    """The record of a finished run; None when there is none."""
    return studies.record_of(study.config(training), study.switches(training.variant))


def check_corpus(study: Study, target: Target) -> None:
    """The corpus's answers must be to as many questions as the target's own.

    Raises:
        UserError: they are not.
    """
    if study.corpus_data is None:
        return
    own, corpus = (
        sum(1 for line in path.open(encoding="utf-8") if line.strip()) for path in (study.data, study.corpus_data)
    )
    if own != corpus:
        raise UserError(f"{study.corpus_data} has {corpus} conversations where {study.data} has {own}; give as many")


def check_data(study: Study) -> None:
    """All runs must have been trained on the data that are named now."""
    target = load_target(study.model, backend="eager")
    for which in (BASE, CORPUS):
        if which in study.variants:
            of_it = [run for run in study.runs if (run.variant == CORPUS) == (which == CORPUS)]
            studies.check_data(target, study.config(Training(which, STEPS, 0)), [finished(study, run) for run in of_it])


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_all(study: Study, speed: bool, console: Console) -> list[dict[str, Any]]:
    """For every seed and temperature what was accepted, or how fast it was; kept rows are read back."""
    target: Target | None = None
    found: list[dict[str, Any]] = []
    encoded: list[list[int]] = []
    for seed in range(study.seeds):
        path = study.output_dir / f"{'timed' if speed else 'measured'}-seed{seed}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings = study.measurement | ({"repetitions": study.repetitions} if speed else {})
        rows = kept.get("rows", []) if kept.get("settings") == settings else []
        for temperature in study.temperatures:
            there = {row["name"] for row in rows if row["temperature"] == temperature}
            missing = [one for one in study.trainings(seed) if one.name not in there]
            if not missing:
                continue
            if target is None:
                check_data(study)
                target = load_target(study.model)
                encoded = encode(studies.held_out(study), target)
            console.print(
                f"seed {seed}, {studies.law_of(temperature)}: measuring {len(missing)} drafters", highlight=False
            )
            # Speeds are compared within one turn, so that all are measured again; counts can be added to.
            rows = [row for row in rows if not speed or row["temperature"] != temperature]
            these = list(study.trainings(seed)) if speed else missing
            rows += measured(study, target, encoded, these, temperature, speed)
            kept = {"settings": settings, "environment": environment(target), "rows": rows}
            write(path, json.dumps(plain(kept), indent=1))
            gc.collect()
        wanted = {one.name for one in study.trainings(seed)}
        chosen = [row for row in rows if row["name"] in wanted and row["temperature"] in study.temperatures]
        found += [{**row, "environment": kept["environment"]} for row in chosen]
    return found


def measured(
    study: Study,
    target: Target,
    encoded: Sequence[list[int]],
    trainings: Sequence[Training],
    temperature: float,
    speed: bool,
) -> list[dict[str, Any]]:
    """One row for every training."""
    rivals = [
        speculative(one.name, target, load_drafter_for(target, study.folder(one), backend=target.backend))
        for one in trainings
    ]
    runs = compare(
        [*([speculative(PLAIN, target, None)] if speed else []), *rivals],
        encoded,
        repetitions=study.repetitions if speed else 1,
        max_new_tokens=study.max_new_tokens,
        temperature=temperature,
        seed=trainings[0].seed,
    )
    rows = []
    for one, rival in zip(trainings, rivals, strict=True):
        row = {**one._asdict(), "name": one.name, "temperature": temperature, **studies.counted(runs[rival.name])}
        if speed:
            row |= studies.timed(rival, runs[rival.name], runs[PLAIN])
            row["speed_against_base"] = studies.timed(rival, runs[rival.name], runs[BASE])["speedup"]
        rows.append(row)
    return rows


# --- reporting -------------------------------------------------------------------------------------------------------

TIMED = ("tokens_per_second", "speedup", "speed_against_base")


def summed_up(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of every variant's training, and of its decoding at every temperature."""
    table, costs = [], costs_of(study)
    for example in study.trainings(0):
        of_seeds = [example._replace(seed=seed) for seed in range(study.seeds)]
        records = [(one, record) for one in of_seeds if (record := finished(study, one)) is not None]
        if not records:
            continue
        cost = costs.get(BASE if example.variant == CORPUS else example.variant)
        steps = study.config(example).max_steps
        assert steps is not None
        entry: dict[str, Any] = {
            "variant": example.name,
            "budget": example.budget,
            "seeds": len(records),
            "parameters": studies.parameters_of(study.folder(records[0][0])),
            "steps": steps,
            "seconds_a_step": cost,
            "idle_seconds": None if cost is None else steps * cost,
            "agreement": spread([record["metrics"]["acc"] for _, record in records]),
            "decoding": {},
        }
        for temperature in study.temperatures:
            own = [row for row in rows if (row["name"], row["temperature"]) == (example.name, temperature)]
            if own:
                figures = (*studies.COUNTED, *(name for name in TIMED if name in own[0]))
                entry["decoding"][f"{temperature:g}"] = studies.decoding_of(own, figures)
        table.append(entry)
    return table


def markdown(study: Study, table: Sequence[dict[str, Any]]) -> str:
    """One table of the trainings, one for every temperature."""
    lines = [
        f"{BASE} trained {study.steps} steps, the others as long in steps or seconds; {studies.over_seeds(table)}.",
        "",
    ]
    lines += studies.markdown_rows(
        table,
        ["parameters", "steps", "seconds a step", "seconds, idle", "agreement on the training data"],
        lambda entry: [
            f"{entry['parameters']:,}",
            f"{entry['steps']}",
            number(entry["seconds_a_step"], ".3f"),
            number(entry["idle_seconds"], ".0f"),
            shown(entry["agreement"], ".3f"),
        ],
    )
    for temperature in study.temperatures:
        key = f"{temperature:g}"
        speed = any("speedup" in entry["decoding"].get(key, {}) for entry in table)
        forms = {"tau": ".2f", "acceptance_rate": ".3f"}
        forms |= {"speedup": ".2f", "speed_against_base": ".3f"} if speed else {}

        def cells(entry: dict[str, Any], key: str = key, forms: dict[str, str] = forms) -> list[str] | None:
            found = entry["decoding"].get(key)
            return (
                None if found is None else [*(shown(found[n], f) for n, f in forms.items()), studies.by_position(found)]
            )

        head = ["tau", "acceptance rate", *(["speed-up", f"speed against {BASE}"] if speed else [])]
        body = studies.markdown_rows(table, [*head, "accepted at position 1, 2, ..."], cells)
        law = studies.law_of(temperature).capitalize()
        what = f"{law}, {study.limit} prompts of up to {study.max_new_tokens} new tokens:"
        lines += [what, "", *body] if body else []
    return "\n".join(lines)


def report(study: Study, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """All three files; the table on stdout too."""
    table = summed_up(study, rows)
    switches = {variant: study.switches(variant) for variant in study.variants}
    studies.publish(study, table, rows, markdown(study, table), {"switches": switches})
    if rows:
        figures = {"tau": "tau"} | ({"speedup": "speed-up"} if "speedup" in rows[0] else {})
        title = f"Beyond the paper's recipe, {study.steps} steps of {BASE} or as long"
        studies.plot(study, table, figures, title, study.output_dir / "study.html", console)


def arguments() -> tuple[Study, argparse.Namespace]:
    parser = studies.parser_of(__doc__, BASE, steps=400, seeds=1)
    parser.add_argument("--corpus-data", type=Path, help="the same number of conversations with the corpus's answers")
    parser.add_argument("--variants", help=f"of {', '.join(SWITCHES)}; all by default")
    parser.add_argument("--budgets", default=f"{STEPS},{SECONDS}", help="equal steps, equal seconds, or both")
    parser.add_argument("--unroll-steps", type=int, default=3, help="draft steps where they are trained")
    parser.add_argument("--costs", action="store_true", help="measure what a step of every variant costs, nothing else")
    parser.add_argument("--cost-steps", type=int, default=5, help="steps of each measurement")
    parser.add_argument("--speed", action="store_true", help="time decoding, too, in turns with plain decoding")
    given = parser.parse_args()
    every = [*SWITCHES, *([CORPUS] if given.corpus_data is not None else [])]
    study = Study(
        **studies.fields_of(parser, given),
        corpus_data=given.corpus_data,
        variants=tuple(given.variants.split(",") if given.variants else every),
        budgets=tuple(given.budgets.split(",")),
        unroll_steps=given.unroll_steps,
    )
    return study, given


def work(console: Console) -> None:
    """Measure costs, or train and measure what is missing, then report."""
    study, given = arguments()
    study.output_dir.mkdir(parents=True, exist_ok=True)
    if given.costs:
        measure_costs(study, given.cost_steps, console)
        return
    train_all(study, console)
    report(study, [] if given.train_only else measure_all(study, given.speed, console), console)


def main() -> None:
    studies.run("recipes", work)


if __name__ == "__main__":
    main()
