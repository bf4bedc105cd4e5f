"""The diagnosis behind `outdraft doctor`: does a drafter's folder fit its target, and is it read as it was trained?

The target decodes a few prompts greedily, once. At every token of these texts the drafter, read from its folder as it
is and in the other ways that the folder allows, drafts a chain, which is compared with the text. So all readings are
compared at the same places.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_network
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.drafting.folder import find_folder
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Network, method_of
from outdraft.methods.registry import DrafterFacts, Method, Reading
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads

PROMPTS, NEW_TOKENS, DEPTH = 6, 40, 4
"""The number of prompts, of tokens decoded after each, and of candidates of a chain."""

CONTEXT = 8
"""The last tokens by which places of a text are told apart: a text that goes in circles counts each place once."""

USABLE = 0.3
"""The acceptance of the first candidate from which on a drafter counts as trained."""

AS_NOTED = 0.6
"""The least share of the acceptance that its training noted: texts differ, and a right reading is above it."""

SURE, TWICE = 0.1, 2.0
"""A drafter whose confidence exceeds twice its acceptance by more than this was trained, on something else: training
makes confidence and acceptance about equal."""

ALIKE = 0.9
"""The mean cosine of embeddings of one token from which on both are one model's."""

LEVEL = 0.001
"""The level of the sign tests, over all other readings together."""


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Drafts:
    """The drafts of one reading at every token of the texts, repetitions left out.

    Attributes:
        accepted: candidates of each chain that the target continued with.
        depth: candidates of a chain.
        confidence: mean draft probability of the first candidates; None for drafters that give none.
    """

    accepted: list[int]
    depth: int
    confidence: float | None

    @property
    def by_position(self) -> list[float]:
        """At index d, the share of chains whose first d + 1 candidates were accepted."""
        return [sum(n > d for n in self.accepted) / max(1, len(self.accepted)) for d in range(self.depth)]

    def p_value(self, other: Drafts) -> float:
        """Return the p-value of a sign test for the hypothesis that `other` is accepted no further than this."""
        signs = [b - a for a, b in zip(self.accepted, other.accepted, strict=True) if a != b]
        better = sum(sign > 0 for sign in signs)
        return sum(math.comb(len(signs), k) for k in range(better, len(signs) + 1)) / 2 ** len(signs)


class _Confidences:
    """A `Budget` that stops nothing and keeps the confidences of the first level."""

    def __init__(self, rows: int):
        self.going, self.first = [True] * rows, list[float | None]()

    def wants(self, nodes: int) -> list[bool]:
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        self.first = self.first or list(confidences)

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        return [len(own) for own in gains]


class _Guess(NamedTuple):
    row: int
    start: int  # tokens before the chain
    chain: list[int]
    confidence: float | None


class Probe(Drafter):
    """Several drafters at once, whose drafts are recorded and not verified, so that decoding is plain.

    Args:
        drafters: drafters of one target; one that runs the target ahead (`Reads.split`) can only be alone.
    """

    method = "probe"

    def __init__(self, drafters: Sequence[Drafter]):
        self.drafters = drafters
        alone = drafters[0].reads if len(drafters) == 1 else None
        self.reads = alone or Reads(layers=tuple(sorted({layer for one in drafters for layer in one.reads.layers})))
        self.limits = Limits(stepwise=False, probs=False, looks_back=True)
        self.guesses: list[list[_Guess]] = [[] for _ in drafters]

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        return _ProbeState(self, prompts, run)

    def slots(self, shape: TreeShape) -> int:
        return max(one.slots(shape) for one in self.drafters)

    def taps(self, taps: Tensor, reads: Reads, width: int) -> Tensor:
        """Select what a drafter reads from `(rows, tokens, width * parts)`, the parts of `self.reads`."""
        if reads == self.reads:
            return taps
        parts = dict(zip(("features", *self.reads.layers), taps.split(width, dim=-1), strict=True))
        named = [*(["features"] if reads.features else []), *reads.layers]
        return torch.cat([parts[name] for name in named], dim=-1)


