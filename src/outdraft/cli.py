"""The command line: one function a verb, which parses, calls and prints. What it calls is imported when it runs.

Knows no mathematics and no file format; how mistakes are reported is in `console/app.py`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.console.app import Verbs
from outdraft.console.fields import field_help
from outdraft.console.output import print_json, remarks, results
from outdraft.errors import UserError

app = typer.Typer(
    name="outdraft",
    cls=Verbs,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding: train a drafter for your model, decode faster, measure it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
BENCH = field_help("evaluation/bench_settings.py", "BenchSettings")
ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that the drafter had guessed.")]


def main() -> None:
    """The console script."""
    app()


@app.callback(invoke_without_command=True)
def entry(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", envvar="OUTDRAFT_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a verb: the help."""
    if version:
        from outdraft import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    train_seconds: Annotated[float, typer.Option("--train-seconds", help="Time for training a drafter.")] = 90.0,
    prompts: Annotated[int, typer.Option("--prompts", help="Held-out prompts to decode.")] = 12,
    max_new_tokens: o.MaxNewTokens = 96,
    dtype: o.Dtype = None,
    backend: o.Backend = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Keep the trained drafter here.")] = None,
    skip_training: Annotated[bool, typer.Option("--skip-training", help="Only the drafter that ships.")] = False,
    json: o.Json = False,
) -> None:
    """Train a drafter for the shipped target, then decode held-out prompts with and without it."""
    from outdraft.reference.demo import DemoSettings, run_demo

    settings = DemoSettings(train_seconds, prompts, max_new_tokens, dtype, backend, output_dir, skip_training)
    result = run_demo(settings, remarks())
    if json:
        print_json(result.as_dict())
    else:
        result.show(results())


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; from stdin when left out.")] = None,
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="Read the prompt from this file.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Through the chat template or as it is; chat where there is a template."),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 256,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this string; may be repeated.")] = None,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    controller: o.Controller = None,
    exact: o.Exact = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    show_drafts: ShowDrafts = False,
    json: o.Json = False,
) -> None:
    """Answer one prompt, streaming the text."""
    text = _prompt_text(prompt, prompt_file)
    from outdraft.console.streaming import stream
    from outdraft.generation import load

    loaded = load(model, draft_model, method=method, dtype=dtype, device=device, backend=backend)
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, stop_strings=stop, exact=exact or None),
        **o.sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        **o.tree(
            loaded.drafter,
            num_speculative_tokens=num_speculative_tokens,
            tree_depth=tree_depth,
            tree_top_k=tree_top_k,
            tree_size=tree_size,
            controller=controller,
        ),
    }
    if chat is None:
        chat = getattr(loaded.tokenizer, "chat_template", None) is not None
    asked: Any = [{"role": "user", "content": text}] if chat else text
    if not json:
        streamed = stream(loaded.stream(asked, **settings), results(show_drafts), show_drafts)
        remarks().print(streamed.line(), style="dim", markup=False)
        return
    output = loaded.generate(asked, **settings)
    print_json(
        {
            "text": output.texts[0] if output.texts else None,
            "tokens": output.tokens[0],
            "from_draft": output.accepted[0],
            "finish_reason": output.finish_reasons[0],
            "prompt_tokens": len(output.prompts[0]),
            "method": loaded.method,
            "tokens_per_second": output.tokens_per_second,
            "exactness": None if output.exactness is None else asdict(output.exactness),
            **output.statistics.as_dict(),
        }
    )


