"""The options that several verbs share, named as in Hugging Face, vLLM and EAGLE.

The help text of a setting is its field's docstring, read from the source, so that `--help` needs no torch.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from functools import cache
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from outdraft.data.records import whole_text
from outdraft.errors import UserError, flag
from outdraft.methods.registry import names

PACKAGE = Path(__file__).parents[1]


KINDS: dict[str, Any] = {"int": int, "float": float, "bool": bool, "Path": Path, "list[str]": list[str]}
"""The types of settings that flags have, too; a flag of any other is text."""


@cache
def _fields(file: str, class_name: str) -> dict[str, tuple[ast.AnnAssign, str]]:
    """Return the fields of a class that have a docstring, with it, by name; `file` is a path within the package."""
    module = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        field.target.id: (field, " ".join(text.value.value.split()))
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def field_help(file: str, class_name: str) -> dict[str, str]:
    """Return the docstrings of a class's fields by name."""
    return {name: said for name, (_, said) in _fields(file, class_name).items()}


def flags_of(file: str, class_name: str, *names: str, optional: bool = False) -> dict[str, Parameter]:
    """Make the flags of settings, for `with_flags`: types and defaults are the fields', docstrings their help.

    Args:
        optional: True if a flag that is not given shall be None, whatever the field's default is.
    """
    found = {}
    for name in names:
        field, said = _fields(file, class_name)[name]
        kind = KINDS.get(ast.unparse(field.annotation).removesuffix(" | None"), str)
        default = None
        if not optional and field.value is not None and not isinstance(field.value, ast.Call):  # a call makes it anew
            default = ast.literal_eval(field.value)
        option = typer.Option(f"{flag(name)}/--no-{name}" if default is True else flag(name), help=said)
        found[name] = flag_named(name, Annotated[kind if default is not None else kind | None, option], default)
    return found


def flag_named(name: str, annotation: Any, default: Any = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


SAMPLING = ("core/sampling_settings.py", "SamplingSettings")
DRAFT = ("api/draft_settings.py", "DraftSettings")
DRAFT_HELP = field_help(*DRAFT)
TRAINING = field_help("training/config.py", "DrafterConfig")


TARGET = "The target model: a folder, GGUF file, hub id, `smollm2` (135M chat model) or `reference` (20M test model)."

Model = Annotated[str, typer.Option("--model", "-m", help=TARGET)]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        "-d",
        help="Drafter: its folder or hub id, a smaller model, or `smollm2` or `reference` for one that ships.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help=f"{', '.join(names()[:-1])} or {names()[-1]}; by default the drafter's, and prompt-lookup without one.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bfloat16, float32, ...; by default the fastest on the device.")
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, ..., or auto for layers over all GPUs; by default the first GPU, else the CPU."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="eager, packed, native or graphs; native by default on a CPU, graphs on a GPU."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="int8|int4|gguf",
        help="Quantise the target's weights (CPU), or take those of its GGUF file: Q4_0, Q4_1 and Q8_0 as they are, "
        "Q4_K with scales rounded to float16, others rounded to 8 bits. The output is then the quantised model's.",
    ),
]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tp",
        help="Share the target's layers among the processes of `torchrun --nproc-per-node N -m outdraft.cli ...`.",
    ),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        "--generation-config",
        metavar="auto|vllm",
        help="auto: sampling defaults from the model's generation_config.json; vllm: ignore that file, as vLLM does.",
    ),
]


def mapping(text: str | None) -> dict[str, Any] | None:
    """Parse a JSON object of switches for the chat template."""
    if text is None:
        return None
    if (found := json_object(text)) is None:
        raise UserError(
            f'--chat-template-kwargs must be a JSON object such as {{"enable_thinking": false}}, not {text}'
        )
    return found


def json_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def response_format(text: str | None) -> dict[str, Any] | None:
    """Read what an answer's text must be: a `response_format`, or a JSON schema, as JSON or as a file of it."""
    if text is None:
        return None
    source = text
    if not text.lstrip().startswith("{"):
        if text in ("json_object", "json"):
            return {"type": "json_object"}
        try:
            source = whole_text(Path(text))
        except OSError as error:
            raise UserError(
                f"--response-format {text} cannot be read ({type(error).__name__}); "
                "give JSON, a file of it, or json_object"
            ) from None
    found = json_object(source)
    if found is None:
        raise UserError(f"--response-format must be a JSON object, such as a JSON schema; {text[:80]} holds none")
    from outdraft.api.guided import FORMATS  # needs torch, which `--help` does without

    if found.get("type") in FORMATS:
        return found
    return {"type": "json_schema", "json_schema": {"schema": found}}


