"""`outdraft regenerate`: its flags, and how the result is shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.output import print_json, remarks, results


def regenerate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Prompts: JSON lines or a JSON list (messages, conversations, prompt, instruction, question, turns or "
            "text), Parquet, a text file with a prompt a line, a folder of *.jsonl and *.parquet, or hf:NAME[:SPLIT].",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="JSON lines to write, one as each answer ends; run again, it goes on."),
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
        int, typer.Option("--max-new-tokens", help='Tokens of an answer at most; one cut there has "finished": false.')
    ] = 512,
    temperature: Annotated[
        str,
        typer.Option("--temperature", help="0 is greedy; 0,1 writes two answers to every prompt, one at each."),
    ] = "0",
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn above temperature 0.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Answers decoded at once; by default 24 on a CPU, 64 on a GPU."),
    ] = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    on_bad_line: Annotated[str, o.training("on_bad_line")] = "error",
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    json: o.Json = False,
) -> None:
    """Have the target answer prompts itself: what its drafter should learn from. Interrupted, run it again to go on."""
    from outdraft.api.generation import load
    from outdraft.training.regenerate import regenerate as run

    if on_bad_line not in ("error", "skip"):
        raise UserError(f"--on-bad-line must be error or skip, not '{on_bad_line}'")
    if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
        raise UserError("--batch-size and --max-new-tokens must be at least 1")
    temperatures = o.numbers("--temperature", temperature)
    filters = o.given(top_p=top_p, top_k=top_k, min_p=min_p)
    if filters and not any(temperatures):
        name = next(iter(filters)).replace("_", "-")
        raise UserError(f"--{name} changes nothing at temperature 0; give a --temperature above it")
    if method is None and draft_model is None:
        method = "none"  # answers run many at a time, where repetitions pay little
    done = run(
        load(model, draft_model, method=method, dtype=dtype, device=device, backend=backend),
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
    else:
        results().print(done.line(), markup=False)
