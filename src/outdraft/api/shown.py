"""How a model and an output look when they are printed: what one wants to know of them, in few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outdraft.api.generation import GenerationOutput, SpeculativeModel

SHOWN_TEXT = 300
"""Characters of an answer that are shown."""


def shown_model(model: SpeculativeModel) -> str:
    """Target, drafter and what they run on."""
    target, drafter = model.target, model.drafter
    name = getattr(target.model.config, "_name_or_path", "") or type(target.model).__name__
    drafting = "no drafter" if drafter is None else f"drafter {drafter.method}"
    if drafter is not None and drafter.num_parameters:
        drafting += f" ({short(drafter.num_parameters)} parameters)"
    where = f"{str(target.dtype).removeprefix('torch.')} on {target.device}, {target.backend} backend"
    return f"<SpeculativeModel: {name} ({short(target.num_parameters)} parameters), {drafting}, {where}>"


def shown_output(output: GenerationOutput) -> str:
    """The figures in a line, then each answer, the long ones cut."""
    count, drafted = sum(map(len, output.tokens)), sum(map(sum, output.accepted))
    rows = "" if len(output.tokens) == 1 else f"{len(output.tokens)} answers, "
    share = f" ({drafted / count:.0%} from drafts)" if drafted else ""
    tau = f"tau {output.tau:.2f}, " if output.statistics.rounds else ""
    ends = ", ".join(dict.fromkeys(output.finish_reasons))
    figures = f"{tau}{output.tokens_per_second:.1f} tokens/s, ended by {ends}"
    answers: list[str] = output.texts if output.texts is not None else [str(row) for row in output.tokens]
    cut = (text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..." for text in answers)
    return "\n".join([f"<GenerationOutput: {rows}{count} tokens{share}, {figures}>", *cut])


def short(count: int) -> str:
    """`134515008` as `135M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
