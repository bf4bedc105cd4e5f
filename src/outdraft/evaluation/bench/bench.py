"""The comparison that `outdraft bench` and the demo print: it measures, judges the texts and sums up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from outdraft.api.loading import load_target
from outdraft.api.prompts import note_texts
from outdraft.data.provenance import environment, load_average
from outdraft.evaluation.audit.stock import Divergence
from outdraft.evaluation.bench import spec_bench
from outdraft.evaluation.bench.baselines import STOCK
from outdraft.evaluation.bench.measure import PLAIN, Contender, Run, Script, compare, divergences_by_method
from outdraft.evaluation.bench.methods import BenchSettings, contenders
from outdraft.evaluation.bench.questions import Question, QuestionSet, dialogues, questions_of, read_questions
from outdraft.evaluation.bench.result import BenchResult, Comparison, temperature_name
from outdraft.evaluation.bench.store import Store, fingerprint
from outdraft.evaluation.bench.summary import Summary, paired, summarise
from outdraft.evaluation.report.pages import check_page, plotly_script, save_bench
from outdraft.output import is_main_process
from outdraft.reference import load_prompts
from outdraft.target.target import Target

__all__ = ["BenchResult", "BenchSettings", "Comparison", "measured", "run_bench"]

HELD_OUT = "held-out"
"""The group name of the shipped prompts."""


def run_bench(
    settings: BenchSettings, remarks: Console, others: Callable[[Target], Sequence[Contender]] = lambda model: ()
) -> BenchResult:
    """Load, measure and sum up; with an output folder, resume an earlier run of the same settings.

    Args:
        others: makes more contenders from the model that the baselines run on.
    """
    if settings.report is not None:
        plotly_script()
        check_page(settings.report)
    if settings.data is not None:
        asked = read_questions(settings.data, settings.suite, settings.on_bad_line)
    else:
        asked = QuestionSet("prompts", questions_of(load_prompts("heldout"), HELD_OUT), digest=HELD_OUT)
    place: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "backend": settings.backend}
    target = load_target(settings.model, **place, tp_plan=settings.tp_plan)
    fitting, too_long = dialogues(
        asked.limited(settings.limit), target, settings.max_new_tokens, on_bad_line=settings.on_bad_line
    )
    questions = [dialogue.question for dialogue in fitting]
    stock = None  # the peers run on the modules of `transformers` itself, unless they shall not
    elsewhere = settings.peers_backend != "same" and target.backend != "eager"
    if elsewhere and (settings.peers or settings.include_transformers):
        stock = load_target(settings.model, dtype=target.dtype, device=target.device, backend="eager")
    rivals = contenders(target, settings, stock)
    rivals += others(stock or target)
    note_texts([question.prompt for question in questions], target.tokenizer)
    facts = environment(target)
    store = None
    if settings.output_dir is not None:
        names = [rival.name for rival in rivals]
        sitting = {"git_revision": facts["git_revision"], "load_average": facts["load_average"]}
        store = Store(settings.output_dir, fingerprint(settings, facts, asked, questions, names), sitting)
    comparisons = [
        measured(
            target,
            rivals,
            fitting,
            temperature=temperature,
            repetitions=settings.repetitions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            remarks=remarks,
            questions=questions,
            store=store,
        )
        for temperature in settings.temperatures
    ]
    # Only now is it known what forwards ran on: a backend that cannot serve the model may give way when first used.
    ended = {"backend": target.backend, "load_average_at_the_end": load_average()}
    facts |= ended
    if store is not None:
        store.end(**ended)
        facts |= store.sittings[-1]  # those of the last measurement, which need not be now
        facts["sittings"] = store.sittings
        for one in comparisons if is_main_process() else ():
            suffix = f"temp-{one.temperature:g}" if len(comparisons) > 1 else ""
            for name, runs in one.runs.items():
                lines = spec_bench.records(name, runs, one.questions, target.tokenizer)
                spec_bench.write(store.folder / spec_bench.FOLDER / spec_bench.file_name(name, suffix), lines)
    result = BenchResult(
        settings.shown(asked.suite, len(questions)), facts, comparisons, questions, [*asked.left_out, *too_long]
    )
    if settings.report is not None and is_main_process():
        save_bench(result, settings.report, target.tokenizer)
        remarks.print(f"report: {settings.report}", highlight=False)
    return result


def measured(
    target: Target,
    rivals: Sequence[Contender],
    prompts: Sequence[list[int] | Script],
    *,
    temperature: float = 0.0,
    repetitions: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    remarks: Console,
    questions: Sequence[Question] = (),
    store: Store | None = None,
    end: float | None = None,
) -> Comparison:
    """Compare contenders, one of which is `PLAIN`.

    Args:
        target: the model, which also judges divergences.
        prompts: prompts as in `measure.compare`.
        questions: the prompts' questions, where groups matter.
        store: keeps complete pairs, and knows those of earlier runs.
        end: deadline as in `measure.compare`; only for single prompts without questions or a store.
    """
    title = temperature_name(temperature)
    known = store.known(temperature) if store is not None else {}
    pairs = len(prompts) * repetitions
    if known:
        remarks.print(f"{title}: {len(known)} of {pairs} pairs are there already", highlight=False)
    with progress(remarks, title, len(rivals) * (pairs - len(known))) as advance:
        try:
            runs = compare(
                rivals,
                prompts,
                repetitions=repetitions,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                progress=advance,
                known=known,
                completed=lambda *pair: store.keep(temperature, *pair) if store is not None else None,
                end=end,
            )
        except KeyboardInterrupt:
            if store is not None:
                done = len(store.known(temperature))
                remarks.print(f"{title}: {done} of {pairs} pairs kept; the same command goes on from there")
            raise
    parted = divergences_by_method(target, prompts, runs[PLAIN], runs) if temperature == 0 else dict.fromkeys(runs)
    return summed_up(target, rivals, runs, parted, temperature, questions)


def summed_up(
    target: Target,
    rivals: Sequence[Contender],
    runs: dict[str, list[Run]],
    parted: Mapping[str, list[Divergence] | None],
    temperature: float,
    questions: Sequence[Question],
) -> Comparison:
    """Sum up the figures of all runs, and those of every group."""
    groups = list(dict.fromkeys(question.group for question in questions))
    answers = {
        rival.name: spec_bench.records(rival.name, runs[rival.name], questions, target.tokenizer)
        for rival in rivals
        if questions
    }

    def of(rival: Contender, group: str | None) -> Summary:
        indices = {i for i, question in enumerate(questions) if question.group == group}
        own, plain, stock = (
            [run for run in runs.get(name, []) if group is None or run.prompt in indices]
            for name in (rival.name, PLAIN, STOCK)
        )
        found = parted[rival.name]
        if found is not None and group is not None:
            found = [divergence for divergence in found if divergence.prompt in indices]
        summary = summarise(rival.name, rival.method, rival.parameters, own, plain, found)
        if stock:
            summary.over_stock, summary.over_stock_interval = paired(own, stock)
        if questions:
            lines, base = (
                [
                    line
                    for line, question in zip(answers[name], questions, strict=True)
                    if group in (None, question.group)
                ]
                for name in (rival.name, PLAIN)
            )
            summary.spec_bench_speedup = spec_bench.figures(lines, base, target.tokenizer)["speedup"]
        return summary

    return Comparison(
        temperature,
        [of(rival, None) for rival in rivals],
        runs,
        {group: [of(rival, group) for rival in rivals] for group in groups},
        questions,
    )


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal, nothing elsewhere; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
