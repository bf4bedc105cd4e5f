"""`outdraft export`: its flags, and how the result is shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.output import print_json, remarks, results


def export(
    draft_model: Annotated[
        str,
        typer.Option("--draft-model", "-d", help="Drafter: its folder or hub id, `smollm2` or `reference` (shipped)."),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="A new folder for the engine to load.")],
    model: o.Model = "reference",
    engine: Annotated[
        str, typer.Option("--engine", help="vllm, or hf: transformers' assistant_model (EESD only).")
    ] = "vllm",
    method: Annotated[
        str | None, typer.Option("--method", help="Which of the shipped drafters: fspad, eagle or eesd.")
    ] = None,
    target_dir: Annotated[
        Path | None,
        typer.Option("--target-dir", help="Also write a shipped or GGUF target there, as an ordinary folder."),
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", help="Length of the chains in the command that is printed.")
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
