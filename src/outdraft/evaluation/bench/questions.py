"""Question sets for benchmarks, and their turns as prompts for a model.

The sets are Spec-Bench's six tasks, MT-bench, the prompt sets of the EAGLE papers, GSM8K, and any file of prompts. A
question has a group (the task of its figures) and one or several turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outdraft.api.prompts import Prompt, encode_one, prompt_of
from outdraft.data.records import BadRecord, plain_suffix, read_records
from outdraft.data.text import decode_text
from outdraft.errors import UserError
from outdraft.evaluation.bench.methods import SUITES

MULTI_TURN = "multi-turn"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories of MT-bench, which together are Spec-Bench's multi-turn task."""

SPEC_BENCH = (MULTI_TURN, "translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's tasks."""


@dataclass(frozen=True)
class Question:
    """One question: a conversation's user turns, or a prompt."""

    id: int | str
    category: str
    """The category that the file names."""
    group: str
    """The task to whose figures the question counts."""
    turns: tuple[str, ...] = ()
    """The user turns of a conversation; empty where `prompt` is set."""
    prompt: Prompt | None = None
    """A raw text, or a conversation that ends before the assistant's only answer."""
    source: str = ""
    """The question's `file:line`."""


@dataclass(frozen=True)
class LeftOut:
    """A question that is not measured."""

    source: str
    reason: str


@dataclass
class QuestionSet:
    """The questions in the order of the files and their lines."""

    suite: str
    questions: list[Question]
    left_out: list[LeftOut] = field(default_factory=list)
    digest: str = ""
    """A digest of the files' contents."""

    def limited(self, limit: int | None) -> list[Question]:
        """The first `limit` questions of every group."""
        counts: dict[str, int] = {}
        kept = []
        for question in self.questions:
            counts[question.group] = counts.get(question.group, 0) + 1
            if limit is None or counts[question.group] <= limit:
                kept.append(question)
        return kept


def read_questions(path: str | Path, suite: str | None = None, on_bad_line: str = "error") -> QuestionSet:
    """Read a question set.

    Args:
        path: a file, or for the suite `eagle` a folder of files.
        suite: one of `SUITES`; None guesses it from the records.
        on_bad_line: `error` stops at the first record that cannot be used, `skip` leaves it out and lists it.

    Raises:
        UserError: the file is missing, the suite unknown, a record unusable, or no record usable.
    """
    path = Path(path)
    if suite is not None and suite not in SUITES:
        raise UserError(f"unknown suite '{suite}'; choose from {', '.join(SUITES)}")
    files = _files(path, suite)
    suite = suite or ("eagle" if path.is_dir() else guessed(path))
    found = QuestionSet(suite, [], digest=_digest(files))
    known: dict[int | str, str] = {}
    for file in files:
        read = _reader(suite, file, several=path.is_dir())
        for source, number, content in read_records(file):
            try:
                if isinstance(content, BadRecord):
                    raise content
                question = read(content, number, source)
                if question.id in known:
                    raise BadRecord(f"question {question.id} stands at {known[question.id]} already")
            except BadRecord as problem:
                if on_bad_line == "error":
                    raise UserError(f"{source}: {problem}; mend the line, or go on with --on-bad-line skip") from None
                found.left_out.append(LeftOut(source, str(problem)))
            else:
                known[question.id] = source
                found.questions.append(question)
    if not found.questions:
        extra = f"; {found.left_out[0].source}: {found.left_out[0].reason}" if found.left_out else ", it is empty"
        raise UserError(f"no question in {path}{extra}")
    return found


def guessed(file: Path) -> str:
    """Guess the suite of a file's records; `prompts` where no field tells."""
    records = [content for _, _, content in read_records(file) if isinstance(content, dict)]
    if not records or not all("turns" in record or "answer" in record for record in records):
        return "prompts"
    if all("question" in record for record in records):
        return "gsm8k"
    if not all("question_id" in record and "turns" in record for record in records):
        return "prompts"
    categories = {str(record.get("category")) for record in records}
    if categories <= set(MT_BENCH):
        return "mt-bench" if len(categories) > 1 else "eagle"
    return "spec-bench" if categories <= {*MT_BENCH, *SPEC_BENCH} else "eagle"


def _files(path: Path, suite: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"no such file: {path}; give a JSON-lines or text file of prompts")
    files = sorted(file for file in path.iterdir() if plain_suffix(file) == ".jsonl")
    if suite not in (None, "eagle"):
        names = f", such as {files[0]}" if files else ""
        raise UserError(f"the suite {suite} is one file, and {path} is a folder; give the file{names}")
    if not files:
        raise UserError(f"no *.jsonl file in {path}; give a file, or a folder of EAGLE's prompt sets")
    return files


Reader = Callable[[Any, int, str], Question]
"""A function from record, line number and `file:line` to a question; it may raise `BadRecord`."""


def _reader(suite: str, file: Path, several: bool) -> Reader:
    """Return the function that reads the records of one file."""

    def turned(record: Any, number: int, source: str) -> Question:
        """Read a record `{"question_id", "category", "turns"}`."""
        turns = record.get("turns") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns:
            raise BadRecord('"turns" must be a list of texts')
        if not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise BadRecord('every one of "turns" must be a non-empty string')
        identity, category = record.get("question_id", number), str(record.get("category", ""))
        if not isinstance(identity, int | str):
            raise BadRecord('"question_id" must be a number or a text')
        if suite == "eagle":
            group = file.stem
            identity = f"{file.stem}-{identity}" if several else identity
        elif category in MT_BENCH:
            group = MULTI_TURN if suite == "spec-bench" else category
        elif suite == "spec-bench" and category in SPEC_BENCH:
            group = category
        else:
            known = (*MT_BENCH, *SPEC_BENCH[1:]) if suite == "spec-bench" else MT_BENCH
            raise BadRecord(f"category '{category}' is none of {suite}'s ({', '.join(known)})")
        return Question(identity, category or group, group, tuple(turns), source=source)

    def arithmetic(record: Any, number: int, source: str) -> Question:
        """Read a record `{"question", "answer"}`."""
        text = record.get("question") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise BadRecord('"question" must be a non-empty string')
        return Question(number, "gsm8k", "gsm8k", (text,), source=source)

    def free(record: Any, number: int, source: str) -> Question:
        return Question(number, "prompts", "prompts", prompt=prompt_of(record), source=source)

    return {"gsm8k": arithmetic, "prompts": free}.get(suite, turned)


def questions_of(prompts: Sequence[Prompt], group: str) -> list[Question]:
    """Turn prompts into questions of one group."""
    return [
        Question(number, group, group, prompt=prompt, source=f"{group}:{number}")
        for number, prompt in enumerate(prompts, start=1)
    ]


def _digest(files: Iterator[Path] | Sequence[Path]) -> str:
    """Digest the files' names and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    return total.hexdigest()[:16]


class Dialogue:
    """One question put to one model; a `measure.Script`."""

    def __init__(self, question: Question, target: Any):
        self.question, self._tokenizer, self._context = question, target.tokenizer, target.context_length
        self.first = self._prompt([])

    def __call__(self, answers: list[list[int]]) -> list[int] | None:
        """Return the next prompt's token ids; None after the last turn, or where a turn would not fit the context."""
        if not answers:
            return self.first
        if len(answers) >= len(self.question.turns):
            return None
        ids = self._prompt([answer_text(self._tokenizer, tokens) for tokens in answers])
        return ids if len(ids) < self._context else None

    def needed(self, max_new_tokens: int) -> int:
        """Count the tokens of the last prompt, with the longest possible answers before it."""
        turns = len(self.question.turns)
        if turns < 2:
            return len(self.first)
        return len(self._prompt([""] * (turns - 1))) + max_new_tokens * (turns - 1)

    def _prompt(self, answers: Sequence[str]) -> list[int]:
        question = self.question
        if question.prompt is not None:
            return encode_one(question.prompt, self._tokenizer)
        messages = []
        for place, turn in enumerate(question.turns[: len(answers) + 1]):
            messages.append({"role": "user", "content": turn})
            if place < len(answers):
                messages.append({"role": "assistant", "content": answers[place]})
        return encode_one(messages, self._tokenizer)


def answer_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Decode an answer for the conversation and Spec-Bench's files, without special tokens and outer space."""
    return decode_text(tokenizer, tokens).strip()


def dialogues(
    questions: Sequence[Question], target: Any, max_new_tokens: int, on_bad_line: str = "error"
) -> tuple[list[Dialogue], list[LeftOut]]:
    """Return the dialogues of questions for a model, and the questions that do not fit its context.

    Raises:
        UserError: a question does not fit (and `on_bad_line` is `error`), or none fits.
    """
    fitting: list[Dialogue] = []
    left_out: list[LeftOut] = []
    for number, question in enumerate(questions, start=1):
        dialogue = Dialogue(question, target)
        needed = dialogue.needed(max_new_tokens)
        if needed < target.context_length:
            fitting.append(dialogue)
            continue
        answers = f" with answers of up to {max_new_tokens}" if len(question.turns) > 1 else ""
        reason = f"prompt {number} has {needed} tokens{answers}, the model's context is {target.context_length}"
        if on_bad_line == "error":
            fix = "shorten it or take it out, or leave it out with --on-bad-line skip"
            raise UserError(f"{question.source}: {reason}; {fix}")
        left_out.append(LeftOut(question.source, reason))
    if not fitting:
        raise UserError(f"no question fits the model's context of {target.context_length} tokens")
    return fitting, left_out
