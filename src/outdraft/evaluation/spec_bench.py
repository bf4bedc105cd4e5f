"""Spec-Bench's own answer files, written and read back, and its own figures from them.

The format and the arithmetic are those of its `evaluation/eval.py` and `evaluation/speed.py`
(github.com/hemingkx/Spec-Bench): a method's rate is its `new_tokens` over its `wall_time`, the baseline's is the
tokens that its texts have when tokenized anew, less one for the beginning of the text; the speed-up is the ratio of the
mean rates over questions. Knows nothing of decoding.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outdraft.data.text_file import BadText, text_lines
from outdraft.errors import UserError
from outdraft.evaluation.dialogue import answer_text
from outdraft.evaluation.measure import Answer, Run
from outdraft.evaluation.questions import MT_BENCH, MULTI_TURN, Question

Record = dict[str, Any]
"""One line of an answer file."""

FOLDER = "model_answer"
"""Where Spec-Bench keeps a folder of them, one file a method."""

NAN = float("nan")


def accept_lengths(answer: Answer) -> list[int]:
    """Tokens that each target forward after the prefill emitted, the bonus token among them.

    What a last round accepted past the end of the text is not in the answer, so it is not counted.
    """
    lengths = [accepted + 1 for accepted in answer.statistics.lengths]
    if lengths:
        lengths[-1] = answer.statistics.emitted - sum(lengths[:-1])
    return lengths


def choice(run: Run, tokenizer: Any) -> dict[str, Any]:
    """One repetition of one question in Spec-Bench's format; its `turns` here are the answers' texts."""
    return {
        "index": run.repetition,
        "turns": [answer_text(tokenizer, answer.tokens) for answer in run.answers],
        "decoding_steps": [answer.statistics.rounds for answer in run.answers],
        "new_tokens": [len(answer.tokens) for answer in run.answers],
        "wall_time": [answer.seconds for answer in run.answers],
        "accept_lengths": [length for answer in run.answers for length in accept_lengths(answer)],
    }


def records(name: str, runs: Iterable[Run], questions: Sequence[Question], tokenizer: Any) -> list[Record]:
    """The lines of one contender's answer file, in the order of the questions."""
    found: dict[int, Record] = {}
    for run in runs:
        question = questions[run.prompt]
        if run.prompt not in found:
            found[run.prompt] = {
                "question_id": question.id,
                "category": question.category,
                "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{question.id}").hex,
                "model_id": name,
                "choices": [],
                "tstamp": time.time(),
            }
        found[run.prompt]["choices"].append(choice(run, tokenizer))
    return list(found.values())


def file_name(contender: str, law: str = "") -> str:
    """`fspad.jsonl`; with several temperatures `fspad-temp-1.jsonl`."""
    return re.sub(r"[^\w.+=-]+", "-", contender) + (f"-{law}" if law else "") + ".jsonl"


def write(path: Path, lines: Iterable[Record]) -> None:
    """One answer file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)


def read(path: Path) -> list[Record]:
    """The lines of an answer file, Spec-Bench's or ours.

    Raises:
        UserError: no such file, or a line that is no answer.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}; give an answer file of Spec-Bench's format")
    found = []
    for number, line in text_lines(path):
        try:
            if isinstance(line, BadText):
                raise ValueError(str(line))
            record = json.loads(line)
            for one in record["choices"]:
                _ = one["turns"], one["new_tokens"], one["wall_time"], one["accept_lengths"]
            _ = record["category"]
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path}:{number}: no answer of Spec-Bench's format ({problem!r})") from None
        found.append(record)
    return found


def in_group(lines: Iterable[Record], group: str | None) -> list[Record]:
    """Those of one task, where MT-bench's categories together are the multi-turn one; all of them when None."""
    wanted = MT_BENCH if group == MULTI_TURN else (group,)
    return [line for line in lines if group is None or line["category"] in wanted]


def tau(lines: Iterable[Record], index: int = 0) -> float:
    """Mean of the accept lengths: tokens a target forward, the bonus token included."""
    lengths = [length for line in lines for length in line["choices"][index]["accept_lengths"]]
    return float(np.mean(lengths)) if lengths else NAN


def speedup(lines: Sequence[Record], base: Sequence[Record], count: Callable[[str], int], index: int = 0) -> float:
    """Spec-Bench's own speed-up.

    Args:
        lines: of the method.
        base: of plain decoding, for the same questions.
        count: tokens of a text as the tokenizer gives them, its beginning-of-text token included.
        index: which of the choices (repetitions); its scripts read the first.
    """
    rates = [sum(one["new_tokens"]) / sum(one["wall_time"]) for one in (line["choices"][index] for line in lines)]
    base_rates = [
        sum(count(text) - 1 for text in one["turns"]) / sum(one["wall_time"])
        for one in (line["choices"][index] for line in base)
    ]
    below = float(np.mean(base_rates)) if base_rates else 0.0
    return float(np.mean(rates)) / below if rates and below > 0 else NAN


def counter(tokenizer: Any) -> Callable[[str], int]:
    """How Spec-Bench counts a text's tokens."""
    return lambda text: len(tokenizer(text).input_ids)


def figures(lines: Sequence[Record], base: Sequence[Record], tokenizer: Any) -> dict[str, float]:
    """`tau` over all repetitions, and the mean of the repetitions' speed-ups, as its report of several runs does."""
    repetitions = range(min((len(line["choices"]) for line in (*lines, *base)), default=0))
    lengths = [n for line in lines for index in repetitions for n in line["choices"][index]["accept_lengths"]]
    count = counter(tokenizer)
    speedups = [speedup(lines, base, count, index) for index in repetitions]
    return {
        "tau": float(np.mean(lengths)) if lengths else NAN,
        "speedup": float(np.mean(speedups)) if speedups else NAN,
    }
