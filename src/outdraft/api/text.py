"""Text in, text out: prompts to token ids, token ids to text as they come.

One detokenizer serves whole answers, streams, the command line, the server, stop strings and the names of tokens.

Knows tokenizers; knows nothing of models or decoding.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

from outdraft.errors import UserError

Message = dict[str, str]
Prompt = str | list[int] | list[Message] | torch.Tensor


def encode_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase | None, switches: Mapping[str, Any] | None = None
) -> tuple[list[list[int]], bool]:
    """One prompt or a list of them to token ids.

    A prompt is a text (taken as it is), a conversation (a list of `{"role", "content"}`, put through the chat template)
    or token ids (a list or a tensor; a 2-D tensor is a batch). `switches` are the chat template's own.

    Returns:
        The ids, and whether a single prompt was given.
    """
    if isinstance(prompts, torch.Tensor):
        rows = list(prompts) if prompts.dim() == 2 else [prompts]
        return [_encode(row, tokenizer, switches) for row in rows], prompts.dim() != 2
    if isinstance(prompts, Mapping):  # its keys would pass for prompts
        raise UserError("a prompt is a text, a list of messages or token ids, no dictionary; give its input_ids")
    single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int | dict)
    )
    batch = [prompts] if single else list(prompts)
    if not batch:
        raise UserError("no prompt given")
    return [_encode(prompt, tokenizer, switches) for prompt in batch], single


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, switches: Mapping[str, Any] | None) -> list[int]:
    if isinstance(prompt, torch.Tensor):
        ids = prompt.reshape(-1).tolist()
    elif isinstance(prompt, str):
        ids = list(_needed(tokenizer)(prompt)["input_ids"])
    elif prompt and isinstance(prompt[0], dict):
        ids = encode_chat(prompt, _needed(tokenizer), switches)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise UserError("a prompt is empty; give at least one token (the model's bos token, for instance)")
    return ids


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    switches: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """A conversation through the chat template, ready for the assistant's turn, or for the rest of one it ends with.

    Args:
        messages: the conversation.
        tokenizer: with the template.
        switches: what the template itself can be told (`chat_template_kwargs`), such as `enable_thinking`.
        tools: functions that the answer may call, in OpenAI's format.

    Raises:
        UserError: the tokenizer has no chat template, or refuses the roles; or switches that are not the template's.
    """
    switches = check_switches(switches)
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; give plain text prompts, or set tokenizer.chat_template")
    begun = messages[-1].get("role") == "assistant"
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt=not begun,
            continue_final_message=begun,
            return_dict=True,
            **switches,
        )
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    return list(encoded["input_ids"])  # type: ignore


def check_switches(switches: Any) -> dict[str, Any]:
    """What a chat template is told beside the conversation; an empty dictionary for None.

    Raises:
        UserError: no dictionary, or names that are how a conversation is rendered and not the template's own.
    """
    if switches is None:
        return {}
    if not isinstance(switches, Mapping) or not all(isinstance(name, str) for name in switches):
        raise UserError(f"chat_template_kwargs must map the chat template's own names to values, not {switches!r}")
    taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
    for name in switches:
        if name in taken:
            raise UserError(f"chat_template_kwargs cannot set '{name}', which is no switch of the template's own")
    return dict(switches)


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError("the model folder has no tokenizer; give token ids, or a tokenizer with tokenizer=")
    return tokenizer


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of one list of tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


class Detokenizer:
    """Text of a growing list of tokens, handed out as soon as no later token can change it.

    All that is handed out together is what the tokenizer makes of the prompt and the tokens, less the prompt's text; so
    an answer keeps the space before its first word where the tokenizer marks words by one.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave the text of special tokens out.
        prompt: tokens that stand before the first one. Their own text is never handed out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.tokens: list[int] = []
        self.special = special_ids(tokenizer)
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._window = self._context(prompt)  # tokens whose text is not settled, and some before them
        # What the prompt leaves of a character is the answer's, which completes it.
        self._given = len(self._text().rstrip("\ufffd")) if self._window else 0  # characters of it handed out
        self._seen = self._given  # characters of it that stood there, certain or not
        self._chunk = 0  # place in the window after which the newest text began
        self.pending = ""
        """Text that stands there by now and is not certain; empty while a character is unfinished."""

    def add(self, token: int) -> str:
        """The new text that this token makes certain; empty while a character is still in the making."""
        self.tokens.append(token)
        if self.skip and token in self.special:
            return ""
        self._window.append(token)
        text = self._text()
        # Of a run of byte tokens each may still turn all others into replacement characters.
        certain = self._given if self._is_byte(token) else len(text) - self._uncertain(text)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        self.pending = "" if text.endswith("\ufffd") else text[self._given :]
        self._seen = max(self._seen, self._given + len(self.pending))
        self._shorten(text, new)
        return new

    def finish(self) -> str:
        """What is still held back, when no token will complete it."""
        text = self._text() if self._window else ""
        new, self._given, self.pending = text[self._given :], len(text), ""
        return new

    def peek(self, token: int) -> str:
        """What a token would add to the text and to `pending`, but for a character that it leaves unfinished."""
        if token in self.special:
            return decode_text(self.tokenizer, [token], skip_special_tokens=False)
        text = decode_text(self.tokenizer, [*self._window, token], self.skip)
        if text.endswith("\ufffd"):
            text = "" if self._is_byte(token) else text[:-1]
        return text[self._seen :]

    def _text(self) -> str:
        return decode_text(self.tokenizer, self._window, self.skip)

    def _is_byte(self, token: int) -> bool:
        return byte_of(self.tokenizer, token) is not None

    def _uncertain(self, text: str) -> int:
        """Characters at the end that further tokens may change."""
        if text.endswith("\ufffd"):  # of a character's bytes that are not complete there is never more than one
            return 1
        if not self._cleans:
            return 0
        return max((n for end in _CLEANED for n in range(1, len(end)) if text.endswith(end[:n])), default=0)

    def _shorten(self, text: str, new: str) -> None:
        """Let go of tokens that are settled, but for those that gave the newest text: decoders drop a leading space at
        the start of what they are given."""
        if new and self._given == len(text):
            if self._chunk and len(self._window) > WINDOW:
                self._window = self._window[self._chunk :]
                self._given = self._seen = len(self._text())
            self._chunk = len(self._window)
        elif len(self._window) > 4 * WINDOW and not self._is_byte(self._window[-1]):  # bytes without end, no text
            held = len(text) - self._given
            self._window = self._window[-WINDOW:]
            self._given, self._chunk = max(0, len(self._text()) - held), 0
            self._seen = self._given

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt that the answer's text may depend on: nothing before a special token."""
        start = len(prompt)
        while start > max(0, len(prompt) - WINDOW) and prompt[start - 1] not in self.special:
            start -= 1
        while 0 < start < len(prompt) and self._is_byte(prompt[start]) and prompt[start - 1] not in self.special:
            start -= 1
        return list(prompt[start:])


