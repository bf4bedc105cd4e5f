"""`outdraft chat`: its flags, and what they become. The conversation itself is in `conversation.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.output import remarks, results


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
    coupling: o.Coupling = None,
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
    show_drafts: o.ShowDrafts = False,
) -> None:
    """Talk with a model; /plain turns the drafter off and on."""
    from outdraft.api.generation import load
    from outdraft.console.conversation import Chat

    loading = {"method": method, "dtype": dtype, "device": device, "backend": backend}
    loaded = load(model, draft_model, **loading, generation_config=generation_config)  # type: ignore[arg-type]
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, coupling=coupling, exact=exact or None, chat_template_kwargs=chat_template_kwargs),
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
        prompt_lookup_min=prompt_lookup_min,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        controller=controller,
    )
    Chat(loaded, settings, tree, results(show_drafts), remarks(), show_drafts, system).run()
