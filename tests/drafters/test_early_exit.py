"""EESD's views: nothing of the target is copied, the lower layers run once a token, and the cut changes no result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedModel

from models import FAMILIES, FURTHER, tiny
from outdraft.core import tensors
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Update
from outdraft.engine.round import decode
from outdraft.errors import UserError
from outdraft.methods.eesd.drafter import EarlyExit, EarlyExitState
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, empty
from outdraft.target.backends import accelerate
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads, exit_view, layers_of, shortcut_view
from test_losslessness import exit_drafter, rows_of

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])


def split_after(model: PreTrainedModel, layers: int) -> Reader:
    """The model in two parts, of which the first one's output is read."""
    return Reader(model, Reads(features=False, layers=(layers,), split=layers))


@pytest.mark.parametrize("family", FAMILIES | FURTHER)
@torch.inference_mode()
def test_a_model_cut_in_two_gives_the_same_bits(family: str) -> None:
    model = tiny(family, dtype=torch.float32)
    expected = model.base_model(input_ids=IDS, use_cache=False)
    total = len(layers_of(model))
    for layers in range(1, total):
        features, hidden = split_after(model, layers)(input_ids=IDS, use_cache=False)
        assert torch.equal(features, expected.last_hidden_state)
    exit_of_itself = exit_view(model, copy.deepcopy(layers_of(model)[-1]))
    assert torch.equal(exit_of_itself(hidden, use_cache=False)[0], expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES | FURTHER)
@torch.inference_mode()
def test_an_exit_layer_begins_as_the_target_s_last_layer(family: str) -> None:
    """Built anew from the config, weights and constants in place: after all other layers it is the target itself."""
    model = tiny(family, dtype=torch.float32)
    target = Target(model)
    last = len(layers_of(model)) - 1
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(last, own_head=True)).eval()
    features, hidden = split_after(model, last)(input_ids=IDS, use_cache=False)
    bound = exit_layer.bind(target)
    assert torch.equal(bound.features(hidden, use_cache=False), features)
    assert torch.allclose(bound.head(features), target.head(features), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES | FURTHER)
@torch.inference_mode()
def test_first_layers_and_exit_layer_at_once_are_one_after_the_other(family: str) -> None:
    model = tiny(family, dtype=torch.float32, seed=1)
    layer = copy.deepcopy(layers_of(model)[-1])
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(1.1)
    for layers in range(1, len(layers_of(model))):
        hidden = split_after(model, layers).lower(input_ids=IDS, use_cache=False)
        features = exit_view(model, layer)(hidden, use_cache=False)[0]
        at_once = shortcut_view(model, layers, layer)(input_ids=IDS, use_cache=False)
        assert torch.equal(at_once[0], features) and torch.equal(at_once[1], hidden)


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_an_exit_where_there_is_none_is_refused_in_one_line(layers: int) -> None:
    model = tiny("llama-gqa")
    for make in (lambda: split_after(model, layers), lambda: empty(model, ExitLayerConfig(layers))):
        with pytest.raises(UserError, match=f"between 1 and 1 for this model, not {layers}"):
            make()


# --- memory ----------------------------------------------------------------------------------------------------------


def storages(*modules: torch.nn.Module) -> set[int]:
    """Where the weights of all modules lie, packed ones included."""
    found = set()
    for module in (module for top in modules for module in top.modules()):
        held = [*module._parameters.values(), *module._buffers.values(), module.__dict__.get("_packed")]
        for tensor in (tensor for tensor in held if tensor is not None):
            opaque = tensor.layout is torch._mkldnn  # type: ignore[attr-defined]
            found.add(id(tensor) if opaque else tensor.untyped_storage().data_ptr())
    return found


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("backend", ["eager", "packed"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "gpt2", "gpt-neo", "gemma2"])
def test_no_weight_of_the_target_is_held_twice(family: str, backend: str, own_head: bool) -> None:
    model = tiny(family, dtype=torch.float32)
    target = Target(model, backend=backend)
    original = storages(target.model)
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(1, own_head))
    own = sum(1 for _ in exit_layer.parameters())
    drafter = EarlyExit(accelerate(exit_layer.eval(), backend), target)
    reader = target.reader(drafter.reads)
    views = [reader._first._inner, reader._last._inner, drafter.exit.view._inner]
    borrowed = storages(*views) & original
    added = (storages(*views) | storages(drafter.exit_layer)) - original
    assert len(borrowed) > 10
    assert added == storages(drafter.exit_layer) - original, "nothing but the exit layer"
    # `packed` joins products of one input, and has a weight of its own beside that of each norm.
    assert len(added) <= own if backend == "packed" else len(added) == own
    assert drafter.num_parameters == sum(weight.numel() for weight in exit_layer.parameters())


