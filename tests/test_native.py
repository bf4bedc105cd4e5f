"""Our CPU kernels compute what the stock layers compute, and give every token the same bits in any company."""

from __future__ import annotations

import copy
import ctypes
import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import VOCAB, tiny
from outdraft.api.generation import load
from outdraft.api.loading import load_target
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead
from outdraft.target.backends import accelerate, count_parameters, unloaded, why_not_native, why_not_native_model
from outdraft.target.backends.native import build, operations, weights
from outdraft.target.backends.native.modules import NativeLayer
from outdraft.target.backends.native.operations import rms_norm
from outdraft.target.backends.native.weights import STAYS, NativeLinear, ReleasedLinear, Weight
from outdraft.target.exact.target import exactly
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target
from outdraft.target.views import Reads

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))

WIDE = {"head_dim": 16, "hidden_size": 48, "intermediate_size": 80}
"""A shape that the kernels serve: heads of whole vectors, in a width that is none."""

FAMILIES = ["llama-gqa", "llama-mha", "llama-tied", "qwen2", "qwen3", "mistral-sliding", "qwen2-sliding"]
DTYPES = [torch.float32, torch.bfloat16]


def wide(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny(family, dtype=dtype, **{**WIDE, **changes})


def run_of(target: Target, prompts: list[torch.Tensor]) -> ModelRunner:
    run = ModelRunner(target, target.new_cache(len(prompts), 4))
    run.prefill(prompts)
    return run


def random_trees(rows: int, nodes: int) -> tuple[list[torch.Tensor], Tree]:
    dice = torch.Generator().manual_seed(100 * rows + nodes)
    prompts = [torch.randint(VOCAB, (3 + (17 * row) % 29,), generator=dice) for row in range(rows)]
    parents = [[-1, *(int(torch.randint(0, i, (), generator=dice)) for i in range(1, nodes))] for _ in range(rows)]
    return prompts, Tree(torch.randint(VOCAB, (rows, nodes), generator=dice), torch.tensor(parents), [nodes] * rows)


# --- products and norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (100, 66), (193, 576), (5, 2)])
def test_products_are_right_and_do_not_depend_on_the_tokens_beside(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    product = Weight(weight, bias)
    torch.testing.assert_close(product.dense(), weight, rtol=0, atol=0)
    x, added = torch.randn(41, inputs).to(dtype), torch.randn(41, outputs).to(dtype)
    right = x.double() @ weight.double().T + bias.double() + added.double()
    alone = torch.cat([product(x[i : i + 1], added[i : i + 1]) for i in range(41)])
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(alone.double(), right, atol=close * float(right.abs().max()), rtol=close)
    for tokens in range(1, 42):
        assert torch.equal(product(x[:tokens], added[:tokens]), alone[:tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 50, 576])
def test_norms_are_those_of_torch(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, width).to(dtype), torch.randn(width).to(dtype)
    sharp = nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    close = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), sharp, atol=close, rtol=close)


def test_threads_do_not_change_a_bit() -> None:
    model, (prompts, trees) = wide("qwen3", torch.bfloat16), random_trees(3, 9)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            target = Target(model, backend="native")
            with torch.inference_mode():
                found.append(run_of(target, prompts).tree(trees).features)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# --- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_stock_layers(family: str, dtype: torch.dtype) -> None:
    model = wide(family, dtype)
    target, eager = Target(model, backend="native"), Target(model)
    assert target.backend == "native" and target.num_parameters == eager.num_parameters
    sharp = Target(copy.deepcopy(model).double())
    with torch.inference_mode():
        for rows, nodes in ((1, 1), (2, 5), (1, 9), (3, 1), (2, 17), (1, 40)):
            prompts, trees = random_trees(rows, nodes)
            ours, stock, right = (run_of(one, prompts).tree(trees).features for one in (target, eager, sharp))
            if dtype == torch.float32:
                torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)
            else:
                assert (ours - right).norm() <= 1.5 * (stock - right).norm() <= 0.15 * right.norm()


