"""Writing and reading Spec-Bench's own answer files, and its own figures from them.

The format and the arithmetic are those of its `evaluation/eval.py` and `evaluation/speed.py`
(github.com/hemingkx/Spec-Bench): a method's rate is its `new_tokens` over its `wall_time`. The baseline's tokens are
counted by tokenizing its texts anew, less one for the begin-of-text token. The speed-up is the ratio of the mean rates
over questions. `reread` gets the figures from answer files only, with the target's tokenizer.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import AutoTokenizer

from outdraft.api.loading import first_line
from outdraft.data.records import BadText, json_lines, text_lines
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import PLAIN, Answer, Run
from outdraft.evaluation.bench.questions import MT_BENCH, MULTI_TURN, Question, answer_text
from outdraft.output import number, write_whole
from outdraft.target.named import place_of

Record = dict[str, Any]
"""A line of an answer file."""

FOLDER = "model_answer"
"""Spec-Bench's folder of answer files, one file a method."""

NAN = float("nan")

ALL = "all questions"
THEIRS = "vanilla"
"""The word in Spec-Bench's name of plain decoding's file."""
TEMPERATURE = re.compile(r"-temp-([\d.]+)$")

Figures = dict[str, float]
"""The figures `tau` and `speedup`."""


def accept_lengths(answer: Answer) -> list[int]:
    """Return the tokens that each target forward after the prefill emitted, bonus token included.

    Tokens that a last round accepted past the end of the text are not in the answer, so they do not count.
    """
    lengths = [accepted + 1 for accepted in answer.statistics.lengths]
    if lengths:
        lengths[-1] = answer.statistics.emitted - sum(lengths[:-1])
    return lengths


def choice(run: Run, tokenizer: Any) -> dict[str, Any]:
    """Format a repetition of a question as in Spec-Bench, where `turns` are the answers' texts."""
    return {
        "index": run.repetition,
        "turns": [answer_text(tokenizer, answer.tokens) for answer in run.answers],
        "decoding_steps": [answer.statistics.rounds for answer in run.answers],
        "new_tokens": [len(answer.tokens) for answer in run.answers],
        "wall_time": [answer.seconds for answer in run.answers],
        "accept_lengths": [length for answer in run.answers for length in accept_lengths(answer)],
    }


def records(name: str, runs: Iterable[Run], questions: Sequence[Question], tokenizer: Any) -> list[Record]:
    """Return the lines of a contender's answer file, in the order of the questions."""
    found: dict[int, Record] = {}
    for run in runs:
        question = questions[run.prompt]
        if run.prompt not in found:
            found[run.prompt] = {
                "question_id": question.id,
                "category": question.category,
                "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{question.id}").hex,
                "model_id": name,
                "choices": [],
                "tstamp": time.time(),
            }
        found[run.prompt]["choices"].append(choice(run, tokenizer))
    return list(found.values())


def file_name(contender: str, suffix: str = "") -> str:
    """Return the file name: `fspad.jsonl`; with several temperatures `fspad-temp-1.jsonl`."""
    return re.sub(r"[^\w.+=-]+", "-", contender) + (f"-{suffix}" if suffix else "") + ".jsonl"


def write(path: Path, lines: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_lines(lines))


