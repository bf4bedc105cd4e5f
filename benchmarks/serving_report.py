"""The figures and tables of `serving.py`. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from serving_servers import Asked

from outdraft.evaluation.bench.summary import interval
from outdraft.output import number


def rate(blocks: Sequence[dict[str, Any]]) -> float:
    """Tokens a second of all clients together."""
    return sum(len(b["answers"]) * b["answers"][0].tokens for b in blocks) / sum(b["seconds"] for b in blocks)


def summary(blocks: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a way in a cell, and its ratios to our plain server in the same blocks."""
    answers: list[Asked] = [one for each in blocks for one in each["answers"]]
    first, whole = ([getattr(one, name) for one in answers] for name in ("first", "seconds"))
    rounds = [one.rounds for one in answers]
    emitted = sum(one.tokens - 1 for one in answers)
    found: dict[str, Any] = {
        "blocks": len(blocks),
        "answers": len(answers),
        "tokens_per_second": rate(blocks),
        "first_token_seconds": {"p50": statistics.median(first), "p95": float(np.percentile(first, 95))},
        "answer_seconds": {"p50": statistics.median(whole), "p95": float(np.percentile(whole, 95))},
        "tau": emitted / sum(rounds) if all(rounds) else None,
    }
    if len(plain) >= len(blocks):
        base = [one for each in plain[: len(blocks)] for one in each["answers"]]
        ratios = np.array([other.seconds / one.seconds for one, other in zip(answers, base, strict=True)])
        found["over_plain"] = rate(blocks) / rate(plain[: len(blocks)])
        found["answer_over_plain"] = float(np.median(ratios))
        found["answer_over_plain_interval"] = interval(ratios, [one.question for one in answers])
    return found


def as_offline(blocks: Sequence[dict[str, Any]], texts: Sequence[str]) -> int:
    """How many answers have the text of plain decoding offline."""
    return sum(one.text == texts[one.question] for each in blocks for one in each["answers"])


def markdown(result: dict[str, Any]) -> str:
    facts, asked = result["environment"], result["settings"]
    lines = [
        "# Servers under several clients",
        "",
        f"`{asked['model']}`, bfloat16, {facts['cpu']}, {asked['threads']} threads for others, ours by its default; "
        f"{asked['questions']} questions ({asked['prompt_tokens']} prompt tokens, median), "
        f"{asked['max_new_tokens']} new tokens each, streamed, "
        f"clients on the same cores. Load average before {facts['load_average']}.",
        "",
        "Tokens/s are those of all clients together, prompts included. Over plain: of tokens/s; and of an answer's "
        "seconds, paired by question, median with a bootstrap 95% interval over questions. As offline: answers whose "
        "text is that of our plain decoding without a server.",
    ]
    for cell in result["results"]:
        lines += [
            "",
            f"## T={cell['temperature']:g}, {cell['clients']} clients",
            "",
            "| | tokens/s | over plain | an answer over plain | tau | first token, ms: p50 / p95 "
            "| answer, s: p50 / p95 | as offline | answers |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, s in cell["servers"].items():
            first, whole = s["first_token_seconds"], s["answer_seconds"]
            spread = ", ".join(number(end) for end in s.get("answer_over_plain_interval", ()))
            same = "-" if s.get("as_offline") is None else f"{s['as_offline']} of {s['answers']}"
            lines.append(
                f"| {name} | {s['tokens_per_second']:.1f} | {number(s.get('over_plain'))} "
                f"| {number(s.get('answer_over_plain'))} [{spread}] | {number(s['tau'])} "
                f"| {1000 * first['p50']:.0f} / {1000 * first['p95']:.0f} | {whole['p50']:.2f} / {whole['p95']:.2f} "
                f"| {same} | {s['answers']} |"
            )
    lines += ["", *(f"Left out: {name}: {reason}" for name, reason in result["left_out"].items())]
    return "\n".join(lines) + "\n"
