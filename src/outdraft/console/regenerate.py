"""`outdraft regenerate`: its flags, and what they become. Knows no file of conversations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.console.output import print_json, remarks, results
from outdraft.errors import UserError


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
