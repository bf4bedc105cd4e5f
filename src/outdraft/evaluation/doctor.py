"""The diagnosis behind `outdraft doctor`: does a drafter's folder fit its target, and is it read as it was trained?

The target decodes a few prompts greedily, once. At every token of these texts the drafter, read from its folder as it
is and in the other ways that the folder allows, drafts a chain, which is compared with the text. So all readings are
compared at the same places.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_network
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.data.text import common_length
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.drafting.folder import find_folder
from outdraft.drafting.ngrams import FullDrafts
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Network, method_of
from outdraft.methods.registry import DrafterFacts
from outdraft.target.backends.packed import plain_linear
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

LEVEL = 0.001
"""The level of the sign tests, over all other readings together."""


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Drafts:
    """The drafts of one reading of a folder, at the same places as those of the others.

    Attributes:
        accepted: for each place, candidates of the chain that the target continued with.
        depth: candidates of a chain.
        confidence: mean draft probability of the first candidates; None for drafters that give none.
        setting: what config.json must say for this reading; empty for the folder as it is.
    """

    accepted: list[int]
    depth: int
    confidence: float | None
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_position(self) -> list[float]:
        """At index d, the share of chains whose first d + 1 candidates were accepted."""
        return [sum(n > d for n in self.accepted) / len(self.accepted) for d in range(self.depth)]

    def p_value(self, other: Drafts) -> float:
        """Return the p-value of a sign test for the hypothesis that `other` is accepted no further than this."""
        signs = [b > a for a, b in zip(self.accepted, other.accepted, strict=True) if a != b]
        return sum(math.comb(len(signs), k) for k in range(sum(signs), len(signs) + 1)) / 2 ** len(signs)


class _Confidences(FullDrafts):
    """A `Budget` that stops nothing and keeps the confidences of the first level."""

    first: Sequence[float | None] = ()

    def drafted(self, confidences: Sequence[float | None]) -> None:
        self.first = self.first or list(confidences)


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
    limits = Limits(stepwise=False, probs=False, looks_back=True)

    def __init__(self, drafters: Sequence[Drafter]):
        self.drafters = drafters
        layers = sorted({layer for one in drafters for layer in one.reads.layers})
        self.reads = drafters[0].reads if len(drafters) == 1 else Reads(layers=tuple(layers))
        self.guesses: list[list[_Guess]] = [[] for _ in drafters]

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        return _ProbeState(self, prompts, run)

    def slots(self, shape: TreeShape) -> int:
        return max(one.slots(shape) for one in self.drafters)

    def taps(self, taps: Tensor, reads: Reads, width: int) -> Tensor:
        """Select what a drafter reads from `(rows, tokens, width * parts)`, the parts of `self.reads`."""
        if reads == self.reads:
            return taps
        parts = dict(zip((0, *self.reads.layers), taps.split(width, dim=-1), strict=True))
        return torch.cat([parts[layer] for layer in (*([0] if reads.features else []), *reads.layers)], dim=-1)


class _ProbeState(DraftState):
    def __init__(self, probe: Probe, prompts: Sequence[Tensor], run: ModelRunner):
        self.probe, self.width, self.rows = probe, run.target.hidden_size, list(range(len(prompts)))
        self.states = [one.begin(prompts, run) for one in probe.drafters]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        for one, state, guesses in zip(self.probe.drafters, self.states, self.probe.guesses, strict=True):
            budget = _Confidences([True] * len(self.rows))
            own = replace(update, taps=self.probe.taps(update.taps, one.reads, self.width))
            tree = state.propose(own, shape, replace(rows, budget=budget))
            for place, (row, count) in enumerate(zip(self.rows, tree.counts, strict=True)):
                sure = budget.first[place] if budget.first else None
                guesses.append(_Guess(row, len(rows.prefixes[place]), tree.tokens[place, 1:count].tolist(), sure))
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
    depth, probe = min(DEPTH, *(one.limits.depth or DEPTH for one in drafters)), Probe(drafters)
    settings: dict[str, Any] = {"controller": "fixed", "num_speculative_tokens": depth, "do_sample": False}
    output = SpeculativeModel(target, probe).generate(list(prompts), max_new_tokens=NEW_TOKENS, **settings)
    whole = [[*prompt, *text] for prompt, text in zip(prompts, output.tokens, strict=True)]
    found = []
    for guesses in probe.guesses:
        fitting = [guess for guess in guesses if guess.start + depth <= len(whole[guess.row])]
        places = {(one.row, *whole[one.row][: one.start][-CONTEXT:]): one for one in fitting}.values()
        if not places:
            raise UserError("the target ends its answers at once; give other prompts (--data)")
        accepted = [common_length(one.chain[:depth], whole[one.row][one.start :]) for one in places]
        sure = [one.confidence for one in places if one.confidence is not None]
        found.append(Drafts(accepted, depth, sum(sure) / len(sure) if sure else None))
    return found


# --- judging ---------------------------------------------------------------------------------------------------


@dataclass
class Diagnosis:
    """The diagnosis of a drafter.

    Attributes:
        verdict: `right`, `wrong layout`, `wrong target` or `undertrained`.
        reason: the evidence in a sentence.
        fix: what to do; empty where nothing is wrong.
        setting: what config.json must say, where that is the fix.
        drafts: the drafts of the folder as it is.
        tried: those of other readings.
        facts: facts of the folder.
    """

    verdict: str
    reason: str
    fix: str
    setting: Mapping[str, Any]
    drafts: Drafts
    tried: list[Drafts]
    facts: DrafterFacts

    @property
    def right(self) -> bool:
        return self.verdict == "right"

    @property
    def noted(self) -> dict[str, float]:
        """The figures that the drafter's training noted of held-out text, by name."""
        return dict(self.facts.training.get("tau") or {})

    def as_dict(self) -> dict[str, Any]:
        facts, names = self.facts, ("method", "layout", "parameters", "trained_for")
        return {
            **{name: getattr(self, name) for name in ("verdict", "reason", "fix", "setting", "noted")},
            "acceptance_by_position": self.drafts.by_position,
            "positions": len(self.drafts.accepted),
            "confidence": self.drafts.confidence,
            "drafter": {**{name: getattr(facts, name) for name in names}, **facts.more},
            "tried": [
                {"setting": one.setting, "acceptance_by_position": one.by_position, "p_value": self.drafts.p_value(one)}
                for one in self.tried
            ],
        }