@app.command()
def chat(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_new_tokens: o.MaxNewTokens = 512,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    controller: o.Controller = None,
    exact: o.Exact = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    show_drafts: ShowDrafts = False,
) -> None:
    """Talk with a model; /plain turns the drafter off and on."""
    from outdraft.console.chat import Chat
    from outdraft.generation import load

    loaded = load(model, draft_model, method=method, dtype=dtype, device=device, backend=backend)
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, exact=exact or None),
        **o.sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
        ),
    }
    tree = o.tree(
        loaded.drafter,
        num_speculative_tokens=num_speculative_tokens,
        tree_depth=tree_depth,
        tree_top_k=tree_top_k,
        tree_size=tree_size,
        controller=controller,
    )
    Chat(loaded, settings, tree, results(show_drafts), remarks(), show_drafts, system).run()


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Any setting as key=value; an unknown one is answered with all there are."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Target: a folder, a hub id, or `reference`.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; key=value and flags override it.")
    ] = None,
    data: Annotated[Path | None, o.training("data")] = None,
    output_dir: Annotated[Path | None, o.training("output_dir")] = None,
    method: Annotated[str | None, o.training("method")] = None,
    exit_layer: Annotated[str | None, o.training("exit_layer")] = None,
    own_head: Annotated[bool, typer.Option("--own-head", help=o.TRAINING["own_head"])] = False,
    loss: Annotated[str | None, o.training("loss")] = None,
    preset: Annotated[str | None, o.training("preset")] = None,
    max_length: Annotated[int | None, o.training("max_length")] = None,
    max_steps: Annotated[int | None, o.training("max_steps")] = None,
    epochs: Annotated[float | None, o.training("epochs")] = None,
    batch_size: Annotated[int | None, o.training("batch_size")] = None,
    learning_rate: Annotated[float | None, o.training("learning_rate")] = None,
    seed: Annotated[int | None, o.training("seed")] = None,
    on_bad_line: Annotated[str | None, o.training("on_bad_line")] = None,
    report_to: Annotated[list[str] | None, o.training("report_to")] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Prompts to measure tau on, in place of held-out ones.")
    ] = None,
    hold_out: Annotated[
        int | None, typer.Option("--hold-out", help="Last conversations kept out to measure tau on (8).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time; train nothing.")] = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Train a drafter for a model."""
    from outdraft.console.settings import read_settings
    from outdraft.console.training import is_main_process, plan_training, run_training

    settings = read_settings(
        config,
        overrides or [],
        model=model,
        data=data,
        output_dir=output_dir,
        method=method,
        exit_layer=exit_layer,
        own_head=own_head or None,
        loss=loss,
        preset=preset,
        max_length=max_length,
        max_steps=max_steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        on_bad_line=on_bad_line,
        report_to=report_to or None,
        eval_data=eval_data,
        hold_out=hold_out,
        dtype=dtype,
        device=device,
    )
    if dry_run:
        plan = plan_training(settings)
        print_json(asdict(plan)) if json else plan.show(results())
        return
    result = run_training(settings, resume, remarks())
    if not is_main_process():
        return
    if json:
        print_json(asdict(result))
    else:
        tau = (result.tau or {}).get("tau")
        measured = f", tau {tau:.2f}" if tau is not None else ""
        results().print(f"{result.folder}: {result.steps} steps in {result.seconds:.0f} s{measured}", markup=False)


@app.command()
def regenerate(
    data: Annotated[Path, typer.Option("--data", help="Conversations whose questions are asked, as for training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines to write; goes on where they end.")],
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    max_new_tokens: o.MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option("--temperature", help=o.SAMPLING["temperature"])] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Makes sampling repeatable.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Conversations answered at once.")] = 8,
    on_bad_line: Annotated[str, o.training("on_bad_line")] = "error",
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    json: o.Json = False,
) -> None:
    """Have the target write the answers of a training set itself: what its drafter should learn from."""
    from outdraft.generation import load
    from outdraft.training.regenerate import regenerate as run

    if on_bad_line not in ("error", "skip"):
        raise UserError(f"--on-bad-line must be error or skip, not '{on_bad_line}'")
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be at least 1")
    loaded = load(model, draft_model, method=method, dtype=dtype, device=device, backend=backend)
    done = run(
        lambda prompts, **settings: loaded.generate(prompts, **settings).tokens,
        data,
        output,
        tokenizer=loaded.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        context_length=loaded.target.context_length,
        on_bad_line="skip" if on_bad_line == "skip" else "error",
        console=remarks(),
    )
    if json:
        print_json(asdict(done))
    else:
        left_out = f", {done.too_long} too long" if done.too_long else ""
        results().print(f"{done.output}: {done.written} written, {done.present} were there{left_out}", markup=False)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="Folder or hub id of a model, folder of a drafter, or `reference`.")],
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Say what a model or drafter is, and what it can do on this machine."""
    from outdraft.console.info import describe, table

    facts = describe(path, device)
    print_json(facts) if json else results().print(table(facts))


