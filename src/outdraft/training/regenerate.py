"""The target writes the answers itself: its own words are what a drafter must learn to predict.

Keeps the system and user turns of every conversation and has each assistant turn generated in its place; for base
models a text is continued from its first tokens. Resumable at any line. Does not know how tokens are generated: that
function is handed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from outdraft.errors import UserError
from outdraft.training.conversations import Conversation, Message, OnBadLine, read_conversations
from outdraft.training.tokenization import require_chat_template

GenerateBatch = Callable[..., Sequence[Sequence[int]]]
"""`(prompts, *, max_new_tokens, temperature, seed) -> responses`, lists of token ids; responses without the prompts."""


@dataclass
class RegenerateResult:
    """What a run has written."""

    output: Path
    written: int
    """Lines added by this run."""
    present: int
    """Lines that an earlier run had left."""
    too_long: int
    """Conversations whose first prompt leaves no room for an answer; they are left out."""
    skipped: list[str]
    """Lines of the prompts that could not be used."""


def regenerate(
    generate_batch: GenerateBatch,
    prompts_path: str | Path,
    output_path: str | Path,
    *,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    resume: bool = True,
    context_length: int | None = None,
    prefix_tokens: int = 32,
    on_bad_line: OnBadLine = "error",
    console: Console | None = None,
) -> RegenerateResult:
    """Write every conversation of `prompts_path` again, with answers by the target, as JSON lines.

    Args:
        generate_batch: `(prompts, *, max_new_tokens, temperature, seed) -> responses` on lists of token ids.
        prompts_path: conversations or texts, as for training; answers that are there are replaced.
        output_path: JSON lines `{"id", "messages"}` or `{"id", "text"}`, in the order of the prompts.
        tokenizer: the target's.
        max_new_tokens: of one answer.
        temperature: 0 is greedy.
        seed: every batch and turn gets its own, derived from this.
        batch_size: conversations generated at once.
        resume: keep the lines that are there, a half-written last one excepted; False refuses an existing file.
        context_length: the target's; a conversation ends before the turn that would not fit.
        prefix_tokens: tokens of a text that are kept as the prompt of its continuation.
        on_bad_line: as in `read_conversations`.
        console: where progress goes; stderr when not given.

    Raises:
        UserError: prompts that cannot be used, or an output file that other settings have written.
    """
    output = Path(output_path)
    found = read_conversations(prompts_path, on_bad_line)
    for conversation in found:
        if conversation.text is None:
            require_chat_template(tokenizer, conversation.source)
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "prefix_tokens": prefix_tokens,
    }
    present = _claim(output, settings, resume)
    writer = _Writer(generate_batch, tokenizer, max_new_tokens, temperature, context_length, prefix_tokens)
    ids = [_line_id(i, conversation) for i, conversation in enumerate(found)]
    written = too_long = 0
    batches = range(0, len(found), batch_size)
    console = console or Console(stderr=True)
    with output.open("ab") as lines:
        for start in track(batches, "regenerating", console=console, disable=not console.is_terminal):
            batch = found.conversations[start : start + batch_size]
            fitting = [i for i in range(start, start + len(batch)) if writer.fits(found.conversations[i])]
            too_long += len(batch) - len(fitting)
            missing = [i for i in fitting if ids[i] not in present]
            if not missing:
                continue
            # The whole batch is generated even when a part is there: the rows of a batch share its seed.
            records = writer.answer(batch, f"{seed} {start}")
            fresh = [json.dumps({"id": ids[i], **records[i - start]}, ensure_ascii=False) for i in missing]
            lines.write("".join(f"{line}\n" for line in fresh).encode())
            lines.flush()
            os.fsync(lines.fileno())
            written += len(fresh)
    return RegenerateResult(output, written, len(present & set(ids)), too_long, found.skipped)


@dataclass
class _Writer:
    """Generates the answers of one batch of conversations, turn by turn."""

    generate_batch: GenerateBatch
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    context_length: int | None
    prefix_tokens: int

    def fits(self, conversation: Conversation) -> bool:
        """Whether the first answer has room in the context."""
        questions = [message for message in conversation.messages if message["role"] != "assistant"]
        return self._room(self._prompt(conversation, [], questions))

    def answer(self, batch: Sequence[Conversation], seed: str) -> list[dict[str, Any]]:
        """A record for every conversation, without the turns that do not fit the context."""
        questions = [[m for m in conversation.messages if m["role"] != "assistant"] for conversation in batch]
        told: list[list[Message]] = [[] for _ in batch]
        texts: list[str | None] = [None] * len(batch)
        open_rows = list(range(len(batch)))
        turn = 0
        while open_rows:
            prompts: list[list[int]] = []
            asked: list[int] = []
            for row in open_rows:
                prompt = self._prompt(batch[row], told[row], questions[row])
                if self._room(prompt):
                    prompts.append(prompt)
                    asked.append(row)
            answers = self._generate(prompts, f"{seed} {turn}") if prompts else []
            for row, prompt, answer in zip(asked, prompts, answers, strict=True):
                if batch[row].text is not None:
                    texts[row] = self._text([*prompt, *answer])
                else:
                    told[row] += [
                        *_next_question(questions[row]),
                        {"role": "assistant", "content": self._text(answer).strip("\n")},
                    ]
            open_rows = [row for row in asked if questions[row]]
            turn += 1
        return [
            {"messages": messages} if text is None else {"text": text}
            for text, messages in zip(texts, told, strict=True)
        ]

    def _room(self, prompt: list[int]) -> bool:
        return bool(prompt) and (not self.context_length or len(prompt) + self.max_new_tokens <= self.context_length)

    def _prompt(self, conversation: Conversation, told: list[Message], questions: list[Message]) -> list[int]:
        if conversation.text is not None:
            return list(self.tokenizer(conversation.text)["input_ids"])[: self.prefix_tokens]
        end = 2 if questions[0]["role"] == "system" else 1
        prompt = self.tokenizer.apply_chat_template(
            [*told, *questions[:end]], add_generation_prompt=True, return_dict=True
        )
        return list(prompt["input_ids"])

    def _generate(self, prompts: list[list[int]], seed: str) -> Sequence[Sequence[int]]:
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
        return self.generate_batch(
            prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=number
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _next_question(questions: list[Message]) -> list[Message]:
    """Take the user turn that was just answered, with the system turn before it, from the front."""
    count = 2 if questions[0]["role"] == "system" else 1
    taken = questions[:count]
    del questions[:count]
    return taken


def _line_id(place: int, conversation: Conversation) -> str:
    """Place in the prompts and hash of what is asked, so that lines of other prompts are never taken for these."""
    asked = conversation.text or [message for message in conversation.messages if message["role"] != "assistant"]
    return f"{place}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"


def _claim(output: Path, settings: dict[str, Any], resume: bool) -> set[str]:
    """Ids that are already in the output, whose half-written last line is cut off."""
    record = output.with_name(output.name + ".settings.json")
    if not output.exists() or not output.stat().st_size:
        output.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings) + "\n")
        return set()
    if not resume:
        raise UserError(f"{output} exists; resume it, or choose another output")
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        raise UserError(f"{record.name} is missing beside {output}; choose another output") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"{output} was written with {name} {before.get(name)}, not {value}; keep it, or choose another output"
            )
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with output.open("r+b") as lines:
            lines.truncate(len(whole))
    return {str(json.loads(line)["id"]) for line in whole.splitlines()}
