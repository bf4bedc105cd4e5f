"""Forwards over trees on backend `graphs`, unrecorded as on every CPU, compute what the stock modules compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import outdraft.target.cache as cache_module
from models import perturbed, tiny
from outdraft.api.generation import load
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.target.backends import accelerate, fused, fused_modules, graphs, tree_attention
from outdraft.target.backends.tree_forward import with_attention
from outdraft.target.limits import slot_bytes
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target
from test_backends import tree_features

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Stock norms compute in single precision whatever the model does."""

FAMILIES = [
    "llama-gqa",
    "llama-mha",
    "llama-tied",
    "mistral-sliding",
    "qwen2-sliding",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt-neox",
    "gpt2",
    "nemotron",
    "deepseek",
]


def on_graphs(model: nn.Module) -> Target:
    target = Target(model, backend="graphs")  # type: ignore[arg-type]
    assert target.backend == "graphs"
    return target


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_over_trees_are_those_of_stock_modules(family: str, dtype: torch.dtype) -> None:
    """One row and several of uneven lengths; three rows where four have room, nine nodes in a recording of ten."""
    model = tiny(family, dtype=dtype)
    target, eager = on_graphs(model), Target(model)
    for rows, nodes in ((2, 5), (1, 1), (1, 9), (3, 1), (3, 9), (2, fused_modules.FOLDED + 1)):
        torch.testing.assert_close(tree_features(target, rows, nodes), tree_features(eager, rows, nodes), **CLOSE)
    assert target._run.serves and {(key[2], key[3]) for key in target._run.recordings} == {
        (2, 5), (1, 1), (1, 10), (4, 1), (4, 10), (2, 20)
    }  # fmt: skip


def grown(target: Target, seed: int) -> list[Output]:
    """Rounds of larger, then smaller trees, fewer rows, other paths; what each of them gave."""
    dice = torch.Generator().manual_seed(seed)
    run = ModelRunner(target, target.new_cache(4, 4))
    run.prefill([torch.randint(32, (2 + 3 * row,), generator=dice) for row in range(4)])
    found = []
    for rows, nodes in ((4, 10), (4, 9), (3, 9), (3, 10), (1, 10), (1, 9), (1, 4), (1, 3)):
        if rows < run.cache.rows:
            run.cache.select_rows([row + 1 for row in range(rows)] if rows > 1 else [0])
        parents = [
            [-1, *(int(torch.randint(node, (), generator=dice)) for node in range(1, nodes))] for _ in range(rows)
        ]
        tree = Tree(torch.randint(32, (rows, nodes), generator=dice), torch.tensor(parents), [nodes] * rows)
        found.append(run.tree(tree))
        last = [next(node for node in range(1, nodes) if row[node] == 0) for row in parents]
        run.cache.commit([[0, node] if row % 2 == 0 else [0] for row, node in enumerate(last)])
    return found


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-sliding", "gpt2"])
def test_what_a_recording_held_before_does_not_show(family: str) -> None:
    model = tiny(family)
    target = on_graphs(model)
    for ours, stock in zip(grown(target, 0), grown(Target(model), 0), strict=True):
        torch.testing.assert_close(ours.features, stock.features, **CLOSE)
    assert {key[3:] for key in target._run.recordings} == {(10, 10), (4, 4), (3, 3)}, "nine nodes run as ten"


def test_buffers_that_grow_keep_what_they_hold_and_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "rounded_slots", lambda slots: slots)
    model = tiny("qwen2-sliding")
    target = on_graphs(model)
    for ours, stock in zip(grown(target, 1), grown(Target(model), 1), strict=True):
        torch.testing.assert_close(ours.features, stock.features, **CLOSE)
    assert len({key[1] for key in target._run.recordings}) > 1, "they lay elsewhere before"


def test_a_forward_may_fill_its_buffers_to_the_last_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for ten nodes, nine are recorded as they are."""
    monkeypatch.setattr(cache_module, "rounded_slots", lambda slots: slots)
    model = tiny("llama-gqa")
    found = []
    for target in (on_graphs(model), Target(model)):
        run = ModelRunner(target, target.new_cache(1, 12))
        run.prefill([torch.tensor([3, 1, 2])])
        found.append(run.tree(Tree.chains(torch.arange(9)[None], 1)).features)
        assert run.cache.capacity == 12
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("limit", ["MOST_TOKENS", "MOST_RECORDINGS"])
def test_few_recordings_of_few_tokens_are_kept(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, limit, 2)
    model = tiny("llama-gqa")
    target = on_graphs(model)
    for nodes in (1, 2, 3, 4, 2):
        torch.testing.assert_close(tree_features(target, 1, nodes), tree_features(Target(model), 1, nodes), **CLOSE)
    kept = {"MOST_TOKENS": [1, 2], "MOST_RECORDINGS": [4, 2]}[limit]
    assert [key[3] for key in target._run.recordings] == kept


# --- models that cannot run this way ----------------------------------------------------------------------------


def gives_way(target: Target, model: nn.Module, reason: str) -> None:
    """One warning in all, and what the stock modules give."""
    stock = tree_features(Target(model))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=reason) as warned:
        found = [tree_features(target) for _ in range(2)]
    assert len(warned) == 1
    for ours in found:
        torch.testing.assert_close(ours, stock, **CLOSE)


def twice_as_sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tree_attention.tree_attention

    def attention(*given: Any) -> torch.Tensor:
        *tensors, scale, window = given
        return real(*tensors, 2 * scale, window)

    monkeypatch.setattr(tree_attention, "tree_attention", attention)


def test_what_computes_something_else_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    twice_as_sharp(monkeypatch)
    model = tiny("phi3")
    target = on_graphs(model)
    gives_way(target, model, "Phi3ForCausalLM's forward cannot run on backend 'graphs' .it computes something else")
    assert not target._run.serves and not target._run.recordings


def test_capped_scores_are_no_attention_of_ours() -> None:
    model = tiny("gemma2")
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *given: None)  # so that it has no double, which SDPA has no cap in
    gives_way(on_graphs(model), model, "attention with softcap")


def test_one_token_is_too_little_to_compare_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees itself only, so that any attention gives the same."""
    twice_as_sharp(monkeypatch)
    model = tiny("phi3")
    found = []
    for target in (on_graphs(model), Target(model)):
        run = ModelRunner(target, target.new_cache(1, 8))
        run.prefill([torch.tensor([3])])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found.append(run.tree(Tree.chains(torch.tensor([[4, 5, 6]]), 1)).features)
        assert len(warned) == (target.backend == "graphs")
    torch.testing.assert_close(*found, **CLOSE)


