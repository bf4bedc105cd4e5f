"""Records of data from JSON lines, JSON lists, tables, Parquet, texts with a prompt a line, and the hub.

All prompts and conversations are read here, so that every verb takes the same files; the readers of records decide what
they mean. Text is plain or compressed UTF-8 or UTF-16, with or without a mark at its beginning. A line ends at a line
feed and nowhere else: JSON allows U+2028, U+2029 and U+0085 inside a text, at which `str.splitlines` ends one.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from outdraft.errors import UserError, first_line

PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""The suffixes of compressed files, with the first bytes by which they are recognised."""

_ELSE = (UserError, FileNotFoundError, PermissionError, IsADirectoryError)
"""The errors before a file is read, whose own messages are clear."""

AROUND = " \t\r\n\ufeff"
"""The characters around a line that are no part of it; fewer than `str.strip` removes."""

HALF = re.compile("[\ud800-\udfff]")
"""The pattern of half a surrogate pair, which is no text, though strings of Python can hold it."""


class BadRecord(Exception):
    """An error of a record that cannot be used, with the reason."""


class BadText(BadRecord):
    """An error of a line that is no text, with the reason."""


def plain_suffix(file: Path) -> str:
    """Return a file's suffix without compression: `.jsonl` of `a.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix


def split_lines(text: str) -> list[str]:
    """Split a text into lines, without their ends and without empty ones."""
    return [line for line in (line.strip(AROUND) for line in text.split("\n")) if line]


class Damaged(BadText):
    """An error of an archive that cannot be read from a line on, with the reason."""


def text_lines(file: Path) -> Iterator[tuple[int, str | BadText]]:
    """Yield non-empty lines with their numbers, or why one is unreadable; a damaged archive ends at the damage."""
    for number, line in enumerate(_text_of(file), start=1):
        if isinstance(line, BadText):
            yield number, line
        elif text := line.strip(AROUND):
            yield number, text


def whole_text(file: Path) -> str:
    """Read the text of a file.

    Raises:
        UserError: a part is no text, or the archive is damaged.
    """
    lines = list(_text_of(file))
    for number, line in enumerate(lines, start=1):
        if isinstance(line, BadText):
            fix = "fetch it again" if isinstance(line, Damaged) else "mend the line or convert the file to UTF-8"
            raise UserError(f"{file}:{number}: {line}; {fix}")
    return "\n".join(map(str, lines)).lstrip("\ufeff")


def _text_of(file: Path) -> Iterator[str | BadText]:
    try:
        yield from _decoded(file)
    except _ELSE:
        raise
    except Exception as problem:  # every format's library has exceptions of its own
        yield Damaged(f"the archive is damaged from here on ({first_line(problem)})")


def _decoded(file: Path) -> Iterator[str | BadText]:
    with _opened(file) as stream:
        start = stream.peek(4)[:4]
        # By a mark, or by where zero bytes are; nothing but those, as after a crash, is no text in any encoding.
        encoding = json.detect_encoding(start) if any(start) else "utf-8"
        if encoding.startswith("utf-8"):
            for line in stream:
                try:
                    yield line.removesuffix(b"\n").decode()
                except UnicodeDecodeError:
                    yield BadText("not UTF-8 text")
            return
        decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        for text in decoder.decode(stream.read()).split("\n"):
            yield BadText(f"not {encoding.upper()} text") if HALF.search(text) else text


def _opened(file: Path) -> io.BufferedReader:
    """Open a stream of the content of a file that may be compressed."""
    with file.open("rb") as raw:
        start = raw.read(6)
    kind = next((suffix for suffix, mark in PACKED.items() if start.startswith(mark)), "")
    opens: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
    return io.BufferedReader(opens.get(kind, open)(file, "rb"))


def _zstd(file: Path, mode: str) -> Any:
    for name in ("compression.zstd", "zstandard"):  # the first is Python's own from 3.14 on
        try:
            return importlib.import_module(name).open(file, mode)
        except ImportError:
            continue
    raise UserError(f"{file} is compressed by zstd, which needs a package: pip install zstandard (or unpack it)")


HUB = "hf:"
"""The prefix of names of Hugging Face hub data sets."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""The suffixes of tables, whose first line names the fields, and what separates these."""

FOLDER_SUFFIXES = (".jsonl", ".parquet")
"""The suffixes of the files that are read of a folder."""

BARE = (("instruction", "input"), ("prompt", None), ("question", None))
"""The question fields of a record without turns, each with an optional field that continues it."""

ANSWERS = ("output", "completion", "response", "answer")
"""The fields that may have the answer of a record without turns."""

Found = tuple[str, int, Any]
"""A tuple of `file:line`, the line's number, and the record or the `BadRecord` with the reason it is unreadable."""


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
    if suffix in TABLE_SUFFIXES:
        yield from _numbered(file, iter(_table(file, TABLE_SUFFIXES[suffix])))
        return
    first = next((line for _, line in text_lines(file) if isinstance(line, str)), "")
    is_json = suffix in JSON_SUFFIXES or (suffix != ".txt" and (first == "[" or first.startswith(("{", "[{"))))
    if not is_json or not first.startswith("["):
        yield from _lines(file, json.loads if is_json else lambda text: {"prompt": text})
        return
    try:  # one JSON list, as ShareGPT and Alpaca are published
        records = json.loads(whole_text(file))
    except ValueError as problem:
        raise UserError(f"{file}: not valid JSON ({problem}); mend the file or convert it to JSON lines") from None
    yield from _numbered(file, iter(records))


def data_files(path: str | Path) -> list[str | Path]:
    """List the sources that `path` stands for: itself, or the files of a folder by name."""
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
        content: Any = line
        try:
            if isinstance(line, str):
                content = sound(read(line)) if "\\u" in line else read(line)
        except ValueError as problem:  # of `json`, or of a number with thousands of digits
            content = BadRecord(f"broken JSON, {first_line(problem)}")
        except RecursionError:
            content = BadRecord("JSON that is nested too deep")
        except BadRecord as problem:
            content = problem
        yield f"{file}:{number}", number, content


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


def _table(file: Path, separator: str) -> list[Any]:
    text, before = whole_text(file), csv.field_size_limit()
    csv.field_size_limit(max(before, len(text)))  # answers may be longer than the module's 131,072 characters
    table = csv.DictReader(io.StringIO(text), delimiter=separator)
    try:
        return list(table)
    except csv.Error as problem:
        raise UserError(f"{file}:{table.line_num + 1}: no row of a table ({problem}); mend the line") from None
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{file}: Parquet is read by pyarrow, which is missing: pip install pyarrow") from None
    try:
        for batch in ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except Exception as error:  # the library has exceptions of its own
        reason = f"no Parquet file that can be read ({first_line(error)}); check the file"
        raise UserError(f"{file}: {reason}") from error


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
