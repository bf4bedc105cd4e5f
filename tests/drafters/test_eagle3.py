"""EAGLE-3 folders of every layout draft what the equations say, and whatever does not fit is refused in one line.
Losslessness is tested with all drafters'."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle3_reference import KEPT, LAYOUTS, Eagle3Shape, NaiveEagle3, eagle3_folder, eagle3_tensors
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from models import tiny
from outdraft import UserError, load
from outdraft.api.loading import load_drafter_for
from outdraft.console.facts import describe
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.methods.checkpoint import method_of
from outdraft.methods.eagle3.drafter import Eagle3Drafter
from outdraft.methods.eagle3.folder import load_eagle3
from outdraft.methods.fspad import drafter as feature_drafter
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.tapped import rotary_frequencies
from outdraft.target.target import Target
from test_losslessness import SHAPES, Recorded, finish, rows_of

LAYERS = 8
PROMPTS = [[5, 9, 9, 3, 5, 9], [1, 2, 3, 4, 1, 2, 3], [30, 8, 30]]
EAGLE31 = {"fc_norm": True, "norm_output": True}
OWN_WIDTH = {"hidden_size": 20, "embedding": True, "kept": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "3.1": EAGLE31,
    "norm before fc": {"norm_before_fc": True, "norm_before_residual": True},
    "head norms and biases": {"head_norms": True, "attention_bias": True, "num_key_value_heads": 4},
    "own width and embedding": OWN_WIDTH,
}


def model_of(layers: int = LAYERS, **changes: Any) -> PreTrainedModel:
    return tiny("llama-gqa", num_hidden_layers=layers, **changes)


def bound(folder: Path, model: PreTrainedModel, backend: str = "eager") -> Eagle3Drafter:
    target = Target(model, backend=backend)
    drafter = load_drafter_for(target, folder, method="eagle3", backend=backend)
    assert isinstance(drafter, Eagle3Drafter)
    return drafter


@torch.inference_mode()
def assert_drafts_are_the_equations(
    drafter: Eagle3Drafter, shape: Eagle3Shape, taps: tuple[int, ...], tree: TreeShape
) -> None:
    """Round after round, in a ragged batch, every tree is the one that grows with the stock model's hidden states."""
    model, w, recorded = drafter.target.model, eagle3_tensors(shape), Recorded(drafter)
    table = w.get("embed_tokens.weight", model.get_input_embeddings().weight.numpy())
    rows = rows_of(drafter.target, PROMPTS, SamplingSettings(), 9, [Dice(i) for i in range(len(PROMPTS))])
    finish(drafter.target, recorded, rows, tree)
    assert len(recorded.proposed) > 2 * len(PROMPTS)
    for prefix, proposed in recorded.proposed:
        hidden = model(torch.tensor([prefix[:-1]]), output_hidden_states=True, use_cache=False).hidden_states
        naive = NaiveEagle3(w, shape, table, prefix[1:], [hidden[tap][0].numpy() for tap in taps])
        tokens, parents = naive.tree(tree.depth, tree.top_k, tree.size)
        assert proposed.tokens[0].tolist() == tokens and proposed.parents[0].tolist() == parents