def test_what_cannot_be_recorded_runs_unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Recording, "record", refuse)
    model = tiny("llama-gqa")
    target = on_graphs(model)
    with pytest.warns(UserWarning, match="cannot be recorded .operation not permitted.*it runs unrecorded") as warned:
        ours = [tree_features(target, 2, nodes) for nodes in (5, 5, 3)]
    assert len(warned) == 1 and target._run.serves and not target._run.recordings
    torch.testing.assert_close(ours[1], tree_features(Target(model)), **CLOSE)
    torch.testing.assert_close(ours[0], ours[1])


@pytest.mark.parametrize("backend", ["graphs"])
def test_models_whose_attention_or_weights_are_special_run_as_they_are(backend: str) -> None:
    """Falcon takes an attention whose name it does not know for `eager`, with masks of another kind."""
    adapted = tiny("phi3", dtype=torch.float32)
    adapted.peft_config = {"default": object()}
    unlike = tiny("phi3", dtype=torch.float32, attention="eager"), tiny("falcon", dtype=torch.float32)
    reasons = "its attention is not 'sdpa'", "its attention cannot be replaced", "it has adapters"
    for model, reason in zip((*unlike, adapted), reasons, strict=True):
        with pytest.warns(UserWarning, match=f"backend '{backend}' cannot serve this model .{reason}") as warned:
            target = Target(model, backend=backend)
        assert len(warned) == 1 and target.backend != backend and target.pool is None
        torch.testing.assert_close(tree_features(target), tree_features(Target(model)), **CLOSE)


def test_attention_of_another_kind_is_not_replaced_in_what_runs_beside_such_a_model() -> None:
    """A drafter's layer keeps the attention that it was trained with."""
    for given, expected in (("eager", "eager"), ("sdpa", "another")):
        view = copy.copy(tiny("llama-gqa", attention=given).model.layers[0])
        with_attention(view, "another")
        assert view.self_attn.config._attn_implementation == expected


def test_exact_mode_is_not_offered() -> None:
    with pytest.raises(UserError, match="exact=True is not offered on backend 'graphs'"):
        load(tiny("llama-gqa"), backend="graphs").generate([[1, 2, 3]], exact=True)


# --- weights ----------------------------------------------------------------------------------------------------


def memory(*models: nn.Module) -> int:
    """Bytes of the storages of all their weights, each counted once."""
    weights = [weight.untyped_storage() for model in models for weight in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in weights}.values())


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen2", "gemma3"])
def test_weights_lie_in_memory_once(family: str) -> None:
    model = tiny(family)
    before, size = copy.deepcopy(model.state_dict()), memory(model)
    views = [accelerate(model, "graphs") for _ in range(2)]
    assert any(isinstance(module, fused.FusedAttention) for module in views[0].modules())
    assert memory(model, *views) == size
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    for view in views:
        joined = view.model.layers[1].mlp.gate_up_proj.weight
        assert joined[:48].any() and not joined[48:].any(), "a view sees what becomes of the model's weights"


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied"])
def test_a_model_is_saved_as_before(family: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    load(model, backend="graphs").generate([[1, 2, 3]], max_new_tokens=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert again.keys() == before.keys() and all(torch.equal(before[name], again[name]) for name in before)
    size = sum({weight.data_ptr(): weight.nbytes for weight in before.values()}.values())
    assert size <= (tmp_path / "model.safetensors").stat().st_size < 1.1 * size
    copied = perturbed(model, lambda: tiny(family, dtype=torch.float32), 0.0)
    assert all(torch.equal(before[name], weight) for name, weight in copied.state_dict().items())


def test_a_slot_of_the_cache_takes_as_much_as_ever() -> None:
    """Serving measures it on a cache whose buffers are larger than asked for."""
    model = tiny("llama-gqa")
    assert slot_bytes(on_graphs(model)) == slot_bytes(Target(model)) > 1