ResponseFormat = Annotated[
    str | None,
    typer.Option(
        "--response-format",
        callback=response_format,
        metavar="FILE|JSON",
        help="What the answer must be: a JSON schema, json_object, or a response_format as in generate(), as JSON or a "
        "file of it. Needs the extra `guided`.",
    ),
]


TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        callback=mapping,
        metavar="JSON",
        help='Variables for the chat template, as JSON: {"enable_thinking": false}.',
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout; everything else goes to stderr.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed; makes sampling repeatable.")]
Coupling = Annotated[str | None, typer.Option("--coupling", help=DRAFT_HELP["coupling"])]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to generate.")]


def whole_or_auto(text: str | None) -> int | str | None:
    """Parse a whole number, or `auto`."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--tree-size must be a whole number or auto, not '{text}'") from None


TreeSize = Annotated[
    str | None, typer.Option("--tree-size", callback=whole_or_auto, metavar="<int>|auto", help=DRAFT_HELP["tree_size"])
]

ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that came from drafts.")]
Exact = Annotated[bool, typer.Option("--exact", help=DRAFT_HELP["exact"])]


def given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


PLACED = {"dtype": Dtype, "device": Device, "backend": Backend, "quantize": Quantize}
LOADED = {**PLACED, "generation_config": flag_named("generation_config", GenerationConfig, "auto")}
SAMPLED = flags_of(*SAMPLING, "temperature", "top_p", "top_k", "min_p", "repetition_penalty", optional=True)
FILTERS = {name: SAMPLED[name] for name in ("top_p", "top_k", "min_p")}
SHAPED: dict[str, Any] = flags_of(*DRAFT, "num_speculative_tokens", "tree_depth", "tree_top_k", optional=True)
SHAPED |= {"tree_size": TreeSize}
DRAFTED = SHAPED | flags_of(*DRAFT, "prompt_lookup_min", "prompt_lookup_num_tokens", "controller", optional=True)
"""The flags of where and how a target runs, of all that `load` takes, of sampling and its filters, of the shape of
drafts, and of all that is drafted."""

Verb = TypeVar("Verb", bound=Callable[..., None])


def with_flags(*groups: Mapping[str, Any]) -> Callable[[Verb], Verb]:
    """Give a verb the flags of these groups after its own; it gets them as keywords (`**flags`).

    Args:
        groups: for every flag's name its annotation, or a parameter that has a default, too.
    """
    flags = [(name, kind) for group in groups for name, kind in group.items()]
    more = [kind if isinstance(kind, Parameter) else flag_named(name, kind) for name, kind in flags]

    def given(verb: Verb) -> Verb:
        whole = signature(verb, eval_str=True)
        own = [part for part in whole.parameters.values() if part.kind is not Parameter.VAR_KEYWORD]
        verb.__signature__ = whole.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return verb

    return given


def loading(**flags: Any) -> dict[str, Any]:
    """Return those of a verb's flags that `load` takes."""
    tp_plan = "auto" if flags.get("tp") else None
    return {**{name: flags[name] for name in ("method", *LOADED)}, "tp_plan": tp_plan}


def drafting(**flags: Any) -> dict[str, Any]:
    """Return those of a verb's flags that say what is drafted, where they were given."""
    return {name: flags[name] for name in DRAFTED if flags.get(name) is not None}


def sampling(**flags: Any) -> dict[str, Any]:
    """Return those of a verb's flags that `generate` samples by; a filter without a temperature means temperature 1."""
    found = {name: flags[name] for name in SAMPLED if flags.get(name) is not None}
    if "temperature" not in found and {"top_p", "top_k", "min_p"} & set(found):
        found["temperature"] = 1.0
    return found


def tree(drafter: object, **flags: Any) -> dict[str, Any]:
    """Return what `drafting` does; a shape without a drafter is a user's mistake."""
    found = drafting(**flags)
    if found and drafter is None:
        name = next(iter(found))
        other = "" if name.startswith("prompt_lookup") else " or --method prompt-lookup"
        raise UserError(f"{flag(name)} shapes what a drafter drafts; give --draft-model{other}")
    return found


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(flag: str, text: str) -> list[float]:
    """Parse numbers between commas."""
    try:
        found = [float(part) for part in listed(text)]
    except ValueError:
        found = []
    if not found:
        raise UserError(f"{flag} must be numbers with commas between them, such as 0,1, not '{text}'")
    return found
