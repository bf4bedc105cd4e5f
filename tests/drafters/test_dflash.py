"""DFlash and DSpark folders of every layout draft what the equations say, and whatever does not fit is refused in one
line. Losslessness is tested with all drafters'."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dflash_reference import KEPT, LAYOUTS, WINDOW, BlockShape, NaiveDFlash, block_folder, block_tensors
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from models import tiny
from outdraft import UserError, load
from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.loading import load_drafter_for
from outdraft.console.facts import describe
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting import draft_cache
from outdraft.methods.checkpoint import method_of
from outdraft.methods.dflash.drafter import DFlash
from outdraft.methods.dflash.folder import load_dflash
from outdraft.methods.dflash.network import spaced
from outdraft.target.target import Target
from test_losslessness import SHAPES, Recorded, finish, rows_of

LAYERS = 8
TAPS = (2, 4, 6)
PROMPTS = [[5, 9, 9, 3, 5, 9], [1, 2, 3, 4, 1, 2, 3], [30]]
OWN: dict[str, Any] = {"embedding": True, "head": True}
DSPARK: dict[str, Any] = {"anchor_first": True, "markov_rank": 5, "block_size": 3, **OWN}
PLAIN = BlockShape()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "z-lab": ("z-lab", {}),
    "causal head": ("z-lab", {"causal": True}),
    "sliding layer": ("z-lab", {"sliding": (1,)}),
    "sliding and bidirectional": ("z-lab", {"sliding": (0,), "causal": False}),
    "scaled": ("z-lab", {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0}),
    "speculators dflash": ("speculators", {**OWN, "kept": KEPT}),
    "speculators dspark": ("speculators", {**DSPARK, "kept": KEPT}),
    "speculators, other norms": ("speculators", {"head_norms": False, "attention_bias": True, "kept": KEPT}),
    "deepspec dspark": ("deepspec", DSPARK),
    "deepspec dflash": ("deepspec", {**OWN, "anchor_first": True, "block_size": 3}),
    "own width": ("deepspec", {**DSPARK, "hidden_size": 20}),
}


def model_of(layers: int = LAYERS, **changes: Any) -> PreTrainedModel:
    return tiny("llama-gqa", num_hidden_layers=layers, **changes)


def bound(folder: Path, model: PreTrainedModel, backend: str = "eager") -> DFlash:
    target = Target(model, backend=backend)
    drafter = load_drafter_for(target, folder, backend=backend)
    assert isinstance(drafter, DFlash)
    return drafter


def folder_of(folder: Path, variant: str) -> tuple[Path, BlockShape]:
    layout, switches = VARIANTS[variant]
    shape = BlockShape(**switches)
    return block_folder(folder, layout, shape, TAPS), shape


@torch.inference_mode()
def assert_drafts_are_the_equations(drafter: DFlash, shape: BlockShape, taps: tuple[int, ...], tree: TreeShape) -> None:
    """Round after round, in a ragged batch: logits are those of the whole context, trees those that grow from them."""
    model, w, recorded = drafter.target.model, block_tensors(shape), Recorded(drafter)
    table, head = model.get_input_embeddings().weight.numpy(), model.get_output_embeddings().weight.numpy()
    given, levels = list[torch.Tensor](), drafter.levels

    def noting(*args: Any) -> torch.Tensor:
        logits = levels(*args)
        given.extend(logits.clone())  # of every row
        return logits

    drafter.levels = noting  # type: ignore[method-assign]
    rows = rows_of(drafter.target, PROMPTS, SamplingSettings(), 9, [Dice(i) for i in range(len(PROMPTS))])
    finish(drafter.target, recorded, rows, tree)
    assert len(given) == len(recorded.proposed) > 2 * len(PROMPTS)
    for (prefix, proposed), logits in zip(recorded.proposed, given, strict=True):
        hidden = model(torch.tensor([prefix[:-1]]), output_hidden_states=True, use_cache=False).hidden_states
        naive = NaiveDFlash(w, shape, table, head, prefix[-1], [hidden[tap][0].numpy() for tap in taps])
        np.testing.assert_allclose(logits.numpy(), naive.levels[: len(logits)], atol=1e-8)
        tokens, parents = naive.tree(tree.depth, tree.top_k, tree.size)
        assert proposed.tokens[0].tolist() == tokens and proposed.parents[0].tolist() == parents


@pytest.mark.parametrize("tree", [TreeShape.chain(3), TreeShape(2, 3, 9)], ids=["chain", "tree"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_drafts_what_the_equations_say(tmp_path: Path, variant: str, tree: TreeShape) -> None:
    folder, shape = folder_of(tmp_path / "drafter", variant)
    loaded = load_dflash(folder)
    assert loaded.layout == VARIANTS[variant][0] and loaded.network.config.anchor_first == shape.anchor_first
    assert method_of(folder).name == loaded.network.method == ("dspark" if shape.markov_rank else "dflash")
    assert_drafts_are_the_equations(bound(folder, model_of()), shape, TAPS, tree)


def test_long_prompts_are_taken_in_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_cache, "PREFILL_CHUNK", 3)
    folder, shape = folder_of(tmp_path / "drafter", "sliding layer")
    assert_drafts_are_the_equations(bound(folder, model_of()), shape, TAPS, TreeShape.chain(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_are_counted_as_each_layout_counts_them(tmp_path: Path, layout: str) -> None:
    """`target_layer_ids` names outputs counted from 0, speculators' ids inputs; any layers, in any order."""
    shape, taps = BlockShape(taps=4, **OWN, anchor_first=layout == "deepspec"), (7, 1, 6, 1)
    drafter = bound(block_folder(tmp_path / "drafter", layout, shape, taps), model_of())
    assert drafter.reads.layers == taps
    assert_drafts_are_the_equations(drafter, shape, taps, TreeShape.chain(3))


