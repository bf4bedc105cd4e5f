"""The text that the reference target is trained on: reading, chat rendering and the held-out split.

Knows the folder layout of the data root and which files may be trained on.
Knows nothing about tokens, models or training; benchmark files (gsm8k test, spec_bench, eagle_bench, mt_bench)
are never opened here.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outdraft.reference import Messages

HELD_OUT = 0.02
STDLIB_BYTES = 6_000_000
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "site-packages"}
T0_TEMPLATES = ("duorc_", "common_gen_")
"""Only the T0 renderings whose source data set is under a permissive licence (DuoRC, CommonGen: MIT)."""


@dataclass(frozen=True)
class Document:
    """One text; ``messages`` is set when the text is a rendered conversation, ``kind`` names its file of origin."""

    text: str
    kind: str
    messages: Messages | None = None


def render(messages: Messages) -> str:
    """Write a conversation exactly as the tokenizer's chat template does."""
    return "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages)


def conversation(user: str, assistant: str, kind: str) -> Document:
    """One question and its answer as a document."""
    messages = [{"role": "user", "content": user.strip()}, {"role": "assistant", "content": assistant.strip()}]
    return Document(render(messages), kind, messages)


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def gsm8k(root: Path) -> Iterator[Document]:
    """Grade-school maths (train split only) without the calculator marks."""
    for row in _lines(root / "gsm8k" / "train.jsonl"):
        yield conversation(row["question"], re.sub(r"<<.*?>>", "", row["answer"]), "math")


def gpteacher(root: Path) -> Iterator[Document]:
    """Code and role-play instructions."""
    for kind, name in (("code", "codegen-instruct.json"), ("roleplay", "roleplay-instruct.json")):
        for row in json.loads((root / "gpteacher" / name).read_text(encoding="utf-8")):
            user = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
            yield conversation(user, row["response"], kind)


def instruct(root: Path) -> Iterator[Document]:
    """Short instructions, questions over a text, and stories built around an answer."""
    folder = root / "self_instruct"
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for row in _lines(folder / name):
            for case in row["instances"]:
                user = "\n\n".join(part for part in (row["instruction"], case["input"]) if part.strip())
                yield conversation(user, case["output"], "instruct")
    for path in sorted((folder / "t0").glob("*.jsonl")):
        if path.name.startswith(T0_TEMPLATES):
            for row in _lines(path):
                yield conversation(row["prompt"], row["completion"].replace("<|endoftext|>", ""), "t0")


def books(root: Path, chunk: int = 16_000) -> Iterator[Document]:
    """Public-domain novels without the publisher's header and footer, unwrapped, in pieces of about ``chunk`` bytes."""
    for path in sorted((root / "gutenberg").glob("*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        text = text.replace("\r\n", "\n")
        start = re.search(r"\*\*\* *START OF.*?\*\*\*", text, re.DOTALL)
        end = re.search(r"\*\*\* *END OF|\nEnd of (the )?Project Gutenberg", text)
        text = text[start.end() if start else 0 : end.start() if end else None]
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if "Gutenberg" not in p]
        piece: list[str] = []
        for paragraph in filter(None, paragraphs):
            piece.append(paragraph)
            if sum(map(len, piece)) > chunk:
                yield Document("\n\n".join(piece), "book")
                piece = []
        if piece:
            yield Document("\n\n".join(piece), "book")


def stdlib(root: Path) -> Iterator[Document]:
    """Python standard library sources of the running interpreter; ``root`` is not used."""
    del root
    library = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(library.rglob("*.py")) if not STDLIB_SKIP & set(p.relative_to(library).parts)]
    random.Random(0).shuffle(paths)
    taken = 0
    for path in paths:
        size = path.stat().st_size
        if 200 < size < 150_000 and taken + size <= STDLIB_BYTES:
            taken += size
            yield Document(path.read_text(encoding="utf-8", errors="replace"), "python")


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "gsm8k": gsm8k,
    "gpteacher": gpteacher,
    "instruct": instruct,
    "books": books,
    "stdlib": stdlib,
}


def split(root: Path, source: str, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Read one source and return its shuffled (train, held-out) documents; the same seed gives the same split."""
    documents = list(dict.fromkeys(Document(d.text, d.kind) for d in READERS[source](root)))
    messages = {d.text: d.messages for d in READERS[source](root)}
    documents = [Document(d.text, d.kind, messages[d.text]) for d in documents]
    random.Random(seed).shuffle(documents)
    count = max(4, round(HELD_OUT * len(documents)))
    return documents[count:], documents[:count]
