"""Question sets: groups are the tasks, turns are kept, what cannot be used is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench_data import QUESTIONS, question_file

from cli_fixtures import write_lines
from outdraft.errors import UserError
from outdraft.evaluation.bench.questions import (
    MT_BENCH,
    MULTI_TURN,
    SPEC_BENCH,
    Dialogue,
    Question,
    answer_text,
    dialogues,
    read_questions,
)
from training.tiny import tiny_target


def test_spec_bench_has_six_groups(tmp_path: Path) -> None:
    found = read_questions(question_file(tmp_path))
    assert found.suite == "spec-bench" and not found.left_out
    assert list(dict.fromkeys(question.group for question in found.questions)) == list(SPEC_BENCH)
    assert [question.id for question in found.questions] == [record["question_id"] for record in QUESTIONS]
    assert found.questions[0].turns == ("one two", "again") and found.questions[0].category == "writing"
    limited = found.limited(1)
    assert Counter(question.group for question in limited) == dict.fromkeys(SPEC_BENCH, 1)


def test_the_real_files_are_recognised(shared: Path) -> None:
    data = shared / "data"
    spec = read_questions(data / "spec_bench/question.jsonl")
    assert spec.suite == "spec-bench" and not spec.left_out
    assert Counter(question.group for question in spec.questions) == dict.fromkeys(SPEC_BENCH, 80)
    assert Counter(len(question.turns) for question in spec.questions) == {1: 400, 2: 80}
    mt = read_questions(data / "mt_bench/question.jsonl")
    assert mt.suite == "mt-bench" and Counter(q.group for q in mt.questions) == dict.fromkeys(MT_BENCH, 10)
    eagle = read_questions(data / "eagle_bench")
    assert eagle.suite == "eagle" and len({question.id for question in eagle.questions}) == 480
    groups = Counter(question.group for question in eagle.questions)
    assert groups == dict.fromkeys(("alpaca", "gsm8k", "humaneval", "mt_bench", "qa", "sum"), 80)
    assert read_questions(data / "eagle_bench/alpaca.jsonl").suite == "eagle"
    gsm8k = read_questions(data / "gsm8k/test.jsonl")
    assert gsm8k.suite == "gsm8k" and len(gsm8k.questions) == 1319
    assert read_questions(data / "gsm8k/test.jsonl").digest == gsm8k.digest != spec.digest


def test_any_prompts_are_one_group(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]})
    found = read_questions(path)
    assert found.suite == "prompts" and {question.group for question in found.questions} == {"prompts"}
    assert [question.prompt for question in found.questions] == ["a", [{"role": "user", "content": "b"}]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "broken JSON"),
        ({"question_id": 1, "category": "poetry", "turns": ["x"]}, "poetry"),
        ({"question_id": 1, "category": "qa", "turns": []}, "turns"),
        ({"question_id": 1, "category": "qa", "turns": ["x", ""]}, "turns"),
        ({"question_id": [], "category": "qa", "turns": ["x"]}, "question_id"),
        ({"question_id": 81, "category": "qa", "turns": ["x"]}, "stands at"),
        (3, "turns"),
    ],
    ids=str,
)
def test_lines_that_cannot_be_used_are_named_or_left_out(tmp_path: Path, record: Any, reason: str) -> None:
    path = question_file(tmp_path, record)
    with pytest.raises(UserError, match=rf"question\.jsonl:9: .*{reason}.*--on-bad-line skip"):
        read_questions(path, "spec-bench")
    found = read_questions(path, "spec-bench", "skip")
    assert len(found.questions) == 8
    (left,) = found.left_out
    assert left.source == f"{path}:9" and reason in left.reason


def test_data_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"no \*\.jsonl"):
        read_questions(tmp_path)
    question_file(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        read_questions(tmp_path, "spec-bench")
    with pytest.raises(UserError, match="unknown suite"):
        read_questions(tmp_path, "specbench")
    empty = write_lines(tmp_path / "e.jsonl")
    with pytest.raises(UserError, match="empty"):
        read_questions(empty)


# --- turns become prompts ----------------------------------------------------------------------------------------


def test_the_second_turn_follows_the_own_first_answer() -> None:
    target = tiny_target()
    assert target.tokenizer is not None
    dialogue = Dialogue(Question(1, "writing", MULTI_TURN, ("first", "second")), target)
    decode = target.tokenizer.decode
    assert decode(dialogue([]) or []) == "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\n"
    answer = list(target.tokenizer(" an answer <|im_end|>").input_ids)
    assert answer_text(target.tokenizer, answer) == "an answer"
    assert decode(dialogue([answer]) or []) == (
        "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\nan answer<|im_end|>\n"
        "<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dialogue([answer, answer]) is None
    assert dialogue([answer * 9]) is None, "a turn beyond the context is not asked"


def test_questions_beyond_the_context_are_named_or_left_out() -> None:
    target = tiny_target()
    questions = [
        Question(1, "qa", "qa", ("short",), source="q.jsonl:1"),
        Question(2, "qa", "qa", ("x" * 200,), source="q.jsonl:2"),
        Question(3, "writing", MULTI_TURN, ("a", "b"), source="q.jsonl:3"),
    ]
    with pytest.raises(UserError, match=r"q\.jsonl:2: .*context is 128"):
        dialogues(questions, target, 8)
    fitting, left_out = dialogues(questions, target, 100, "skip")
    assert [dialogue.question.id for dialogue in fitting] == [1]
    assert [left.source for left in left_out] == ["q.jsonl:2", "q.jsonl:3"], "room for the first answer counts"
    assert "answers of up to 100" in left_out[1].reason
    with pytest.raises(UserError, match="no question fits"):
        dialogues(questions[1:2], target, 8, "skip")


def test_without_a_template_turns_are_plain_text() -> None:
    target = tiny_target(chat_template=None)
    assert target.tokenizer is not None
    dialogue = Dialogue(Question(1, "writing", MULTI_TURN, ("first", "second")), target)
    answer = list(target.tokenizer("answer").input_ids)
    assert target.tokenizer.decode(dialogue([answer]) or []) == "first\n\nanswer\n\nsecond"


def test_a_folder_of_sets_keeps_ids_apart(tmp_path: Path) -> None:
    for name in ("alpaca", "qa"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question_id": 0, "category": "", "turns": ["x"]}) + "\n")
    found = read_questions(tmp_path)
    assert [(q.id, q.group) for q in found.questions] == [("alpaca-0", "alpaca"), ("qa-0", "qa")]
