"""A conversation that the target answers turn by turn: the next prompt, the answer taken in, the record at the end.

Every sample of it has dice of its own for every turn, which follow from the seed and its name alone: neither company
nor an interruption changes what it draws. Knows tokenizers and rows; nothing of files or of other conversations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from outdraft.api.text import decode_text
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.data.conversations import Conversation
from outdraft.data.messages import Message
from outdraft.data.tokenization import render
from outdraft.drafting.repeats import Repeats
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.target.target import Target

ENDED, CUT = "stop", "length"
"""What ended an answer, in the words of OpenAI's API: its own end, or the room that it had."""


class Name(NamedTuple):
    """What tells an answer from all others in a file."""

    id: int | str
    """Of the prompt."""
    temperature: float
    sample: int = 0
    """Which one of several at this temperature."""

    def seed(self, seed: int, turn: int) -> int:
        """Of the dice of a turn."""
        text = f"{seed} {self.id} {self.temperature:g} {self.sample} {turn}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Asking:
    """How prompts are asked, the same for all of a run.

    Attributes:
        target: answers.
        max_new_tokens: of one answer.
        filters: sampling settings other than the temperature.
        seed: of all dice.
        prefix_tokens: of a text, that are kept as the prompt of its continuation.
        repeats: when rows draft what their texts repeat.
    """

    target: Target
    max_new_tokens: int
    filters: dict[str, Any]
    seed: int = 0
    prefix_tokens: int = 32
    repeats: Repeats | None = None

    def row(self, prompt: list[int], name: Name, turn: int) -> Row:
        """To be decoded for one turn."""
        target = self.target
        settings = SamplingSettings(temperature=name.temperature, **self.filters)
        ends = target.eos_token_ids
        warper = Warper(settings, len(prompt), target.vocab_size, ends, (), target.device)
        dice = Dice(name.seed(self.seed, turn))
        return Row(prompt, warper, dice, self.max_new_tokens, frozenset(ends), repeats=self.repeats)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a whole answer has room after it."""
        return bool(prompt) and len(prompt) + self.max_new_tokens <= self.target.context_length


@dataclass
class Asked:
    """One conversation at one temperature."""

    asking: Asking
    conversation: Conversation
    name: Name
    _told: list[dict[str, Any]] = field(default_factory=list)
    _text: str | None = None
    _turn: int = 0
    _finished: bool = True

    def __post_init__(self) -> None:
        self._asked = self.conversation.asked

    def next_row(self) -> Row | None:
        """For the next turn; None where all are answered, or the next one's answer would have no room.

        Raises:
            TemplateRefuses: the chat template does not take what is said before it.
        """
        prompt = self._prompt()
        return self.asking.row(prompt, self.name, self._turn) if self.asking.fits(prompt) else None

    def take(self, row: Row) -> None:
        """The row of the last `next_row` has ended."""
        if row.error is not None:
            raise UserError(f"prompt {self.name.id}: {row.error}")
        finished = row.finish_reason == "eos"
        tokens = row.tokens[:-1] if finished else row.tokens
        if self._plain:
            text = self._decoded([*row.prompt, *tokens], finished)
            self._text = text
        else:
            if not self._finished:  # what was the last turn until now
                self._told[-1] |= {"finished": False, "finish_reason": CUT}
            answer = {"role": "assistant", "content": self._decoded(tokens, finished).strip("\n")}
            self._told += [*self._question(), answer]
        self._finished = finished
        self._turn += 1

    def record(self) -> dict[str, Any]:
        """The line of the output; what ended it is the last turn's, earlier turns that were cut say so themselves."""
        origin = {} if self.conversation.origin is None else {"source": self.conversation.origin}
        sample = {"sample": self.name.sample} if self.name.sample else {}
        tools = {"tools": list(self.conversation.tools)} if self.conversation.tools else {}
        content = {**tools, "messages": self._told} if self._text is None else {"text": self._text}
        about = {"id": self.name.id, **origin, "temperature": self.name.temperature, **sample}
        return {**about, "finished": self._finished, "finish_reason": ENDED if self._finished else CUT, **content}

    @property
    def _plain(self) -> bool:
        """Whether a text is continued, with no chat around it."""
        return self.conversation.text is not None or (self.conversation.bare and not self._template)

    @property
    def _template(self) -> bool:
        return bool(getattr(self.asking.target.tokenizer, "chat_template", None))

    def _prompt(self) -> list[int]:
        """Empty where there is nothing to ask."""
        tokenizer = self.asking.target.tokenizer
        assert tokenizer is not None
        if self._plain:
            if self._turn:
                return []
            if self.conversation.text is not None:
                return list(tokenizer(self.conversation.text)["input_ids"])[: self.asking.prefix_tokens]
            return list(tokenizer(self.conversation.messages[0]["content"])["input_ids"])
        question = self._question()
        if not question:
            return []
        marks = ("finished", "finish_reason")
        said = [{name: one[name] for name in one if name not in marks} for one in [*self._told, *question]]
        text = render(tokenizer, said, add_generation_prompt=True, tools=self.conversation.tools)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _question(self) -> list[Message]:
        """What is said before the next answer; nothing after the last."""
        return self._asked[self._turn] if self._turn < len(self._asked) else []

    def _decoded(self, tokens: Sequence[int], finished: bool) -> str:
        tokenizer = self.asking.target.tokenizer
        assert tokenizer is not None
        text = decode_text(tokenizer, tokens)
        return text if finished else text.rstrip("\ufffd")  # a character that was cut in the middle


def identities(conversations: Sequence[Conversation]) -> list[int | str]:
    """An id for each: its own, else a hash of what it asks; those that come again get a number."""
    own = [one.id if one.id is not None else _hash(one) for one in conversations]
    given, used = set(own), set[int | str]()
    found: list[int | str] = []
    for name in own:
        number = 1
        unique = name
        while unique in used or (number > 1 and unique in given):
            number += 1
            unique = f"{name}-{number}"
        used.add(unique)
        found.append(unique)
    return found


def _hash(conversation: Conversation) -> str:
    asked = conversation.text or conversation.questions
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
