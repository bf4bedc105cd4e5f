"""Packed forwards compute what the stock modules compute, and leave the model as it was."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from models import VOCAB, tiny
from outdraft.api.generation import load
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.target.backends import (
    PackedLinear,
    accelerate,
    count_parameters,
    default_backend,
    default_dtype,
    fused_modules,
    why_not_native,
)
from outdraft.target.backends.tree_attention import has_triton
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "gpt2", "gemma2"])
def test_packed_features_and_logits_are_those_of_stock_modules(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    eager, packed = Target(model), Target(model, backend="packed")
    assert packed.backend == "packed" and packed.num_parameters == eager.num_parameters
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, stock = packed.features(tokens), eager.features(tokens)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(packed.head(stock), eager.head(stock), atol=2e-4, rtol=1e-5)
        else:  # they round in other places, so both are held against what is hardly rounded
            sharp = Target(copy.deepcopy(model).double())
            right, logits = sharp.features(tokens), sharp.head(stock.double())
            assert (ours - right).norm() <= 1.5 * (stock - right).norm() <= 0.03 * right.norm()
            assert (packed.head(stock) - logits).norm() <= 1.5 * (eager.head(stock) - logits).norm()


def test_packing_replaces_every_linear_layer_and_touches_nothing_of_the_original() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    view = accelerate(model, "packed")
    linears = [module for module in view.modules() if isinstance(module, nn.Linear)]
    # Two layers of four (queries, keys and values are joined, and so are gate and up), and the output layer.
    assert not linears and sum(isinstance(module, PackedLinear) for module in view.modules()) == 9
    assert count_parameters(view) == count_parameters(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 15
    assert view.get_input_embeddings().weight is model.get_input_embeddings().weight


def doubled(model: nn.Module) -> dict[str, int]:
    """How many modules of a packed view are doubles, by kind."""
    found = Counter(type(module).__name__ for module in accelerate(model, "packed").modules())
    return {name: count for name, count in found.items() if name.startswith("Fused")}


@pytest.mark.parametrize(
    ("family", "doubles"),
    [
        ("llama-gqa", {"FusedAttention": 2, "FusedMLP": 2, "FusedNorm": 5}),
        ("qwen3", {"FusedAttention": 2, "FusedMLP": 2, "FusedNorm": 9}),
        ("gemma2", {"FusedAttention": 4, "FusedMLP": 4}),  # weights of its norms count from one
        ("phi3", {"FusedNorm": 5}),  # its projections are joined already
        ("gpt-neox", {}),
        ("nemotron", {}),  # half of every head is rotated, as much as the tables are wide
        ("glm4-moe", {"FusedMLP": 2, "FusedNorm": 5}),
    ],
)
def test_modules_are_known_by_what_they_hold(family: str, doubles: dict[str, int]) -> None:
    assert doubled(tiny(family, dtype=torch.float32)) == doubles


@pytest.mark.parametrize(
    "family", ["llama-gqa", "llama-mha", "qwen2-sliding", "qwen3", "gemma3", "phi3", "nemotron", "glm4-moe"]
)
def test_doubles_give_over_trees_what_stock_modules_give(family: str) -> None:
    model = tiny(family, dtype=torch.float32)
    with torch.inference_mode():
        for rows, nodes in ((2, 5), (1, 1), (1, 9), (3, 1), (2, fused_modules.FOLDED), (2, fused_modules.FOLDED + 1)):
            ours, stock = (
                tree_features(Target(model, backend=backend), rows, nodes) for backend in ("packed", "eager")
            )
            torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-sliding", "gemma3"])
def test_prompts_are_read_as_stock_modules_read_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every token sees all before it by the kernel for that, everywhere else under the mask."""
    monkeypatch.setattr(fused_modules, "LONG", 16)
    model = tiny(family, dtype=torch.float32)
    prompts = [torch.arange(3, 43) % VOCAB, torch.arange(20) % VOCAB]
    kinds: dict[str, list[bool]] = {"packed": [], "eager": []}
    real = fused_modules.F.scaled_dot_product_attention
    with torch.inference_mode():
        for pieces in (1024, 24):
            found = []
            for backend, seen in kinds.items():

                def recorded(*args: Any, seen: list[bool] = seen, **settings: Any) -> torch.Tensor:
                    seen.append(bool(settings.get("is_causal")))
                    return real(*args, **settings)

                monkeypatch.setattr(fused_modules.F, "scaled_dot_product_attention", recorded)
                target = Target(model, backend=backend)
                run = ModelRunner(target, target.new_cache(2, 64))
                out = Output.cat(list(run.prefill_in_pieces(prompts, pieces))).features
                found.append([out[0], out[1, :20]])
            for ours, stock in zip(*found, strict=True):
                torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)
    assert set(kinds["packed"]) == {True, False} and set(kinds["eager"]) == {False}


