"""EESD's views: nothing of the target is copied, the lower layers run once a token, and the cut changes no result."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from models import FAMILIES, FURTHER, tiny
from outdraft.backends import accelerate
from outdraft.decoding import decode
from outdraft.drafters.base import TreeShape
from outdraft.drafters.early_exit import EarlyExit
from outdraft.drafters.exit_layer import ExitLayer, ExitLayerConfig, empty
from outdraft.errors import UserError
from outdraft.layers import Cut, ExitView, layers_of
from outdraft.sampling import Dice, SamplingSettings
from outdraft.target import Target
from test_losslessness import exit_drafter, rows_of

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("family", FAMILIES | FURTHER)
@torch.inference_mode()
def test_a_model_cut_in_two_gives_the_same_bits(family: str) -> None:
    model = tiny(family, dtype=torch.float32)
    expected = model.base_model(input_ids=IDS, use_cache=False)
    total = len(layers_of(model))
    for layers in range(1, total):
        hidden, features = Cut(model, layers).both(input_ids=IDS, use_cache=False)
        assert torch.equal(features, expected.last_hidden_state)
    exit_of_itself = ExitView(model, copy.deepcopy(layers_of(model)[-1]))
    assert torch.equal(exit_of_itself(hidden, use_cache=False), expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES | FURTHER)
@torch.inference_mode()
def test_an_exit_layer_begins_as_the_target_s_last_layer(family: str) -> None:
    """Built anew from the config, weights and constants in place: after all other layers it is the target itself."""
    model = tiny(family, dtype=torch.float32)
    target = Target(model)
    last = len(layers_of(model)) - 1
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(last, own_head=True)).eval()
    hidden, features = Cut(model, last).both(input_ids=IDS, use_cache=False)
    bound = exit_layer.bind(target)
    assert torch.equal(bound.features(hidden, use_cache=False), features)
    assert torch.allclose(bound.head(features), target.head(features), atol=1e-5)


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_an_exit_where_there_is_none_is_refused_in_one_line(layers: int) -> None:
    model = tiny("llama-gqa")
    for make in (lambda: Cut(model, layers), lambda: empty(model, ExitLayerConfig(layers))):
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
    views = [drafter.cut._lower, drafter.cut._upper, drafter.exit._view._inner]
    borrowed = storages(*views) & original
    added = (storages(*views) | storages(drafter.exit_layer)) - original
    assert len(borrowed) > 10
    assert len(added) == own
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
    run = drafter.start(target, target.new_cache(2, 24 + drafter.slots(shape)))
    capacity = run.cache.capacity
    drafter.start = lambda *_: run  # type: ignore[method-assign]
    for _ in decode(target, drafter, rows, shape):
        assert run.cache.capacity == capacity
    assert sum(row.statistics.drafted for row in rows) > 0
