"""The comparison that `outdraft bench` and the demo print: it measures, judges the texts and sums up.

An output folder holds the settings and every complete pair of runs at once, so that an interrupted benchmark resumes
where it stopped. A pair is complete when all contenders have answered a question in a repetition; one line of
`runs.jsonl` holds it. A folder with other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from outdraft.api.loading import load_target
from outdraft.api.prompts import note_texts
from outdraft.core.statistics import Statistics
from outdraft.data.provenance import environment, load_average
from outdraft.errors import UserError
from outdraft.evaluation.bench import spec_bench
from outdraft.evaluation.bench.measure import (
    PLAIN,
    Answer,
    Contender,
    Pair,
    Run,
    Script,
    compare,
    divergences_by_method,
)
from outdraft.evaluation.bench.methods import BenchSettings, contenders
from outdraft.evaluation.bench.questions import Question, QuestionSet, dialogues, questions_of, read_questions
from outdraft.evaluation.bench.result import BenchResult, Comparison, summed_up, temperature_name
from outdraft.evaluation.report.pages import check_page, plotly_script, save_bench
from outdraft.evaluation.resuming import differences, folder_state
from outdraft.output import is_main_process, whole_lines, write_whole
from outdraft.output import plain as in_json
from outdraft.reference import load_prompts
from outdraft.target.target import Target

__all__ = ["BenchResult", "BenchSettings", "Comparison", "measured", "run_bench"]

HELD_OUT = "held-out"
"""The group name of the shipped prompts."""


def run_bench(
    settings: BenchSettings, remarks: Console, others: Callable[[Target], Sequence[Contender]] = lambda model: ()
) -> BenchResult:
    """Load, measure and sum up; with an output folder, resume an earlier run of the same settings.

    Args:
        others: makes more contenders from the model that the baselines run on.
    """
    if settings.report is not None:
        plotly_script()
        check_page(settings.report)
    if settings.data is not None:
        asked = read_questions(settings.data, settings.suite, settings.on_bad_line)
    else:
        asked = QuestionSet("prompts", questions_of(load_prompts("heldout"), HELD_OUT), digest=HELD_OUT)
    place: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "backend": settings.backend}
    target = load_target(settings.model, **place, tp_plan=settings.tp_plan)
    fitting, too_long = dialogues(
        asked.limited(settings.limit), target, settings.max_new_tokens, on_bad_line=settings.on_bad_line
    )
    questions = [dialogue.question for dialogue in fitting]
    stock = None  # the peers run on the modules of `transformers` itself, unless they shall not
    elsewhere = settings.peers_backend != "same" and target.backend != "eager"
    if elsewhere and (settings.peers or settings.include_transformers):
        stock = load_target(settings.model, dtype=target.dtype, device=target.device, backend="eager")
    rivals = contenders(target, settings, stock)
    rivals += others(stock or target)
    note_texts([question.prompt for question in questions], target.tokenizer)
    facts = environment(target)
    store = None
    if settings.output_dir is not None:
        names = [rival.name for rival in rivals]
        sitting = {"git_revision": facts["git_revision"], "load_average": facts["load_average"]}
        store = Store(settings.output_dir, fingerprint(settings, facts, asked, questions, names), sitting)
    comparisons = [
        measured(
            target,
            rivals,
            fitting,
            temperature=temperature,
            repetitions=settings.repetitions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            remarks=remarks,
            questions=questions,
            store=store,
        )
        for temperature in settings.temperatures
    ]
    # Only now is it known what forwards ran on: a backend that cannot serve the model may give way when first used.
    ended = {"backend": target.backend, "load_average_at_the_end": load_average()}
    facts |= ended
    if store is not None:
        store.end(**ended)
        facts |= store.sittings[-1]  # those of the last measurement, which need not be now
        facts["sittings"] = store.sittings
        for one in comparisons if is_main_process() else ():
            suffix = f"temp-{one.temperature:g}" if len(comparisons) > 1 else ""
            for name, runs in one.runs.items():
                lines = spec_bench.records(name, runs, one.questions, target.tokenizer)
                spec_bench.write(store.folder / spec_bench.FOLDER / spec_bench.file_name(name, suffix), lines)
    result = BenchResult(
        settings.shown(asked.suite, len(questions)), facts, comparisons, questions, [*asked.left_out, *too_long]
    )
    if settings.report is not None and is_main_process():
        save_bench(result, settings.report, target.tokenizer)
        remarks.print(f"report: {settings.report}", highlight=False)
    return result


def measured(
    target: Target,
    rivals: Sequence[Contender],
    prompts: Sequence[list[int] | Script],
    *,
    temperature: float = 0.0,
    repetitions: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    remarks: Console,
    questions: Sequence[Question] = (),
    store: Store | None = None,
    end: float | None = None,
) -> Comparison:
    """Compare contenders, one of which is `PLAIN`.

    Args:
        target: the model, which also judges divergences.
        prompts: prompts as in `measure.compare`.
        questions: the prompts' questions, where groups matter.
        store: keeps complete pairs, and knows those of earlier runs.
        end: deadline as in `measure.compare`; only for single prompts without questions or a store.
    """
    title = temperature_name(temperature)
    known = store.known(temperature) if store is not None else {}
    pairs = len(prompts) * repetitions
    if known:
        remarks.print(f"{title}: {len(known)} of {pairs} pairs are there already", highlight=False)
    with progress(remarks, title, len(rivals) * (pairs - len(known))) as advance:
        try:
            runs = compare(
                rivals,
                prompts,
                repetitions=repetitions,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                progress=advance,
                known=known,
                completed=lambda *pair: store.keep(temperature, *pair) if store is not None else None,
                end=end,
            )
        except KeyboardInterrupt:
            if store is not None:
                done = len(store.known(temperature))
                remarks.print(f"{title}: {done} of {pairs} pairs kept; the same command goes on from there")
            raise
    parted = divergences_by_method(target, prompts, runs[PLAIN], runs) if temperature == 0 else dict.fromkeys(runs)
    return summed_up(target, rivals, runs, parted, temperature, questions)


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal, nothing elsewhere; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


SETTINGS, RUNS = "settings.json", "runs.jsonl"


class Store:
    """An output folder, open for a benchmark of these settings.

    Args:
        folder: the folder, made if missing.
        fingerprint: everything that changes the figures.
        sitting: facts of this run that may differ between runs; stored with the first pair it adds.

    Raises:
        UserError: the folder holds a benchmark of other settings.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], sitting: Mapping[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(in_json(dict(fingerprint))))
        self.sittings = self._known(wanted)
        self._settings, self._sitting = wanted, in_json({"began": _now(), **sitting})
        self._pairs = self._read()
        self._save()

    def known(self, temperature: float) -> dict[tuple[int, int], Pair]:
        """Return the complete pairs of a temperature, by question and repetition."""
        return {place[1:]: pair for place, pair in self._pairs.items() if place[0] == temperature}

    def keep(self, temperature: float, prompt: int, repetition: int, pair: Pair) -> None:
        """Store a complete pair; it is on the disk when this returns."""
        if not self.added:
            self.sittings.append(self._sitting)
            self._save()
        answers = {name: [asdict(answer) for answer in run.answers] for name, run in pair.items()}
        line = {"temperature": temperature, "question": prompt, "repetition": repetition, "answers": answers}
        if is_main_process():
            with (self.folder / RUNS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._pairs[temperature, prompt, repetition] = dict(pair)

    @property
    def added(self) -> bool:
        """True if this sitting has added a pair."""
        return any(sitting is self._sitting for sitting in self.sittings)

    def end(self, **facts: Any) -> None:
        """Store facts of the end of this sitting, if it has added a pair."""
        if self.added:
            self._sitting |= in_json({"ended": _now(), **facts})
            self._save()

    def _known(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the earlier sittings; other settings raise UserError."""
        file = self.folder / SETTINGS
        if not file.exists():
            if (self.folder / RUNS).exists():
                raise UserError(f"{self.folder} holds runs but no {SETTINGS}; give another --output-dir")
            return []
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            there, sittings = found["settings"], list(found["sittings"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not of a benchmark; give another --output-dir") from None
        if said := differences(there, wanted):
            raise UserError(
                f"{self.folder} holds a benchmark with other settings ({said}); "
                "give another --output-dir, or the settings that were used there"
            )
        return sittings

    def _read(self) -> dict[tuple[float, int, int], dict[str, Run]]:
        """Read the pairs in `runs.jsonl`; a last line that an interruption cut off is dropped."""
        file = self.folder / RUNS
        if not file.exists():
            return {}
        found: dict[tuple[float, int, int], dict[str, Run]] = {}
        for number, line in enumerate(whole_lines(file), start=1):
            try:
                record = json.loads(line)
                place = (float(record["temperature"]), int(record["question"]), int(record["repetition"]))
                found[place] = {name: _run(place[1], place[2], answers) for name, answers in record["answers"].items()}
            except (ValueError, KeyError, TypeError) as problem:
                raise UserError(f"{file}:{number}: not a pair of runs ({problem!r}); take the line out") from None
        return found

    def _save(self) -> None:
        state = {"settings": self._settings, "sittings": self.sittings}
        if is_main_process():
            write_whole(self.folder / SETTINGS, json.dumps(state, indent=2))


def _run(prompt: int, repetition: int, answers: list[dict[str, Any]]) -> Run:
    made = [Answer(**{**answer, "statistics": Statistics(**answer["statistics"])}) for answer in answers]
    return Run(prompt, repetition, made[0], made[1:])


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def fingerprint(
    settings: BenchSettings,
    facts: dict[str, Any],
    asked: QuestionSet,
    questions: Sequence[Question],
    contenders: Sequence[str],
) -> dict[str, Any]:
    """Return all facts that change the figures, machine and versions included. The source's revision is kept for every
    sitting instead."""
    models = [settings.model, *(text.partition("=")[2] or text for text in (*settings.draft_models, *settings.peers))]
    shown = settings.shown(asked.suite, len(questions))
    for name in ("data", "methods", "peers", "on_bad_line", "temperatures", "draft_models"):
        shown.pop(name)  # what they amount to stands in the lines below
    return {
        **shown,
        "temperatures": settings.temperatures,
        "data": asked.digest,
        "questions": hashlib.sha256(json.dumps([question.id for question in questions]).encode()).hexdigest()[:16],
        "contenders": list(contenders),
        "model_files": [state for state in map(folder_state, models) if state is not None],
        **{name: facts[name] for name in ("cpu", "gpu", "threads", "device", "dtype", "backend", "versions")},
    }
