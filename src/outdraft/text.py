"""Text in, text out: prompts to token ids, token ids to text as they come, stop strings.

Knows tokenizers; knows nothing of models or decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from outdraft.errors import UserError

Message = dict[str, str]
Prompt = str | list[int] | list[Message] | torch.Tensor


def encode_prompts(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[list[int]], bool]:
    """One prompt or a list of them to token ids.

    A prompt is a text (taken as it is), a conversation (a list of `{"role", "content"}`, put through the chat template)
    or token ids (a list or a tensor; a 2-D tensor is a batch).

    Returns:
        The ids, and whether a single prompt was given.
    """
    if isinstance(prompts, torch.Tensor):
        rows = list(prompts) if prompts.dim() == 2 else [prompts]
        return [_encode(row, tokenizer) for row in rows], prompts.dim() != 2
    if isinstance(prompts, Mapping):  # its keys would pass for prompts
        raise UserError("a prompt is a text, a list of messages or token ids, no dictionary; give its input_ids")
    single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int | dict)
    )
    batch = [prompts] if single else list(prompts)
    if not batch:
        raise UserError("no prompt given")
    return [_encode(prompt, tokenizer) for prompt in batch], single


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(prompt, torch.Tensor):
        ids = prompt.reshape(-1).tolist()
    elif isinstance(prompt, str):
        ids = list(_needed(tokenizer)(prompt)["input_ids"])
    elif prompt and isinstance(prompt[0], dict):
        ids = encode_chat(prompt, _needed(tokenizer))
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise UserError("a prompt is empty; give at least one token (the model's bos token, for instance)")
    return ids


def encode_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A conversation through the chat template, ready for the assistant's turn, or for the rest of one it ends with.

    Raises:
        UserError: the tokenizer has no chat template, or refuses the roles.
    """
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; give plain text prompts, or set tokenizer.chat_template")
    begun = messages[-1].get("role") == "assistant"
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=not begun, continue_final_message=begun, return_dict=True
        )
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    return list(encoded["input_ids"])  # type: ignore


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError("the model folder has no tokenizer; give token ids, or a tokenizer with tokenizer=")
    return tokenizer


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of one list of tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


class Detokenizer:
    """Text of a growing list of tokens, handed out as soon as it is certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.tokens: list[int] = []
        self._start = 0  # tokens before this one are settled
        self._given = ""  # text already handed out of those after it

    def add(self, token: int) -> str:
        """The new text that this token completes; empty while a character is still in the making."""
        self.tokens.append(token)
        if self._since(self._start).endswith("�"):
            return ""
        new = self.finish()
        if self._given.endswith("\n") or len(self.tokens) - self._start > 64:
            # Keep one token of context: decoders drop a leading space at the start of what they are given.
            newest = len(self.tokens) - 1
            if context := self._since(newest):
                self._start, self._given = newest, context
        return new

    def finish(self) -> str:
        """What is still held back, when no token will complete it."""
        text = self._since(self._start)
        new, self._given = text[len(self._given) :], text
        return new

    def _since(self, start: int) -> str:
        return decode_text(self.tokenizer, self.tokens[start:], self.skip)


def stops_at(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool]:
    """A test whether the newest token completes one of the strings.

    Raises:
        UserError: a string is empty, which every text contains.
    """
    if not all(strings):
        raise UserError("a stop string is empty; leave it out")
    longest = max(len(string.encode()) for string in strings)

    def completed(tokens: list[int]) -> bool:
        # A token that says anything says at least a byte; some more tokens for those that say nothing.
        tail = decode_text(tokenizer, tokens[-(longest + 8) :], skip_special_tokens=False)
        return any(string in tail for string in strings)

    return completed