@pytest.mark.parametrize("kind", ["gelu_pytorch_tanh", "gelu_new"])
def test_gelu_is_an_activation_too(kind: str) -> None:
    model, (prompts, trees) = wide("llama-gqa", hidden_act=kind), random_trees(2, 5)
    with torch.inference_mode():
        ours, stock = (
            run_of(Target(model, backend=backend), prompts).tree(trees).features for backend in ("native", "eager")
        )
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "mistral-sliding", "qwen2-sliding"])
def test_a_tree_gives_every_node_the_bits_of_one_token_forwards(family: str, dtype: torch.dtype) -> None:
    """Also of prompts in pieces, and of rows alone."""
    target = Target(wide(family, dtype), backend="native")
    with torch.inference_mode():
        for rows, nodes in ((1, 4), (2, 7), (3, 16), (1, 33)):
            prompts, trees = random_trees(rows, nodes)
            ran = run_of(target, prompts)
            together = ran.tree(trees).features
            logits = target.head(together)
            for row, prompt in enumerate(prompts):
                for node in range(0, nodes, 3):
                    path, at = [], node
                    while at >= 0:
                        path.append(at)
                        at = int(trees.parents[row, at])
                    cache = target.new_cache(1, 4)
                    single = ModelRunner(target, cache)
                    list(single.prefill_in_pieces([prompt], 5))
                    for at in reversed(path):
                        features = single.tree(Tree.roots(trees.tokens[row, at : at + 1])).features
                        cache.commit([[0]])
                    assert torch.equal(features[0, 0], together[row, node]), (rows, nodes, node)
                    assert torch.equal(target.head(features)[0, 0], logits[row, node])


def test_prompts_give_the_same_bits_in_one_piece_and_in_several() -> None:
    target, prompt = Target(wide("llama-gqa", torch.bfloat16), backend="native"), torch.arange(50) % VOCAB
    with torch.inference_mode():
        run_of(target, [prompt])  # the first call is also run as stock, for comparison
        whole = run_of(target, [prompt]).cache
        found = []
        for most in (1024, 7, 1):
            run = ModelRunner(target, target.new_cache(1, 4))
            found.append(Output.cat(list(run.prefill_in_pieces([prompt], most))).features)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and whole.lengths == [50]


# --- decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-sliding"])
def test_drafted_text_is_plain_text_in_bfloat16(family: str) -> None:
    model, prompts = wide(family, torch.bfloat16), [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6], [8, 9]]
    plain = load(model, backend="native", method="none").generate(prompts, max_new_tokens=40)
    torch.manual_seed(0)
    head = FeatureHead(FeatureHeadConfig(48, 80, 4, 2, 16, VOCAB)).to(torch.bfloat16).eval()
    layer = ExitLayer.beginning(model, ExitLayerConfig(1)).to(torch.bfloat16)
    block = OneForwardHead(OneForwardConfig(48, 80, 4, 2, 16, VOCAB, block_size=4)).to(torch.bfloat16).eval()
    for drafter, method in ((head, None), (block, None), (layer, None), (None, "prompt-lookup")):
        loaded = load(model, drafter, method=method, backend="native")
        for settings in ({}, {"num_speculative_tokens": 3}, {"tree_size": 12, "tree_top_k": 3}):
            if method is not None and "tree_size" in settings:
                continue
            drafted = loaded.generate(prompts, max_new_tokens=40, **settings)
            assert drafted.statistics.drafted > 0 and loaded.target.backend == "native"
            assert drafted.tokens == plain.tokens
        sampled = {"temperature": 1.0, "seed": 3, "max_new_tokens": 30}
        texts = [m.generate(prompts, **sampled).tokens for m in (loaded, loaded.with_drafter(None))]  # type: ignore[arg-type]
        assert texts[0] == texts[1]


def test_exact_mode_is_free_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama-gqa", torch.bfloat16)
    loaded = load(model, method="prompt-lookup", backend="native")
    found = loaded.generate([[1, 2, 3, 1, 2]], max_new_tokens=20, exact=True)
    assert found.exactness is not None and (found.exactness.one_by_one, found.exactness.checks) == (0, 2)
    assert found.tokens == loaded.with_drafter(None).generate([[1, 2, 3, 1, 2]], max_new_tokens=20).tokens
    other = Target(model, backend="native")
    real = other.model.get_output_embeddings()._packed.__class__.__call__
    monkeypatch.setattr(  # a product that rounds otherwise in company
        Weight, "__call__", lambda own, x, added=None: real(own, x, added) * (1 + 0.01 * (x.numel() > own.inputs))
    )
    with pytest.raises(UserError, match=r"gives other \w+ than one-token forwards.*--backend packed"):
        exactly(other)


