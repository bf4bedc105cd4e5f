"""A trial of a model at loading: it compares a small tree over our cache with the model's own outputs.

Which families keep more than keys and values, look at what follows, or ignore a configured window changes with every
version of `transformers`, so no list of names would be right. The trial runs a branching tree, keeps one of its paths,
and runs another tree after it, in three forwards over a few tokens. The model stays as it is.
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
from outdraft.target.limits import windows_of
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import layers_of, view_of

FIRST, SECOND = [-1, 0, 0, 2], [-1, 0, 0]
"""Parents of the two trees' nodes; nodes 0, 2 and 3 of the first are kept."""

WINDOW = 2
"""Window that replaces a longer one, so that a few tokens reach past it."""

LARGE = 2 << 30
"""Bytes of weights from which one layer of each kind is tried instead of all."""

TOLERANCE, ROUGH = {torch.float64: 1e-6, torch.float32: 1e-4}, 0.1
"""Largest difference of trees from plain text, relative to its norm; `ROUGH` in 16 bits."""

NOISE, MOST_NOISE = 4.0, 0.2
"""Limits where rounding alone exceeds the tolerance (products of quantised numbers, experts that are nearly tied): the
tree's difference relative to plain decoding's with a cache, and the largest of all."""


@torch.no_grad()  # not inference mode, whose tensors a model may keep and then not be trained with
def tried(target: Target) -> dict[str, int | None]:
    """Run trees over the target, which is on backend `eager`.

    Returns:
        The windows that its layers really have, by kind of layer.

    Raises:
        UserError: its outputs over trees differ, or it fails.
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
        except Exception as error:  # families raise any exception
            raise UserError(f"{name} cannot run over plain token ids ({first_line(error)}); choose another") from error
        windows = windows_of(config)
        if not expected.isfinite().all():  # nothing to compare with: decoding ends its rows with the reason
            return windows
        tries = [windows, *([dict.fromkeys(windows)] if any(windows.values()) else [])]
        reasons = []
        for kinds in tries:
            try:
                found = model.over_trees(kinds, [torch.stack([a, b, c, d]), torch.stack([e, f, g])])
            except Exception as error:  # families raise any exception
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
    """The model itself, or a smaller one of the same layers, whose features replace the logits."""

    def __init__(self, target: Target):
        self.target, self.inner = target, _smaller(target)

    def plain(self, tokens: Tensor, **settings: Any) -> tuple[Tensor, Any]:
        """Return the `(rows, tokens, ...)` outputs of a forward of its own, and its cache."""
        if self.inner is None:
            output = self.target.model(input_ids=tokens, **settings)
            return output.logits, output.get("past_key_values")
        output = self.inner(input_ids=tokens, **settings)
        return output.last_hidden_state, output.get("past_key_values")

    def over_trees(self, windows: dict[str, int | None], trees: list[Tensor]) -> Tensor:
        """Return the `(2, 5, ...)` outputs at the trees' nodes, where the two texts have them; zeros elsewhere."""
        trial = Target.__new__(Target)
        trial.__dict__.update(self.target.__dict__, windows=windows)
        trial._inner = self.inner or self.target._inner
        trial._run = trial._whole
        run = ModelRunner(trial, SlotCache(1, trial.num_layers, 4))

        def over(tokens: Tensor, parents: list[int]) -> Tensor:
            tree = Tree(tokens[None], torch.tensor([parents], device=tokens.device), [len(parents)])
            features = run.tree(tree).features[0]
            return trial.head(features) if self.inner is None else features

        first = over(trees[0], FIRST)
        run.cache.commit([[0, 2, 3]])  # a path that skips a node
        second = over(trees[1], SECOND)
        kept = torch.cat([first[[0, 2, 3]], second[[0, 2]]])
        return torch.stack([kept, torch.cat([first[:2], torch.zeros_like(kept[2:])])])


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
    """Return the difference relative to the expected norm; infinite if it is not finite."""
    apart = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return apart if apart == apart else float("inf")


@contextmanager
def _narrow(config: Any) -> Iterator[None]:
    """Replace the configuration's window, if any, by one that a few tokens reach past."""
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
    """Return an inner model with one layer of every kind, if the model is large; None if the whole is no larger."""
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
    indices = list(first.values())
    return view_of(model, [layers[place] for place in indices], indices)
