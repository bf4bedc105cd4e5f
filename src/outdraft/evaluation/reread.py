"""Spec-Bench's figures from answer files alone: those of an output folder, or Spec-Bench's own.

Needs the target's tokenizer, for Spec-Bench counts plain decoding's tokens by it; loads no model and decodes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoTokenizer

from outdraft.api.loading import first_line
from outdraft.errors import UserError
from outdraft.evaluation import spec_bench
from outdraft.evaluation.measure import PLAIN
from outdraft.evaluation.questions import MT_BENCH, MULTI_TURN
from outdraft.evaluation.spec_bench import Record
from outdraft.output import number
from outdraft.target.named import place_of

ALL = "all questions"
THEIRS = "vanilla"
"""What Spec-Bench has in the name of plain decoding's file."""
LAW = re.compile(r"-temp-([\d.]+)$")

Figures = dict[str, float]
"""`tau` and `speedup`."""


@dataclass
class Reread:
    """What the files of a folder say."""

    folder: Path
    methods: dict[str, dict[str, Figures]]
    """By file (without its ending), then by task, all questions first."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"folder": str(self.folder), "methods": self.methods}

    def table(self) -> Table:
        """One row a file, one column a task."""
        built = Table(title="from the answer files: Spec-Bench's own speed-up (tau)", title_justify="left")
        built.add_column("file", no_wrap=True)
        groups = list(dict.fromkeys(group for own in self.methods.values() for group in own))
        for group in groups:
            built.add_column(group, justify="right")
        for name, own in self.methods.items():
            said = (own.get(group, {"speedup": spec_bench.NAN, "tau": spec_bench.NAN}) for group in groups)
            built.add_row(name, *(f"{number(one['speedup'])}x ({number(one['tau'])})" for one in said))
        return built


def reread(folder: Path, model: str) -> Reread:
    """Every answer file of a folder against plain decoding's.

    Args:
        folder: what `--output-dir` named, or a folder of answer files. Plain decoding's are called `plain...` or, as
            Spec-Bench does, `...vanilla...`; where files are of several temperatures, one of each.
        model: whose tokenizer counts; a folder, a GGUF file, a hub id, `smollm2` or `reference`.

    Raises:
        UserError: no answer files or none of plain decoding, files of other questions than its, or no tokenizer.
    """
    inner = folder / spec_bench.FOLDER
    files = sorted((inner if inner.is_dir() else folder).glob("*.jsonl"))
    files = [file for file in files if file.name != "runs.jsonl"]
    if not files:
        raise UserError(f"no answer files in {folder}; give the --output-dir of a finished benchmark")
    tokenizer = tokenizer_of(model)
    lines = {file.stem: spec_bench.read(file) for file in files}
    methods = {}
    for name in sorted(lines, key=lambda name: not is_plain(name)):
        base = lines[baseline_of(name, list(lines), folder)]
        if _asked(lines[name]) != _asked(base):
            raise UserError(f"{folder}: {name}.jsonl and plain decoding's file answer different questions; finish both")
        methods[name] = {
            group or ALL: spec_bench.figures(
                spec_bench.in_group(lines[name], group), spec_bench.in_group(base, group), tokenizer
            )
            for group in (None, *groups_of(base))
        }
    return Reread(folder, methods)


def baseline_of(name: str, names: Sequence[str], folder: Path) -> str:
    """The file of plain decoding that belongs to a file: the one of its temperature."""
    found = [other for other in names if is_plain(other) and _law(other) == _law(name)]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files ({', '.join(found)})"
        raise UserError(
            f"{folder}: {what} of plain decoding for {name}.jsonl; there must be one, called plain... or ...{THEIRS}..."
        )
    return found[0]


def is_plain(name: str) -> bool:
    return LAW.sub("", name) == PLAIN or THEIRS in name


def groups_of(lines: Sequence[Record]) -> list[str]:
    """The tasks in the file's order; MT-bench's categories are one where there are others."""
    categories = list(dict.fromkeys(str(line["category"]) for line in lines))
    if not set(categories) <= set(MT_BENCH):
        categories = list(dict.fromkeys(MULTI_TURN if name in MT_BENCH else name for name in categories))
    return categories if len(categories) > 1 else []


def tokenizer_of(model: str) -> Any:
    """A model's tokenizer, without its weights."""
    path = str(place_of(model).path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # every library under here has exceptions of its own; the user needs their first line
        raise UserError(f"the tokenizer in '{path}' cannot be loaded: {first_line(error)}") from error


def _law(name: str) -> float | None:
    found = LAW.search(name)
    return float(found.group(1)) if found else None


def _asked(lines: Sequence[Record]) -> set[str]:
    return {str(line.get("question_id")) for line in lines}