def test_layers_that_no_config_names_are_spaced_equally(tmp_path: Path) -> None:
    """From layer 1 to layer L - 3 counted from 0, so five of 36 are 1, 9, 17, 25, 33; a single one is L // 2."""
    assert [tap - 1 for tap in spaced(5, 36)] == [1, 9, 17, 25, 33] and spaced(1, 8) == (5,)
    drafter = bound(block_folder(tmp_path / "drafter", "z-lab", PLAIN, None), model_of())
    assert drafter.reads.layers == (2, 4, 6)


@pytest.mark.parametrize(
    ("variant", "mistake", "taps"),
    [
        ("z-lab", {}, (3, 5, 7)),
        ("speculators dflash", {}, (2, 4, 5)),
        ("deepspec dspark", {"anchor_first": False, "block_size": 4}, TAPS),
        ("deepspec dflash", {"anchor_first": False, "block_size": 4}, TAPS),
        ("z-lab", {"causal": True}, TAPS),
        ("sliding layer", {"sliding": ()}, TAPS),
        ("sliding layer", {"causal": False}, TAPS),
        ("deepspec dspark", {"markov_rank": 0}, TAPS),
        ("z-lab", {"mask_token_id": 28}, TAPS),
        ("speculators dflash", {"head": False, "kept": None}, TAPS),
    ],
)
def test_a_wrong_layout_would_be_seen(tmp_path: Path, variant: str, mistake: dict[str, Any], taps: Any) -> None:
    folder, shape = folder_of(tmp_path / "drafter", variant)
    with pytest.raises(AssertionError):
        wrong = dataclasses.replace(shape, **mistake)
        assert_drafts_are_the_equations(bound(folder, model_of()), wrong, taps, TreeShape.chain(3))


@pytest.mark.parametrize("said", [True, False])
def test_a_flag_decides_what_the_anchors_slot_predicts(tmp_path: Path, said: bool) -> None:
    """Against what the layout is taken to mean without one."""
    shape = BlockShape(anchor_first=said)
    folder = block_folder(tmp_path / "drafter", "z-lab", shape, TAPS, sample_from_anchor=said)
    assert_drafts_are_the_equations(bound(folder, model_of()), shape, TAPS, TreeShape.chain(3))
    assert f"the anchor's slot predicting {'the next token' if said else 'nothing'} (as its config.json says)" in str(
        describe(str(folder), "cpu")["proposals"]
    )


@pytest.mark.parametrize(("variant", "proposals"), [("z-lab", 3), ("deepspec dspark", 3), ("speculators dflash", 3)])
def test_no_draft_is_longer_than_the_block(tmp_path: Path, variant: str, proposals: int) -> None:
    drafter = bound(folder_of(tmp_path / "drafter", variant)[0], model_of())
    assert drafter.limits.depth == proposals and not drafter.limits.stepwise
    for shape in (TreeShape.chain(9), TreeShape(8, 2, 20)):
        recorded = Recorded(drafter)
        finish(drafter.target, recorded, rows_of(drafter.target, PROMPTS, SamplingSettings(), 9, [Dice(0)] * 3), shape)
        assert {int(tree.depths.max()) for _, tree in recorded.proposed} == {proposals}


def test_gpus_draft_as_deep_as_the_block(tmp_path: Path) -> None:
    drafter = bound(folder_of(tmp_path / "drafter", "z-lab")[0], model_of())
    assert drafter.default_shape(torch.device("cuda"), sampling=True) == TreeShape.chain(3, candidates="sampled")
    alone, many = (resolve(DraftSettings(), drafter, torch.device("cuda"), rows=n).shape for n in (1, 8))
    assert (alone.depth, alone.size) == (2, 60) and (many.depth, many.size) == (2, 16)


