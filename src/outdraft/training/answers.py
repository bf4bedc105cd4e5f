"""The target's answers: a conversation that is answered turn by turn, the answer file, and the prompts that are still
without an answer.

Every turn of a sample has its own random generator, which follows from the seed and the sample's name alone: neither
other rows nor an interruption change its draws.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.data.conversations import Conversation, ConversationSet, Message
from outdraft.data.text import decode_text
from outdraft.data.tokenization import TemplateRefuses, render, variables_of
from outdraft.drafting.ngrams import NgramSettings
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.output import whole_lines, write_whole
from outdraft.target.target import Target

ENDED, CUT = "stop", "length"
"""The finish reasons of an answer in OpenAI's API: it ended by itself, or reached its largest length."""

WINDOW = 8
"""The window of prompts sorted by length, as a multiple of the rows: prompts that run together then have like lengths.
Sorting all prompts would leave an interrupted run with nothing but the longest."""

FORMAT = 2
"""The format version of the lines; version 1 had one answer to a prompt and no finish reason."""


class Name(NamedTuple):
    """The key of an answer in a file."""

    id: int | str
    """The prompt's id."""
    temperature: float
    sample: int = 0
    """The sample's number among several at this temperature."""

    def seed(self, seed: int, turn: int) -> int:
        """Return the seed of a turn's random generator."""
        text = f"{seed} {self.id} {self.temperature:g} {self.sample} {turn}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class AnswerSettings:
    """The settings by which all prompts of a run are answered.

    Attributes:
        target: the model that answers.
        max_new_tokens: most tokens of one answer.
        filters: sampling settings other than the temperature.
        seed: seed of all draws.
        prefix_tokens: tokens of a text that are kept as the prompt of its continuation.
        ngrams: settings of n-gram drafts, if rows use them.
        switches: variables of the chat template.
    """

    target: Target
    max_new_tokens: int
    filters: dict[str, Any]
    seed: int = 0
    prefix_tokens: int = 32
    ngrams: NgramSettings | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class AnsweredConversation:
    """A conversation that is answered at one temperature."""

    settings: AnswerSettings
    conversation: Conversation
    name: Name
    _told: list[dict[str, Any]] = field(default_factory=list)
    _text: str | None = None
    _turn: int = 0
    _finished: bool = True

    def __post_init__(self) -> None:
        self._asked = self.conversation.asked
        self._tokenizer: Any = self.settings.target.tokenizer

    def next_row(self) -> Row | None:
        """Make the row of the next turn; None where all are answered, or a whole answer would not fit the context.

        Raises:
            TemplateRefuses: the chat template does not take the turns before it.
        """
        settings, prompt = self.settings, self._prompt()
        target, most = settings.target, settings.max_new_tokens
        if not prompt or len(prompt) + most > target.context_length:
            return None
        sampling = SamplingSettings(temperature=self.name.temperature, **settings.filters)
        ends = target.eos_token_ids
        warper = Warper(sampling, len(prompt), target.vocab_size, ends, (), target.device)
        dice = Dice(self.name.seed(settings.seed, self._turn))
        return Row(prompt, warper, dice, most, frozenset(ends), ngrams=settings.ngrams)

    def take(self, row: Row) -> None:
        """Take in the answer of the last `next_row`, which has ended."""
        if row.error is not None:
            raise UserError(f"prompt {self.name.id}: {row.error}")
        finished = row.finish_reason == "eos"
        tokens = row.tokens[:-1] if finished else row.tokens
        if self._plain:
            self._text = self._decoded([*row.prompt, *tokens], finished)
        else:
            if not self._finished:  # what was the last turn until now
                self._told[-1] |= {"finished": False, "finish_reason": CUT}
            answer = {"role": "assistant", "content": self._decoded(tokens, finished).strip("\n")}
            self._told += [*self._question(), answer]
        self._finished = finished
        self._turn += 1

    def record(self) -> dict[str, Any]:
        """Return the output line; its finish reason is the last turn's, and earlier turns that were cut say so
        themselves."""
        origin = {} if self.conversation.origin is None else {"source": self.conversation.origin}
        sample = {"sample": self.name.sample} if self.name.sample else {}
        tools = {"tools": list(self.conversation.tools)} if self.conversation.tools else {}
        content = {**tools, "messages": self._told} if self._text is None else {"text": self._text}
        about = {"id": self.name.id, **origin, "temperature": self.name.temperature, **sample}
        return {**about, "finished": self._finished, "finish_reason": ENDED if self._finished else CUT, **content}

    @property
    def _plain(self) -> bool:
        """True if a text is continued, with no chat around it."""
        template = getattr(self._tokenizer, "chat_template", None)
        return self.conversation.text is not None or (self.conversation.bare and not template)

    def _prompt(self) -> list[int]:
        """Return the tokens of the next turn's prompt; empty where no question is left."""
        tokenizer = self._tokenizer
        if self._plain:
            if self._turn:
                return []
            if self.conversation.text is not None:
                return list(tokenizer(self.conversation.text)["input_ids"])[: self.settings.prefix_tokens]
            return list(tokenizer(self.conversation.messages[0]["content"])["input_ids"])
        if not (question := self._question()):
            return []
        marks = ("finished", "finish_reason")
        said = [{name: one[name] for name in one if name not in marks} for one in [*self._told, *question]]
        text = render(tokenizer, said, True, variables_of(self.conversation, self.settings.switches))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _question(self) -> list[Message]:
        """Return the turns before the next answer; empty after the last."""
        return self._asked[self._turn] if self._turn < len(self._asked) else []

    def _decoded(self, tokens: Sequence[int], finished: bool) -> str:
        text = decode_text(self._tokenizer, tokens)
        return text if finished else text.rstrip("\ufffd")  # a character that was cut in the middle


