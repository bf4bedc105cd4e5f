"""The network computes the equations of arXiv 2408.15562, section 3, in every combination of its switches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from drafter_reference import Shape, head_outputs, numbers, official_tensors

from outdraft.core.tree import attention_mask
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.target.cache import SlotCache

GQA = Shape(num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_theta=500.0, rms_norm_eps=1e-5)

# The last position's first four entries of p and r, from the numpy implementation.
PINNED = {
    "fspad": (
        [5.267157217225, 5.012773886837, -8.640372079129, 9.495861525142],
        [0.499756382458, 9.632332329483, -10.353512210252, 11.301439518792],
    ),
    "fs": (
        [5.267157217225, 5.012773886837, -8.640372079129, 9.495861525142],
        [5.267157217225, 5.012773886837, -8.640372079129, 9.495861525142],
    ),
    "pad": (
        [9.107007385934, 3.866770643412, 11.486186864542, 2.192824618894],
        [8.177677825614, 1.606962177562, 12.067925339635, 1.165846292532],
    ),
    "eagle": (
        [9.107007385934, 3.866770643412, 11.486186864542, 2.192824618894],
        [9.107007385934, 3.866770643412, 11.486186864542, 2.192824618894],
    ),
}
SWITCHES = {"fspad": (True, True), "fs": (True, False), "pad": (False, True), "eagle": (False, False)}


def torch_head(w: dict[str, np.ndarray], shape: Shape) -> FeatureHead:
    """The library's head with the same weights, put in place by hand, name by name."""
    sampling = "fc.fc.weight" in w
    fc = "fc.fc" if sampling else "fc"
    config = FeatureHeadConfig(
        **vars(shape),
        feature_sampling=sampling,
        partial_alignment=len(w["layers.0.mlp.down_proj.weight"]) == 2 * shape.hidden_size,
        fc_bias=f"{fc}.bias" in w,
        attention_bias="layers.0.self_attn.q_proj.bias" in w,
    )
    head = FeatureHead(config).double()
    places = {f"{fc}.weight": head.fusion.fc.weight, f"{fc}.bias": head.fusion.fc.bias}
    if sampling:
        places["fc.post_attention_layernorm.weight"] = head.fusion.norm.weight
        places |= {f"fc.mlp.{n}_proj.weight": getattr(head.fusion, f"{n}_proj").weight for n in ("gate", "up", "down")}
    for name in "qkvo":
        projection = getattr(head.self_attn, f"{name}_proj")
        places[f"layers.0.self_attn.{name}_proj.weight"] = projection.weight
        places[f"layers.0.self_attn.{name}_proj.bias"] = projection.bias
    places |= {f"layers.0.mlp.{n}_proj.weight": getattr(head, f"{n}_proj").weight for n in ("gate", "up", "down")}
    places["layers.0.post_attention_layernorm.weight"] = head.norm.weight
    with torch.no_grad():
        for name, value in w.items():
            places[name].copy_(torch.tensor(value))
    assert sum(p.numel() for p in head.parameters()) == sum(value.size for value in w.values())
    return head.eval()


def inputs(shape: Shape, positions: int) -> tuple[np.ndarray, np.ndarray]:
    size = (positions, shape.hidden_size)
    return numbers(size, 101) * 2, numbers(size, 102) * 3


@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("shape", [Shape(), GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_forward_is_the_equations(switches: str, shape: Shape, attention_bias: bool, fc_bias: bool) -> None:
    w = official_tensors(shape, *SWITCHES[switches], fc_bias=fc_bias, attention_bias=attention_bias)
    e, f = inputs(shape, 7)
    p, r = head_outputs(w, shape, e, f)
    with torch.no_grad():
        out = torch_head(w, shape)(torch.tensor(e)[None], torch.tensor(f)[None])
    np.testing.assert_allclose(out.p[0].numpy(), p, rtol=0, atol=1e-10)
    np.testing.assert_allclose(out.r[0].numpy(), r, rtol=0, atol=1e-10)
    assert (np.abs(p - r).max() > 0.1) == SWITCHES[switches][1]


@pytest.mark.parametrize("switches", SWITCHES)
def test_forward_gives_the_pinned_numbers(switches: str) -> None:
    e, f = inputs(GQA, 5)
    with torch.no_grad():
        head = torch_head(official_tensors(GQA, *SWITCHES[switches]), GQA)
        out = head(torch.tensor(e)[None], torch.tensor(f)[None])
    p, r = PINNED[switches]
    assert out.p[0, -1, :4].tolist() == pytest.approx(p, abs=1e-10)
    assert out.r[0, -1, :4].tolist() == pytest.approx(r, abs=1e-10)


def test_every_input_and_every_switch_matters() -> None:
    """Guards the tests above against weights that make terms vanish."""
    e, f = inputs(GQA, 5)
    other_base = Shape(**{**vars(GQA), "rope_theta": 10000.0})
    w = official_tensors(GQA)
    results = [head_outputs(official_tensors(GQA, *switches), GQA, e, f) for switches in SWITCHES.values()]
    results += [head_outputs(w, GQA, e * 1.1, f), head_outputs(w, GQA, e, f * 1.1), head_outputs(w, other_base, e, f)]
    for one, other in itertools.combinations(results, 2):
        assert np.abs(np.array(one) - np.array(other))[:, -1].max() > 1e-3


def test_one_pair_at_a_time_over_the_cache_equals_all_at_once() -> None:
    w = official_tensors(GQA)
    e, f = inputs(GQA, 6)
    p, r = head_outputs(w, GQA, e, f)
    head, cache = torch_head(w, GQA), SlotCache(1, 1, 2)
    for t in range(6):
        slots = cache.reserve(1, "cpu")
        mask = attention_mask(torch.ones(1, 1, 1, dtype=torch.bool), slots, cache.lengths, cache.extent, slots)
        with torch.no_grad():
            out = head(torch.tensor(e[None, t : t + 1]), torch.tensor(f[None, t : t + 1]), slots, mask, cache)
        cache.commit([[0]])
        np.testing.assert_allclose(out.p[0, 0].numpy(), p[t], rtol=0, atol=1e-10)
        np.testing.assert_allclose(out.r[0, 0].numpy(), r[t], rtol=0, atol=1e-10)


def test_a_head_that_has_decoded_can_train() -> None:
    """Rotary tables made in inference mode must not follow the head into training."""
    head = torch_head(official_tensors(Shape()), Shape())
    e, f = (torch.tensor(x)[None] for x in inputs(Shape(), 4))
    with torch.inference_mode():
        head(e, f)
    head(e, f).p.sum().backward()
    assert head.self_attn.q_proj.weight.grad is not None
