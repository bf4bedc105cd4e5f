"""A trial of a model that is being loaded: a small tree over our cache, against what the model itself says.

Which families keep more than keys and values, look at what follows, or ignore a window that they are configured with,
changes with every version of `transformers`; no list of names could tell. So a branching tree is run, one of its paths
kept and a further tree run after it, in three forwards over a few tokens. The model stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from outdraft.core.tree import Tree
from outdraft.errors import UserError, first_line
from outdraft.target.cache import SlotCache
from outdraft.target.reach import windows_of
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import layers_of, view_of

FIRST, SECOND = [-1, 0, 0, 2], [-1, 0, 0]
"""Parents of two trees' nodes; of the first, its nodes 0, 2 and 3 are kept."""

WINDOW = 2
"""In place of a longer one, so that a few tokens reach past it."""

LARGE = 2 << 30
"""Bytes of weights from which on a layer of each kind is tried in place of all."""

TOLERANCE, ROUGH = {torch.float64: 1e-6, torch.float32: 1e-4}, 0.1
"""By how much trees may differ from plain text, relative to its length; the second in 16 bits."""

NOISE, MOST_NOISE = 4.0, 0.2
"""By how much more the tree may differ than plain decoding with a cache does, and by how much at all, where rounding
alone is past the tolerance (products of quantised numbers, experts that are nearly tied)."""


@torch.no_grad()  # not inference mode, whose tensors a model may keep and then not be trained with
def tried(target: Target) -> dict[str, int | None]:
    """Run trees over the target, which is on backend `eager`.

    Returns:
        the windows that its layers really have, by their kinds.

    Raises:
        UserError: it says something else, or nothing, over trees.
    """
    name = type(target.model).__name__
    a, b, c, d, e, f, g = (
        torch.arange(1, 8, device=target.device) * max(1, target.vocab_size // 9) % target.vocab_size
    ).unbind()
    texts = torch.stack([torch.stack([a, c, d, e, g]), torch.stack([a, b, d, e, f])])
    config: Any = target.config
    with _narrow(config):
        model = _Model(target)
        try:
            expected = model.plain(texts, use_cache=False)[0]
        except Exception as error:  # families raise what they like
            raise UserError(f"{name} cannot run over plain token ids ({first_line(error)}); choose another") from error
        windows = windows_of(config)
        if not expected.isfinite().all():  # nothing to compare with: decoding ends its rows with the reason
            return windows
        tries = [windows, *([dict.fromkeys(windows)] if any(windows.values()) else [])]
        reasons = []
        for kinds in tries:
            try:
                found = model.over_trees(kinds, [torch.stack([a, b, c, d]), torch.stack([e, f, g])])
            except Exception as error:  # families raise what they like
                reasons.append(f"it fails with '{first_line(error)}'")
                continue
            if _close(found, expected, model, texts):
                break
            reasons.append("it says something else than over plain text")
        else:
            raise UserError(
                f"{name} cannot verify trees: {reasons[0]} (does it keep more than keys and values, or look at what "
                "follows?); choose a model of another family"
            )
    return windows_of(config) if kinds is windows else dict.fromkeys(windows_of(config))


class _Model:
    """The model as it is, or a smaller one of the same layers, whose features stand for what it says.

    Args:
        target: of the whole.
    """

    def __init__(self, target: Target):
        self.target, self.inner = target, _smaller(target)

    def plain(self, tokens: Tensor, **settings: Any) -> tuple[Tensor, Any]:
        """`(rows, tokens, ...)` what it says in a forward of its own, and its cache."""
        if self.inner is None:
            output = self.target.model(input_ids=tokens, **settings)
            return output.logits, output.get("past_key_values")
        output = self.inner(input_ids=tokens, **settings)
        return output.last_hidden_state, output.get("past_key_values")

    def over_trees(self, windows: dict[str, int | None], trees: list[Tensor]) -> Tensor:
        """`(2, 5, ...)` what it says at the trees' nodes, where the two texts have them; zeros elsewhere."""
        trial = Target.__new__(Target)
        trial.__dict__.update(self.target.__dict__, windows=windows)
        trial._inner = self.inner or self.target.model.base_model
        trial._run = trial._whole
        run = ModelRunner(trial, SlotCache(1, trial.num_layers, 4))
        first, second = (
            run.tree(Tree(tokens[None], torch.tensor([parents], device=tokens.device), [len(parents)])).features[0]
            for tokens, parents in _committing(run, trees)
        )
        if self.inner is None:
            first, second = trial.head(first), trial.head(second)
        kept = torch.cat([first[[0, 2, 3]], second[[0, 2]]])
        return torch.stack([kept, torch.cat([first[:2], torch.zeros_like(kept[2:])])])


def _committing(run: ModelRunner, trees: list[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """Each tree and its parents; before the second, a path of the first is kept that skips over a node."""
    yield trees[0], FIRST
    run.cache.commit([[0, 2, 3]])
    yield trees[1], SECOND


def _close(found: Tensor, expected: Tensor, model: _Model, texts: Tensor) -> bool:
    expected = torch.stack([expected[0], torch.cat([expected[1, :2], torch.zeros_like(expected[1, 2:])])])
    off = _off(found, expected)
    if off <= TOLERANCE.get(expected.dtype, ROUGH):
        return True
    try:
        begun, past = model.plain(texts[:1, :3], use_cache=True)
        steps = [model.plain(texts[:1, [place]], use_cache=True, past_key_values=past)[0] for place in (3, 4)]
    except Exception:  # without a cache of its own there is nothing to compare with
        return False
    noise = _off(torch.cat([begun, *steps], dim=1)[0], expected[0])
    if off > min(NOISE * noise, MOST_NOISE):
        return False
    name = type(model.target.model).__name__
    warnings.warn(
        f"what {name} says depends on how many tokens it reads at once (by {off:.1%} here, quantised activations?), so "
        "drafts can change its text; see `outdraft verify`",
        stacklevel=5,
    )
    return True


def _off(found: Tensor, expected: Tensor) -> float:
    """How far apart they are, relative to what is expected; infinite where there are no numbers."""
    apart = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return apart if apart == apart else float("inf")


@contextmanager
def _narrow(config: Any) -> Iterator[None]:
    """With a window that a few tokens reach past, where there is one."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= WINDOW:
        yield
        return
    config.__dict__["sliding_window"] = WINDOW
    try:
        yield
    finally:
        config.__dict__["sliding_window"] = window


def _smaller(target: Target) -> Any:
    """Of a large model the inner one with a layer of every kind; None where the whole is no more."""
    model: Any = target.model
    if sum(weight.numel() * weight.element_size() for weight in model.parameters()) < LARGE:
        return None
    try:
        layers = list(layers_of(model))
    except UserError:
        return None
    kinds = getattr(target.config, "layer_types", None) or [None] * len(layers)
    first: dict[Any, int] = {}
    for place, layer in enumerate(layers):
        shape = tuple((name, type(part)) for name, part in layer.named_modules())
        first.setdefault((kinds[place], shape), place)
    places = list(first.values())
    return view_of(model, [layers[place] for place in places], places)