WINDOW = 16
"""Tokens that are decoded again with each new one, at most, once their text is settled."""

_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " n ' t", " 'm", " 's", " 've", " 're")
"""Texts out of which `clean_up_tokenization_spaces` takes spaces."""

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_special: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that `skip_special_tokens` leaves out."""
    known = _special.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids = {token for token, entry in added.items() if entry.special} | set(tokenizer.all_special_ids)
        known = _special[tokenizer] = (len(tokenizer), frozenset(ids))
    return known[1]


def byte_of(tokenizer: PreTrainedTokenizerBase, token: int) -> int | None:
    """The byte that a token of byte fallback stands for; None for every other token."""
    spelled = _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))
    return None if spelled is None else int(spelled[1], 16)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of a whole answer after its prompt: what a stream of it adds up to."""
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    detokenizer._window += tokens
    return detokenizer.finish()


def bytes_of(tokenizer: PreTrainedTokenizerBase, token: int, name: str) -> bytes:
    """A token's own bytes, which may be a part of a character.

    Args:
        tokenizer: of the model.
        token: whose.
        name: the text that it adds where it stands, which has its bytes where it is no part of a character.
    """
    spelled = decode_text(tokenizer, [token], skip_special_tokens=False)
    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte = byte_of(tokenizer, token)
    if byte is not None and spelled != piece:
        return bytes([byte])
    if token not in special_ids(tokenizer) and all(letter in _BYTE_LEVEL for letter in piece):
        own = bytes(_BYTE_LEVEL[letter] for letter in piece)
        if own.decode("utf-8", "replace") == spelled:  # else its letters are what they look like
            return own
    return name.lstrip("\ufffd").encode("utf-8", "replace")


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
"""The letters that byte-level tokenizers write for bytes."""