@pytest.mark.parametrize("tree", [TreeShape.chain(3), TreeShape(2, 3, 9)], ids=["chain", "tree"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_drafts_what_the_equations_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, variant: str, tree: TreeShape
) -> None:
    monkeypatch.setattr(feature_drafter, "LONG", 1 if tree.top_k == 1 else 16)
    shape = Eagle3Shape(**VARIANTS[variant])
    taps = (2, LAYERS // 2, LAYERS - 3)
    folder = eagle3_folder(tmp_path / "drafter", layout, shape, taps)
    assert load_eagle3(folder).layout == layout and method_of(folder).name == "eagle3"
    assert_drafts_are_the_equations(bound(folder, model_of()), shape, taps, tree)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layers_are_counted_as_each_layout_counts_them(tmp_path: Path, layout: str) -> None:
    """The output of layer id inside `eagle_config`, what goes into it at the top; any layers, in any order."""
    shape, taps = Eagle3Shape(taps=4), (7, 1, 6, 1)
    drafter = bound(eagle3_folder(tmp_path / "drafter", layout, shape, taps), model_of())
    assert drafter.head.layers_read(LAYERS) == taps
    assert_drafts_are_the_equations(drafter, shape, taps, TreeShape.chain(3))


def test_a_layer_off_by_one_would_be_seen(tmp_path: Path) -> None:
    shape = Eagle3Shape()
    drafter = bound(eagle3_folder(tmp_path / "drafter", "speculators", shape, (2, 4, 5)), model_of())
    with pytest.raises(AssertionError):
        assert_drafts_are_the_equations(drafter, shape, (2, 4, 6), TreeShape.chain(3))


@pytest.mark.parametrize("switch", ["norm_before_residual", "norm_output"])
def test_every_flag_that_no_tensor_tells_matters(tmp_path: Path, switch: str) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(**{switch: True}), (2, 4, 5))
    with pytest.raises(AssertionError):
        assert_drafts_are_the_equations(bound(folder, model_of()), Eagle3Shape(), (2, 4, 5), TreeShape.chain(3))


def test_short_targets_are_read_at_one_layer_twice(tmp_path: Path) -> None:
    """Six layers: 2, 3 and 3."""
    shape = Eagle3Shape()
    drafter = bound(eagle3_folder(tmp_path / "drafter", "eagle3", shape), model_of(6))
    assert_drafts_are_the_equations(drafter, shape, (2, 3, 3), TreeShape.chain(3))


def test_embeddings_are_read_unscaled(tmp_path: Path) -> None:
    """Gemma's module scales what it gives; trainers of EAGLE-3 read the table."""
    model, shape = tiny("gemma3", num_hidden_layers=6, layer_types=["full_attention"] * 6), Eagle3Shape()
    drafter = bound(eagle3_folder(tmp_path / "drafter", "eagle3", shape), model)
    assert not torch.equal(model.get_input_embeddings()(torch.tensor([3])), drafter.embed(torch.tensor([3])))
    assert_drafts_are_the_equations(drafter, shape, (2, 3, 3), TreeShape.chain(3))


@pytest.mark.parametrize("backend", ["packed", "graphs"])
@pytest.mark.parametrize("variant", ["as in the paper", "3.1", "own width and embedding"])
def test_other_backends_say_the_same(tmp_path: Path, variant: str, backend: str) -> None:
    """On `graphs` whole drafts run as they are recorded; the text is plain decoding's everywhere."""
    shape = Eagle3Shape(**VARIANTS[variant])
    folder = eagle3_folder(tmp_path / "drafter", "speculators", shape, (2, 4, 5))
    model = model_of(dtype=torch.float32)
    expected = load(model, method="none", backend="eager").generate(PROMPTS, max_new_tokens=12).tokens
    given: dict[str, Any] = {"max_new_tokens": 12, "prompt_lookup_min": 0, "tree_depth": 2, "tree_top_k": 3}
    eager = load(model, folder, backend="eager").generate(PROMPTS, **given)
    found = load(model, folder, backend=backend)
    drafted = found.generate(PROMPTS, **given)
    assert drafted.tokens == expected and drafted.statistics.drafted > 0
    assert drafted.statistics.lengths == eager.statistics.lengths
    assert isinstance(found.drafter, Eagle3Drafter)
    if backend == "graphs":
        assert found.drafter.recorded is not None and found.drafter.recorded.recordings


def test_a_seed_gives_the_same_text_and_drafts_are_drawn_from_kept_tokens(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "angelslim", Eagle3Shape(), (2, 4, 5))
    loaded = load(model_of(), folder, method="eagle3")
    given: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "candidates": "sampled", "prompt_lookup_min": 0}
    one = loaded.generate(PROMPTS, seed=5, **given)
    assert one.tokens == loaded.generate(PROMPTS, seed=5, **given).tokens
    assert one.tokens != loaded.generate(PROMPTS, seed=6, **given).tokens
    recorded = Recorded(bound(folder, model_of()))
    rows = rows_of(recorded.inner.target, PROMPTS, SamplingSettings(temperature=1), 9, [Dice(i) for i in range(3)])  # type: ignore[attr-defined]
    finish(recorded.inner.target, recorded, rows, SHAPES["drawn"])  # type: ignore[attr-defined]
    assert {token for _, tree in recorded.proposed for token in tree.tokens[0, 1:].tolist()} <= set(KEPT)


