"""The output folder of a benchmark: its settings, and every complete pair of runs at once, so that an interrupted
benchmark resumes where it stopped.

A pair is complete when all contenders have answered a question in a repetition; one line of `runs.jsonl` holds it. A
folder with other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import Answer, Pair, Run
from outdraft.evaluation.bench.methods import BenchSettings
from outdraft.evaluation.bench.questions import Question, QuestionSet
from outdraft.output import is_main_process, whole_lines, write_whole
from outdraft.output import plain as in_json

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
        differing = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        if differing:
            said = "; ".join(
                f"{name} {json.dumps(there.get(name))} there, {json.dumps(wanted.get(name))} here"
                for name in differing[:3]
            )
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


def folder_state(path: str | Path) -> str | None:
    """Digest the names, sizes and times of a local folder's files, so that a retrained model shows; None for a name
    that is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    facts = [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


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
