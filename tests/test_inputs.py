"""Prompts are taken in whatever they are held; what is no prompt is refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models import VOCAB, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.api.prompts import encode_chat, plain_prompts
from outdraft.errors import UserError
from outdraft.target.target import Target
from tokens import byte_tokenizer

IDS = [3, 1, 4, 1, 5]
OTHER = [9, 2, 6]

ONE: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(3, 8),
    "array": np.array(IDS),
    "small array": np.array(IDS, dtype=np.uint8),
    "tensor": torch.tensor(IDS),
    "int tensor": torch.tensor(IDS, dtype=torch.int32),
    "list of array numbers": list(np.array(IDS)),
    "list of tensor numbers": list(torch.tensor(IDS)),
    "objects": np.array(IDS, dtype=object),
    "another library's": SimpleNamespace(shape=(5,), tolist=lambda: list(IDS)),
}
SEVERAL: dict[str, Any] = {
    "lists": [IDS, OTHER],
    "arrays": [np.array(IDS), np.array(OTHER)],
    "tensors": [torch.tensor(IDS), torch.tensor(OTHER)],
    "mixed": (np.array(IDS), OTHER),
    "tensors of one row": [torch.tensor([IDS]), np.array([OTHER])],
    "ragged array": np.array([IDS, OTHER], dtype=object),
    "generator": (row for row in (IDS, np.array(OTHER))),
}


@pytest.mark.parametrize("kind", ONE)
def test_token_ids_of_one_prompt_are_whole_numbers_however_they_are_held(kind: str) -> None:
    found = plain_prompts(ONE[kind])
    assert found == list(ONE[kind] if kind == "range" else IDS) and {type(token) for token in found} == {int}


@pytest.mark.parametrize("kind", SEVERAL)
def test_batches_are_lists_of_prompts_however_they_are_held(kind: str) -> None:
    found = plain_prompts(SEVERAL[kind])
    assert found == [IDS, OTHER] and {type(token) for row in found for token in row} == {int}


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_two_dimensions_are_a_batch(kind: Any) -> None:
    assert plain_prompts(kind([IDS, IDS])) == [IDS, IDS]
    assert plain_prompts(kind([IDS])) == [IDS]


def test_texts_and_messages_stay_what_they_are() -> None:
    message = {"role": "user", "content": "x"}
    for prompts in ("x", ["x", "y"], [message], [[message], "x", IDS], {"input_ids": IDS}):
        assert plain_prompts(prompts) == prompts
    assert plain_prompts(np.array(["x", "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (np.array([1.5, 2.0]), "whole numbers"),
        (torch.tensor(IDS).float(), "whole numbers"),
        ([1, 2.0], "whole numbers"),
        ([[1, None]], "whole numbers"),
        (np.zeros((2, 2, 2), dtype=int), "3 dimensions"),
        (torch.tensor(7), "0 dimensions"),
        ([torch.tensor([IDS, IDS])], "2 rows of its own"),
        (7, "not a int"),
        (None, "not a NoneType"),
        (b"text", "not a bytes"),
        ([b"text"], "whole numbers, not bytes"),
        ("a \ud83d b", r"half a surrogate pair, \\ud83d"),
        (["x", "\ude00"], "half a surrogate"),
        ([{"role": "user", "content": "\ud83d"}], "half a surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_reason(prompts: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plain_prompts(prompts)


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "user", "content": "ab"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"x": 1}}}],
            },
        ),
    ],
    ids=["parts", "no content", "a call"],
)
def test_messages_as_clients_have_them_are_what_templates_take(message: Any, plain: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + m.content }}{{ (m.tool_calls or []) | tojson }}{% endfor %}"
    )
    rest = {"role": "user", "content": "go on"}
    given, expected = (encode_chat([one, rest], tokenizer) for one in (message, plain))
    assert given == expected and "None" not in tokenizer.decode(given)


@pytest.mark.parametrize(
    ("content", "says"),
    [([{"type": "image_url"}], 'no text but "image_url"'), ([{"type": "text", "text": "\ud83d"}], "half a surrogate")],
)
def test_parts_that_are_no_text_are_refused(content: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        encode_chat([{"role": "user", "content": content}], byte_tokenizer())


def test_arrays_are_answered_as_lists_are() -> None:
    model = SpeculativeModel(Target(tiny("llama-gqa")))
    expected = model.generate(IDS, max_new_tokens=5).tokens
    for given in ONE.values():
        if not isinstance(given, range):
            assert model.generate(given, max_new_tokens=5).tokens == expected
    both = model.generate(np.array([IDS, IDS]), max_new_tokens=5)
    assert both.tokens == expected * 2
    end = expected[0][1]
    for ends in (np.int64(end), np.array([end, VOCAB - 1]), torch.tensor([end]), torch.tensor(end), [np.int32(end)]):
        stopped = model.generate(IDS, max_new_tokens=5, eos_token_id=ends)
        assert stopped.tokens[0] == expected[0][: expected[0].index(end) + 1]
