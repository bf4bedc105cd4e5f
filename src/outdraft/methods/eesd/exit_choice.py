"""The choice of EESD's exit layer: the agreement of a light probe at every layer against a draft token's cost there.

The probe is the target's own last layer on the layer's hidden state, moved by a linear map to where the last layer
expects its input; the map is a ridge regression that shrinks towards no change. Nothing is trained by gradients, the
target stays as it is. A trained exit layer agrees more often than the probe does, so the expected speed-up is on the
low side; it serves to compare layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from outdraft.core.tensors import now
from outdraft.data.tokenization import Example, ExampleSet
from outdraft.losses.objective import Reading, pad
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads, exit_view, layers_of

LONGEST_CHAIN = 12
"""The longest chain length that is compared."""

FEWEST_TOKENS, MOST_TOKENS = 6144, 12288
"""The bounds on the number of tokens to compare on, which is six times the hidden size."""

RIDGE = 0.1
"""The ridge penalty towards no change, relative to the spread of as many tokens as the hidden size."""

BATCH, REPEATS = 8, 9


@dataclass
class ExitCandidate:
    """A layer to exit after, with its measurements."""

    layer: int
    as_it_is: float
    """The share of response tokens on which the target's last layer, on the unmapped state, agrees with the target."""
    agreement: float
    """The share of response tokens on which the probe agrees with the target."""
    cost: float
    """The cost of a draft token, in passes of the target over one token."""
    chain: int
    """The best number of draft tokens a round at this agreement and cost."""
    speedup: float
    """The tokens in the time of a target pass with such chains, for geometric acceptance."""


@dataclass
class ExitChoice:
    """The chosen layer, and the candidates that it was chosen from."""

    layer: int
    candidates: list[ExitCandidate]
    response_tokens: int
    """The number of response tokens on which agreement was measured."""
    seconds: float
    """The duration of the comparison."""

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> ExitChoice:
        """Rebuild a choice from its `asdict`."""
        return cls(**{**record, "candidates": [ExitCandidate(**candidate) for candidate in record["candidates"]]})

    @property
    def settings(self) -> dict[str, Any]:
        return {"exit_layer": self.layer}

    @property
    def reason(self) -> str:
        """Explain the choice in one line."""
        best = next(candidate for candidate in self.candidates if candidate.layer == self.layer)
        return (
            f"exit after layer {best.layer}: a probe agrees on {best.agreement:.0%} of the tokens there at "
            f"{best.cost:.2f} of a pass a draft token, {best.speedup:.2f}x with chains of {best.chain}"
        )

    def show(self, console: Console) -> None:
        table = Table(title=f"where to exit (measured on {self.response_tokens:,} response tokens)")
        for name in ("layer", "as it is", "probe agrees", "draft cost", "best chain", "speed-up"):
            table.add_column(name, justify="right")
        for c in self.candidates:
            cells = (f"{c.layer}", f"{c.as_it_is:.3f}", f"{c.agreement:.3f}", f"{c.cost:.3f}", f"{c.chain}")
            table.add_row(*cells, f"{c.speedup:.2f}", style="bold" if c.layer == self.layer else None)
        console.print(table)
        console.print(self.reason, highlight=False, soft_wrap=True)


@torch.no_grad()
def choose_exit(target: Target, examples: ExampleSet) -> ExitChoice:
    """Compare the layers of the lower half on some of the data and take the one of the largest expected speed-up."""
    began = time.perf_counter()
    layers = candidate_layers(len(layers_of(target.model)))
    chosen = _sample(examples, min(max(FEWEST_TOKENS, 6 * target.hidden_size), MOST_TOKENS))
    judged = chosen[::4]
    fitted = [example for i, example in enumerate(chosen) if i % 4] or judged
    costs = Costs.measured(target, layers)
    agreements = _agreements(target, layers, fitted, judged)
    candidates = [
        ExitCandidate(layer, as_it_is, agreement, costs.draft(layer), *costs.best_chain(layer, agreement))
        for layer, (as_it_is, agreement) in zip(layers, agreements, strict=True)
    ]
    best = max(candidates, key=lambda candidate: candidate.speedup)
    tokens = sum(int(example.loss_mask[1:].sum()) for example in judged)
    return ExitChoice(best.layer, candidates, tokens, time.perf_counter() - began)


