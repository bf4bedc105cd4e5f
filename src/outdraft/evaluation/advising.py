"""The measurements of `outdraft advise`: passes, drafts of each kind, and a few answers, in about two minutes.

Target passes and drafts of the trainable kinds are timed with networks of the right sizes and arbitrary weights. Ways
that need no training, and the given drafter, answer prompts in turns with plain decoding. `advice.py` draws the
conclusions.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.api.loading import load_drafter_for, load_target, quantised_backend
from outdraft.api.prompts import encode, note_texts, read_prompts
from outdraft.core.shape import TreeShape
from outdraft.data.provenance import environment, load_average, peak_memory_bytes
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.evaluation.advice import CHAIN, CONTROLLER, PASSES, Advice, AdviceSettings, Kind, next_steps
from outdraft.evaluation.bench.bench import Comparison, measured, progress
from outdraft.evaluation.bench.measure import PLAIN, speculative
from outdraft.evaluation.bench.methods import LOOKUP, WITH_LOOKUP
from outdraft.evaluation.rounds import NOTHING, WARM_UP, Guesses, Lap, RoundCost, Way, head_seconds, timed
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.limits import slot_bytes
from outdraft.target.named import NAMED, SMOLLM2, named
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import new_drafter

PROMPT_TOKENS = 64
"""The number of tokens of the text whose rounds are timed."""

ROUNDS = 4
"""The number of rounds of each text that are timed."""

TIMING_SECONDS, ANSWER_SECONDS = 40.0, 75.0

FEWEST_TOKENS = 16
"""The least number of tokens of an answer, however slow the machine is."""


def advise(settings: AdviceSettings, remarks: Console) -> Advice:
    """Load the model, time it, try prompts, and give advice."""
    start = time.perf_counter()
    backend = quantised_backend(settings.backend, settings.quantize)
    place: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    whole = load_target(settings.model, **place, backend="eager")
    if settings.quantize is not None:
        target = load_target(settings.model, **place, backend=backend)
    else:
        target = load_target(whole.model, whole.tokenizer, backend=backend)  # the same weights
    prompts = _prompts(settings, target)
    choices = _choices(target)
    untrained, left_out = _untrained(choices, whole, target, backend)
    del whole  # a second copy of the weights, where the target's are packed
    given = load_drafter_for(target, settings.draft_model, backend=backend)
    kinds = dict(untrained)
    if given is not None:
        kinds[given.method + " as given"] = given
    costs, passes, each = _costs(target, kinds, prompts[0], remarks)
    size = target.dtype.itemsize
    memory = {
        "target": target.num_parameters * size,
        "cache of 1,000 tokens": 1000 * slot_bytes(target),
        **{name: drafter.num_parameters * size for name, drafter in kinds.items() if drafter.num_parameters},
    }
    found = Advice(
        settings,
        environment(target),
        passes,
        head_seconds(target),
        [
            Kind(
                name,
                costs[name],
                drafter.num_parameters,
                to_train=name in untrained,
                flags="".join(f" --{flag.replace('_', '-')} {value}" for flag, value in choices.get(name, {}).items()),
                always=not drafter.limits.looks_back,
            )
            for name, drafter in {**kinds, LOOKUP: PromptLookup()}.items()
        ],
        left_out,
        _answers(target, given, prompts, settings, each, remarks),
        memory,
        0.0,
    )
    memory["most held here"] = peak_memory_bytes(target.device)
    found.environment["load_average_at_the_end"] = load_average()
    found.next = next_steps(found)
    found.seconds = time.perf_counter() - start
    return found


def _prompts(settings: AdviceSettings, target: Target) -> list[list[int]]:
    """Return the token ids of the prompts: the user's, else the built-in ones."""
    built_in = NAMED[settings.model if named(settings.model) is not None else SMOLLM2].prompts
    prompts = read_prompts(settings.data or built_in, settings.limit)
    note_texts(prompts, target.tokenizer)
    found = encode(prompts, target)
    room = target.context_length - settings.max_new_tokens - max(PASSES)
    fitting = [prompt for prompt in found if len(prompt) <= room]
    if not fitting:
        raise UserError(
            f"no prompt leaves room for {settings.max_new_tokens} tokens in the context of {target.context_length}; "
            "lower --max-new-tokens or give shorter ones with --data"
        )
    return fitting


