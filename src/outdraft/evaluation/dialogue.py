"""What a question's turns become for a model: token ids through its chat template, each later turn after the answers
given so far, as Spec-Bench does it.

Knows tokenizers; knows nothing of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outdraft.api.text import decode_text
from outdraft.errors import UserError
from outdraft.evaluation.prompts import encode_one
from outdraft.evaluation.questions import LeftOut, Question


class Dialogue:
    """One question put to one model; a `measure.Script`.

    Args:
        question: what is asked.
        target: gives tokenizer and context.
    """

    def __init__(self, question: Question, target: Any):
        self.question, self._tokenizer, self._context = question, target.tokenizer, target.context_length
        self.first = self._prompt([])

    def __call__(self, answers: list[list[int]]) -> list[int] | None:
        """Token ids of the next prompt; None after the last turn, or where a turn would not fit the context."""
        if not answers:
            return self.first
        if len(answers) >= len(self.question.turns):
            return None
        ids = self._prompt([answer_text(self._tokenizer, tokens) for tokens in answers])
        return ids if len(ids) < self._context else None

    def needed(self, max_new_tokens: int) -> int:
        """Tokens of the last prompt, with answers as long as they can get before it."""
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
    """An answer as it goes into the conversation and into Spec-Bench's files: no special tokens, no space around it."""
    return decode_text(tokenizer, tokens).strip()


def dialogues(
    questions: Sequence[Question], target: Any, max_new_tokens: int, on_bad_line: str = "error"
) -> tuple[list[Dialogue], list[LeftOut]]:
    """Questions for one model, and those that do not fit its context.

    Raises:
        UserError: one does not fit (and `on_bad_line` is `error`), or none does.
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