# --- what folders hold -----------------------------------------------------------------------------------------------


def test_info_says_what_a_folder_is(tmp_path: Path) -> None:
    shape = Eagle3Shape(**EAGLE31, norm_before_residual=True)
    facts = describe(str(eagle3_folder(tmp_path / "a", "speculators", shape, (2, 4, 5))), "cpu")
    assert (facts["method"], facts["layout"], facts["trained_for"]) == ("eagle3", "speculators", "someone/target")
    assert facts["reads"] == "the input of layers 2, 4, 5 (counted from 0)"
    assert facts["draft_vocab_size"] == len(KEPT) and facts["fits_targets_with"]["hidden_size"] == 32
    assert facts["tap_norms"] and facts["norm_output"] and facts["norm_before_residual"]
    facts = describe(str(eagle3_folder(tmp_path / "b", "eagle3", Eagle3Shape())), "cpu")
    assert facts["layout"] == "eagle3" and facts["reads"] == "layers 2, L/2 and L-3 of L"
    assert "norm_output" not in facts


def test_speculators_leave_out_what_the_family_has_by_default(tmp_path: Path) -> None:
    shape = Eagle3Shape(rope_theta=10000.0, rms_norm_eps=1e-6)
    folder = eagle3_folder(tmp_path / "drafter", "speculators", shape, (2, 4, 5))
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rms_norm_eps", "hidden_act"):
        del config["transformer_layer_config"][name]
    (folder / "config.json").write_text(json.dumps(config))
    assert_drafts_are_the_equations(bound(folder, model_of()), shape, (2, 4, 5), TreeShape.chain(3))