def read(path: Path) -> list[Record]:
    """Read the lines of an answer file, Spec-Bench's or outdraft's."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; give an answer file of Spec-Bench's format")
    found = []
    for place, line in text_lines(path):
        try:
            if isinstance(line, BadText):
                raise ValueError(str(line))
            record = json.loads(line)
            for one in record["choices"]:
                _ = one["turns"], one["new_tokens"], one["wall_time"], one["accept_lengths"]
            _ = record["category"]
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path}:{place}: no answer of Spec-Bench's format ({problem!r})") from None
        found.append(record)
    return found


def in_group(lines: Iterable[Record], group: str | None) -> list[Record]:
    """Select the lines of one task (MT-bench's categories together are the multi-turn task); None selects all."""
    wanted = MT_BENCH if group == MULTI_TURN else (group,)
    return [line for line in lines if group is None or line["category"] in wanted]


def figures(lines: Sequence[Record], base: Sequence[Record], tokenizer: Any) -> Figures:
    """Compute Spec-Bench's own `tau` and `speedup`, means over repetitions as in its report of several runs.

    Args:
        base: answers of plain decoding to the same questions.
        tokenizer: counts the tokens of plain decoding's texts, each with its beginning-of-text token.
    """
    lengths, speedups = [], []
    for index in range(min((len(line["choices"]) for line in (*lines, *base)), default=0)):
        own, plain = ([line["choices"][index] for line in some] for some in (lines, base))
        lengths += [length for one in own for length in one["accept_lengths"]]
        rates = [sum(one["new_tokens"]) / sum(one["wall_time"]) for one in own]
        base_rates = [
            sum(len(tokenizer(text).input_ids) - 1 for text in one["turns"]) / sum(one["wall_time"]) for one in plain
        ]
        below = float(np.mean(base_rates)) if base_rates else 0.0
        speedups.append(float(np.mean(rates)) / below if rates and below > 0 else NAN)
    return {
        "tau": float(np.mean(lengths)) if lengths else NAN,
        "speedup": float(np.mean(speedups)) if speedups else NAN,
    }


@dataclass
class Reread:
    """The figures of a folder's answer files."""

    folder: Path
    methods: dict[str, dict[str, Figures]]
    """The figures by file (without its suffix), then by task, all questions first."""

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "methods": self.methods}

    def table(self) -> Table:
        """Make a table with one row a file, one column a task."""
        built = Table(title="from the answer files: Spec-Bench's own speed-up (tau)", title_justify="left")
        built.add_column("file", no_wrap=True)
        groups = list(dict.fromkeys(group for own in self.methods.values() for group in own))
        for group in groups:
            built.add_column(group, justify="right")
        for name, own in self.methods.items():
            said = (own.get(group, {"speedup": NAN, "tau": NAN}) for group in groups)
            built.add_row(name, *(f"{number(one['speedup'])}x ({number(one['tau'])})" for one in said))
        return built


def reread(folder: Path, model: str) -> Reread:
    """Compute the figures of every answer file of a folder against plain decoding's.

    Args:
        folder: the folder of `--output-dir`, or a folder of answer files. Plain decoding's are called `plain...` or, as
            Spec-Bench does, `...vanilla...`; where files are of several temperatures, one of each.
        model: the model whose tokenizer counts; a folder, a GGUF file, a hub id, `smollm2` or `reference`.

    Raises:
        UserError: answer files, plain decoding's or the tokenizer are missing, or files have other questions.
    """
    inner = folder / FOLDER
    files = sorted((inner if inner.is_dir() else folder).glob("*.jsonl"))
    files = [file for file in files if file.name != "runs.jsonl"]
    if not files:
        raise UserError(f"no answer files in {folder}; give the --output-dir of a finished benchmark")
    tokenizer = tokenizer_of(model)
    lines = {file.stem: read(file) for file in files}
    methods = {}
    for name in sorted(lines, key=lambda name: not is_plain(name)):
        base = lines[baseline_of(name, list(lines), folder)]
        if _asked(lines[name]) != _asked(base):
            raise UserError(f"{folder}: {name}.jsonl and plain decoding's file answer different questions; finish both")
        methods[name] = {
            group or ALL: figures(in_group(lines[name], group), in_group(base, group), tokenizer)
            for group in (None, *groups_of(base))
        }
    return Reread(folder, methods)


def baseline_of(name: str, names: Sequence[str], folder: Path) -> str:
    """Return the file of plain decoding at the same temperature as a file."""
    found = [other for other in names if is_plain(other) and _temperature(other) == _temperature(name)]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files ({', '.join(found)})"
        raise UserError(
            f"{folder}: {what} of plain decoding for {name}.jsonl; there must be one, called plain... or ...{THEIRS}..."
        )
    return found[0]


def is_plain(name: str) -> bool:
    return TEMPERATURE.sub("", name) == PLAIN or THEIRS in name


def groups_of(lines: Sequence[Record]) -> list[str]:
    """List the tasks in the file's order; MT-bench's categories are one task where there are others."""
    categories = list(dict.fromkeys(str(line["category"]) for line in lines))
    if not set(categories) <= set(MT_BENCH):
        categories = list(dict.fromkeys(MULTI_TURN if name in MT_BENCH else name for name in categories))
    return categories if len(categories) > 1 else []


def tokenizer_of(model: str) -> Any:
    path = str(place_of(model).path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # every library under here has exceptions of its own; the user needs their first line
        raise UserError(f"the tokenizer in '{path}' cannot be loaded: {first_line(error)}") from error


def _temperature(name: str) -> float | None:
    found = TEMPERATURE.search(name)
    return float(found.group(1)) if found else None


def _asked(lines: Sequence[Record]) -> set[str]:
    return {str(line.get("question_id")) for line in lines}