@app.command()
def bench(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option("--data", help=BENCH["data"]),
    ] = None,
    suite: Annotated[str | None, typer.Option("--suite", help=BENCH["suite"])] = None,
    model: o.Model = "reference",
    draft_model: Annotated[
        list[str] | None,
        typer.Option("--draft-model", "-d", help=BENCH["draft_models"]),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Of none,prompt-lookup,lookahead,fspad,eagle,eesd,medusa,draft-model; else lookup and all given.",
        ),
    ] = None,
    controllers: Annotated[
        str,
        typer.Option("--controllers", help="Of fixed,confidence,beta,calibrated,ucb: every drafter runs with each."),
    ] = "fixed",
    peers: Annotated[str, typer.Option("--peers", help=BENCH["peers"])] = "",
    limit: Annotated[int | None, typer.Option("--limit", help=BENCH["limit"])] = None,
    on_bad_line: Annotated[str, typer.Option("--on-bad-line", help=BENCH["on_bad_line"])] = "error",
    temperatures: Annotated[str, typer.Option("--temperatures", help="Separated by commas; 0 is greedy.")] = "0",
    repetitions: Annotated[int, typer.Option("--repetitions", help=BENCH["repetitions"])] = 1,
    max_new_tokens: o.MaxNewTokens = 128,
    seed: Annotated[int, typer.Option("--seed", help="Makes sampling repeatable.")] = 0,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    include_transformers: Annotated[
        bool, typer.Option("--include-transformers", help=BENCH["include_transformers"])
    ] = False,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help=BENCH["output_dir"])] = None,
    report: Annotated[Path | None, typer.Option("--report", help=BENCH["report"])] = None,
    reread: Annotated[
        Path | None,
        typer.Option("--reread", help="Only Spec-Bench's figures again, from the answer files of this --output-dir."),
    ] = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    json: o.Json = False,
) -> None:
    """Compare ways of decoding on the same prompts in turns: tau, tokens per second, speed-up, same text or not."""
    if reread is not None:
        from outdraft.evaluation.reread import reread as reread_answers

        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if others := sorted(set(given) - {"reread", "model", "json"}):
            flags = ", ".join("--" + name.replace("_", "-") for name in others)
            raise UserError(f"--reread measures nothing, so it takes --model and --json only; leave out {flags}")
        answers = reread_answers(reread, model)
        print_json(answers.as_dict()) if json else results().print(answers.table())
        return
    from outdraft.evaluation.bench import BenchSettings, run_bench

    result = run_bench(
        BenchSettings(
            model=model,
            draft_models=draft_model or [],
            methods=None if methods is None else o.listed(methods),
            controllers=o.listed(controllers) or ["fixed"],
            data=data,
            suite=suite,
            limit=limit,
            on_bad_line=on_bad_line,
            temperatures=o.numbers("--temperatures", temperatures),
            repetitions=repetitions,
            max_new_tokens=max_new_tokens,
            seed=seed,
            tree=o.given(
                num_speculative_tokens=num_speculative_tokens,
                tree_depth=tree_depth,
                tree_top_k=tree_top_k,
                tree_size=tree_size,
            ),
            include_transformers=include_transformers,
            peers=o.listed(peers),
            output_dir=output_dir,
            report=report,
            dtype=dtype,
            device=device,
            backend=backend,
        ),
        remarks(),
    )
    if json:
        print_json(result.as_dict())
    else:
        result.show(results())