def diagnose(target: Target, draft_model: str | Path, prompts: Sequence[list[int]]) -> Diagnosis:
    """Diagnose the drafter in a folder or hub repository.

    Args:
        prompts: token ids of prompts that the target is used with.
    """
    method = method_of(draft_model)
    facts = method.describe(find_folder(draft_model))
    network = load_network(draft_model, target, target.dtype, target.device)
    drafters, settings = [method.bind(network, target)], list[Mapping[str, Any]]()
    for reading in method.readings(network, target):
        other = copy.copy(network)  # shares the weights
        other.config = replace(network.config, **reading.changes)
        drafters.append(method.bind(other, target))
        settings.append(reading.setting)
    drafts, *others = drafts_of(target, drafters, prompts)
    tried = [replace(one, setting=setting) for one, setting in zip(others, settings, strict=True)]
    better = [one for one in tried if drafts.p_value(one) < LEVEL / len(tried)]
    if not better:
        return Diagnosis(*_judged(target, network, drafts, facts), {}, drafts, tried, facts)
    best = max(better, key=lambda one: sum(one.accepted))
    before, after = drafts.by_position[0], best.by_position[0]
    reason = f"read in another way, {after:.0%} of its first candidates are accepted instead of {before:.0%}"
    keys = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in best.setting.items())
    fix = f"write {keys} into the drafter's config.json, where that key stands now or else at the top; then look again"
    return Diagnosis("wrong layout", reason, fix, best.setting, drafts, tried, facts)


def _judged(target: Target, network: Network, drafts: Drafts, facts: DrafterFacts) -> tuple[str, str, str]:
    """Judge a drafter for which no other reading is better: verdict, reason and fix."""
    here, confidence, noted = drafts.by_position[0], drafts.confidence or 0.0, facts.training.get("tau") or {}
    before = noted.get("acceptance_at_1", noted.get("held_out_top1_1"))
    as_noted = before is not None and here >= AS_NOTED * before
    reason = f"{here:.0%} of its first candidates are accepted"
    reason += "" if before is None else f", where its training noted {before:.0%}"
    if here >= USABLE and (before is None or as_noted):
        return "right", reason, ""
    if not as_noted and _overwritten(target, network):
        reason += "; its own output layer is the target's, value by value: it has been overwritten"
        return "wrong layout", reason, "copy lm_head.weight (Medusa: outputs.*.weight) again from the original drafter"
    weak = before is not None and before < USABLE
    sure = before is None and confidence > TWICE * here + SURE
    if sure or not (before is None or as_noted or weak):
        if sure:
            reason += f"; it is sure of them (mean probability {confidence:.0%}): it was trained, on something else"
        own = facts.trained_for or "the model that it was trained for"
        return "wrong target", reason, f"load it with {own} in the same revision, or train one here (outdraft train)"
    return "undertrained", reason, "train it longer or on more of the target's own answers (outdraft train, regenerate)"


def _overwritten(target: Target, network: Network) -> bool:
    """Return True if the output layers that training made the drafter's own equal the target's."""
    theirs, kept = plain_linear(target.model.get_output_embeddings())[0], getattr(network, "draft_tokens", None)
    theirs = theirs if kept is None else theirs[kept.to(theirs.device)]
    heads = network.own_heads
    return bool(heads) and all(own.shape == theirs.shape and torch.equal(own, theirs.to(own.dtype)) for own in heads)