def test_embeddings_are_the_targets_own_or_scaled_as_the_config_says(tmp_path: Path) -> None:
    """Gemma's module scales what it gives."""
    model = tiny("gemma3", num_hidden_layers=8, layer_types=["full_attention"] * 8)
    tokens, table = torch.tensor([[3, 4]]), model.get_input_embeddings().weight
    plain = bound(block_folder(tmp_path / "plain", "z-lab", PLAIN, TAPS), model)
    assert torch.equal(plain.embed(tokens), model.get_input_embeddings()(tokens))
    scaled = bound(block_folder(tmp_path / "scaled", "z-lab", BlockShape(input_embedding_scale=2.0), TAPS), model)
    assert torch.equal(scaled.embed(tokens), 2 * table[tokens])


@pytest.mark.parametrize("backend", ["packed", "graphs"])
@pytest.mark.parametrize("variant", ["z-lab", "sliding layer", "speculators dspark", "deepspec dspark"])
def test_other_backends_say_the_same(tmp_path: Path, variant: str, backend: str) -> None:
    folder, model = folder_of(tmp_path / "drafter", variant)[0], model_of(dtype=torch.float32)
    expected = load(model, method="none", backend="eager").generate(PROMPTS, max_new_tokens=12).tokens
    given: dict[str, Any] = {"max_new_tokens": 12, "prompt_lookup_min": 0, "tree_depth": 2, "tree_top_k": 3}
    eager = load(model, folder, backend="eager").generate(PROMPTS, **given)
    drafted = load(model, folder, backend=backend).generate(PROMPTS, **given)
    assert drafted.tokens == expected and drafted.statistics.drafted > 0
    assert drafted.statistics.lengths == eager.statistics.lengths


@pytest.mark.parametrize("variant", ["speculators dflash", "speculators dspark"])
def test_a_seed_gives_the_same_text_and_drafts_are_drawn_from_kept_tokens(tmp_path: Path, variant: str) -> None:
    folder = folder_of(tmp_path / "drafter", variant)[0]
    loaded = load(model_of(), folder)
    given: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "candidates": "sampled", "prompt_lookup_min": 0}
    one = loaded.generate(PROMPTS, seed=5, **given)
    assert one.tokens == loaded.generate(PROMPTS, seed=5, **given).tokens
    assert one.tokens != loaded.generate(PROMPTS, seed=6, **given).tokens
    drafter = bound(folder, model_of())
    recorded = Recorded(drafter)
    rows = rows_of(drafter.target, PROMPTS, SamplingSettings(temperature=1), 9, [Dice(i) for i in range(3)])
    finish(drafter.target, recorded, rows, SHAPES["drawn"])
    assert {token for _, tree in recorded.proposed for token in tree.tokens[0, 1:].tolist()} <= set(KEPT)


# --- what folders hold -----------------------------------------------------------------------------------------------


def test_info_says_what_a_folder_is(tmp_path: Path) -> None:
    facts = describe(str(folder_of(tmp_path / "a", "speculators dspark")[0]), "cpu")
    assert (facts["method"], facts["layout"], facts["trained_for"]) == ("dspark", "speculators", "someone/target")
    assert facts["reads"] == "the input of layers 2, 4, 6 (counted from 0)"
    assert facts["draft_vocab_size"] == len(KEPT) and facts["fits_targets_with"]["hidden_size"] == 32
    assert facts["markov_rank"] == 5 and facts["own_head"] and facts["own_embedding"]
    facts = describe(str(folder_of(tmp_path / "b", "sliding layer")[0]), "cpu")
    assert facts["layout"] == "z-lab" and facts["reads"] == "the output of layers 1, 3, 5 (counted from 0)"
    assert facts["proposals"] == "3, the anchor's slot predicting nothing (as z-lab trains it)"
    assert facts["windows"] == WINDOW and facts["fits_targets_with"]["num_layers"] == LAYERS
    facts = describe(str(folder_of(tmp_path / "c", "deepspec dspark")[0]), "cpu")
    assert facts["proposals"] == "3, the anchor's slot predicting the next token (as DSpark trains it)"
    assert facts["unused"] == "confidence_head.proj.weight"
    assert describe(str(block_folder(tmp_path / "d", "z-lab", PLAIN, None)), "cpu")["reads"] == "equally spaced layers"


def test_a_folder_with_a_tokenizer_beside_it_is_a_drafter_all_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "drafter", "z-lab")[0]
    (folder / "tokenizer.json").write_text("{}")
    assert bound(folder, model_of()).method == "dflash" and describe(str(folder), "cpu")["kind"] == "drafter"


