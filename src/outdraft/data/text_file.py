"""Files of lines of text as they are found: plain or compressed, UTF-8 or UTF-16, with any mark at their beginning.

A line ends where "\n" stands and nowhere else: JSON allows U+2028, U+2029 and U+0085 inside a text, at which Python's
own `str.splitlines` ends one. Knows nothing of what a line means.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outdraft.errors import UserError, first_line

PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""What compressed files are called, and how they begin, which is what they are recognised by."""

_ELSE = (UserError, FileNotFoundError, PermissionError, IsADirectoryError)
"""What goes wrong before a file is read, and says so itself."""

AROUND = " \t\r\n\ufeff"
"""What may stand around a line and is no part of it; not all that `str.strip` takes away."""


HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: what is no text, though strings of Python can hold it."""


class BadText(Exception):
    """A line that is no text; carries the reason."""


def plain_suffix(file: Path) -> str:
    """What a file's name ends with, compression apart: `.jsonl` of `a.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix


def split_lines(text: str) -> list[str]:
    """The lines of a text that is there already, without their ends and without empty ones."""
    return [line for line in (line.strip(AROUND) for line in text.split("\n")) if line]


def text_lines(file: Path) -> Iterator[tuple[int, str | BadText]]:
    """Lines that are not empty and their numbers, or why one cannot be read; a damaged archive ends where it breaks.

    Raises:
        UserError: the file is compressed in a way that only a missing package knows.
    """
    lines, number = _lines(file), 0
    while True:
        number += 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except _ELSE:
            raise
        except Exception as problem:  # every format's library has exceptions of its own
            yield number, BadText(f"the archive is damaged from here on ({first_line(problem)})")
            return
        if isinstance(line, BadText):
            yield number, line
        elif text := line.strip(AROUND):
            yield number, text


def whole_text(file: Path) -> str:
    """The text of a file.

    Raises:
        UserError: some of it is no text, or its archive is damaged.
    """
    try:
        lines = list(_lines(file))
    except _ELSE:
        raise
    except Exception as problem:  # every format's library has exceptions of its own
        raise UserError(f"{file}: the archive is damaged ({first_line(problem)}); fetch it again") from None
    for number, line in enumerate(lines, start=1):
        if isinstance(line, BadText):
            raise UserError(f"{file}:{number}: {line}; mend the line or convert the file to UTF-8")
    return "\n".join(map(str, lines)).lstrip("\ufeff")


def _lines(file: Path) -> Iterator[str | BadText]:
    with _opened(file) as stream:
        encoding = json.detect_encoding(stream.peek(4)[:4])  # by a mark, or by where zero bytes are
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
    """Its content, whatever it is compressed by."""
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