def test_layers_that_are_read_and_early_exits_run_natively() -> None:
    model, (prompts, trees) = wide("qwen2-sliding"), random_trees(2, 5)
    for reads in (Reads(layers=(1, 3)), Reads(layers=(1, 3), split=2)):
        found = []
        for backend in ("native", "eager"):
            target = Target(model, backend=backend)
            run = ModelRunner(target, target.new_cache(2, 8), reads)
            with torch.inference_mode():
                run.prefill(prompts)
                found.append(run.tree(trees).taps)
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


# --- what is served ---------------------------------------------------------------------------------------------


def test_the_original_stays_as_it_is() -> None:
    model = wide("llama-gqa")
    before = copy.deepcopy(model.state_dict())
    view = accelerate(model, "native")
    assert sum(isinstance(module, NativeLayer) for module in view.modules()) == 2
    assert isinstance(view.get_output_embeddings(), NativeLinear) and count_parameters(view) == count_parameters(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, NativeLayer | NativeLinear) for module in model.modules())


def released(model: Any) -> list[ReleasedLinear]:
    return [module for module in model.modules() if isinstance(module, ReleasedLinear)]


@pytest.mark.parametrize("backend", ["native", "native-int8", "native-int4"])
def test_a_model_that_was_loaded_here_keeps_one_copy_of_its_layers(backend: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
    model = wide("llama-gqa", **changes)
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, dtype="float32", backend=backend)
    layers = [module for module in target.model.modules() if isinstance(module, NativeLayer)]
    assert len(released(target.model)) == 7 * len(layers) == 14
    assert all(part._parameters["weight"].is_meta for part in released(target.model))  # type: ignore[union-attr]
    assert target.num_parameters == count_parameters(model) == count_parameters(target.model)

    kept = Target(copy.deepcopy(model), backend=backend)  # a model of somebody else's, whose weights stay
    assert not released(kept.model)
    expected = kept.model.state_dict()
    for name, tensor in target.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    found = []
    for one in (target, kept):
        with torch.inference_mode():
            run = run_of(one, [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])])
            found.append(run.tree(Tree.chains(torch.tensor([[7, 8], [9, 1]]), 1)).features)
    assert torch.equal(*found)
    assert len(released(target.model)) == 14, "the comparison with the stock modules reads weights once"