def test_the_bitmap_serves_where_the_offsets_are_missing(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    rewrite(folder, d2t=None)
    assert load_eagle3(folder).head.draft_tokens.tolist() == KEPT  # type: ignore[union-attr]


def test_the_targets_head_serves_where_there_is_none(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    rewrite(folder, **{"lm_head.weight": None})
    drafter = bound(folder, model_of())
    p = torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(drafter.logits(p), drafter.target.head(p)[..., KEPT])


def test_a_folder_with_a_tokenizer_beside_it_is_a_drafter_all_the_same(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "angelslim", Eagle3Shape(), (2, 4, 5))
    (folder / "tokenizer.json").write_text("{}")
    assert bound(folder, model_of()).method == "eagle3" and describe(str(folder), "cpu")["kind"] == "drafter"


def test_a_flag_that_readers_disagree_on_is_not_guessed_silently(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "speculators", Eagle3Shape(), (2, 4, 5), norm_before_residual=None)
    with pytest.warns(UserWarning, match="says nothing of norm_before_residual"):
        assert not load_eagle3(folder).head.config.norm_before_residual


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    rewrite(folder, **{"midlayer.self_attn.o_proj.bias": torch.zeros(32)})
    with pytest.warns(UserWarning, match="midlayer.self_attn.o_proj.bias"):
        load_eagle3(folder)


# --- rotary positions ------------------------------------------------------------------------------------------------


def frequencies(tmp_path: Path, **rope: Any) -> tuple[np.ndarray, float]:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(head_dim=16), (2, 4, 5), rope_scaling=rope)
    found, scale = rotary_frequencies(load_eagle3(folder).head.config)
    return found.numpy(), scale


def test_positions_scaled_by_length(tmp_path: Path) -> None:
    found, scale = frequencies(tmp_path, type="linear", factor=4.0)
    np.testing.assert_allclose(found, 500.0 ** (-np.arange(8) / 8) / 4, rtol=1e-6)
    assert scale == 1


def test_positions_of_llama_3_1(tmp_path: Path) -> None:
    """Long waves are stretched by the factor, short ones not, those between by a blend of both."""
    found, scale = frequencies(
        tmp_path,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    )
    expected = []
    for frequency in 500.0 ** (-np.arange(8) / 8):
        turns = 128 * frequency / (2 * math.pi)
        blend = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        expected.append(blend * frequency + (1 - blend) * frequency / 8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert scale == 1


def test_positions_by_yarn(tmp_path: Path) -> None:
    found, scale = frequencies(tmp_path, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    plain = 500.0 ** (-np.arange(8) / 8)
    assert found[0] == pytest.approx(plain[0]) and found[-1] == pytest.approx(plain[-1] / 4)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_tables_reach_as_far_as_the_target_does(tmp_path: Path) -> None:
    """Published configs name 2,048 positions for targets of many more."""
    folder = eagle3_folder(tmp_path / "drafter", "eagle3", Eagle3Shape(max_position_embeddings=16))
    step = bound(folder, model_of()).step
    cos, _ = step.angles([40], 2)
    assert not torch.equal(cos[0, 0], cos[0, 1])


# --- errors ----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors in the file, or take them out."""
    file = folder / "model.safetensors"
    held = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)


def refusal(folder: Path, model: PreTrainedModel | None = None) -> str:
    with pytest.raises(UserError) as error:
        bound(folder, model_of() if model is None else model)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_another_targets_drafter_is_refused(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    assert "trained for a target with hidden_size 32, this one has 64" in refusal(folder, model_of(hidden_size=64))
    assert "vocab_size 32, this one has 40" in refusal(folder, model_of(vocab_size=40))
    assert "layers to read must be between 1 and 3 for this model, not 4" in refusal(folder, model_of(4))
    assert "layers to read must be between 1 and 1 for this model" in refusal(
        eagle3_folder(tmp_path / "official", "eagle3", Eagle3Shape()), model_of(2)
    )


def changed(count: int) -> Iterator[torch.Tensor]:
    """Offsets that lead to one token twice, beyond the vocabulary, and to too few."""
    right = torch.tensor(KEPT) - torch.arange(len(KEPT))
    twice, beyond = right.clone(), right.clone()
    twice[1] -= 1
    beyond[-1] += 10
    yield from (twice, beyond, right[:-1])


@pytest.mark.parametrize("which", range(3))
def test_damaged_offsets_are_refused(tmp_path: Path, which: int) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    rewrite(folder, d2t=list(changed(len(KEPT)))[which])
    assert "d2t must lead to 12 different token ids below 32" in refusal(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"midlayer.mlp.up_proj.weight": None}, "lacks midlayer.mlp.up_proj.weight"),
        ({"norm.weight": None}, "lacks norm.weight"),
        ({"midlayer.hidden_norm.weight": torch.ones(31)}, "midlayer.hidden_norm.weight is 31 where"),
        ({"d2t": None, "t2d": None}, "lacks d2t, which says what its 12 draft tokens are"),
        ({"layers.1.mlp.up_proj.weight": torch.ones(3)}, "only EAGLE-3 drafters of one layer"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    rewrite(folder, **tensors)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_act": "gelu"}, "only drafters with silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "those that load are default, linear"),
        ({"layer_types": ["sliding_attention"]}, "looks back over a window only"),
        ({"fc_norm": "yes"}, "fc_norm must be true or false"),
        ({"fc_norm": True}, "lacks fc_norm.0.weight"),
        ({"hidden_size": "wide"}, "hidden_size must be a positive whole number"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "reads no layers of its target"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}, "reads 3 layers of its target and its"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "all"}}, "must be a list of layers"),
        ({"target_hidden_size": 16}, "needs embed_tokens.weight of its own"),
    ],
)
def test_impossible_configs_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    assert message in refusal(eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5), **more))


def test_other_readers_point_to_the_method(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "drafter", "specforge", Eagle3Shape(), (2, 4, 5))
    with pytest.raises(UserError, match="EAGLE-3"):
        load_drafter(folder)
    with pytest.raises(UserError, match="is a 'eagle3' drafter"):
        load_drafter_for(Target(model_of()), folder, method="fspad")
    other = eagle3_folder(tmp_path / "other", "speculators", Eagle3Shape(), (2, 4, 5), speculators_model_type="peagle")
    with pytest.raises(UserError):
        load_drafter_for(Target(model_of()), other)
