"""Answers by the target: every assistant turn is its own, and a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from outdraft.errors import UserError
from outdraft.training.conversations import read_conversations
from outdraft.training.regenerate import RegenerateResult, regenerate

from .tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Parrot:
    """Says how long its prompt is and which seed it got; keeps what it was asked."""

    def __init__(self, die_at: int | None = None):
        self.calls: list[dict[str, Any]] = []
        self.die_at = die_at

    def __call__(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        self.calls.append({"prompts": [TOKENIZER.decode(prompt) for prompt in prompts], **sampling})
        return [TOKENIZER(f"{len(prompt)} {sampling['seed']}<|im_end|>")["input_ids"] for prompt in prompts]


def user(*contents: str, system: str | None = None) -> str:
    turns = [{"role": "system", "content": system}] if system else []
    for content in contents:
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "OLD"}]
    return json.dumps({"messages": turns[:-1] if contents[-1].endswith("?") else turns})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RegenerateResult]:
    prompts = tmp_path / "prompts.jsonl"
    lines = [user("a", "b", system="S"), user("c?"), user("d", "e", "f"), '{"text": "once upon a time"}', user("g")]
    prompts.write_text("\n".join(lines) + "\n")

    def start(generate: Any, name: str = "out.jsonl", **settings: Any) -> RegenerateResult:
        values = {"tokenizer": TOKENIZER, "max_new_tokens": 9, "batch_size": 2, "prefix_tokens": 4, **settings}
        return regenerate(generate, prompts, tmp_path / name, **values)

    return start


def read(result: RegenerateResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.output.read_text().splitlines()]


def test_every_assistant_turn_is_the_targets_own(run: Callable[..., RegenerateResult]) -> None:
    parrot = Parrot()
    result = run(parrot, temperature=0.7)
    lines = read(result)
    assert result.written == 5 and "OLD" not in result.output.read_text()
    roles = [[message["role"][0] for message in line.get("messages", [])] for line in lines]
    assert ["".join(r) for r in roles] == ["suaua", "ua", "uauaua", "", "ua"]
    first_answer = lines[0]["messages"][2]["content"]
    assert f"assistant\n{first_answer}<|im_end|>" in parrot.calls[1]["prompts"][0]  # its own words are the history
    assert parrot.calls[0]["prompts"][0].startswith("<|im_start|>system\nS<|im_end|>")
    assert lines[3]["text"].startswith("once") and not lines[3]["text"].startswith("once ")
    assert {(call["max_new_tokens"], call["temperature"]) for call in parrot.calls} == {(9, 0.7)}
    assert len({call["seed"] for call in parrot.calls}) == len(parrot.calls)
    assert max(len(call["prompts"]) for call in parrot.calls) == 2
    assert len(read_conversations(result.output)) == 5


def test_a_killed_run_with_a_half_written_line_ends_in_the_same_file(
    run: Callable[..., RegenerateResult], tmp_path: Path
) -> None:
    undisturbed = run(Parrot(), "whole.jsonl").output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(Parrot(die_at=3))
    killed = tmp_path / "out.jsonl"
    assert killed.read_bytes().count(b"\n") == 2
    killed.write_bytes(undisturbed[: undisturbed.find(b"\n") + 20])  # one whole line of a batch of two, and a half
    parrot = Parrot()
    result = run(parrot)
    assert (result.present, result.written) == (1, 4)
    assert killed.read_bytes() == undisturbed
    again = run(parrot_again := Parrot())
    assert (again.present, again.written, parrot_again.calls) == (5, 0, [])


def test_settings_are_not_mixed_in_one_file(run: Callable[..., RegenerateResult]) -> None:
    run(Parrot())
    with pytest.raises(UserError, match=r"was written with temperature 0.0, not 1.0"):
        run(Parrot(), temperature=1.0)
    with pytest.raises(UserError, match="exists; resume it, or choose another output"):
        run(Parrot(), resume=False)


def test_a_conversation_ends_before_the_turn_that_does_not_fit(run: Callable[..., RegenerateResult]) -> None:
    length = len(
        TOKENIZER.apply_chat_template([{"role": "user", "content": "d"}], add_generation_prompt=True).input_ids
    )
    parrot = Parrot()
    result = run(parrot, context_length=length + 9)
    lines = read(result)
    assert result.too_long == 2  # the one with the system turn, and "c?", one token longer
    assert [len(line.get("messages", [])) for line in lines] == [2, 0, 2]
    asked = len(parrot.calls)
    run(parrot, context_length=length + 9)
    assert len(parrot.calls) == asked