class _ProbeState(DraftState):
    def __init__(self, probe: Probe, prompts: Sequence[Tensor], run: ModelRunner):
        self.probe, self.width, self.rows = probe, run.target.hidden_size, list(range(len(prompts)))
        self.states = [one.begin(prompts, run) for one in probe.drafters]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        for one, state, guesses in zip(self.probe.drafters, self.states, self.probe.guesses, strict=True):
            budget = _Confidences(len(self.rows))
            own = replace(update, taps=self.probe.taps(update.taps, one.reads, self.width))
            tree = state.propose(own, shape, replace(rows, budget=budget))
            for place, count in enumerate(tree.counts):
                confidence = budget.first[place] if budget.first else None
                chain = tree.tokens[place, 1:count].tolist()
                guesses.append(_Guess(self.rows[place], len(rows.prefixes[place]), chain, confidence))
        return Tree.roots(update.roots)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        for state in self.states:
            state.select_rows(rows)


def drafts_of(target: Target, drafters: Sequence[Drafter], prompts: Sequence[list[int]]) -> list[Drafts]:
    """Compare the chains of all drafters with the target's greedy texts.

    Raises:
        UserError: the target says too little after these prompts.
    """
    depth = min(DEPTH, *(one.limits.depth or DEPTH for one in drafters))
    probe = Probe(drafters)
    settings: dict[str, Any] = {"controller": "fixed", "num_speculative_tokens": depth, "do_sample": False}
    output = SpeculativeModel(target, probe).generate(list(prompts), max_new_tokens=NEW_TOKENS, **settings)
    whole = [[*prompt, *text] for prompt, text in zip(prompts, output.tokens, strict=True)]
    found = []
    for guesses in probe.guesses:
        fitting = list(
            {
                (guess.row, *whole[guess.row][: guess.start][-CONTEXT:]): guess
                for guess in guesses
                if guess.start + depth <= len(whole[guess.row])
            }.values()
        )
        if not fitting:
            raise UserError("the target ends its answers at once; give other prompts (--data)")
        pairs = [(guess.chain, whole[guess.row][guess.start :]) for guess in fitting]
        accepted = [_agreeing(chain[:depth], text) for chain, text in pairs]
        sure = [guess.confidence for guess in fitting if guess.confidence is not None]
        found.append(Drafts(accepted, depth, sum(sure) / len(sure) if sure else None))
    return found


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


# --- judging ---------------------------------------------------------------------------------------------------


@dataclass
class Tried:
    """Another reading, what config.json must say for it, and its acceptance."""

    setting: dict[str, Any]
    drafts: Drafts
    p_value: float
    """The p-value of the hypothesis that it is no better than the folder as it is."""

    def as_dict(self) -> dict[str, Any]:
        shares = self.drafts.by_position
        return {"setting": self.setting, "acceptance_by_position": shares, "p_value": self.p_value}


@dataclass
class Diagnosis:
    """The diagnosis of a drafter.

    Attributes:
        verdict: `right`, `wrong layout`, `wrong target` or `undertrained`.
        reason: the evidence in a sentence.
        fix: what to do; empty where nothing is wrong.
        setting: what config.json must say, where that is the fix.
        drafts: the drafts of the folder as it is.
        noted: the figures that its training noted, by name.
        facts: facts of the folder.
        tried: the other readings.
    """

    verdict: str
    reason: str
    fix: str
    drafts: Drafts
    noted: dict[str, float]
    facts: DrafterFacts
    tried: list[Tried]
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.verdict == "right"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = self.facts
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "fix": self.fix,
            "setting": self.setting,
            "acceptance_by_position": self.drafts.by_position,
            "positions": len(self.drafts.accepted),
            "confidence": self.drafts.confidence,
            "noted": self.noted,
            "drafter": {
                "method": facts.method,
                "layout": facts.layout,
                "parameters": facts.parameters,
                "trained_for": facts.trained_for,
                **facts.more,
            },
            "tried": [one.as_dict() for one in self.tried],
        }