def candidate_layers(count: int) -> list[int]:
    """List the candidates among `count` layers: the lower half, sparser with depth, at least one."""
    half = max(1, count // 2)
    return [n for n in range(1, half + 1) if n <= 6 or n % (2 if n <= 12 else 4 if n <= 24 else 8) == 0]


# --- what a draft token costs ------------------------------------------------------------------------------------


@dataclass
class Costs:
    """Measured times, relative to a pass of the target over one token."""

    layers: int
    """The number of the target's layers."""
    first: float
    """The time of a draft token with one layer below the exit layer."""
    each: float
    """The time that every further layer adds."""
    token: float
    """The time that every further token adds to a pass of the whole target."""

    @classmethod
    def measured(cls, target: Target, layers: Sequence[int]) -> Costs:
        """Measure the costs on this machine, at the shallowest and the deepest of the layers."""
        count = len(layers_of(target.model))
        view = exit_view(target.model, layers_of(target.model)[-1])
        one, many = (torch.ones(1, tokens, dtype=torch.long, device=target.device) for tokens in (1, LONGEST_CHAIN + 1))

        def draft(layer: int) -> Callable[[], object]:
            reader = Reader(target.model, Reads(False, (layer,), layer))
            return lambda: target.head(view(reader.lower(input_ids=one, use_cache=False), use_cache=False)[0])

        whole, wide, shallow, deep = _seconds(
            [
                lambda: target.head(target.features(one)),
                lambda: target.head(target.features(many)),
                draft(layers[0]),
                draft(layers[-1]),
            ],
            target.device,
        )
        steps = layers[-1] - layers[0]
        each = max(0.0, (deep - shallow) / steps / whole) if steps else 1 / count
        first = shallow / whole - each * (layers[0] - 1)
        return cls(count, first, each, max(0.0, (wide / whole - 1) / LONGEST_CHAIN))

    def draft(self, layer: int) -> float:
        """Return the time of a draft token: `layer` layers, the exit layer and the head."""
        return self.first + (layer - 1) * self.each

    def speedup(self, layer: int, agreement: float, chain: int) -> float:
        """Return emitted tokens a round over its time; the draft has run the lower layers of all but the last token."""
        emitted = sum(agreement**n for n in range(chain + 1))
        upper = (1 + chain * self.token) * (1 - layer / self.layers)
        return emitted / (chain * self.draft(layer) + layer * self.each + upper)

    def best_chain(self, layer: int, agreement: float) -> tuple[int, float]:
        """Return the length and the speed-up of the fastest chain."""
        found = [(self.speedup(layer, agreement, chain), chain) for chain in range(1, LONGEST_CHAIN + 1)]
        speedup, chain = max(found)
        return chain, speedup


def _seconds(works: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return each work's median time; works take turns, so that other load slows all of them alike."""
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(REPEATS + 2):
        for work, found in zip(works, times, strict=True):
            began = now(device)
            work()
            if repeat >= 2:  # the first pay for allocation
                found.append(now(device) - began)
    return [statistics.median(found) for found in times]


# --- how often a probe agrees ------------------------------------------------------------------------------------


def _sample(examples: ExampleSet, tokens: int) -> list[Example]:
    """Take evenly spaced examples of about `tokens` tokens, at least two where there are two."""
    mean = examples.tokens / len(examples)
    count = min(len(examples), max(2, round(tokens / mean)))
    return [examples[i * len(examples) // count] for i in range(count)]


def _agreements(
    target: Target, layers: Sequence[int], fitted: Sequence[Example], judged: Sequence[Example]
) -> list[tuple[float, float]]:
    """Return, for every layer, the share of agreeing argmaxes without and with the fitted map."""
    last = len(layers_of(target.model)) - 1
    states, _ = _tapped(target, [*layers, last], fitted)
    goal = torch.cat(states.pop()).float()
    maps = [_Map.fit(torch.cat(states.pop(0)).float(), goal) for _ in layers]
    states, features = _tapped(target, layers, judged)
    masks = [example.loss_mask[1:].bool() for example in judged]
    wanted = torch.cat([_argmax(target, f[:-1][mask]) for f, mask in zip(features, masks, strict=True)])
    view = exit_view(target.model, layers_of(target.model)[-1])

    def agreement(rows: Sequence[Tensor]) -> float:
        said = []
        for row, mask in zip(rows, masks, strict=True):
            out = view(row[None].to(target.device, target.dtype), use_cache=False)[0][0]
            said.append(_argmax(target, out[:-1][mask]))
        return (torch.cat(said) == wanted).float().mean().item()

    return [
        (agreement(rows), agreement([fit(row.float()) for row in rows])) for rows, fit in zip(states, maps, strict=True)
    ]


def _argmax(target: Target, features: Tensor) -> Tensor:
    return target.head(features).argmax(dim=-1)


def _tapped(
    target: Target, layers: Sequence[int], examples: Sequence[Example]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Run the target once; return `(tokens, hidden)` states by layer and example, and the features."""
    reading, found = Reading(target, layers), list[tuple[Tensor, ...]]()
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        lengths = torch.tensor([len(example) for example in batch], device=target.device)
        read = reading(pad([example.input_ids.long() for example in batch]).to(target.device), lengths)
        rows = zip(read, lengths.tolist(), strict=True)
        found += [row[:length].split(target.hidden_size, dim=-1) for row, length in rows]
    features, *taps = (list(parts) for parts in zip(*found, strict=True))
    return taps, features


@dataclass
class _Map:
    """The affine map x + (x - mean) @ weight + shift."""

    mean: Tensor
    weight: Tensor
    shift: Tensor

    @classmethod
    def fit(cls, x: Tensor, goal: Tensor) -> _Map:
        """Fit the map from x to the goal, each `(tokens, hidden)`; fewer tokens shrink it more."""
        mean, change = x.mean(dim=0), goal - x
        shift = change.mean(dim=0)
        spread = x.std(dim=0).clamp_min(1e-6)  # a few channels of some families are hundreds of times the others
        scaled = (x - mean) / spread
        gram = scaled.T @ scaled
        gram.diagonal().add_(RIDGE * len(x) * min(10.0, x.shape[1] / len(x)) + 1e-3)
        weight = torch.linalg.solve(gram, scaled.T @ (change - shift))
        return cls(mean, weight / spread[:, None], shift)

    def __call__(self, x: Tensor) -> Tensor:
        return x + (x - self.mean) @ self.weight + self.shift
