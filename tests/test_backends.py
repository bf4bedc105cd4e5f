"""The packed backend computes what the stock modules compute, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models import tiny
from outdraft.backends import PackedLinear, accelerate, default_backend, default_dtype
from outdraft.drafters.feature_drafting import FeatureDrafter
from outdraft.drafters.feature_head import FeatureHead, FeatureHeadConfig
from outdraft.errors import UserError
from outdraft.generation import load
from outdraft.target import Target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "gpt2", "gemma2"])
def test_packed_features_and_logits_are_those_of_stock_modules(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    eager, packed = Target(model), Target(model, backend="packed")
    assert packed.backend == "packed" and packed.num_parameters == eager.num_parameters
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, stock = packed.features(tokens), eager.features(tokens)
        tolerance = 1e-5 if dtype == torch.float32 else 0.06
        torch.testing.assert_close(ours.float(), stock.float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            packed.head(stock).float(), eager.head(stock).float(), atol=20 * tolerance, rtol=tolerance
        )


def test_packing_replaces_every_linear_layer_and_touches_nothing_of_the_original() -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    view = accelerate(model, "packed")
    linears = [module for module in view.modules() if isinstance(module, nn.Linear)]
    assert not linears and sum(isinstance(module, PackedLinear) for module in view.modules()) == 15
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 15
    assert view.get_input_embeddings().weight is model.get_input_embeddings().weight


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


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        load(tiny("llama-gqa"), backend="fast")


def test_defaults_suit_the_device() -> None:
    cpu = torch.device("cpu")
    assert default_dtype(cpu) in (torch.bfloat16, torch.float32)
    assert default_backend(cpu, torch.bfloat16) == "packed"
    assert default_backend(cpu, torch.float64) == "eager"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == "eager"
