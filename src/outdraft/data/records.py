"""Records of data from JSON lines, JSON lists, Parquet, texts with a prompt a line, and the hub.

All prompts and conversations are read here, so that every verb takes the same files. `text_file.py` turns bytes
into lines of text; the readers of records decide what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from outdraft.data.text_file import HALF, BadText, plain_suffix, text_lines, whole_text
from outdraft.errors import UserError, first_line

HUB = "hf:"
"""The prefix of names of Hugging Face hub data sets."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
FOLDER_SUFFIXES = (".jsonl", ".parquet")
"""The suffixes of the files that are read of a folder."""

BARE = (("instruction", "input"), ("prompt", None), ("question", None))
"""The question fields of a record without turns, each with an optional field that continues it."""

ANSWERS = ("output", "completion", "response", "answer")
"""The fields that may have the answer of a record without turns."""

Found = tuple[str, int, Any]
"""A tuple of `file:line`, the line's number, and the record or the `BadRecord` with the reason it is unreadable."""


class BadRecord(Exception):
    """An error of a record that cannot be used, with the reason."""


def read_records(source: str | Path) -> Iterator[Found]:
    """Read the records of a file, in its order, or of `hf:NAME` or `hf:NAME:SPLIT` on the hub.

    Raises:
        UserError: a package is missing that such a source needs, or the whole of it cannot be read.
    """
    if str(source).startswith(HUB):
        yield from _hub(str(source))
        return
    file = Path(source)
    suffix = plain_suffix(file)
    if suffix == ".parquet":
        yield from _numbered(file, _parquet(file))
        return
    first = next((line for _, line in text_lines(file) if isinstance(line, str)), "")
    if suffix in JSON_SUFFIXES or (suffix != ".txt" and first.startswith("{")):
        yield from _json_list(file) if first.startswith("[") else _lines(file, json.loads)
    else:
        yield from _lines(file, lambda text: {"prompt": text})


def data_files(path: str | Path) -> list[str | Path]:
    """List the sources that `path` stands for: itself, or the files of a folder by name.

    Raises:
        UserError: no such file exists.
    """
    if str(path).startswith(HUB):
        return [str(path)]
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if plain_suffix(file) in FOLDER_SUFFIXES)
        if not files:
            raise UserError(f"no *.jsonl or *.parquet file in {path}; give --data a file or a folder that has some")
        return list(files)
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}; give --data a JSON-lines file or a folder of them")
    return [path]


def json_lines(rows: Iterable[Mapping[str, Any] | str]) -> str:
    """Format rows as the text of a file of records; a string among them is a text.

    Raises:
        UserError: a row is neither a dictionary nor a string.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping | str):
            raise UserError(f"row {number} of the data is a {type(row).__name__}; give dictionaries or texts")
        record = {"text": row} if isinstance(row, str) else dict(row)
        lines.append(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def bare_question(record: Mapping[str, Any]) -> str | None:
    """Return the question of a record without turns, Alpaca's `input` after the `instruction`; None without one.

    Raises:
        BadRecord: the field holds no text.
    """
    for name, more in BARE:
        if name not in record:
            continue
        question = record[name]
        if not isinstance(question, str) or not question.strip():
            raise BadRecord(f'"{name}" must be a non-empty string')
        rest = record.get(more) if more else None
        return f"{question}\n\n{rest}" if isinstance(rest, str) and rest.strip() else question
    return None


def _lines(file: Path, read: Any) -> Iterator[Found]:
    for number, line in text_lines(file):
        content: Any
        try:
            if isinstance(line, BadText):
                raise BadRecord(str(line))
            content = sound(read(line)) if "\\u" in line else read(line)
        except json.JSONDecodeError as problem:
            content = BadRecord(f"broken JSON, {problem}")
        except RecursionError:
            content = BadRecord("JSON that is nested too deep")
        except BadRecord as problem:
            content = problem
        yield f"{file}:{number}", number, content


def _json_list(file: Path) -> Iterator[Found]:
    """Read a file that is one JSON list, as ShareGPT and Alpaca are published."""
    try:
        records = json.loads(whole_text(file))
    except ValueError as problem:
        raise UserError(f"{file}: not valid JSON ({problem}); mend the file or convert it to JSON lines") from None
    yield from _numbered(file, iter(records))


def sound(record: Any) -> Any:
    """Return the record if all of its texts can be written as text.

    Raises:
        BadRecord: a text holds half a surrogate pair, which JSON can escape and no tokenizer takes.
    """
    half = HALF.search(json.dumps(record, ensure_ascii=False, default=str))
    if half is not None:
        raise BadRecord(f"half a surrogate pair, \\u{ord(half[0]):04x}, which is no text")
    return record


def _numbered(source: str | Path, records: Iterator[Any]) -> Iterator[Found]:
    for number, record in enumerate(records, start=1):
        content: Any
        try:
            content = sound(record)
        except BadRecord as problem:
            content = problem
        yield f"{source}:#{number}", number, content


def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        yield from _parquet_by_pandas(file)
        return
    try:
        for batch in ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except Exception as error:  # the library has exceptions of its own
        raise _unreadable(file, error) from error


def _parquet_by_pandas(file: Path) -> Iterator[Any]:
    try:
        import pandas

        frame = pandas.read_parquet(file)
    except ImportError:
        raise UserError(f"{file}: Parquet is read by pyarrow, which is missing: pip install pyarrow") from None
    except Exception as error:
        raise _unreadable(file, error) from error
    yield from json.loads(frame.to_json(orient="records"))  # plain lists and numbers in place of arrays


def _hub(source: str) -> Iterator[Found]:
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source}: data sets of the hub need a package: pip install datasets") from None
    try:
        records = load_dataset(name, split=split or "train")
    except Exception as error:  # network, names, scripts, formats
        raise UserError(
            f"{source}: {first_line(error)}; check the name, the split (hf:NAME:SPLIT), or take a file"
        ) from (error)
    yield from _numbered(source, iter(records))


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: no Parquet file that can be read ({first_line(error)}); check the file")