# --- work ------------------------------------------------------------------------------------------------------------


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens that went through each layer."""
    layers = layers_of(model)  # type: ignore[arg-type]
    counts = [0] * len(layers)

    def counting(place: int):
        def hook(module: object, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[place] += hidden.shape[1]

        return hook

    hooks = [layer.register_forward_pre_hook(counting(i), with_kwargs=True) for i, layer in enumerate(layers)]
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(temperature=1)], ids=["greedy", "drawn"])
def test_the_lower_layers_run_once_for_every_token_of_a_chain(settings: SamplingSettings) -> None:
    """As often as the upper ones, drafting included."""
    target = Target(tiny("gemma2"))
    drafter = exit_drafter(target)
    rows = rows_of(target, [[5, 9, 9, 3, 5, 9]], settings, 20, [Dice(0)])
    with counted(target.model) as counts:
        for _ in decode(target, drafter, rows, TreeShape.chain(3, candidates="sampled")):
            pass
    verified = 6 + sum(1 + depth for depth in rows[0].statistics.depths)
    assert rows[0].statistics.accepted > 0
    assert counts == [verified] * target.num_layers


def test_of_a_tree_the_lower_layers_run_what_is_expanded_and_the_leaves_that_are_kept() -> None:
    target = Target(tiny("gemma2"))
    drafter, shape = exit_drafter(target), TreeShape(2, 3, 8)
    rows = rows_of(target, [[5, 9, 9, 3, 5, 9]], SamplingSettings(), 20, [Dice(0)])
    with counted(target.model) as counts:
        for _ in decode(target, drafter, rows, shape):
            pass
    rounds = rows[0].statistics.rounds
    lower, upper = counts[0], counts[-1]
    assert counts == [lower] * 2 + [upper] * 2
    assert upper == 6 + rounds * 8
    expanded = rounds * (1 + 2 * 3)
    assert 6 + expanded < lower <= 6 + expanded + rounds * 7


def test_slots_of_a_round_are_enough_for_what_runs_ahead() -> None:
    """The cache never has to grow while decoding."""
    target = Target(tiny("llama-gqa"))
    drafter, shape = exit_drafter(target), TreeShape(3, 4, 12)
    rows = rows_of(target, [[5, 9, 9, 3], [1, 2]], SamplingSettings(), 20, [Dice(0), Dice(1)])
    begin, caches = drafter.begin, []

    def noting(prompts: object, run: ModelRunner) -> object:
        state = begin(prompts, run)
        caches.extend([(run.cache, run.cache.capacity), (state.cache, state.cache.capacity)])
        return state

    drafter.begin = noting  # type: ignore[method-assign, assignment]
    for _ in decode(target, drafter, rows, shape):
        assert [cache.capacity for cache, _ in caches] == [capacity for _, capacity in caches]
    assert len(caches) == 2
    assert sum(row.statistics.drafted for row in rows) > 0


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2"])
@pytest.mark.parametrize("shape", [TreeShape.chain(3), TreeShape(2, 3, 8)], ids=["chain", "tree"])
def test_what_was_computed_for_accepted_candidates_is_what_a_fresh_run_computes(
    monkeypatch: pytest.MonkeyPatch, family: str, shape: TreeShape
) -> None:
    """Exit features of every level, ragged rows: in one run or two, with what was kept or everything anew, and as
    where the host would wait for it."""
    model = tiny(family)

    def recorded(at_once: bool, keeping: bool, free: tuple[str, ...] = ("cpu",)) -> tuple[list, list[list[int]], int]:
        monkeypatch.setattr(tensors, "READ_FREELY", free)
        target = Target(model)
        drafter = exit_drafter(target)
        through, kept = [], 0
        head, keep = drafter.exit.head, EarlyExitState._keep_accepted
        drafter.exit.head = lambda features: through.append(features) or head(features)  # type: ignore[func-returns-value]

        def accepted(state: EarlyExitState, update: Update) -> list[int]:
            nonlocal kept
            state._at_once = at_once
            if not keeping:
                state._expanded = []
            found = keep(state, update)
            kept += sum(found)
            return found

        monkeypatch.setattr(EarlyExitState, "_keep_accepted", accepted)
        rows = rows_of(target, [[5, 9, 9, 3, 5, 9], [1, 2]], SamplingSettings(), 12, [Dice(0), Dice(1)])
        for _ in decode(target, drafter, rows, shape):
            pass
        monkeypatch.undo()
        return through, [row.tokens for row in rows], kept

    own, tokens, kept = recorded(True, True)
    assert kept > 0, "something was accepted and expanded"
    waiting = ((True, True, ()), (False, True, ()))
    for how in ((True, False), (False, True), (False, False), *waiting):
        other, same_tokens, again = recorded(*how)  # type: ignore[misc]
        assert not again or how not in waiting
        assert tokens == same_tokens and len(own) == len(other)
        for x, y in zip(own, other, strict=True):
            torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


def test_a_level_is_one_forward_and_so_is_a_round_s_first_where_all_was_expanded() -> None:
    target = Target(tiny("llama-gqa"))
    drafter = exit_drafter(target)
    calls = {"lower": 0, "exit": 0, "at once": 0}

    def counting(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    reader = target.reader(drafter.reads)
    reader.lower = counting("lower", reader.lower)  # type: ignore[method-assign]
    drafter.exit.features = counting("exit", drafter.exit.features)  # type: ignore[method-assign]
    drafter.shortcut = counting("at once", drafter.shortcut)  # type: ignore[assignment]
    rows = rows_of(target, [[5, 9, 9, 3, 5, 9]], SamplingSettings(), 20, [Dice(0)])
    for _ in decode(target, drafter, rows, TreeShape.chain(3)):
        pass
    statistics = rows[0].statistics
    whole = sum(length == 3 for length in statistics.lengths[:-1])  # the leaf was accepted, and nobody had expanded it
    assert whole < statistics.rounds - 1
    assert calls["exit"] == 1 + whole
    assert calls["at once"] == 3 * statistics.rounds - calls["exit"]