# --- errors ----------------------------------------------------------------------------------------------------------


def refusal(folder: Path, model: PreTrainedModel | None = None) -> str:
    with pytest.raises(UserError) as error:
        bound(folder, model_of() if model is None else model)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_another_targets_drafter_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "drafter", "z-lab")[0]
    assert "trained for a target with hidden_size 32, this one has 64" in refusal(folder, model_of(hidden_size=64))
    assert "vocab_size 32, this one has 40" in refusal(folder, model_of(vocab_size=40))
    assert "num_layers 8, this one has 6" in refusal(folder, model_of(6))
    own = folder_of(tmp_path / "own", "speculators dflash")[0]
    assert "layers to read must be between 1 and 3 for this model, not 4" in refusal(own, model_of(4))
    last = block_folder(tmp_path / "last", "z-lab", PLAIN, (2, 4, 8))
    assert "layers to read must be between 1 and 7 for this model, not 8" in refusal(last)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.1.mlp.up_proj.weight": None}, "lacks layers.1.mlp.up_proj.weight"),
        ({"hidden_norm.weight": None}, "lacks hidden_norm.weight"),
        ({"norm.weight": torch.ones(31)}, "norm.weight is 31 where"),
        ({"layers.2.mlp.up_proj.weight": torch.ones(3)}, "holds layers.2.mlp.up_proj.weight, which DFlash and DSpark"),
        ({"layers.0.conv.base": torch.ones(3)}, "holds layers.0.conv.base, which DFlash and DSpark have no place for"),
        ({"markov_head.gate.weight": torch.ones(3)}, "gated or recurrent Markov head"),
        ({"markov_head.markov_w1.weight": None}, "lacks markov_head.markov_w1.weight"),
        ({"markov_head.markov_w1.weight": torch.ones(12, 5)}, "markov_w1.weight is 12x5 where"),
        ({"d2t": None, "t2d": None}, "lacks d2t, which says what its 12 draft tokens are"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path / "drafter", "speculators dspark")[0]
    file = folder / "model.safetensors"
    held = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_act": "gelu"}, "only drafters with silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "those that load are default, linear"),
        ({"use_sliding_window": True}, "no layer_types that say which layers have it"),
        ({"layer_types": ["full_attention"]}, "must have layer_types of 2 layers"),
        ({"layer_types": ["full_attention", "mamba"]}, "full_attention or sliding_attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "must have a whole number sliding_window"),
        ({"causal_head": "yes"}, "causal_head must be true or false"),
        ({"mask_token_id": None}, "must have a whole number mask_token_id"),
        ({"mask_token_id": 32}, "has mask_token_id 32, beyond its 32 tokens"),
        ({"block_size": 1.5}, "must have a whole number block_size"),
        ({"target_layer_ids": [1, 3]}, "reads 3 layers of its target and its"),
        ({"target_layer_ids": "all"}, "target_layer_ids must be a list of layers"),
        ({"target_hidden_size": 16}, "needs embed_tokens.weight of its own"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"output_multiplier": "much"}, "output_multiplier must be a positive number"),
        ({"dflash_config": 3}, "dflash_config must be an object"),
        ({"architectures": ["DFlash2DraftModel"]}, "is a DFlash2 drafter"),
        ({"dflash_config": {"selector_rank": 256}}, "is a DFlash2 drafter"),
        ({"dflash_config": {"projector_type": "domino"}}, "is a Domino drafter"),
        ({"dflash_config": {"projector_type": "dspark"}}, "has projector_type 'dspark'"),
        ({"dspine_config": {}}, "is a DSpine drafter"),
        ({"treeflash_config": {}, "architectures": []}, "is a TreeFlash drafter"),
    ],
)
def test_impossible_configs_are_refused_and_others_by_name(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path / "drafter", "z-lab")[0]
    config = json.loads((folder / "config.json").read_text())
    inner = config["dflash_config"]
    for name, value in more.items():
        place = inner if name in inner else config
        place[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert message in refusal(folder)


def test_names_lead_to_the_method(tmp_path: Path) -> None:
    folder, target = folder_of(tmp_path / "drafter", "z-lab")[0], Target(model_of())
    drafter = load_drafter_for(target, folder, method="dflash")
    assert drafter is not None and drafter.method == "dflash"
    with pytest.raises(UserError, match="is a 'dflash' drafter"):
        load_drafter_for(target, folder, method="dspark")
    (folder / "config.json").write_text(json.dumps({"speculators_model_type": "peagle"}))
    with pytest.raises(UserError, match="holds no DFlash or DSpark drafter"):
        load_dflash(folder)
