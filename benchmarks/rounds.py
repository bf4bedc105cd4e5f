"""Where every millisecond of a round goes: forwards, heads, trees, masks, verification, commits and Python.

Run it with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/rounds.py [--methods fspad,eagle] [--batches 1,8,16] [--layers 12 --width 768]

The clock is read where one part of a round hands over to another, some hundred functions a round, and each span is
counted without those inside it, so that the parts add up to the round. No profiler hook runs, which would make Python
look slower than it is; rows with and without the spans take turns, and the table says how much longer a round was with
them. On a GPU every span waits for the device, so nothing overlaps there and shares of Python are upper bounds.
With `--layers` and `--width` the target and the drafter have random weights: few candidates are accepted then.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import outdraft.engine.round as decoding
from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode_prompts
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting import vocabulary as draft_vocabulary
from outdraft.drafting.base import Drafter
from outdraft.drafting.draft_cache import DraftMask, RunAhead
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.methods.draft_model import drafter as draft_model
from outdraft.methods.eesd import drafter as early_exit
from outdraft.methods.eesd.network import BoundExit
from outdraft.methods.fspad import drafter as feature_drafting
from outdraft.methods.fspad.drafter import DraftStep, FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.medusa import drafter as medusa
from outdraft.methods.prompt_lookup import drafter as prompt_lookup
from outdraft.methods.registry import without_model
from outdraft.reference import load_prompts, reference_drafter_path
from outdraft.target.backends import accelerate
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reader

ARITHMETIC = ("target layers", "target head", "draft network", "draft head")
"""What the models compute."""
WRITES = "K/V writes"
"""Keys and values put into the cache while the models compute, which any cache does."""
REST = ("draft glue", "trees", "masks", "verification", "commit", "bookkeeping")
"""Everything else."""
PARTS = (*ARITHMETIC, WRITES, *REST)


class Spans:
    """Seconds of every part of every round, each without the parts inside it.

    Args:
        target: the model.
        drafter: what drafts for it; None for plain decoding.
    """

    def __init__(self, target: Target, drafter: Drafter | None):
        self.target, self.drafter = target, drafter
        self.rounds: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of every open span, seconds of the spans in it
        self._drafting = 0

    def clock(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, function: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        """The function with a span of this part, which may depend on what it is called on."""
        drafts = part == "draft glue"

        @functools.wraps(function)
        def spanned(*args: Any, **kwargs: Any) -> Any:
            name = part if isinstance(part, str) else part(*args)
            self._inside.append(0.0)
            self._drafting += drafts
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = self.clock() - start
                self._now[name] += seconds - self._inside.pop()
                self._drafting -= drafts
                if self._inside:
                    self._inside[-1] += seconds
                elif name == "bookkeeping":
                    self.rounds.append(dict(self._now))
                if not self._inside:
                    self._now.clear()

        return spanned

    def layers(self, model: object, *args: object) -> str:
        """Of a forward: the drafter's while it drafts, or by another model than the target."""
        return "draft network" if self._drafting else "target layers"

    def head(self, *args: object) -> str:
        return "draft head" if self._drafting else "target head"

    def places(self) -> list[tuple[Any, str, str | Callable[..., str]]]:
        """What is spanned: owner, name, part. Masks and trees are built inside of what uses them."""
        states = (
            feature_drafting.FeatureDraftState,
            early_exit.EarlyExitState,
            medusa.MedusaState,
            draft_model._DraftModelState,
            prompt_lookup._Lookup,
        )
        found: list[tuple[Any, str, str | Callable[..., str]]] = [
            (decoding.Batch, "round", "bookkeeping"),
            *((state, "propose", "draft glue") for state in states),
            (Target, "forward", self.layers),
            (Target, "inputs", "masks"),
            (Target, "head", self.head),
            (Target, "embed", "draft network"),
            (Reader, "lower", self.layers),
            (Reader, "upper", self.layers),
            (Reader, "__call__", self.layers),
            (BoundExit, "features", "draft network"),
            (early_exit.EarlyExitState, "_features", "draft network"),
            (DraftStep, "__call__", "draft network"),
            (FeatureDrafter, "logits", "draft head"),
            (medusa.Medusa, "logits", "draft network"),
            (SlotCache, "update", WRITES),
            (SlotCache, "reserve", "masks"),
            (SlotCache, "arrange", "commit"),
            (SlotCache, "commit", "commit"),
            (decoding.Batch, "_commit", "commit"),
            (RunAhead, "place", "masks"),
            (ModelRunner, "tree", "masks"),
            (decoding, "verify", "verification"),
            (prompt_lookup.Text, "match", "trees"),
            (prompt_lookup.Text, "extend", "trees"),
            (DraftMask, "level", "masks"),
            (feature_drafting, "causal_mask", "masks"),
        ]
        # What a drafter's step does beside networks and masks runs inside `grow` and counts as trees.
        found += [
            (module, "grow", "trees")
            for module in (feature_drafting, draft_vocabulary, early_exit, draft_model, medusa)
        ]
        if isinstance(self.drafter, early_exit.EarlyExit):
            found.append((self.drafter.exit, "head", "draft head"))  # the target's own or another, bound when loaded
        return [*found, (early_exit, "take_in", "masks")]


