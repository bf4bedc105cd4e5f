"""Reading prompts to measure with from files.

It takes records of `{"messages"}`, `{"conversations"}` (ShareGPT), `{"turns"}` (Spec-Bench, MT-bench: the first one),
`{"prompt"}`, Alpaca's `{"instruction", "input"}` or `{"text"}`; `data/records.py` reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outdraft.api.prompts import encode_prompts
from outdraft.data.messages import Message, turns_of
from outdraft.data.records import HUB, bare_question, read_records
from outdraft.data.records import BadRecord as NoPrompt
from outdraft.errors import UserError

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
    if not str(path).startswith(HUB) and not Path(path).is_file():
        raise UserError(f"no such file: {path}; give a JSON-lines or text file of prompts")
    found = []
    for source, _, content in read_records(path):
        try:
            if isinstance(content, NoPrompt):
                raise content
            found.append(prompt_of(content))
        except NoPrompt as problem:
            raise UserError(f"{source}: {problem}; mend the line, expected {SHAPES}") from None
        if len(found) == limit:
            break
    if not found:
        raise UserError(f"no prompt in {path}; give JSON lines such as {SHAPES}")
    return found


def prompt_of(record: Any) -> Prompt:
    """Return the prompt in a record; the answers that a conversation ends with are left out."""
    if not isinstance(record, dict):
        raise NoPrompt("a record must be an object")
    if "instruction" in record and (asked := bare_question(record)) is not None:
        return [{"role": "user", "content": asked}]
    for name in ("prompt", "text"):
        if name in record:
            if not isinstance(record[name], str) or not record[name].strip():
                raise NoPrompt(f'"{name}" must be a non-empty string')
            return record[name]
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise NoPrompt('"turns" must be a list of texts')
        return [{"role": "user", "content": turns[0]}]
    for name, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if name in record:
            return _until_last_question(record[name], role, content)
    raise NoPrompt(f"unknown keys {', '.join(sorted(map(str, record))) or '(none)'}")


def _until_last_question(turns: Any, role_key: str, content_key: str) -> list[Message]:
    messages = turns_of(turns, role_key, content_key)
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise NoPrompt("there is no user turn to answer")
    return messages


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


def encode_one(prompt: Prompt, tokenizer: Any, switches: Mapping[str, Any] | None = None) -> list[int]:
    """Return a prompt's token ids; without a chat template a conversation is its texts, joined by empty lines."""
    if getattr(tokenizer, "chat_template", None) is None and not isinstance(prompt, str):
        if any(message["role"] == "system" for message in prompt):
            raise UserError("the tokenizer has no chat template for a system message; give plain text prompts")
        prompt = "\n\n".join(message["content"] for message in prompt)
    return encode_prompts(prompt, tokenizer, switches)[0][0]
