"""Converts prompts of any kind to token ids: texts, conversations, arrays and tensors.

Arrays and tensors are recognised by their methods, so those of NumPy, torch and others work alike.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.data.records import HALF
from outdraft.errors import UserError
from outdraft.target.target import Target

Message = dict[str, str]


def encode_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase | None, switches: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Convert one prompt or several to token ids, a list for each.

    A prompt is a text (taken as it is), a conversation (a list of `{"role", "content"}`, put through the chat template)
    or token ids (a list, array or tensor; two dimensions are a batch). `switches` are the chat template's variables.
    """
    prompts = plain_prompts(prompts)
    if isinstance(prompts, Mapping):  # otherwise its keys would count as prompts
        raise UserError("a prompt is a text, a list of messages or token ids, no dictionary; give its input_ids")
    single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int | dict))
    batch = [prompts] if single else prompts
    if not batch:
        raise UserError("no prompt given")
    return [_encode(prompt, tokenizer, switches) for prompt in batch]


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, switches: Mapping[str, Any] | None) -> list[int]:
    if isinstance(prompt, str):
        ids = list(_needed(tokenizer)(prompt)["input_ids"])
    elif prompt and isinstance(prompt[0], dict):
        ids = encode_chat(prompt, _needed(tokenizer), switches)
    else:
        ids = prompt
    if not ids:
        raise UserError("a prompt is empty; give at least one token (the model's bos token, for instance)")
    return ids


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    switches: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Render a conversation by the chat template, ready for the assistant's turn, or for the rest of a turn it ends
    with.

    Args:
        messages: the conversation.
        tokenizer: the tokenizer, which has the template.
        switches: variables of the template (`chat_template_kwargs`), such as `enable_thinking`.
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
    """Check the variables for a chat template; None gives an empty dictionary.

    Raises:
        UserError: not a dictionary, or names that control rendering and are not the template's own.
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


def check_prompt(ids: Sequence[int], target: Target) -> None:
    """Raise UserError for a prompt that the model cannot continue."""
    if len(ids) >= target.context_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {target.context_length}; shorten the prompt"
        )
    if max(ids) >= target.vocab_size or min(ids) < 0:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"the prompt holds token {wrong}, the vocabulary ends at {target.vocab_size - 1}")


def plain_prompts(prompts: Any) -> Any:
    """Convert prompts to what `encode_prompts` takes: a text, a conversation, token ids, or a list of any of these.

    An array or tensor of one dimension is a prompt's token ids, one of two is a batch.

    Raises:
        UserError: token ids that are not whole numbers, too many dimensions, or a text that is not one.
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
    """Return one number or several, of any kind, as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _entry(one: Any) -> Any:
    """Convert an entry of a list of prompts, or of one prompt: a text, a message, a token, or a list of either."""
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
    """Return the number of dimensions of an array or tensor; None for anything else."""
    return len(value.shape) if hasattr(value, "shape") else None


def _whole(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise UserError(f"token ids are whole numbers, not {type(token).__name__} {token!r}") from None


def _checked(said: Any) -> Any:
    """Check that a text, or a message's text, has no half surrogate pair."""
    text = said.get("content") if isinstance(said, Mapping) else said
    if isinstance(text, str) and (half := HALF.search(text)) is not None:
        raise UserError(f"a prompt holds half a surrogate pair, \\u{ord(half[0]):04x}, which is no text; take it out")
    return said
