"""Scale curves: what decoding gains as drafts, contexts, batches, temperatures and targets grow, and what it holds.

Run it with nothing else running; all of it, or curve by curve into the same folder:

    OMP_NUM_THREADS=2 python benchmarks/scale.py --output-dir scale
    OMP_NUM_THREADS=2 python benchmarks/scale.py --output-dir scale --curves tree,shape
    python benchmarks/scale.py --output-dir scale --device cuda --shapes 8b,70b:8

Every point is a turn-by-turn comparison with plain decoding on the same target and backend; a finished point is kept in
`points.json` and read back, so the command can be killed and repeated. The curve `shape` has targets and drafters of
random weights: their times are real and their taus mean nothing, so it says what tau a tree needs to break even and
what stated taus would gain. Writes `scale.json`, `scale.md` and `scale.html`; `docs/measurements/scale.md` says how to
read them, and `--write-docs` fills it in. Knows what is measured; models are made in `scale_models.py`, figures
shown in `scale_report.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scale_report
import studies
from rich.console import Console
from scale_models import Models, sizes_of
from training_cost import Clock
from trees import cell, settings_of

from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import resolve_device
from outdraft.core.shape import TreeShape
from outdraft.data.provenance import environment
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.output import plain
from outdraft.target.named import REFERENCE

CURVES = ("tree", "context", "batch", "temperature", "shape", "memory")
TREES = "chain 1,chain 2,chain 3,chain 4,chain 5,chain 7,2/2/6,3/3/10,4/4/16,5/8/32,5/10/60"
DEFAULT = "default"
SHAPES = {"cpu": "6x256,12x256,24x256,12x512,24x512,12x768", "cuda": "8b:8,8b,70b:2,70b:8"}
SHAPE_TOKENS = 16
"""At most, decoded where weights are random: rounds are alike there."""
MEMORY_TOKENS = 8
"""Decoded where memory is measured; its peak is the prefill's or the first rounds'."""


class Point(NamedTuple):
    """One point of a curve."""

    curve: str
    at: dict[str, Any]
    """Where on the curve it is."""
    settings: dict[str, Any]
    """What else decides its figures; a kept point must have the same."""

    @property
    def key(self) -> str:
        return json.dumps([self.curve, self.at, self.settings], sort_keys=True)


# --- points ----------------------------------------------------------------------------------------------------------


def points_of(curve: str, given: argparse.Namespace, context_length: Callable[[], int]) -> Iterator[Point]:
    """Those of one curve, in order.

    Args:
        curve: its name.
        given: the arguments.
        context_length: asks how much the target can read; only curves that need it ask, for it must be loaded.
    """
    shared = {name: getattr(given, name) for name in ("dtype", "device", "backend")}
    trained = {name: str(getattr(given, name)) for name in ("model", "draft_model", "method", "data")}
    timed = {"turns": given.turns, "tokens": given.tokens}
    if curve == "tree":
        yield Point(curve, {"trees": given.trees}, {**shared, **trained, **timed})
    elif curve == "batch":
        for batch in given.batches:
            yield Point(curve, {"batch": batch}, {**shared, **trained, **timed})
    elif curve == "temperature":
        for temperature in given.temperatures:
            yield Point(curve, {"temperature": temperature}, {**shared, **trained, **timed})
    elif curve == "shape":
        for shape in given.shapes:
            yield Point(curve, {"shape": shape}, {**shared, **timed, "tokens": min(given.tokens, SHAPE_TOKENS)})
    elif curve == "context":
        for length in lengths(given, context_length() - given.tokens):
            yield Point(curve, {"context": length}, {**shared, **trained, **timed})
    else:
        for length in lengths(given, context_length() - MEMORY_TOKENS):
            for batch in given.memory_batches:
                yield Point(curve, {"context": length, "batch": batch}, {**shared, **trained})


def lengths(given: argparse.Namespace, most: int) -> list[int]:
    """Prompt lengths up to the model's limit: those given that fit, and the limit itself."""
    return sorted({*(length for length in given.contexts if length < most), most})


