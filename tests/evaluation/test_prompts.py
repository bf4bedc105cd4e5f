"""Prompts are read from every kind of file and kept out of training; tau is measured on them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_fixtures import write_lines
from outdraft.api.generation import SpeculativeModel
from outdraft.api.prompts import encode, note_texts, read_prompts
from outdraft.data.conversations import Message
from outdraft.errors import UserError
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.target import Target
from outdraft.training.held_out import beginnings, hold_out, tau_meter
from training.tiny import tiny_target, write_chats

PROMPTS = [[10, 20, 30], [40, 50, 60, 70]]


def new_head(target: Target) -> FeatureHead:
    torch.manual_seed(3)
    return FeatureHead(feature_head_config(target))


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = write_lines(
        tmp_path / "p.jsonl",
        {"messages": [question, answer, question, answer]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"turns": ["first", "second"]},
        "",
        {"prompt": "p"},
        {"text": "t"},
    )
    first = [{"role": "user", "content": "first"}]
    assert read_prompts(path) == [[question, answer, question], [question], first, "p", "t"]
    assert read_prompts(path, 2) == [[question, answer, question], [question]]
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


@pytest.mark.parametrize(
    "record",
    ["{", "3", {}, {"prompt": ""}, {"text": 1}, {"turns": []}, {"messages": []}, {"messages": [{"role": "x"}]}],
    ids=json.dumps,
)
def test_lines_without_a_prompt_are_named(tmp_path: Path, record: Any) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fine"}, record)
    with pytest.raises(UserError, match=r"p\.jsonl:2"):
        read_prompts(path)


def test_questions_become_plain_text_without_a_chat_template() -> None:
    bare = tiny_target(chat_template=None)
    assert bare.tokenizer is not None
    assert encode([[{"role": "user", "content": "hi"}]], bare) == [list(bare.tokenizer("hi").input_ids)]


# --- holding out -------------------------------------------------------------------------------------------------


def test_the_last_conversations_are_held_out(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 30)
    split = hold_out(data, 2)
    lines = data.read_text().splitlines()
    written = split.write(tmp_path / "split")
    assert [json.loads(line) for line in written.read_text().splitlines()] == [json.loads(line) for line in lines[:-2]]
    assert split.prompts == [json.loads(line)["messages"][:1] for line in lines[-2:]]
    before = written.read_bytes()
    assert hold_out(data, 2).write(tmp_path / "split").read_bytes() == before


def test_answers_to_one_prompt_are_not_divided(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": str(i // 3)}, {"role": "assistant", "content": str(i)}] for i in range(30)]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    split = hold_out(data, 2)
    assert [one.messages[1]["content"] for one in split.held_out] == ["27", "28", "29"]
    assert len(split.trained) == 27


def test_small_data_are_not_divided(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 5)
    split = hold_out(data)
    assert split.write(tmp_path / "split") == data and len(split.prompts) == 5
    assert not (tmp_path / "split").exists()


def test_texts_are_measured_from_their_beginning() -> None:
    target = tiny_target()
    short, long = beginnings(["a" * 100, "b" * 1000], target)
    assert (len(short), len(long)) == (25, 64)


def test_measuring_tau_leaves_the_drafter_alone() -> None:
    target = tiny_target(torch.bfloat16)
    head = new_head(target).train()
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    found = tau_meter(target, PROMPTS, 16)(head)
    assert found["tau"] >= 1 and 0 <= found["acceptance_rate"] <= 1
    assert head.training and all(weight.requires_grad for weight in head.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in head.state_dict().items())
    bound = SpeculativeModel(target, FeatureDrafter(new_head(target).bfloat16().eval(), target))
    assert found["tau"] == bound.generate(PROMPTS, max_new_tokens=16).tau


def test_texts_for_a_chat_model_are_pointed_out() -> None:
    asked: list[Message] = [{"role": "user", "content": "Why?"}]
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are plain texts, .* without its chat template"):
        note_texts(["Why is the sky blue?", asked], tiny_target().tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_texts([asked], tiny_target().tokenizer)
        note_texts(["Why?"], tiny_target(chat_template=None).tokenizer)