def _choices(target: Target) -> dict[str, dict[str, Any]]:
    """Return the settings of the drafters that could be trained, by the names that are shown."""
    exit_layer = max(1, target.num_layers // 4)
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("fspad", "fspad-1f", "eagle3")}
    shown = f"eesd, exit after layer {exit_layer} of {target.num_layers}"
    return {**found, shown: {"method": "eesd", "exit_layer": exit_layer}}


def _untrained(
    choices: dict[str, dict[str, Any]], whole: Target, target: Target, backend: str | None
) -> tuple[dict[str, Drafter], dict[str, str]]:
    """Build untrained drafters as `train` would begin them; also return the impossible kinds, with the reason."""
    found: dict[str, Drafter] = {}
    left_out = {}
    for name, choice in choices.items():
        try:
            network = new_drafter(whole, DrafterConfig(data=Path(), output_dir=Path(), **choice))
            drafter = load_drafter_for(target, network, backend=backend)
        except UserError as error:
            left_out[name] = str(error)
            continue
        assert drafter is not None
        found[name] = drafter
    return found, left_out


def _costs(
    target: Target, kinds: dict[str, Drafter], prompt: list[int], remarks: Console
) -> tuple[dict[str, RoundCost], dict[int, float], float]:
    """Time the costs of every kind, prompt lookup too, the seconds of the passes, and of a plain round."""
    lookup, shape = PromptLookup(), TreeShape.chain(CHAIN)
    ways: dict[str, Way] = {PLAIN: (None, NOTHING)}
    ways |= {str(tokens): (Guesses(), TreeShape.chain(tokens - 1)) for tokens in PASSES[1:]}
    ways |= {name: (drafter, shape) for name, drafter in {**kinds, LOOKUP: lookup}.items()}
    few = prompt[-PROMPT_TOKENS:]
    first = timed(target, {PLAIN: ways[PLAIN]}, few, rounds=3, turns=1)[PLAIN].whole
    # Many short turns, so that disturbances hit all ways alike; fewer where every pass is long.
    turns = max(2, min(10, int(TIMING_SECONDS / (2 * first * len(ways) * (WARM_UP + ROUNDS))) - 1))
    with progress(remarks, "timing passes and drafts", (turns + 1) * len(ways)) as advance:
        end = time.perf_counter() + TIMING_SECONDS
        laps = timed(target, ways, few, rounds=ROUNDS, turns=turns, end=end, progress=advance)
    plain, checked = laps[PLAIN], laps[str(1 + CHAIN)]
    # A text that repeats nothing gives lookup no candidates: what checking them adds is that of any chain.
    laps[LOOKUP] = Lap(laps[LOOKUP].draft, checked.verify, checked.rest)
    passes = {1: plain.verify} | {tokens: laps[str(tokens)].verify for tokens in PASSES[1:]}
    return {name: RoundCost.of(plain, laps[name], shape) for name in (*kinds, LOOKUP)}, passes, plain.whole


def _answers(
    target: Target,
    given: Drafter | None,
    prompts: list[list[int]],
    settings: AdviceSettings,
    each: float,
    remarks: Console,
) -> Comparison:
    """Compare plain decoding, prompt lookup and the given drafter on the prompts, in turns."""
    rivals = [speculative(PLAIN, target, None), speculative(LOOKUP, target, PromptLookup())]
    if given is not None and not given.limits.looks_back:
        rivals += [
            speculative(given.method + more, target, given, ngrams=bool(more), controller=CONTROLLER)
            for more in ("", WITH_LOOKUP)
        ]
    affordable = int(ANSWER_SECONDS / (each * len(rivals) * len(prompts)))
    tokens = min(settings.max_new_tokens, max(FEWEST_TOKENS, affordable))
    end = time.perf_counter() + ANSWER_SECONDS
    return measured(target, rivals, prompts, max_new_tokens=tokens, remarks=remarks, end=end)
