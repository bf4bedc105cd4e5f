"""`outdraft generate`: its flags, where the prompt comes from, and how the answer is shown."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.console.streaming import stream
from outdraft.data.text_file import whole_text
from outdraft.errors import UserError
from outdraft.output import print_json, remarks, results


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
    coupling: o.Coupling = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this string; may be repeated.")] = None,
    num_speculative_tokens: o.Chain = None,
    tree_depth: o.TreeDepth = None,
    tree_top_k: o.TreeTopK = None,
    tree_size: o.TreeSize = None,
    prompt_lookup_min: o.LookupMin = None,
    prompt_lookup_num_tokens: o.LookupTokens = None,
    controller: o.Controller = None,
    exact: o.Exact = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    generation_config: o.GenerationConfig = "auto",
    chat_template_kwargs: o.TemplateKwargs = None,
    response_format: o.ResponseFormat = None,
    show_drafts: o.ShowDrafts = False,
    json: o.Json = False,
) -> None:
    """Answer one prompt, streaming the text."""
    text = _prompt_text(prompt, prompt_file)
    from outdraft.api.generation import load

    loading = {"method": method, "dtype": dtype, "device": device, "backend": backend}
    loaded = load(model, draft_model, **loading, generation_config=generation_config)  # type: ignore[arg-type]
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, coupling=coupling, stop_strings=stop, exact=exact or None),
        **o.given(chat_template_kwargs=chat_template_kwargs, response_format=response_format),
        **o.sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        **o.tree(
            loaded.drafter,
            num_speculative_tokens=num_speculative_tokens,
            tree_depth=tree_depth,
            tree_top_k=tree_top_k,
            tree_size=tree_size,
            prompt_lookup_min=prompt_lookup_min,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            controller=controller,
        ),
    }
    if chat is None:
        chat = getattr(loaded.tokenizer, "chat_template", None) is not None
    asked: Any = [{"role": "user", "content": text}] if chat else text
    if not json:
        streamed = stream(loaded.stream(asked, **settings), results(show_drafts), show_drafts)
        remarks().print(streamed.line(loaded.plain_seconds), style="dim", markup=False, soft_wrap=True)
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


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, the file or stdin."""
    if prompt is not None and file is not None:
        raise UserError("a prompt and --prompt-file are two prompts; give one")
    if file is not None and str(file) != "-":
        try:
            text = whole_text(file).replace("\r\n", "\n")
        except OSError as error:
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
