"""No prompt that a shipped drafter was trained on is one that it is measured on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from outdraft.target.named import DRAFTERS

HELD_OUT = DRAFTERS / "smollm2" / "heldout_prompts.jsonl"

RUN = 13
"""Words in a row that two texts have in common by chance no more than rarely."""
COMMON = 0.2
"""Share of a question's runs from which on it counts as known."""


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(conversations: Iterable[dict[str, Any]]) -> list[str]:
    return [message["content"] for one in conversations for message in one["messages"] if message["role"] == "user"]


def words(text: str) -> list[str]:
    return re.sub(r"\W+", " ", text).lower().split()


def runs(texts: Iterable[str]) -> set[str]:
    return {" ".join(w[i : i + RUN]) for w in map(words, texts) for i in range(len(w) - RUN + 1)}


def known(questions: Iterable[str], trained: list[str]) -> list[str]:
    """Questions that stand among the training prompts, or share a good part of their text with them."""
    whole, parts = {" ".join(words(text)) for text in trained}, runs(trained)
    found = []
    for question in questions:
        own = runs([question])
        if " ".join(words(question)) in whole or len(own & parts) > COMMON * max(len(own), 1):
            found.append(question)
    return found


@pytest.mark.parametrize("measured", ["Spec-Bench", "held out"])
def test_training_prompts_are_none_that_are_measured_on(measured: str, shared: Path) -> None:
    trained = asked(records(shared / "data" / "smollm2_answers" / "answers.jsonl"))
    if measured == "held out":
        questions = asked(records(HELD_OUT))
    else:
        spec_bench = records(shared / "data" / "spec_bench" / "question.jsonl")
        questions = [turn for record in spec_bench for turn in record["turns"]]
    assert len(trained) > 1000 and len(questions) > 20
    assert known(questions, trained) == []


def test_a_prompt_that_was_trained_on_is_found() -> None:
    text = (
        "Once there was a miller who had three sons, a mill, a donkey and a cat, and when he died they shared it all."
    )
    assert known([text, "What is a donkey?"], ["Go on: " + text]) == [text]
    assert known(["What is a donkey?"], ["what is a Donkey"]) == ["What is a donkey?"]
