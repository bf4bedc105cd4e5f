"""A stock model through our cache and masks says what it says alone.

Expected logits come from the stock model on the whole sequence from root to leaf, without any cache. Features, trees,
ragged rows and committed paths of ours must not change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import outdraft.target.runner as run_module
from models import CONTEXT, FAMILIES, FURTHER, VOCAB, tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

TOLERANCE = {"gpt-neo": 1e-4}
"""GPT-Neo computes its attention in float32 whatever the model's precision."""

EAGER_TOLERANCE = 1e-5
"""Stock eager attention rounds its softmax to float32."""

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5, 2]]
IMPLEMENTATIONS = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
IMPLEMENTATIONS.remove(("gpt-neo", "sdpa"))


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """`(tokens, vocab)`"""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_tree(roots: Sequence[int], nodes: int, seed: int) -> Tree:
    """Branching trees of random tokens; the first row is a node short, so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor(
        [[-1] + [int(torch.randint(max(0, n - 3), n, (), generator=generator)) for n in range(1, nodes)] for _ in roots]
    )
    tokens = torch.randint(VOCAB, (len(roots), nodes), generator=generator)
    tokens[:, 0] = torch.tensor(roots)
    parents[0, -1] = 0
    return Tree(tokens, parents, [nodes - 1] + [nodes] * (len(roots) - 1))


def way_down(tree: Tree, row: int, node: int) -> list[int]:
    """Nodes from the root to this one."""
    way = [node]
    while way[0]:
        way.insert(0, int(tree.parents[row, way[0]]))
    return way


@pytest.mark.parametrize(("family", "attention"), IMPLEMENTATIONS)
@torch.inference_mode()
def test_every_node_of_every_tree_says_what_its_own_path_says(family, attention):
    """Ragged rows, four rounds, every round committing another path, past every sliding window."""
    model = tiny(family, attention=attention)
    target = Target(model)
    tolerance = TOLERANCE.get(family, EAGER_TOLERANCE if attention == "eager" else 1e-9)
    cache = target.new_cache(len(PROMPTS), 4)
    features = ModelRunner(target, cache).prefill([torch.tensor(prompt) for prompt in PROMPTS]).features
    texts = [list(prompt) for prompt in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        found = target.head(features[row, : len(prompt)])
        assert (found - stock_logits(model, prompt)).abs().max() < tolerance
    assert cache.lengths == [len(prompt) for prompt in PROMPTS]
    for round_ in range(4):
        tree = random_tree([11, 12, 13], 9, seed=round_)
        logits = target.head(ModelRunner(target, cache).tree(tree).features)
        paths = []
        for row, text in enumerate(texts):
            ways = [way_down(tree, row, node) for node in range(tree.counts[row])]
            for node, way in enumerate(ways):
                expected = stock_logits(model, text + tree.tokens[row, way].tolist())[-1]
                assert (logits[row, node] - expected).abs().max() < tolerance
            paths.append(max(ways, key=len) if row != round_ % 3 else [0])
        assert any(path != list(range(len(path))) for path in paths), "some path skips over nodes"
        cache.commit(paths)
        texts = [
            text + tree.tokens[row, path].tolist() for row, (text, path) in enumerate(zip(texts, paths, strict=True))
        ]
    assert max(len(text) for text in texts) > 20


@pytest.mark.parametrize("family", FURTHER)
@torch.inference_mode()
def test_further_families_verify_trees(family):
    model = tiny(family, dtype=torch.float32)
    target = Target(model)
    cache = target.new_cache(2, 4)
    ModelRunner(target, cache).prefill([torch.tensor(prompt) for prompt in PROMPTS[::2]])
    tree = random_tree([11, 12], 9, seed=0)
    logits = target.head(ModelRunner(target, cache).tree(tree).features)
    for row, prompt in enumerate(PROMPTS[::2]):
        for node in range(tree.counts[row]):
            way = way_down(tree, row, node)
            expected = stock_logits(model, prompt + tree.tokens[row, way].tolist())[-1]
            assert (logits[row, node] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_head_of_features_is_the_models_logits(family):
    model = tiny(family)
    target = Target(model)
    ids = torch.tensor([PROMPTS[0], PROMPTS[2][:9]])
    features = target.features(ids)
    assert features.shape == (2, 9, target.hidden_size)
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(target.head(features), expected, atol=1e-12)
    assert torch.allclose(target.head(features[0, 3]), expected[0, 3], atol=1e-12)
    assert target.head(features[:, :2, None]).shape == (2, 2, 1, VOCAB)
    assert torch.equal(target.embed(ids), model.get_input_embeddings()(ids))


@torch.inference_mode()
def test_soft_capping_is_not_left_out():
    """Guard of the test above: there the cap does something."""
    model = tiny("gemma2")
    target = Target(model)
    features = target.features(torch.tensor([PROMPTS[0]]))
    assert target.head(features).abs().max() < 2 < model.lm_head(features).abs().max()


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-sliding", "gemma3", "gpt2", "gpt-neo"])
@torch.inference_mode()
def test_long_prompts_are_run_in_pieces(family, monkeypatch):
    model = tiny(family)
    target = Target(model)
    prompts = [torch.arange(length) % VOCAB for length in (30, 7, 4, 1, 8)]
    for chunk in (4, 7, 100):
        monkeypatch.setattr(run_module, "PREFILL_CHUNK", chunk)
        cache = target.new_cache(len(prompts), 8)
        features = ModelRunner(target, cache).prefill(prompts).features
        assert cache.lengths == [30, 7, 4, 1, 8] and cache.pending == 0
        tree = random_tree([1] * 5, 6, seed=chunk)
        logits = target.head(ModelRunner(target, cache).tree(tree).features)
        for row, prompt in enumerate(prompts):
            expected = stock_logits(model, prompt.tolist())
            assert (target.head(features[row, : len(prompt)]) - expected).abs().max() < TOLERANCE.get(family, 1e-9)
            deepest = way_down(tree, row, tree.counts[row] - 1)
            expected = stock_logits(model, prompt.tolist() + tree.tokens[row, deepest].tolist())[-1]
            assert (logits[row, deepest[-1]] - expected).abs().max() < TOLERANCE.get(family, 1e-9)


@torch.inference_mode()
def test_a_row_does_not_see_its_neighbours():
    """Bit for bit what it gives beside other rows of the same length, and without them after they left."""
    target = Target(tiny("llama-gqa"))
    tree = random_tree([1, 2, 3], 7, seed=0)
    logits = {}
    for other in (5, 6):
        cache = target.new_cache(3, 32)
        ModelRunner(target, cache).prefill(
            [torch.tensor(PROMPTS[0]), torch.full((4,), other), torch.full((11,), other)]
        )
        logits[other] = target.head(ModelRunner(target, cache).tree(tree).features)
        cache.rollback()
    assert torch.equal(logits[5][0], logits[6][0]) and not torch.equal(logits[5][1], logits[6][1])
    cache.select_rows([0])
    alone = Tree(tree.tokens[:1], tree.parents[:1], tree.counts[:1])
    assert (target.head(ModelRunner(target, cache).tree(alone).features) - logits[5][:1]).abs().max() < 1e-12


@torch.inference_mode()
def test_what_was_rolled_back_leaves_no_trace():
    target = Target(tiny("qwen2-sliding"))
    cache = target.new_cache(3, 4)
    ModelRunner(target, cache).prefill([torch.tensor(prompt) for prompt in PROMPTS])
    tree = random_tree([1, 2, 3], 6, seed=0)
    before = ModelRunner(target, cache).tree(tree).features
    cache.rollback()
    ModelRunner(target, cache).tree(random_tree([4, 5, 6], 13, seed=1))
    cache.rollback()
    assert torch.equal(ModelRunner(target, cache).tree(tree).features, before)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gpt-neo"])
@torch.inference_mode()
def test_candidates_beyond_the_context_disturb_nothing(family):
    """The last position is verified exactly even if the tree reaches over it."""
    model = tiny(family)
    target = Target(model)
    text = (list(range(VOCAB)) * 2)[: CONTEXT - 2]
    cache = target.new_cache(1, CONTEXT)
    ModelRunner(target, cache).prefill([torch.tensor(text)])
    beyond = 1 if family == "gpt-neo" else 4  # GPT-Neo's table of slots ends: decoding keeps its trees small there
    tree = Tree(torch.arange(1 + beyond)[None], torch.arange(-1, beyond)[None], [1 + beyond])
    logits = target.head(ModelRunner(target, cache).tree(tree).features)
    expected = stock_logits(model, [*text, 0, 1])
    assert (logits[0, :2] - expected[-2:]).abs().max() < TOLERANCE.get(family, 1e-9)
    assert target.slot_limit == (CONTEXT if family == "gpt-neo" else None)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2"])
def test_the_model_stays_as_it_was(family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    target = Target(model)
    with torch.inference_mode():
        target.head(target.features(torch.tensor([PROMPTS[0]])))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- families that are refused ---------------------------------------------------------------------------------------


def other(model_type: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings
    )
    return AutoModelForCausalLM.from_config(config)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: other("mamba", hidden_size=32, num_hidden_layers=1, state_size=4), "recurrent"),
        (lambda: other("rwkv", hidden_size=32, num_hidden_layers=2), "recurrent"),
        (
            lambda: other(
                "lfm2",
                intermediate_size=32,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
                **SMALL,
            ),
            "recurrent",
        ),
        (lambda: other("bloom", hidden_size=32, n_layer=1, n_head=4), "ALiBi"),
        (lambda: other("falcon", alibi=True, **SMALL), "ALiBi"),
        (lambda: tiny("gpt-neo", window_size=16), "local window of 16"),
        (lambda: AutoModel.from_config(tiny("llama-gqa").config), "not a causal language model"),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
            ),
            "not a causal language model",
        ),
    ],
    ids=["mamba", "rwkv", "hybrid", "alibi", "alibi-by-choice", "local-slots", "no-head", "encoder-decoder"],
)
def test_a_family_that_cannot_verify_trees_is_refused_with_the_reason(build, reason):
    with pytest.raises(UserError, match=reason):
        Target(build())


def test_hooks_of_accelerate_leave_the_head_alone():
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama-gqa")
    features = torch.randn(2, 3, 32, dtype=torch.float64)
    expected = Target(model).head(features)
    hooked = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)  # as for quantised models
    assert torch.equal(Target(hooked).head(features), expected)


def test_a_model_spread_over_devices_is_refused():
    model = tiny("llama-gqa")
    model.base_model.layers[1].to("meta")
    with pytest.raises(UserError, match="several devices"):
        Target(model)


def test_attention_that_reads_no_mask_is_refused():
    model = tiny("llama-gqa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="takes no mask of its own"):
        Target(model)


@torch.inference_mode()
def test_longrope_is_used_up_to_its_switch_of_frequencies():
    """Beyond it the whole forward turns by other angles, root and all: the context ends before."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
    model = tiny("phi3", rope_parameters=scaling, original_max_position_embeddings=16)
    target = Target(model)
    assert target.context_length == 16
    text = list(range(13))
    cache = target.new_cache(1, 32)
    ModelRunner(target, cache).prefill([torch.tensor(text)])
    tree = Tree(torch.arange(6)[None], torch.arange(-1, 5)[None], [6])
    logits = target.head(ModelRunner(target, cache).tree(tree).features)
    expected = stock_logits(model, [*text, 0, 1, 2])
    assert (logits[0, :3] - expected[-3:]).abs().max() < 1e-9


def rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


SCALED = {
    "yarn": (rope("yarn", factor=4.0, original_max_position_embeddings=32), 32, 128),
    "yarn, written out": (rope("yarn", factor=4.0, original_max_position_embeddings=32), 128, 128),
    "yarn without an original length": (rope("yarn", factor=4.0), 32, 128),
    "yarn of a half": (rope("yarn", factor=1.5, original_max_position_embeddings=32), 32, 48),
    "linear": (rope("linear", factor=2.0), 32, 64),
    "llama 3": (
        rope("llama3", factor=4.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0),
        32,
        128,
    ),
    "llama 3 with a factor of frequencies that reaches further": (
        rope("llama3", factor=8.0, original_max_position_embeddings=8, low_freq_factor=1.0, high_freq_factor=4.0),
        32,
        32,
    ),
    "dynamic, whose angles change with the length": (rope("dynamic", factor=4.0), 32, 32),
    "none": (rope("default"), 32, 32),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotations_reach_as_far_as_stock_decoding_goes(kind):
    scaling, written, length = SCALED[kind]
    model = tiny("llama-gqa", max_position_embeddings=written, rope_parameters=scaling)
    target = Target(model)
    assert target.context_length == length
    prompt = [number % VOCAB for number in range(length // 2)]
    output = SpeculativeModel(target, PromptLookup()).generate(prompt, max_new_tokens=999)
    assert output.finish_reasons == ["context"] and len(output.tokens[0]) == length - len(prompt)
    given = torch.tensor([prompt])
    count = length - len(prompt)
    stock = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, pad_token_id=0)
    assert output.tokens[0] == stock[0, len(prompt) :].tolist()


def test_past_its_length_dynamic_ntk_has_no_text_of_its_own() -> None:
    """Stock texts depend on the cache and on where the prompt ends, which is why the context ends there."""
    model = tiny("llama-gqa", max_position_embeddings=32, rope_parameters=rope("dynamic", factor=4.0))
    prompt = [number % VOCAB for number in range(20)]

    def stock(prompt: list[int], count: int, **settings: object) -> list[int]:
        given = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(given), "max_new_tokens": count, "pad_token_id": 0, **settings}
        return model.generate(given, do_sample=False, **settings)[0].tolist()

    text = stock(prompt, 40)
    assert stock(prompt, 40, use_cache=False)[:32] == text[:32] and stock(prompt, 40, use_cache=False) != text
    assert any(stock(text[:end], 60 - end) != text for end in range(33, 60))


def test_layers_of_several_kinds_reach_as_far_as_the_shortest():
    """Gemma 3 writes its length with the scaling of its global layers in it; the others are not scaled."""
    kinds = {"sliding_attention": rope("default"), "full_attention": rope("linear", factor=8.0)}
    assert Target(tiny("gemma3", rope_parameters=kinds)).context_length == CONTEXT


def test_facts_about_the_target():
    model = tiny("gpt2")
    model.generation_config.eos_token_id = [3, 5]
    target = Target(model)
    assert (target.hidden_size, target.vocab_size, target.num_layers) == (32, VOCAB, 2)
    assert target.context_length == CONTEXT and target.dtype == torch.float64
    assert target.eos_token_ids == [3, 5]
    assert target.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(target.new_cache(2, 8), SlotCache)


@pytest.mark.parametrize("drafter", [None, "prompt-lookup"])
def test_prompts_of_very_different_lengths_are_not_padded_to_the_longest(
    drafter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows keep their order, their caches and their text, and the forwards run few tokens of padding."""
    monkeypatch.setattr(run_module, "WORTHWHILE", 8)
    target = Target(tiny("llama-gqa"))
    prompts = [torch.arange(count) % 32 for count in (3, 40, 4, 5, 37, 2)]
    ran: list[int] = []
    whole = Target.forward

    def counting(own: Target, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        ran.append(tokens.numel())
        return whole(own, tokens, *others)

    monkeypatch.setattr(Target, "forward", counting)
    with torch.inference_mode():
        run = ModelRunner(target, target.new_cache(len(prompts), 48))
        together = run.prefill(prompts)
        assert sum(ran) <= 1.5 * sum(map(len, prompts)) and run.cache.lengths == list(map(len, prompts))
        tree = Tree.roots(torch.tensor([7, 8, 9, 10, 11, 12]))
        after = run.tree(tree).features
        for row, prompt in enumerate(prompts):
            single = ModelRunner(target, target.new_cache(1, 48))
            alone = single.prefill([prompt])
            torch.testing.assert_close(together.features[row, : len(prompt)], alone.features[0], atol=1e-9, rtol=1e-9)
            alone_after = single.tree(Tree.roots(tree.tokens[row])).features
            torch.testing.assert_close(after[row], alone_after[0], atol=1e-9, rtol=1e-9)
    loaded = load(target.model, method=drafter or "none", backend="eager")
    texts = loaded.generate([prompt.tolist() for prompt in prompts], max_new_tokens=10).tokens
    assert texts == [loaded.generate(prompt.tolist(), max_new_tokens=10).tokens[0] for prompt in prompts]