@app.command()
def verify(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prompts: JSON lines or text; the shipped held-out ones if left out.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help=o.AUDIT["limit"])] = 24,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help=o.AUDIT["max_new_tokens"])] = 48,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    controller: o.Controller = None,
    greedy: Annotated[bool, typer.Option("--greedy/--no-greedy", help=o.AUDIT["greedy"])] = True,
    total_variation: Annotated[float, typer.Option("--total-variation", help=o.AUDIT["total_variation"])] = 0.02,
    power: Annotated[float, typer.Option("--power", help=o.AUDIT["power"])] = 0.95,
    alpha: Annotated[float, typer.Option("--alpha", help=o.AUDIT["alpha"])] = 0.001,
    batch_size: Annotated[int, typer.Option("--batch-size", help=o.AUDIT["batch_size"])] = 256,
    seed: Annotated[int, typer.Option("--seed", help=o.AUDIT["seed"])] = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Save what was found as an HTML page.")] = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    json: o.Json = False,
) -> None:
    """Check with evidence that a drafter keeps the target's law here: exit code 0 if kept, 1 if not."""
    from outdraft.console.verify import run_verify
    from outdraft.evaluation.audit import AuditSettings
    from outdraft.evaluation.audit.screen import show
    from outdraft.generation import load

    generation = o.sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    ) | o.given(
        num_speculative_tokens=num_speculative_tokens,
        tree_depth=tree_depth,
        tree_top_k=tree_top_k,
        tree_size=tree_size,
        controller=controller,
    )
    settings = AuditSettings(
        generation=generation,
        greedy=greedy,
        data=data,
        limit=limit,
        max_new_tokens=max_new_tokens,
        total_variation=total_variation,
        power=power,
        alpha=alpha,
        batch_size=batch_size,
        seed=seed,
    )
    loaded = load(model, draft_model, method=method, dtype=dtype, device=device, backend=backend)
    about = {"model": model, "draft_model": draft_model}
    audit = run_verify(loaded, settings, remarks(), report, about)
    if json:
        print_json(audit.as_dict())
    else:
        show(audit, results())
    if not audit.kept:
        raise typer.Exit(1)


@app.command()
def serve(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    host: Annotated[str, typer.Option("--host", help=o.SERVE["host"])] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help=o.SERVE["port"])] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option("--served-model-name", help=o.SERVE["served_model_name"])
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OUTDRAFT_API_KEY", help=o.SERVE["api_key"])
    ] = None,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", help=o.SERVE["max_model_len"])] = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help=o.SERVE["max_num_seqs"])] = 16,
    kv_cache_tokens: Annotated[int | None, typer.Option("--kv-cache-tokens", help=o.SERVE["kv_cache_tokens"])] = None,
    prefill_chunk: Annotated[int, typer.Option("--prefill-chunk", help=o.SERVE["prefill_chunk"])] = 256,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help=o.SERVE["max_waiting"])] = 512,
    max_request_bytes: Annotated[int, typer.Option("--max-request-bytes", help=o.SERVE["max_request_bytes"])] = 4
    * 2**20,
    request_timeout: Annotated[float, typer.Option("--request-timeout", help=o.SERVE["request_timeout"])] = 30.0,
    shutdown_timeout: Annotated[float, typer.Option("--shutdown-timeout", help=o.SERVE["shutdown_timeout"])] = 30.0,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    controller: o.Controller = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
) -> None:
    """Answer OpenAI's clients, with speculation on; sampling options are what requests that do not say get."""
    from outdraft.console.serve import run_serve
    from outdraft.serving.settings import ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        served_model_name=served_model_name or [],
        api_key=api_key,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        prefill_chunk=prefill_chunk,
        max_waiting=max_waiting,
        max_request_bytes=max_request_bytes,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        defaults=o.given(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
        ),
    )
    tree = o.given(
        num_speculative_tokens=num_speculative_tokens, tree_depth=tree_depth, tree_top_k=tree_top_k, tree_size=tree_size
    )
    loading = {"method": method, "dtype": dtype, "device": device, "backend": backend}
    run_serve(model, draft_model, loading, settings, tree, controller, remarks())


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given."""
    if prompt is not None and file is not None:
        raise UserError("a prompt and --prompt-file are two prompts; give one")
    if file is not None and str(file) != "-":
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {file} cannot be read ({type(error).__name__}); check the path") from None
    elif prompt is not None:
        text = prompt
    elif file is None and sys.stdin.isatty():
        raise UserError("no prompt; give one as an argument, with --prompt-file, or on stdin")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    return text if prompt is not None else text.rstrip("\n")


if __name__ == "__main__":
    main()