def test_a_module_that_computes_otherwise_than_it_looks_is_left_alone() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)

    class Clipping(type(model.model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None,
                    past_key_values: Any = None, **kwargs: Any) -> Any:  # fmt: skip
            return super().forward(hidden_states.clamp(-8, 8), position_embeddings, attention_mask, past_key_values)

    class Offset(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 0.01

    model.model.layers[0].self_attn.__class__ = Clipping
    model.model.norm.__class__ = Offset
    model.model.layers[1].mlp.register_forward_hook(lambda *given: None)
    assert doubled(model) == {"FusedAttention": 1, "FusedMLP": 1, "FusedNorm": 4}


def test_hooks_of_linear_layers_run_on() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, given, out: out + 1)
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    assert doubled(model) == {"FusedAttention": 1, "FusedMLP": 1, "FusedNorm": 5}
    view, tokens = accelerate(model, "packed"), torch.tensor([[1, 2, 3]])
    assert sum(isinstance(module, nn.Linear) for module in view.modules()) == 2
    with torch.inference_mode():
        torch.testing.assert_close(view(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-5)


def test_a_norm_without_a_weight_is_left_alone() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    model.model.norm = nn.RMSNorm(32, eps=1e-6, elementwise_affine=False)
    assert doubled(model)["FusedNorm"] == 4


def test_packed_drafters_draft_the_same() -> None:
    torch.manual_seed(0)
    head = FeatureHead(FeatureHeadConfig(32, 48, 4, 2, 8, 32)).eval()
    x = torch.randn(2, 1, 5, 32)
    with torch.inference_mode():
        for ours, stock in zip(accelerate(head, "packed")(*x), head(*x), strict=True):
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_packed_drafters_are_as_large_as_before() -> None:
    target = Target(tiny("llama-gqa", dtype=torch.float32))
    head = FeatureHead(FeatureHeadConfig(32, 48, 4, 2, 8, 32))
    whole = sum(parameter.numel() for parameter in head.parameters())
    for backend in ("eager", "packed"):
        assert FeatureDrafter(accelerate(head, backend), target).num_parameters == whole


def test_what_cannot_be_packed_falls_back_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="using 'eager'") as warned:
        target = Target(tiny("llama-gqa", dtype=torch.float64), backend="packed")
    assert target.backend == "eager" and len(warned) == 1


def test_models_with_adapters_fall_back_with_a_warning() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    model.peft_config = {"default": object()}
    with pytest.warns(UserWarning, match="adapters"):
        assert accelerate(model, "packed") is model


def test_models_with_parametrized_weights_fall_back_with_a_warning() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.warns(UserWarning, match="parametrized"):
        assert accelerate(model, "packed") is model


def test_packed_layers_tell_their_weights_type_and_shape() -> None:
    layer = PackedLinear(torch.zeros(6, 4), None)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device.type) == (torch.float32, (6, 4), "meta")
    assert not list(layer.parameters())


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        load(tiny("llama-gqa"), backend="fast")


def test_defaults_suit_the_device() -> None:
    cpu = torch.device("cpu")
    assert default_dtype(cpu) in (torch.bfloat16, torch.float32)
    assert default_backend(cpu, torch.bfloat16) == ("packed" if why_not_native() else "native")
    assert default_backend(cpu, torch.float64) == "eager"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == ("graphs" if has_triton() else "eager")


# --- helpers -------------------------------------------------------------------------------------------------


def tree_features(target: Target, rows: int = 2, nodes: int = 5) -> torch.Tensor:
    """Features of random trees behind prompts of different lengths."""
    dice = torch.Generator().manual_seed(nodes)
    run = ModelRunner(target, target.new_cache(rows, 4))
    run.prefill([torch.randint(32, (3 + 4 * row,), generator=dice) for row in range(rows)])
    parents = torch.tensor([-1, *((node - 1) // 2 for node in range(1, nodes))]).expand(rows, -1)
    tree = Tree(torch.randint(32, (rows, nodes), generator=dice), parents, [nodes] * rows)
    return run.tree(tree).features


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_targets_decode_losslessly_without_being_asked_for_eager(kind: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    tiny("llama-gqa", dtype=torch.float32).save_pretrained(tmp_path)
    config = TorchAoConfig(getattr(quantization, kind)())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert "Int8" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    prompts = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend")
        loaded = load(model, method="prompt-lookup")
    together = loaded.generate(prompts, max_new_tokens=24)
    assert loaded.target.backend == "eager" and together.statistics.accepted > 0
    assert together.tokens == load(model).generate(prompts, max_new_tokens=24).tokens
    assert together.tokens == [loaded.generate(prompt, max_new_tokens=24).tokens[0] for prompt in prompts]
