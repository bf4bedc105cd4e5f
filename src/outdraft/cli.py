"""The command line: the verbs that hand their flags on, and the options before a verb.

`generate` and `chat` are in `console/generate.py`, `train` in `console/train.py`, and `bench`, `verify` and `doctor` in
`console/measuring.py`. What a verb calls is imported when it runs; `console/app.py` reports mistakes.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from outdraft.console import options as o
from outdraft.console.app import Verb, Verbs
from outdraft.console.generate import chat, generate
from outdraft.console.measuring import bench, doctor, verify
from outdraft.console.train import train
from outdraft.errors import UserError, flag
from outdraft.output import is_main_process, print_json, remarks, results


@o.with_flags(o.FILTERS, o.PLACED)
def regenerate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Prompts: JSON lines or a JSON list (messages, conversations, prompt, instruction, question, turns or "
            "text), CSV, Parquet, a text file with a prompt a line, a folder of *.jsonl and *.parquet, or "
            "hf:NAME[:SPLIT].",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="JSON lines file for the answers; run again, the command goes on where it stopped."
        ),
    ],
    model: o.Model = "reference",
    draft_model: Annotated[
        str | None,
        typer.Option(
            "--draft-model",
            "-d",
            help="Drafter, as in generate. It pays where few answers are decoded at once (--batch-size); with 24 a CPU "
            "is faster without.",
        ),
    ] = None,
    method: o.Method = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help='Most tokens of an answer; one cut there has "finished": false.')
    ] = 512,
    temperature: Annotated[
        str,
        typer.Option(
            "--temperature", help="0 is greedy; 0,1 writes two answers to every prompt, one at each temperature."
        ),
    ] = "0",
    seed: Annotated[int, typer.Option("--seed", help="Random seed for temperatures above 0.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Answers decoded at once; by default 24 on a CPU, 64 on a GPU."),
    ] = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    on_bad_line: Annotated[str, typer.Option("--on-bad-line", help=o.TRAINING["on_bad_line"])] = "error",
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Write the model's own answers to prompts: the training data for its drafter.

    Stopped by Ctrl-C or a crash, the same command goes on where it was.
    """
    from outdraft.api.generation import load
    from outdraft.training.regenerate import regenerate as run

    if on_bad_line not in ("error", "skip"):
        raise UserError(f"--on-bad-line must be error or skip, not '{on_bad_line}'")
    if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
        raise UserError("--batch-size and --max-new-tokens must be at least 1")
    temperatures = o.numbers("--temperature", temperature)
    filters = o.given(**{name: flags.pop(name) for name in o.FILTERS})
    if filters and not any(temperatures):
        raise UserError(f"{flag(next(iter(filters)))} changes nothing at temperature 0; give a --temperature above it")
    if method is None and draft_model is None:
        method = "none"  # answers run many at a time, where repetitions pay little
    done = run(
        load(model, draft_model, method=method, **flags),
        data,
        output,
        max_new_tokens=max_new_tokens,
        temperatures=temperatures,
        seed=seed,
        rows=batch_size,
        chat_template_kwargs=chat_template_kwargs,  # type: ignore[arg-type]
        on_bad_line="skip" if on_bad_line == "skip" else "error",
        console=remarks(),
        **filters,
    )
    if json:
        print_json(asdict(done))
        return
    results().print(done.line(), markup=False)
    after = f"next: outdraft train --model {shlex.quote(model)} --data {shlex.quote(str(output))} --output-dir drafter"
    remarks().print(f"{after} --dry-run", style="dim", markup=False, soft_wrap=True)


@o.with_flags(o.flags_of("evaluation/advice.py", "AdviceSettings", "data", "limit", "max_new_tokens"), o.PLACED)
def advise(model: o.Model = "reference", draft_model: o.DraftModel = None, json: o.Json = False, **flags: Any) -> None:
    """Find out in about two minutes which method is fastest for a model on this machine, and what to run next.

    Times the target's passes and the drafts of each kind (medians, taken in turns, warm-ups left out), and tries prompt
    lookup on a few prompts. With the time of a plain round as the unit, speed-up = tau / (1 + draft + verify): tau
    tokens a round, the time of drafting, and what checking the draft adds to the pass.
    """
    from outdraft.evaluation.advice import AdviceSettings, show
    from outdraft.evaluation.advising import advise as find

    settings = AdviceSettings(model, draft_model, **flags)
    found = find(settings, remarks())
    print_json(found.as_dict()) if json else show(found, results())


DEMO = o.flags_of(
    *("console/demo_run.py", "DemoSettings"),
    *("prompts", "max_new_tokens", "train", "train_seconds", "output_dir"),
)