@contextmanager
def spanning(spans: Spans) -> Iterator[None]:
    """Spans in all places, while it lasts."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in spans.places()]
    for owner, name, part in spans.places():
        setattr(owner, name, spans.wrap(owner.__dict__[name], part))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


# --- what is measured --------------------------------------------------------------------------------------------


def random_target(layers: int, width: int, given: argparse.Namespace) -> Target:
    """A Llama of random weights, with heads of 64."""
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return load_target(LlamaForCausalLM(config).to(getattr(torch, given.dtype)).to(given.device), backend=given.backend)


def drafter_of(method: str, target: Target, random: bool) -> Drafter | None:
    if method == "none":
        return None
    if method in without_model():
        return load_drafter_for(target, None, method=method)
    if not random:
        return load_drafter_for(target, str(reference_drafter_path(method)))
    if method not in ("fspad", "eagle"):
        raise SystemExit(f"--layers has no drafter of method '{method}'; choose fspad, eagle or prompt-lookup")
    d, full = target.hidden_size, method == "fspad"
    config = FeatureHeadConfig(d, 3 * d, d // 64, max(1, d // 128), 64, target.vocab_size, full, full)
    torch.manual_seed(1)
    head = FeatureHead(config).to(target.device, target.dtype).eval()
    return FeatureDrafter(accelerate(head, target.backend), target)


def rows_of(target: Target, prompts: list[list[int]], temperature: float, tokens: int) -> list[Row]:
    settings = SamplingSettings(temperature=temperature)
    return [
        Row(
            prompt,
            Warper(settings, len(prompt), target.vocab_size, device=target.device),
            Dice(i),
            tokens,
        )
        for i, prompt in enumerate(prompts)
    ]


class Timed:
    """Seconds of rounds with all rows, by a clock outside of them."""

    def __init__(self, target: Target, drafter: Drafter | None, shape: TreeShape, given: argparse.Namespace):
        self.target, self.drafter, self.shape, self.given = target, drafter, shape, given
        self.rounds: list[float] = []
        self.nodes: list[int] = []
        self.accepted: list[float] = []

    def decode(self, prompts: list[list[int]]) -> None:
        """Decode until the first row ends."""
        rows = rows_of(self.target, prompts, self.given.temperature, self.given.tokens)
        steps = decode(self.target, self.drafter, rows, self.shape)
        next(steps)
        while all(row.finish_reason is None for row in rows):
            start = time.perf_counter()
            next(steps)
            self.rounds.append(time.perf_counter() - start)
        self.accepted += [length for row in rows for length in row.statistics.lengths]


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of every part, over the rounds whose length is between the first and the last fifth."""
    whole = sorted(rounds, key=lambda parts: sum(parts.values()))
    kept = whole[len(whole) // 5 : -(len(whole) // 5) or None]
    return {part: 1000 * statistics.fmean(parts.get(part, 0.0) for parts in kept) for part in PARTS}


def measure(target: Target, method: str, batch: int, prompts: list[list[int]], given: argparse.Namespace) -> dict:
    drafter = drafter_of(method, target, given.layers is not None)
    chosen = given.tree and TreeShape(*(int(part) for part in given.tree.split("/")))
    fixed = DraftSettings(controller="fixed", coupling="dice")
    shape = chosen or resolve(fixed, drafter, target.device, sampling=given.temperature > 0, rows=batch).shape
    plain, spanned = (Timed(target, drafter, shape, given) for _ in range(2))
    spans = Spans(target, drafter)
    turns = [prompts[start : start + batch] for start in range(0, len(prompts) - batch + 1, batch)][: given.turns]
    turns = turns or [(prompts * (1 + batch // len(prompts)))[:batch]]
    Timed(target, drafter, shape, given).decode(turns[0])  # warms up
    for turn in turns * max(1, given.turns // len(turns)):
        plain.decode(turn)
        with spanning(spans):
            spanned.decode(turn)
    parts = middle(spans.rounds)
    own, with_spans = (1000 * statistics.median(timed.rounds) for timed in (plain, spanned))
    return {
        "method": method,
        "batch": batch,
        "shape": [shape.depth, shape.top_k, shape.size, shape.candidates],
        "rounds": len(plain.rounds),
        "tau": 1 + statistics.fmean(plain.accepted),
        "round_ms": own,
        "round_with_spans_ms": with_spans,
        "parts_ms": parts,
        "rest_share": sum(parts[part] for part in REST) / sum(parts.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fspad", help="separated by commas; none is plain decoding")
    parser.add_argument("--batches", default="1", help="rows decoded together, separated by commas")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--layers", type=int, help="a target of random weights, so deep")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tree", help="depth/top_k/size; the drafter's default without")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=64, help="of every row at most")
    parser.add_argument("--turns", type=int, default=3, help="batches of prompts")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    if given.layers is not None:
        target = random_target(given.layers, given.width, given)
    else:
        target = load_target(given.model, dtype=given.dtype, device=given.device, backend=given.backend)
    tokenizer = target.tokenizer or load_target("reference", dtype="float32").tokenizer
    prompts = [ids for ids in texts(tokenizer) if len(ids) + given.tokens < target.context_length]
    print("| method | rows | tau | round ms | with spans | " + " | ".join(PARTS) + " | rest |")
    print("|---" * (6 + len(PARTS)) + "|")
    found = []
    for method in given.methods.split(","):
        for batch in given.batches.split(","):
            one = measure(target, method, int(batch), prompts, given)
            found.append(one)
            cells = [one["method"], one["batch"], f"{one['tau']:.2f}", f"{one['round_ms']:.2f}"]
            cells += [f"{one['round_with_spans_ms'] / one['round_ms'] - 1:+.1%}"]
            cells += [f"{one['parts_ms'][part]:.2f}" for part in PARTS] + [f"{one['rest_share']:.1%}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if given.json is not None:
        about = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(given).items()}
        given.json.write_text(json.dumps({"settings": about, "found": found}, indent=1))


def texts(tokenizer: Any) -> list[list[int]]:
    """The shipped held-out prompts as token ids."""
    return [encode_prompts([prompt], tokenizer)[0] for prompt in load_prompts("heldout")]


if __name__ == "__main__":
    main()
