"""The parts of the report's page that are text and tables. Computes nothing, draws nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from outdraft.api.text import Detokenizer
from outdraft.evaluation.environment import busy
from outdraft.evaluation.measure import PLAIN, Answer
from outdraft.evaluation.report import verdict
from outdraft.evaluation.result import BenchResult, Comparison
from outdraft.evaluation.summary import Summary, scattered
from outdraft.output import number

SAMPLES, SAMPLE_TOKENS, SHOWN = 3, 160, 40
"""Samples, their tokens, and rows of long lists, at most."""

FEW_QUESTIONS = 20

METHOD = """
<h2 id="method">How it was measured</h2>
<section class="card">
<p><b>Pairs.</b> Every question is answered by all methods one after the other, in an order that rotates from question
to question, so that whatever disturbs the machine for a while disturbs all of them. A speed-up is the ratio of tokens
per second of two runs of the same question, prefill included; the figure is the median of those ratios, its interval a
bootstrap over questions (2,000 resamples, the repetitions of a question drawn together).</p>
<p><b>Baseline.</b> <i>plain</i> is the same target without a drafter, on the same code, backend and precision.
Methods named <i>transformers …</i> are the stock library, with the same weights in the same precision: on its own
modules, or with <code>--peers-backend same</code> on the target's. <i>Over stock</i> is likewise, over its plain
<code>generate</code>.</p>
<p><b>tau</b> is the number of tokens that a forward of the target after the prefill emits, the bonus token included;
the <b>acceptance rate</b> is the share of verified candidates that were accepted, without it (in a tree most candidates
are alternatives, so it is low by design).</p>
<p><b>Spec-Bench's own</b> speed-up is the ratio of the mean rates over questions where plain decoding's tokens are
counted by tokenizing its text anew, less one, and the method's tokens as it emitted them; <b>ratio of mean rates</b> is
the same with tokens counted alike on both sides. Their difference is the difference in counting.</p>
<p><b>Identical</b> compares greedy texts with plain decoding's, token by token. A divergence is called a near-tie only
if the logit gap lies within the rounding noise of that model and precision: the largest change of such a gap between
one-token and many-token forwards of the stock model, or one unit in the last place of the logits.</p>
</section>
"""


def made_on(facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """One line on the machine."""
    device = facts["gpu"] if str(facts["device"]).startswith("cuda") else f"{facts['cpu']}, {facts['threads']} threads"
    when = facts.get("ended") or facts.get("began") or time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"{device}; {facts['dtype']}, {facts['backend']} backend; {settings['prompts']} questions, "
        f"{settings['repetitions']} repetition(s), up to {settings['max_new_tokens']} new tokens; {when}"
    )


def notes(result: BenchResult) -> str:
    """What a reader should know before believing the figures."""
    facts, found = result.environment, []
    if (note := busy(facts)) is not None:
        found.append(note)
    sizes = {name: s[0].questions for one in result.comparisons for name, s in one.groups.items()}
    few = [f"{name} {count}" for name, count in sizes.items() if count < FEW_QUESTIONS]
    if few:
        found.append(f"Few questions in some tasks ({', '.join(few)}): their intervals say little.")
    if result.left_out:
        found.append(f"Left out: {_questions(len(result.left_out))}, named at the end.")
    sittings = facts.get("sittings") or []
    if len(sittings) > 1:
        revisions = {str(sitting.get("git_revision"))[:12] for sitting in sittings}
        found.append(
            f"Measured in {len(sittings)} sittings (source revisions {', '.join(sorted(revisions))}); controllers that "
            "learn began anew in each."
        )
    for one in result.comparisons:
        if (note := scattered(one.runs)) is not None:
            found.append(note)
        if one.cut_short:
            found.append(f"{one.cut_short} conversations ended early: the next turn did not fit the context.")
        odd = [s.name for s in one.summaries if any(not d.tie for d in s.divergences or [])]
        if odd:
            found.append(f"Texts of {', '.join(odd)} part from plain decoding's beyond rounding noise: look below.")
    if not found:
        return ""
    return (
        f'<div class="notes"><b>Read with care</b><ul>{"".join(f"<li>{escape(one)}</li>" for one in found)}</ul></div>'
    )


def heads(one: Comparison) -> str:
    """The fastest few that draft, large."""
    rivals = sorted((s for s in one.summaries if s.method != "none"), key=lambda s: -s.speedup)[:4]
    cards = "".join(
        f'<div class="card"><div class="name">{escape(s.name)}</div><div class="big">{number(s.speedup)}×</div>'
        f'<div class="muted">95%: {_interval(s.speedup_interval) or "none of one question"}<br>'
        f"tau {number(s.statistics.tau)}, "
        f"{number(s.tokens_per_second, '.1f')} tokens/s</div></div>"
        for s in rivals
    )
    return f'<div class="heads">{cards}</div>'


def overall_table(one: Comparison) -> str:
    return f'<section class="card wide">{_table(one.summaries, "All questions together")}</section>'


def group_tables(one: Comparison) -> str:
    if len(one.groups) < 2:
        return ""
    tables = "".join(
        f"<details><summary>{escape(group)}</summary>"
        f'<div class="wide">{_table(summaries, _questions(summaries[0].questions))}</div></details>'
        for group, summaries in one.groups.items()
    )
    return f'<section class="card"><h3>The same figures, task by task</h3>{tables}</section>'


def _table(summaries: Sequence[Summary], caption: str) -> str:
    columns = (
        ("method", "text"),
        ("tau", ""),
        ("accepted", ""),
        ("tokens/s", ""),
        ("first token, ms", ""),
        ("speed-up, median of pairs [95%]", ""),
        ("over stock generate [95%]", ""),
        ("ratio of mean rates", ""),
        ("Spec-Bench's own", ""),
        ("identical to plain", "text"),
    )
    rows = (
        (
            escape(s.name),
            number(s.statistics.tau),
            number(100 * s.statistics.acceptance_rate, ".0f") + ("%" if s.statistics.drafted else ""),
            number(s.tokens_per_second, ".1f"),
            number(1000 * s.first_token_seconds, ".0f"),
            f'<b>{number(s.speedup)}×</b> <span class="muted">{_interval(s.speedup_interval)}</span>',
            f'{number(s.over_stock)}× <span class="muted">{_interval(s.over_stock_interval)}</span>'
            if math.isfinite(s.over_stock)
            else "",
            f"{number(s.mean_rate_speedup)}×",
            f"{number(s.spec_bench_speedup)}×",
            escape(verdict(s)),
        )
        for s in summaries
    )
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in columns)
    kinds = [kind for _, kind in columns]
    body = "".join(_row(row, kinds) for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(cells: Iterable[str], kinds: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(cells, kinds, strict=True)) + "</tr>"


def _interval(ends: tuple[float, float]) -> str:
    """Empty where one question leaves none."""
    low, high = ends
    return f"[{number(low)}, {number(high)}]" if math.isfinite(low) else ""


def samples(one: Comparison, tokenizer: Any) -> str:
    """An answer of a few groups by every method that drafts, its tokens coloured."""
    drafting = sorted((s for s in one.summaries if s.statistics.tau > 1 and s.name != PLAIN), key=lambda s: -s.speedup)
    if not drafting or not one.questions:
        return ""
    groups: dict[str, int] = {}
    lengths = {run.prompt: len(run.answer.tokens) for run in one.runs[PLAIN]}
    for place, question in enumerate(one.questions):  # of each group the longest answer: there is most to see
        if question.group not in groups or lengths[place] > lengths[groups[question.group]]:
            groups[question.group] = place
    shown = []
    for group, place in list(groups.items())[:SAMPLES]:
        question = one.questions[place]
        asked = question.turns[0] if question.turns else question.prompt
        text = asked if isinstance(asked, str) else (asked or [{"content": ""}])[-1]["content"]
        blocks = []
        for rank, summary in enumerate(drafting):
            run = next(run for run in one.runs[summary.name] if run.prompt == place)
            counts = run.answer.statistics
            said = f"{escape(summary.name)}: {len(run.answer.tokens)} tokens, tau {number(counts.tau)}"
            state = " open" if rank == 0 else ""
            blocks.append(f"<details{state}><summary>{said}</summary>{_coloured(run.answer, tokenizer)}</details>")
        shown.append(
            f'<div class="sample"><h3>{escape(group)}, question {escape(str(question.id))}</h3>'
            f'<div class="question">{escape(text)}</div>{"".join(blocks)}</div>'
        )
    key = (
        '<p class="muted tokens"><span class="hit">drafted and accepted</span>  <span class="own">decided by the '
        "target: a correction, or the bonus token after a draft that was accepted whole</span></p>"
    )
    return f'<section class="card"><h3>Whose tokens they are</h3>{key}{"".join(shown)}</section>'


def _coloured(answer: Answer, tokenizer: Any) -> str:
    detokenizer = Detokenizer(tokenizer)
    tokens = list(zip(answer.tokens, answer.accepted, strict=True))[:SAMPLE_TOKENS]
    pieces = [(detokenizer.add(token), hit) for token, hit in tokens]
    if tokens:
        pieces.append((detokenizer.finish(), tokens[-1][1]))
    spans = "".join(f'<span class="{"hit" if hit else "own"}">{escape(text)}</span>' for text, hit in pieces if text)
    more = " …" if len(answer.tokens) > SAMPLE_TOKENS else ""
    return f'<div class="tokens">{spans}{more}</div>'


def divergence_table(one: Comparison) -> str:
    """Where greedy texts part from plain ones."""
    if one.temperature > 0:
        said = "Texts are sampled, so they need not equal plain decoding's; their law is what must be equal, which "
        return f'<section class="card"><h3>Divergences</h3><p>{said}<code>outdraft verify</code> tests.</p></section>'
    found = [(s.name, d) for s in one.summaries for d in s.divergences or []]
    if not found:
        said = "None: every greedy text equals plain decoding's, token by token."
        return f'<section class="card"><h3>Divergences</h3><p>{said}</p></section>'
    rows = "".join(
        _row(
            (
                escape(name),
                escape(str(one.questions[d.prompt].id if one.questions else d.prompt + 1)),
                str(d.turn + 1),
                str(d.position + 1),
                number(d.gap, ".4f"),
                number(d.noise, ".4f"),
                "near-tie" if d.tie else "<b>beyond the noise</b>",
            ),
            ["text", "", "", "", "", "", "text"],
        )
        for name, d in found[:SHOWN]
    )
    names = ("method", "question", "turn", "token", "logit gap", "noise", "verdict")
    head = "".join(f'<th class="{"text" if name == "verdict" else ""}">{name}</th>' for name in names)
    more = f"<p>… and {len(found) - SHOWN} more (all in the JSON).</p>" if len(found) > SHOWN else ""
    return (
        '<section class="card wide"><h3>Where greedy texts part from plain decoding\'s</h3>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}</section>"
    )


def environment_and_settings(result: BenchResult) -> str:
    """All of both, and the questions left out."""
    left = "".join(f"<li>{escape(one.source)}: {escape(one.reason)}</li>" for one in result.left_out[:SHOWN])
    more = f"<li>… and {len(result.left_out) - SHOWN} more</li>" if len(result.left_out) > SHOWN else ""
    listed = f'<section class="card"><h3>Left out</h3><ul>{left}{more}</ul></section>' if left else ""
    return (
        '<h2 id="made-on">Environment and settings</h2>'
        f'<section class="card facts"><h3>Environment</h3>{_facts(result.environment)}</section>'
        f'<section class="card facts"><h3>Settings</h3>{_facts(result.settings)}</section>{listed}'
    )


def _questions(count: int) -> str:
    return f"{count} question{'' if count == 1 else 's'}"


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_said(value))}</td></tr>" for name, value in facts.items())
    return f"<table><tbody>{rows}</tbody></table>"


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(entry)}" for name, entry in value.items())
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return "; ".join(map(_said, value)) if any(isinstance(e, dict) for e in value) else ", ".join(map(_said, value))
    return value if isinstance(value, str) else json.dumps(value)
