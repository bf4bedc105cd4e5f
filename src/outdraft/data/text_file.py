"""Files of text: reading lines of plain or compressed UTF-8 or UTF-16, with or without a mark at their beginning, and
writing a file whole or not at all.

A line ends at "\n" and nowhere else: JSON allows U+2028, U+2029 and U+0085 inside a text, at which Python's own
`str.splitlines` ends one.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import os
import re
from collections.abc import Iterator
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


class BadText(Exception):
    """An error of a line that is no text, with the reason."""


def plain_suffix(file: Path) -> str:
    """Return a file's suffix without compression: `.jsonl` of `a.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix


def split_lines(text: str) -> list[str]:
    """Split a text into lines, without their ends and without empty ones."""
    return [line for line in (line.strip(AROUND) for line in text.split("\n")) if line]


def text_lines(file: Path) -> Iterator[tuple[int, str | BadText]]:
    """Yield non-empty lines with their numbers, or the reason one is unreadable; a damaged archive ends at the damage.

    Raises:
        UserError: the file's compression needs a missing package.
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
    """Read the text of a file.

    Raises:
        UserError: a part is no text, or the archive is damaged.
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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, even where several processes do so at once; its folder exists."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)


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
