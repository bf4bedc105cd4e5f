"""Draw the prompt files that ship with the reference target from its training text.

``python scripts/reference_model/build_prompts.py --data DIR`` rewrites both files, from MIT sources only.
``heldout`` prompts come from conversations the target never saw; ``train`` prompts are ones it was trained on.
With ``--wide FILE`` it writes that file instead: questions of every source and up to a longer length, for the drafters
that ship. They are too many to ship themselves.
Knows nothing about models.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from pathlib import Path

from corpus import Document, conversation, split
from outdraft.reference import DATA

LONGEST = 480
HELD_OUT_PER_KIND = 8
TRAIN_PER_KIND = {"math": 620, "code": 580, "roleplay": 300}
KINDS: dict[str, Callable[[str, str], bool]] = {
    "math": lambda kind, text: kind == "math",
    "code": lambda kind, text: kind == "code" and not text.endswith("?"),
    "story": lambda kind, text: kind == "roleplay" and bool(re.search(r"\b(story|tale|scene|describe)\b", text, re.I)),
    "qa": lambda kind, text: text.endswith("?") and kind != "math",
    "roleplay": lambda kind, text: kind == "roleplay",
}
"""First match wins; the order is also the order in which held-out prompts take turns."""


WIDE_LONGEST = 4000
WIDE_PER_KIND = {"math": 1100, "code": 900, "roleplay": 500, "instruct": 400, "t0": 300}
"""Of the larger file: characters of a question at most, and questions of each kind."""


def _question(document: Document) -> str:
    return (document.messages or [])[0]["content"]


def _write(path: Path, questions: Iterable[str]) -> None:
    rows = [json.dumps({"messages": [{"role": "user", "content": q}]}, ensure_ascii=False) for q in questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def build(data: Path, seed: int = 0) -> None:
    """Write both prompt files with the same split that the training used."""
    train: list[Document] = []
    held_out: list[Document] = []
    for source in ("gsm8k", "gpteacher"):
        seen, unseen = split(data, source, seed)
        train, held_out = train + seen, held_out + unseen
    with (data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as file:
        test = [conversation(row["question"], row["answer"], "math") for row in map(json.loads, file)]
    known = {_question(d) for d in train}
    shuffle = random.Random(seed)
    held_out += shuffle.sample(test, 3 * HELD_OUT_PER_KIND)
    shuffle.shuffle(held_out)

    picked: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for document in held_out:
        text = _question(document)
        kind = next(name for name, holds in KINDS.items() if holds(document.kind, text))
        if len(text) <= LONGEST and text not in known and len(picked[kind]) < HELD_OUT_PER_KIND:
            picked[kind].append(text)
    turns = chain.from_iterable(zip_longest(*picked.values()))
    _write(DATA / "heldout_prompts.jsonl", [text for text in turns if text is not None])

    chosen: list[str] = []
    for kind, count in TRAIN_PER_KIND.items():
        texts = list(dict.fromkeys(_question(d) for d in train if d.kind == kind))
        chosen += [text for text in texts if len(text) <= LONGEST][:count]
    shuffle.shuffle(chosen)
    _write(DATA / "train_prompts.jsonl", chosen)


def build_wide(data: Path, output: Path, seed: int = 0) -> None:
    """Write questions of every conversational source that the training saw; none that the held-out prompts have."""
    held_out = {json.loads(line)["messages"][0]["content"] for line in (DATA / "heldout_prompts.jsonl").open()}
    documents = [d for source in ("gsm8k", "gpteacher", "instruct") for d in split(data, source, seed)[0]]
    chosen: list[str] = []
    for kind, count in WIDE_PER_KIND.items():
        texts = dict.fromkeys(_question(document) for document in documents if document.kind == kind)
        chosen += [text for text in texts if len(text) <= WIDE_LONGEST and text not in held_out][:count]
    random.Random(seed).shuffle(chosen)
    _write(output, chosen)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wide", type=Path, metavar="FILE", help="write the larger file here, and no other")
    arguments = parser.parse_args()
    if arguments.wide is not None:
        build_wide(arguments.data, arguments.wide, arguments.seed)
    else:
        build(arguments.data, arguments.seed)


if __name__ == "__main__":
    main()
