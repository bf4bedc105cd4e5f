"""Prompts in whatever they are held, as plain texts, messages and lists of Python's own whole numbers.

Arrays and tensors are known by what they can do, so that NumPy's, torch's and others' serve alike. Knows no tokenizer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from outdraft.data.text_file import HALF
from outdraft.errors import UserError


def plain_prompts(prompts: Any) -> Any:
    """Prompts as `encode_prompts` takes them: a text, a conversation, token ids, or a list of any of these.

    An array or tensor of one dimension is a prompt's token ids, one of two is a batch.

    Raises:
        UserError: token ids that are no whole numbers, too many dimensions, or a text that is none.
    """
    if hasattr(prompts, "tolist"):
        if (count := _dimensions(prompts)) not in (1, 2):
            raise UserError(f"an array of {count} dimensions is no prompt; give `(tokens,)` or `(rows, tokens)` ids")
        prompts = prompts.tolist()
    if isinstance(prompts, str | Mapping):
        return _checked(prompts)
    if not isinstance(prompts, Iterable):
        raise UserError(f"a prompt is a text, messages or token ids, not a {type(prompts).__name__}")
    return [_entry(one) for one in prompts]


def whole_numbers(value: Any) -> list[Any]:
    """One number or several, of any kind, as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _entry(one: Any) -> Any:
    """Of a list of prompts, or of one prompt: a text, a message, a token, or a list of either."""
    if isinstance(one, str | Mapping):
        return _checked(one)
    if _dimensions(one) == 2:
        if len(one) != 1:
            raise UserError(f"a prompt in a list of prompts has {len(one)} rows of its own; give each row by itself")
        one = one[0]
    if not isinstance(one, Iterable) or _dimensions(one) == 0:
        return _whole(one)
    rest = one.tolist() if hasattr(one, "tolist") else one
    return [_checked(part) if isinstance(part, str | Mapping) else _whole(part) for part in rest]


def _dimensions(value: Any) -> int | None:
    """Of an array or tensor; None of anything else."""
    return len(value.shape) if hasattr(value, "shape") else None


def _whole(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise UserError(f"token ids are whole numbers, not {type(token).__name__} {token!r}") from None


def _checked(said: Any) -> Any:
    """A text, or a message's, if it is one."""
    text = said.get("content") if isinstance(said, Mapping) else said
    if isinstance(text, str) and (half := HALF.search(text)) is not None:
        raise UserError(f"a prompt holds half a surrogate pair, \\u{ord(half[0]):04x}, which is no text; take it out")
    return said
