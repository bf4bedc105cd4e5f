"""Prompts of any kind as token ids: texts, conversations, arrays and tensors, and records of files.

Arrays and tensors are recognised by their methods, so those of NumPy, torch and others work alike. Records of files to
measure with are `{"messages"}`, `{"conversations"}` (ShareGPT), `{"turns"}` (Spec-Bench, MT-bench: the first one),
`{"prompt"}`, Alpaca's `{"instruction", "input"}` or `{"text"}`; `data/records.py` reads the files.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.data.conversations import Message, for_template, turns_in, turns_of
from outdraft.data.records import HALF, HUB, BadRecord, bare_question, read_records, sound
from outdraft.data.tokenization import turns_for
from outdraft.errors import UserError
from outdraft.target.target import Target


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
        turns = [for_template(message) for message in sound(messages)]
    except BadRecord as problem:
        raise UserError(f"a message of the conversation cannot be read: {problem}") from None
    try:
        encoded = tokenizer.apply_chat_template(
            turns_for(tokenizer, turns),
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
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):  # whose numbers would pass for token ids
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
    if not isinstance(one, Iterable) or isinstance(one, bytes) or _dimensions(one) == 0:
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


Prompt = str | list[Message]
"""A raw text, or a conversation that ends before the assistant's turn."""

SHAPES = '{"messages": [...]}, {"turns": [...]}, {"prompt": "..."} or {"text": "..."}'


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read the first `limit` prompts of a file.

    Raises:
        UserError: the file is missing, a line holds no prompt (with its number), or no line does.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, not {limit}; leave it out for all prompts")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give a JSON-lines or text file of prompts")
    if not str(path).startswith(HUB) and not Path(path).is_file():
        raise UserError(f"no such file: {path}; give a JSON-lines or text file of prompts")
    found = []
    for source, _, content in read_records(path):
        try:
            if isinstance(content, BadRecord):
                raise content
            found.append(prompt_of(content))
        except BadRecord as problem:
            raise UserError(f"{source}: {problem}; mend the line, expected {SHAPES}") from None
        if len(found) == limit:
            break
    if not found:
        raise UserError(f"no prompt in {path}; give JSON lines such as {SHAPES}")
    return found


def prompt_of(record: Any) -> Prompt:
    """Return the prompt in a record; the answers that a conversation ends with are left out."""
    if not isinstance(record, dict):
        raise BadRecord("a record must be an object")
    if "instruction" in record and (asked := bare_question(record)) is not None:
        return [{"role": "user", "content": asked}]
    if (turns := turns_in(record)) is not None:
        messages = turns_of(turns)
        while messages and messages[-1]["role"] not in ("user", "tool"):
            messages.pop()
        if not messages:
            raise BadRecord("there is no user turn to answer")
        return messages
    for name in ("prompt", "text"):
        if name in record:
            if not isinstance(record[name], str) or not record[name].strip():
                raise BadRecord(f'"{name}" must be a non-empty string')
            return record[name]
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise BadRecord('"turns" must be a list of texts')
        return [{"role": "user", "content": turns[0]}]
    raise BadRecord(f"unknown keys {', '.join(sorted(map(str, record))) or '(none)'}")


def encode(prompts: Sequence[Prompt], target: Any, switches: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Return the token ids of the prompts; `switches` are variables of the chat template.

    Raises:
        UserError: a prompt exceeds the target's context, with its number in the list.
    """
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        ids = encode_one(prompt, target.tokenizer, switches)
        if len(ids) >= target.context_length:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, the model's context is {target.context_length}; "
                "shorten it or take it out"
            )
        encoded.append(ids)
    return encoded


def note_texts(prompts: Sequence[Prompt | None], tokenizer: Any) -> None:
    """Warn that a chat model completes plain texts, where it answers messages: it may end after a token."""
    texts = sum(isinstance(prompt, str) for prompt in prompts)
    if texts and getattr(tokenizer, "chat_template", None) is not None:
        warnings.warn(
            f"{texts} of {len(prompts)} prompts are plain texts, which the model completes without its chat template; "
            'to have them answered, write each as {"turns": ["..."]} or {"messages": [...]}',
            stacklevel=2,
        )


def encode_one(prompt: Prompt, tokenizer: Any, switches: Mapping[str, Any] | None = None) -> list[int]:
    """Return a prompt's token ids; without a chat template a conversation is its texts, joined by empty lines."""
    if getattr(tokenizer, "chat_template", None) is None and not isinstance(prompt, str):
        if any(message["role"] == "system" for message in prompt):
            raise UserError("the tokenizer has no chat template for a system message; give plain text prompts")
        prompt = "\n\n".join(message["content"] for message in prompt)
    return encode_prompts(prompt, tokenizer, switches)[0]