@o.with_flags(DEMO, {"dtype": o.Dtype, "backend": o.Backend})
def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="smollm2, or the tiny `reference`; by default the first that is here."),
    ] = None,
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Answer a question without and with a drafter, then compare all ways of decoding on held-out prompts."""
    from outdraft.console.demo_run import DemoSettings, run_demo

    result = run_demo(DemoSettings(model, **flags), Console(quiet=True) if json else results(), remarks())
    print_json(result.as_dict()) if json else result.show(results())


def export(
    draft_model: Annotated[
        str,
        typer.Option(
            "--draft-model", "-d", help="Drafter: its folder or hub id, `smollm2` or `reference` for one that ships."
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="A new folder for the engine to load.")],
    model: o.Model = "reference",
    engine: Annotated[
        str, typer.Option("--engine", help="vllm, or hf: transformers' assistant_model (EESD only).")
    ] = "vllm",
    method: Annotated[
        str | None, typer.Option("--method", help="Which of the drafters that ship: fspad, eagle or eesd.")
    ] = None,
    target_dir: Annotated[
        Path | None,
        typer.Option("--target-dir", help="Also write a shipped or GGUF target there, as an ordinary folder."),
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", help="Tokens of a draft in the command that is printed.")
    ] = 4,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Precision of the written weights; as stored by default.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a trained drafter as a folder that vLLM or transformers loads, checked against the drafter itself."""
    from outdraft.export.export import export_drafter

    exported = export_drafter(
        model,
        draft_model,
        engine,
        output_dir,
        method=method,
        target_dir=target_dir,
        dtype=dtype,
        num_speculative_tokens=num_speculative_tokens,
    )
    if json:
        print_json(asdict(exported))
        return
    notes = remarks()
    notes.print(
        f"{exported.folder}: {exported.method} as {exported.architecture}; differs from the drafter's own forward by "
        f"{exported.difference:.1e} of the largest value (float32)",
        markup=False,
        soft_wrap=True,
    )
    if exported.plugin:
        notes.print("vLLM runs it through outdraft's plug-in: install outdraft where vLLM is", soft_wrap=True)
    results().print(exported.command, markup=False)


def info(
    path: Annotated[
        str | None,
        typer.Argument(help="A model (folder, GGUF file, hub id, `smollm2`, `reference`) or a drafter's folder."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The same, by the name that other verbs use.")
    ] = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Show what a model or drafter is, and what it can do on this machine."""
    from outdraft.console.facts import describe, tables

    if (path is None) == (model is None):
        raise UserError("give one model or drafter, such as `outdraft info smollm2`")
    facts = describe(str(path or model), device)
    print_json(facts) if json else results().print(*tables(facts))


SETTINGS = ("serving/settings.py", "ServeSettings")
SERVE = o.field_help(*SETTINGS)
SERVED = o.flags_of(*SETTINGS, *(name for name in SERVE if name not in ("api_key", "chat_template_kwargs", "defaults")))


@o.with_flags(SERVED, o.SAMPLED, o.DRAFTED, o.LOADED)
def serve(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="OUTDRAFT_API_KEY", help=SERVE["api_key"])] = None,
    tp: o.TensorParallel = False,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option("--chat-template-kwargs", callback=o.mapping, metavar="JSON", help=SERVE["chat_template_kwargs"]),
    ] = None,
    **flags: Any,
) -> None:
    """Serve a model with drafts over OpenAI's API, with a chat page at /.

    Sampling options are the defaults of requests that do not set them.
    """
    own = o.given(api_key=api_key, chat_template_kwargs=chat_template_kwargs, **{name: flags[name] for name in SERVED})
    from outdraft.serving.settings import ServeSettings

    settings = ServeSettings(**own, defaults=o.given(**{name: flags[name] for name in o.SAMPLED}))
    loading, draft, said = o.loading(method=method, tp=tp, **flags), o.drafting(**flags), remarks()
    try:
        from outdraft.serving.server import Service, listen
    except ImportError as error:
        raise UserError(f"{error.name} is missing, which serving needs: pip install 'outdraft[serve]'") from error
    # Before minutes of loading; of processes that share the target the first one listens.
    follows = loading.get("tp_plan") is not None and not is_main_process()
    listening = None if follows else listen(settings.host, settings.port)
    try:
        from outdraft.api.draft_settings import DraftSettings
        from outdraft.api.generation import load
        from outdraft.api.settings import model_settings

        loaded = load(model, draft_model, **loading)
        asked = DraftSettings(**o.tree(loaded.drafter, **draft))  # refuses a tree that nothing could draft
        name = Path(model).resolve().name if Path(model).exists() else model  # hub ids and `reference` as they are
        settings.served_model_name = settings.served_model_name or [name]
        service = Service(loaded, settings, asked)
        if own := model_settings(loaded.target):
            said.print(f"note: the model's generation config sets {own} where requests do not", markup=False)
        if not settings.loopback and settings.api_key is None:
            said.print("note: anyone who reaches this address may use the server; --api-key asks for a key")
        slots = service.engine.capacity.slots
        facts = f"{settings.served_model_name[0]}, drafter: {loaded.method}, cache: {slots} tokens, "
        facts += f"temperature {service.temperature:g} where a request names none"

        def ready(url: str) -> None:
            line = f"{facts}\nlistening on {url} (a page to chat on; /v1 for clients; Ctrl-C ends)"
            said.print(line, markup=False, soft_wrap=True)

        if settings.log_requests:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger = logging.getLogger("outdraft.serving")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        service.serve(listening, ready)
    finally:
        if listening is not None:
            listening.close()


VERBS = (demo, generate, chat, advise, train, regenerate, info, doctor, bench, verify, serve, export)
"""The verbs in the order of the help."""

app = typer.Typer(
    name="outdraft",
    cls=Verbs,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding: train a drafter for your model, decode faster, measure it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in VERBS:
    app.command(cls=Verb)(verb)


def main() -> None:
    """The console script."""
    try:
        app()
    except SystemExit as end:
        ranks: Any = sys.modules.get("outdraft.target.ranks")  # help and refusals do not wait for torch
        if ranks is not None and ranks.in_group() and isinstance(end.code or 0, int):
            ranks.end_in_group(end.code or 0)
        raise


@app.callback(invoke_without_command=True)
def entry(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", envvar="OUTDRAFT_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a verb, print the help."""
    if version:
        from outdraft import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


if __name__ == "__main__":
    main()