def diagnose(target: Target, draft_model: str | Path, prompts: Sequence[list[int]]) -> Diagnosis:
    """Diagnose the drafter in a folder or hub repository.

    Args:
        target: the model that it shall draft for.
        draft_model: the drafter.
        prompts: token ids of prompts that the target is used with.

    Raises:
        UserError: no drafter is there, or its shapes are another target's.
    """
    method, facts = method_of(draft_model), method_of(draft_model).describe(find_folder(draft_model, None))
    network = load_network(draft_model, target, target.dtype, target.device)
    drafts, tried = _tried(method, target, network, prompts)
    noted = {key: value for key, value in (facts.training.get("tau") or {}).items() if isinstance(value, int | float)}
    better = [one for one in tried if one.p_value < LEVEL / len(tried)]
    if not better:
        return Diagnosis(*_judged(target, network, drafts, noted, facts), drafts, noted, facts, tried)
    best = max(better, key=lambda one: sum(one.drafts.accepted))
    keys = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in best.setting.items())
    reason = (
        f"read in another way, {best.drafts.by_position[0]:.0%} of its first candidates are accepted instead of "
        f"{drafts.by_position[0]:.0%}"
    )
    fix = f"write {keys} into the drafter's config.json, where that key stands now or else at the top; then look again"
    return Diagnosis("wrong layout", reason, fix, drafts, noted, facts, tried, best.setting)


def _tried(
    method: Method, target: Target, network: Network, prompts: Sequence[list[int]]
) -> tuple[Drafts, list[Tried]]:
    """Measure a network and its other readings."""
    drafters, readings = [method.bind(network, target)], list[Reading]()
    if drafters[0].reads.split is None:
        for reading in method.readings(network, target):
            other = copy.copy(network)  # shares the weights
            other.config = replace(network.config, **reading.changes)
            try:
                drafters.append(method.bind(other, target))
            except UserError:  # the target has no such layers
                continue
            readings.append(reading)
    own, *others = drafts_of(target, drafters, prompts)
    pairs = zip(readings, others, strict=True)
    return own, [Tried(dict(reading.setting), drafts, own.p_value(drafts)) for reading, drafts in pairs]


def _judged(
    target: Target, network: Network, drafts: Drafts, noted: dict[str, float], facts: DrafterFacts
) -> tuple[str, str, str]:
    """Judge a drafter for which no other reading is better: verdict, reason and fix."""
    here, confidence = drafts.by_position[0], drafts.confidence
    before = noted.get("acceptance_at_1", noted.get("held_out_top1_1"))
    reason = f"{here:.0%} of its first candidates are accepted"
    reason += "" if before is None else f", where its training noted {before:.0%}"
    as_noted = before is not None and here >= AS_NOTED * before
    if here >= USABLE and (before is None or as_noted):
        return "right", reason, ""
    own = facts.trained_for or "the model that it was trained for"
    if not as_noted and _overwritten(target, network):
        return (
            "wrong layout",
            f"{reason}; its own output layer is the target's, value by value: it has been overwritten",
            "copy the output layer's tensors (lm_head.weight, outputs.*.weight) again from the original drafter",
        )
    alien = _alien(network, target)
    sure = before is None and confidence is not None and confidence > TWICE * here + SURE
    if alien or sure or (before is not None and not as_noted):
        why = "; its embedding is another model's" if alien else ""
        if sure and confidence is not None:
            why += f"; it is sure of itself (mean probability {confidence:.0%}), so it was trained, on something else"
        return (
            "wrong target",
            reason + why,
            f"load it with {own}, in the revision that it was trained on, or train one for this target "
            "(outdraft train)",
        )
    return "undertrained", reason, "train it longer or on more of the target's own answers (outdraft train, regenerate)"


def _overwritten(target: Target, network: Network) -> bool:
    """Return True if the output layers that training made the drafter's own equal the target's."""
    theirs, kept = target.model.get_output_embeddings().weight, getattr(network, "draft_tokens", None)
    theirs = theirs if kept is None else theirs[kept.to(theirs.device)]
    heads = network.own_heads
    return bool(heads) and all(own.shape == theirs.shape and torch.equal(own, theirs.to(own.dtype)) for own in heads)


def _alien(network: Network, target: Target) -> bool:
    """Return True if the drafter holds an embedding of the target's shape that is far from the target's."""
    own, theirs = getattr(network, "embed_tokens", None), target.model.get_input_embeddings().weight
    if own is None or own.weight.shape != theirs.shape:
        return False
    return bool(torch.cosine_similarity(own.weight.float(), theirs.float(), dim=-1).mean() < ALIKE)  # type: ignore