def test_a_released_layer_is_plain_again_where_something_else_runs_it() -> None:
    model = wide("llama-gqa")
    whole = copy.deepcopy(model)
    target = Target(model, backend="native", owned=True)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for _ in range(STAYS):
        assert len(released(model)) == 14
        torch.testing.assert_close(target.model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
    assert not released(model)

    target = Target(model, backend="native", owned=True)
    first = model.model.layers[0]
    assert isinstance(first.mlp.up_proj, ReleasedLinear)
    assert torch.equal(copy.deepcopy(first).mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)
    model.double()
    assert not released(model) and first.self_attn.k_proj.weight.dtype == torch.float64
    target = Target(model.float(), backend="native", owned=True)
    model.load_state_dict({name: 2 * tensor for name, tensor in whole.state_dict().items()})
    assert torch.equal(first.self_attn.v_proj.weight, 2 * whole.model.layers[0].self_attn.v_proj.weight)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {}), ("phi3", {}), ("gpt2", None), ("llama-gqa", {"head_dim": 8}), ("glm4-moe", {})],
)
def test_other_layers_are_packed_without_a_word(family: str, changes: dict[str, Any] | None) -> None:
    model = tiny(family, dtype=torch.float32, **({} if changes is None else {**WIDE, **changes}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(model, method="none").target.backend == "packed"
    with pytest.warns(UserWarning, match="backend 'native' cannot serve .*another form.*using 'packed'"):
        assert Target(model, backend="native").backend == "packed"


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma2", "cohere", "granite", "mixtral", "gpt2"])
def test_a_configuration_tells_what_the_model_would(family: str) -> None:
    model = tiny(family, dtype=torch.float32, **({} if family == "gpt2" else WIDE))
    before = torch.random.get_rng_state()
    alone = unloaded(model.config, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert why_not_native_model(alone) == why_not_native_model(model)


def test_a_layer_that_computes_otherwise_than_it_looks_is_not_taken() -> None:
    model = wide("llama-gqa")

    class Scaled(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return 0.9 * super().forward(hidden_states, **kwargs)

    model.model.layers[0].__class__ = Scaled
    with pytest.warns(UserWarning, match="another form"):
        assert Target(model, backend="native").backend == "packed"


def test_hooks_run_on() -> None:
    model = wide("llama-gqa")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, given, out: out + 1)
    assert load(model, method="none").target.backend == "packed"


@pytest.mark.parametrize(
    ("family", "calls"), [("llama-gqa", [2]), ("mistral-sliding", [2]), ("qwen2-sliding", [1] * 4)]
)
def test_layers_of_one_kind_run_as_one_call(family: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    target, (prompts, trees) = Target(wide(family), backend="native"), random_trees(2, 5)
    seen: list[int] = []
    whole = operations.Stack.__call__

    def counting(self: operations.Stack, *given: Any) -> torch.Tensor:
        seen.append(len(self.layers))
        return whole(self, *given)

    with torch.inference_mode():
        run = run_of(target, prompts)  # the first forward is compared with stock layers
        monkeypatch.setattr(operations.Stack, "__call__", counting)
        ours = run.tree(trees).features
        assert seen == calls
        # Layer by layer, as where the outputs of some are read.
        reading = ModelRunner(target, target.new_cache(2, 4), Reads(layers=(1,)))
        reading.prefill(prompts)
        assert torch.equal(reading.tree(trees).features, ours)


def test_a_forward_that_computes_something_else_is_given_up() -> None:
    model, (prompts, trees) = wide("llama-gqa"), random_trees(2, 5)
    target = Target(model, backend="native")
    target.model.model.layers[1].kernel.struct.heads.scale *= 2  # type: ignore[union-attr,index]
    with torch.inference_mode(), pytest.warns(UserWarning, match="computes something else.*as 'eager'") as warned:
        ours = run_of(target, prompts).tree(trees).features
        torch.testing.assert_close(ours, run_of(Target(model), prompts).tree(trees).features, atol=2e-5, rtol=2e-5)
    assert len(warned) == 1


def test_a_machine_without_a_compiler_decodes_on_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiled", lambda: "no C++ compiler (c++, g++, clang++) is installed")
    model = wide("llama-gqa")
    assert load(model, method="none").target.backend == "packed"
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler.*using 'packed'"):
        Target(model, backend="native")


def test_a_compiler_with_arguments_is_called_with_them_and_says_why_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    fake = tmp_path / "cc ache"
    fake.write_text('#!/bin/sh\necho "fatal: no space left for $1" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{fake}' g++")
    monkeypatch.setenv("OUTDRAFT_CACHE", str(tmp_path / "cache"))
    assert "no space left for g++" in str(build.compiled.__wrapped__())
    monkeypatch.setenv("CXX", "'g++")
    assert "CXX cannot be read" in str(build.compiled.__wrapped__())


def test_the_name_of_the_library_changes_with_sources_and_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    compiler = [next(filter(build.shutil.which, ("c++", "g++", "clang++")))]
    name = build._name(compiler, ("-march=native",))
    assert name == build._name(compiler, ("-march=native",)) != build._name(compiler, ())
    (tmp_path / "layers.cpp").write_text("other")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build._name(compiler, ("-march=native",)) != name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
def test_narrower_vectors_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The source for AVX2, on whatever processor runs the tests; only its sums of lanes are in another order."""
    compiler = [next(filter(build.shutil.which, ("c++", "g++", "clang++")))]
    build._compile(compiler, ("-mavx2", "-mfma"), tmp_path)
    narrow = ctypes.CDLL(str(tmp_path / "kernels.so"))
    assert narrow.outdraft_lanes() == 8
    monkeypatch.setattr(build, "compiled", lambda: narrow)
    for dtype in DTYPES:
        test_products_are_right_and_do_not_depend_on_the_tokens_beside(100, 66, dtype)
        test_features_are_those_of_stock_layers("qwen3", dtype)
        test_a_tree_gives_every_node_the_bits_of_one_token_forwards("mistral-sliding", dtype)
        for bits in (8, 4):
            test_quantised_products_are_those_of_their_weights_and_rounded_inputs_in_any_company(bits, dtype)
            test_numbers_that_are_none_stay_so_on_quantised_weights(bits, dtype)


def test_compiled_names_native_now() -> None:
    with pytest.warns(DeprecationWarning, match="'native' takes its place"):
        assert Target(wide("llama-gqa"), backend="compiled").backend == "native"


def test_quantised_models_and_adapters_run_as_they_are() -> None:
    model = wide("llama-gqa")
    model.hf_quantizer = object()
    with pytest.warns(UserWarning, match="quantised.*using 'eager'"):
        assert accelerate(model, "native") is model


# --- weights of eight and four bits -----------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """Inputs in whole numbers from -127 to 127 times a scale a group, as quantised weights are multiplied with."""
    groups = x.double().unflatten(-1, (-1, weights.GROUP))
    most = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((groups * (127 / most)).round() * (most / 127)).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_products_are_those_of_their_weights_and_rounded_inputs_in_any_company(
    bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(83, 96) / 10).to(dtype), torch.randn(83).to(dtype)
    product = Weight(weight, bias, bits=bits)
    dense = product.dense()
    step = (weight.float().abs().amax() * 2 / (2**bits - 1)).item()
    assert (dense.float() - weight.float()).abs().max() <= 0.6 * step + 2**-8 * float(
        weight.abs().max()
    ) and not torch.equal(dense, weight)
    x = torch.randn(37, 96).to(dtype)
    x[5, 32:64] = 0
    alone = torch.cat([product(x[i : i + 1]) for i in range(37)])
    right = rounded(x) @ weights.quantised(weight, bits).dense().double().T + bias.double()
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(alone.double(), right, atol=close * float(right.abs().max()), rtol=close)
    assert (rounded(x) - x.double()).abs().max() <= x.abs().max() / 254 * 1.001
    for tokens in range(1, 38):
        assert torch.equal(product(x[:tokens]), alone[:tokens]), tokens
    numbers = weights.quantised(weight[:80], bits).numbers.view(5, 16, 96)
    assert torch.equal(weights.unblocked(weights.blocked(numbers, bits), bits), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_are_none_stay_so_on_quantised_weights(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = Weight(torch.randn(48, 64).to(dtype), bits=bits)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, 64).to(dtype)
        x[1, 7] = wrong
        found = product(x).isfinite()
        assert not found[1].any() and found[[0, 2]].all()
    assert (product(torch.full((2, 64), 1e-38).to(dtype)).abs() < 1e-30).all()


def test_a_drafter_s_own_head_has_eight_bits() -> None:
    class Drafter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 96, bias=False)

        @property
        def own_heads(self) -> list[Tensor]:
            return [self.lm_head.weight]

    for dtype, bits in ((torch.bfloat16, 8), (torch.float32, None)):
        network = Drafter().to(dtype)
        view: Any = accelerate(network, "native")
        assert (view.layer._packed.bits, view.lm_head._packed.bits) == (None, bits)
        x = torch.randn(3, 64).to(dtype)
        torch.testing.assert_close(view.lm_head(x), network.lm_head(x), atol=2e-2, rtol=2e-2)


def test_gates_of_quantised_weights_keep_their_rows() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    together, apart = Weight(weight, gated=True, bits=8).dense(), Weight(weight, bits=8).dense()
    assert torch.equal(together, apart)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_target_is_decoded_losslessly(quantize: str, tmp_path: Any) -> None:
    model = wide("llama-gqa", torch.bfloat16, hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path)
    plain = load(str(tmp_path), method="none", quantize=quantize)
    assert plain.target.backend == f"native-{quantize}"
    stock = plain.target.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    original = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(stock, original), "whatever runs stock layers runs the quantised model"
    loaded = load(str(tmp_path), method="prompt-lookup", quantize=quantize)
    prompts = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6], [8, 9]]
    drafted = loaded.generate(prompts, max_new_tokens=40, num_speculative_tokens=4, exact=True)
    assert drafted.statistics.drafted > 0
    assert drafted.tokens == plain.generate(prompts, max_new_tokens=40).tokens


def test_what_cannot_be_quantised_is_refused(tmp_path: Any) -> None:
    model = wide("llama-gqa", torch.bfloat16)  # 48 inputs
    model.save_pretrained(tmp_path)
    for given, settings, reason in (
        (str(tmp_path), {"quantize": "int8"}, "a layer has 48 inputs, no multiple of 32"),
        (str(tmp_path), {"quantize": "int3"}, "quantize must be int8, int4 or gguf, not 'int3'"),
        (str(tmp_path), {"quantize": "int8", "backend": "packed"}, "done by backend native, not packed"),
        (model, {"quantize": "int8"}, "a loaded model's are its owner's"),
    ):
        with pytest.raises(UserError, match=reason):
            load(given, **settings)