def measure(point: Point, models: Models, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one point."""
    if point.curve == "memory":
        return memory(models, point.at["batch"], point.at["context"])
    batch, temperature = point.at.get("batch", 1), point.at.get("temperature", 0.0)
    prompts = models.prompts
    if point.curve == "context":
        prompts = models.long(point.at["context"], given.turns)
    rivals = {"tree": given.trees, "batch": f"{DEFAULT},chain 2", "shape": f"{DEFAULT},chain 3,3/3/10"}
    names = [PLAIN, *rivals.get(point.curve, DEFAULT).split(",")]
    if temperature > 0:
        names = [PLAIN, DEFAULT]
    sizes = argparse.Namespace(turns=given.turns, tokens=point.settings["tokens"], full=False)
    found = cell(names, models.target, models.drafter, prompts, sizes, batch, temperature)
    fixed = DraftSettings(controller="fixed", coupling="dice")
    shape = resolve(fixed, models.drafter, models.target.device, sampling=temperature > 0, rows=batch).shape
    return {"rivals": {name: with_spread(name, one, shape) for name, one in found.items()}, "default": in_words(shape)}


def in_words(shape: TreeShape) -> str:
    """A draft as the tables name it."""
    drawn = "sampled " * (shape.candidates == "sampled")
    tree = f"{shape.depth}/{shape.top_k}/{shape.size}"
    return f"{drawn}chain {shape.depth + 1}" if shape.top_k == 1 else drawn + tree


def with_spread(name: str, figures: dict[str, Any], default: TreeShape) -> dict[str, Any]:
    """The figures of a rival with the spread of its speed-up over turns, and what a round costs in plain tokens."""
    settings = settings_of(name)
    longest = settings.get("num_speculative_tokens", settings.get("tree_depth", default.depth) + 1) + 1
    ratios = figures["ratios"]
    rounds = [figures["tau"] / ratio for ratio in ratios]
    return {
        **{name: figures[name] for name in ("tokens_per_second", "speedup", "ratios", "tau", "milliseconds")},
        "spread": [min(ratios), max(ratios)],
        "round_in_plain_tokens": statistics.median(rounds),
        "round_spread": [min(rounds), max(rounds)],
        "longest_tau": 1 if name == PLAIN else longest,
    }


def memory(models: Models, batch: int, context: int) -> dict[str, Any]:
    """Most bytes held beyond the models while so many rows with so long prompts are decoded, plainly and drafted."""
    target = models.target
    prompts = models.long(context, batch)
    config: Any = target.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * target.dtype.itemsize
    found: dict[str, Any] = {"keys_and_values_bytes": batch * (context + MEMORY_TOKENS) * token}
    for name, drafter in ((PLAIN, None), (DEFAULT, models.drafter)):
        model = SpeculativeModel(target, drafter)
        model.generate(prompts[0][-16:], max_new_tokens=2)  # what is made once is no row's
        clock = Clock(target.device)
        clock.on_train_begin()
        model.generate(prompts, max_new_tokens=MEMORY_TOKENS, min_new_tokens=MEMORY_TOKENS)
        found[f"{name}_bytes"] = clock.peak()
        gc.collect()
    return found


# --- the whole -------------------------------------------------------------------------------------------------------


def measure_all(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every point of every curve that was asked for, kept ones read back."""
    path = given.output_dir / "points.json"
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    models: Models | None = None

    def trained() -> Models:
        nonlocal models
        models = models or Models.load(given)
        return models

    found = []
    for curve in given.curves:
        for point in points_of(curve, given, lambda: trained().target.context_length):
            if point.key not in kept:
                own = Models.random(point.at["shape"], given) if curve == "shape" else trained()
                start = time.perf_counter()
                figures = measure(point, own, given)
                about = {"seconds": time.perf_counter() - start, "environment": environment(own.target)}
                kept[point.key] = {"curve": curve, **point.at, **figures, **about}
                studies.write(path, json.dumps(plain(kept), indent=1))
                where = ", ".join(f"{name} {value}" for name, value in point.at.items() if name != "trees")
                console.print(f"{curve} {where}: {about['seconds']:.1f} s", highlight=False, markup=False)
                del own
                gc.collect()
            found.append(kept[point.key])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--curves", default=",".join(CURVES), help="of these, separated by commas")
    parser.add_argument("--model", default=REFERENCE)
    parser.add_argument("--draft-model", default=REFERENCE)
    parser.add_argument("--method")
    parser.add_argument("--data", type=Path, help="prompts as for `outdraft bench`; the shipped held-out ones without")
    parser.add_argument("--trees", default=TREES, help="chain N or depth/top_k/size, separated by commas")
    parser.add_argument("--contexts", default="256,512,1024,4096,16384", help="prompt tokens, and the model's limit")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--memory-batches", default="1,8")
    parser.add_argument("--temperatures", default="0,0.3,0.6,1,1.5")
    parser.add_argument("--shapes", help="of targets of random weights: layers x width, 8b or 70b, 70b:8 for 8 layers")
    parser.add_argument("--taus", default="2,3,4", help="at which speed-ups of those are stated")
    parser.add_argument("--turns", type=int, default=5, help="of every point, each with prompts of its own")
    parser.add_argument("--tokens", type=int, default=32, help="of every row in a turn")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--backend")
    parser.add_argument("--write-docs", type=Path, help="page to fill in (docs/measurements/scale.md), plot beside it")
    given = parser.parse_args()
    given.shapes = given.shapes or SHAPES.get(resolve_device(given.device).type, SHAPES["cpu"])
    given.curves, given.shapes = given.curves.split(","), given.shapes.split(",")
    if odd := [curve for curve in given.curves if curve not in CURVES]:
        raise UserError(f"--curves knows {', '.join(CURVES)}, not {odd[0]}")
    for name, kind in (("contexts", int), ("batches", int), ("memory_batches", int), ("temperatures", float)):
        setattr(given, name, numbers(name, getattr(given, name), kind))
    given.taus = numbers("taus", given.taus, float)
    if given.turns < 1 or given.tokens < 2:
        raise UserError("--turns must be at least 1 and --tokens at least 2")
    for shape in given.shapes:
        sizes_of(shape)
    return given


def numbers(name: str, text: str, kind: type) -> Sequence[Any]:
    """What stands between the commas; at least 1 where it is whole, 0 where not."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < (1 if kind is int else 0):
        raise UserError(f"--{name.replace('_', '-')} must be numbers with commas between them, not '{text}'")
    return found


def work(console: Console) -> None:
    """Measure what is missing, then report everything."""
    given = arguments()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    found = measure_all(given, console)
    scale_report.report(found, given.taus, given.output_dir, console)
    if given.write_docs is not None:
        scale_report.fill_in(given.write_docs, found, given.taus, given.output_dir, console)


def main() -> None:
    studies.run("scale", work)


if __name__ == "__main__":
    main()
