"""`outdraft advise`: its flags, and how the advice is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.output import print_json, remarks, results

ADVICE = o.field_help("evaluation/advice.py", "AdviceSettings")


def advise(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    data: Annotated[Path | None, typer.Option("--data", help=ADVICE["data"])] = None,
    limit: Annotated[int, typer.Option("--limit", help=ADVICE["limit"])] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help=ADVICE["max_new_tokens"])] = 64,
    dtype: o.Dtype = None,
    device: o.Device = None,
    backend: o.Backend = None,
    json: o.Json = False,
) -> None:
    """Say in about two minutes which way of decoding pays for a model on this machine, and what to run next.

    Times the target's passes and the drafts of each kind (medians, taken in turns, warm-ups left out), and tries prompt
    lookup on a few prompts. With the time of a plain round as the unit, speed-up = tau / (1 + draft + verify): tau
    tokens a round, the time of drafting, and what checking the draft adds to the pass.
    """
    from outdraft.evaluation.advice import AdviceSettings, show
    from outdraft.evaluation.advising import advise as find

    settings = AdviceSettings(model, draft_model, data, limit, max_new_tokens, dtype, device, backend)
    found = find(settings, remarks())
    print_json(found.as_dict()) if json else show(found, results())