def identities(conversations: Sequence[Conversation]) -> list[int | str]:
    """Give each conversation an id: its own, else a hash of its questions; repeated ids get a number."""
    asked = [json.dumps(one.text or one.questions).encode() for one in conversations]
    hashes = [hashlib.sha256(text).hexdigest()[:12] for text in asked]
    own = [name if one.id is None else one.id for one, name in zip(conversations, hashes, strict=True)]
    given, used = set(own), set[int | str]()
    found: list[int | str] = []
    for name in own:
        unique, number = name, 1
        while unique in used or (number > 1 and unique in given):
            number += 1
            unique = f"{name}-{number}"
        used.add(unique)
        found.append(unique)
    return found


class AnswerFile:
    """JSON lines of answers, in the order in which they end, and in the prompts' order once all are there.

    A context manager while lines are added. `NAME.settings.json` beside it says by which settings it was written, so
    that answers by others do not get into it. A half-written last line, as a killed run leaves it, is cut off.

    Args:
        settings: the generation settings of the answers, as JSON values.
        resume: True keeps existing lines; False refuses an existing file.

    Attributes:
        present: the answers in the file, each with its questions.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool = True):
        self.path = path
        self.present: dict[Name, list[Message]] = {}
        self._claim({"format": FORMAT, **settings}, resume)

    def __enter__(self) -> AnswerFile:
        self._lines = self.path.open("ab", buffering=0)  # a line is one write
        return self

    def __exit__(self, *problem: object) -> None:
        os.fsync(self._lines.fileno())
        self._lines.close()

    def add(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.present[_name(record)] = _questions(record)

    def arrange(self, order: Sequence[Name]) -> None:
        """Sort the lines into this order, all others after them."""
        index = {name: place for place, name in enumerate(order)}
        lines = self.path.read_bytes().splitlines(keepends=True)
        arranged = sorted(lines, key=lambda line: index.get(_name(json.loads(line)), len(index)))
        if arranged != lines:
            write_whole(self.path, b"".join(arranged))

    def _claim(self, settings: dict[str, Any], resume: bool) -> None:
        """Take the file over, or raise UserError with the reason."""
        output, record = self.path, self.path.with_name(self.path.name + ".settings.json")
        if output.is_dir():
            raise UserError(f"{output} is a folder; give the name of a file, such as {output / 'answers.jsonl'}")
        if not output.exists() or not output.stat().st_size:
            output.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(settings) + "\n")
            return
        if not resume:
            raise UserError(f"{output} exists; resume it, or choose another output")
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{output} exists, and {record.name} beside it does not, so it is no output of regenerate to go on "
                "with; choose another output"
            ) from None
        if before.get("format") != FORMAT:
            raise UserError(f"{output} was written by another version of outdraft; choose another output")
        for name, value in settings.items():
            if before.get(name) != value:
                there, here = _in_words(before.get(name)), _in_words(value)
                raise UserError(
                    f"{output} was written with {name} {there}, not {here}; keep it, or choose another output"
                )
        self._read()

    def _read(self) -> None:
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                record = json.loads(line)
                self.present[_name(record)] = _questions(record)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number}: no answer of a run; choose another output") from None


def _name(record: Mapping[str, Any]) -> Name:
    return Name(record["id"], float(record["temperature"]), record.get("sample", 0))


def _questions(record: Mapping[str, Any]) -> list[Message]:
    return [message for message in record.get("messages", []) if message["role"] != "assistant"]


def _in_words(value: Any) -> str:
    """Format a setting for a sentence."""
    return ",".join(f"{one:g}" for one in value) if isinstance(value, list) else str(value)


Waiting = tuple[AnsweredConversation, Row]
"""A conversation, and the row of its next turn."""


class MissingAnswers:
    """The prompts without an answer yet, in windows of the file's order, the longest of each window first.

    Attributes:
        names: names of all answers to write.
        missing: the names that the file lacks, with their conversations' indices.
        too_long: number of missing answers that do not fit the context.
        refused: missing answers that the chat template does not take, with the reason.
    """

    def __init__(
        self, found: ConversationSet, ask: AnswerSettings, temperatures: Sequence[float], file: AnswerFile, most: int
    ):
        self._settings, self._found = ask, found
        self.names: list[Name] = []
        self.missing: list[tuple[Name, int]] = []
        self.too_long = 0
        self.refused: list[str] = []
        samples = [list(temperatures[:place]).count(one) for place, one in enumerate(temperatures)]
        for place, (conversation, identity) in enumerate(zip(found, identities(found.conversations), strict=True)):
            for temperature, sample in zip(temperatures, samples, strict=True):
                name = Name(identity, float(temperature), sample)
                self.names.append(name)
                if name not in file.present:
                    self.missing.append((name, place))
                elif (there := file.present[name]) != conversation.questions[: len(there)]:
                    raise UserError(
                        f"{file.path} has the answer to another prompt under id {identity}; choose another output"
                    )
        self._waiting: deque[Waiting] = deque()
        self._windows = self._rows(WINDOW * most)

    def take(self, most: int, fits: Callable[[Row, Sequence[Row]], bool]) -> list[Waiting]:
        """Remove and return the next prompts: at most `most`, and as long as each fits beside those before."""
        taken: list[Waiting] = []
        while len(taken) < most:
            if self._waiting:
                if not fits(self._waiting[0][1], [row for _, row in taken]):
                    break
                taken.append(self._waiting.popleft())
            elif (window := next(self._windows, None)) is not None:
                self._waiting.extend(window)
            else:
                break
        return taken

    def put(self, asked: AnsweredConversation, row: Row) -> None:
        """Put a conversation's next turn before all other prompts."""
        self._waiting.appendleft((asked, row))

    def _rows(self, count: int) -> Iterator[list[Waiting]]:
        for start in range(0, len(self.missing), count):
            window: list[Waiting] = []
            for name, place in self.missing[start : start + count]:
                conversation = self._found.conversations[place]
                asked = AnsweredConversation(self._settings, conversation, name)
                try:
                    row = asked.next_row()
                except TemplateRefuses as problem:
                    self.refused.append(f"{conversation.source}: {problem}")
                    continue
                if row is None:
                    self.too_long += 1
                else:
                    window.append((asked, row))
            yield sorted(window, key=lambda waiting: len(waiting[1].prompt), reverse=True)
