"""Exported folders: every tensor, the forward read from the files, what is refused, and decoding with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import outdraft
from models import tiny
from outdraft import UserError
from outdraft.api.loading import load_drafter_for
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.export.export import Exported, export_drafter
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.eagle3 import folder as eagle3_export
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.eagle3.folder import load_eagle3
from outdraft.methods.eesd import network as exit_export
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad import folder as head_export
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads
from outdraft.methods.vllm_folder import check_tensors
from outdraft.target.target import Target
from test_losslessness import Recorded, finish, rows_of

CONFIG = FeatureHeadConfig(
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=32,
    max_position_embeddings=64,
)
EAGLE = {"feature_sampling": False, "partial_alignment": False}
"""The switches of EAGLE's head."""

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "fspad": ({}, "EagleFspadLlamaForCausalLM"),
    "fspad without fc bias": ({"fc_bias": False}, "EagleFspadLlamaForCausalLM"),
    "feature sampling alone": ({"partial_alignment": False}, "EagleFspadLlamaForCausalLM"),
    "partial alignment alone": ({"feature_sampling": False}, "EagleFspadLlamaForCausalLM"),
    "attention biases": ({"attention_bias": True}, "EagleFspadLlamaForCausalLM"),
    "eagle with fc bias": (EAGLE, "EagleFcBiasLlamaForCausalLM"),
    "eagle without": ({**EAGLE, "fc_bias": False}, "EagleLlamaForCausalLM"),
}


def saved_target(folder: Path, family: str = "llama-gqa", **changes: Any) -> Path:
    tiny(family, dtype=torch.float32, **changes).save_pretrained(folder)
    return folder


def random_head(**changes: Any) -> FeatureHead:
    torch.manual_seed(3)
    head = FeatureHead(FeatureHeadConfig(**{**asdict(CONFIG), **changes}))
    with torch.no_grad():
        for weight in head.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return head


def saved_head(folder: Path, **changes: Any) -> Path:
    return save_drafter(folder, random_head(**changes), target_id="tiny")


def saved_exit(folder: Path, family: str = "llama-gqa", own_head: bool = False) -> Path:
    """An exit layer that is often right: the target's last layer, a little changed."""
    model = tiny(family, dtype=torch.float32)
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(1, own_head))
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in exit_layer.parameters():
            weight.add_(0.05 * weight.std(correction=0) * torch.randn_like(weight))
    return save_drafter(folder, exit_layer, target_id="tiny", target=target_facts(model))


def exported(tmp_path: Path, drafter: Path, target: Path, engine: str = "vllm", **more: Any) -> Exported:
    return export_drafter(str(target), str(drafter), engine, tmp_path / "out", **more)


# --- FSPAD and EAGLE's head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_is_written_under_the_names_the_engine_reads_and_computes_the_same(tmp_path: Path, name: str) -> None:
    changes, architecture = VARIANTS[name]
    done = exported(tmp_path, saved_head(tmp_path / "head", **changes), saved_target(tmp_path / "target"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert config["architectures"] == [architecture] == [done.architecture]
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == head_export.expected_shapes(config, tensors)
    # `bias` is the attention's in vLLM, and fc's in EAGLE's code, where its absence means true.
    assert ("bias" not in config) if config["fc_bias"] else config["bias"] is False
    assert not config["attention_bias"] and config.get("qkv_bias", False) == changes.get("attention_bias", False)
    assert 0 < done.difference < 1e-5
    assert done.plugin == (architecture != "EagleLlamaForCausalLM")
    assert done.command.startswith("vllm serve ")
    assert '"method": "eagle"' in done.command and str(tmp_path / "out") in done.command
    # The official names, so it loads here again, as the same drafter.
    back, head = load_drafter(tmp_path / "out").head, random_head(**changes)
    assert all(torch.equal(weight, back.state_dict()[key]) for key, weight in head.state_dict().items())


def test_a_drafters_own_embedding_goes_along(tmp_path: Path) -> None:
    folder = saved_head(tmp_path / "head")
    tensors = {**load_file(folder / "model.safetensors"), "embed_tokens.weight": torch.randn(32, 32)}
    save_file(tensors, folder / "model.safetensors")
    exported(tmp_path, folder, saved_target(tmp_path / "target"))
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"], tensors["embed_tokens.weight"]
    )


def test_the_precision_is_the_stored_one_unless_asked_for(tmp_path: Path) -> None:
    head, target = saved_head(tmp_path / "head"), saved_target(tmp_path / "target")
    assert exported(tmp_path / "a", head, target).difference < 1e-5
    exported(tmp_path / "b", head, target, dtype="bfloat16")
    for place, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        tensors = load_file(tmp_path / place / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen2", "qwen3"])
def test_families_whose_features_vllm_hands_over_are_taken(tmp_path: Path, family: str) -> None:
    assert (
        exported(tmp_path, saved_head(tmp_path / "head"), saved_target(tmp_path / "target", family)).method == "fspad"
    )


REFUSED: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "taps": (lambda p: (saved_head(p / "d", tap_layers=(1,)), saved_target(p / "t")), "tap_layers"),
    "state norm": (lambda p: (saved_head(p / "d", state_norm=True), saved_target(p / "t")), "state_norm"),
    "reduced vocabulary": (
        lambda p: (saved_head(p / "d", draft_vocab_size=8), saved_target(p / "t")),
        "draft_vocab_size",
    ),
    "another width": (lambda p: (saved_head(p / "d", hidden_size=64), saved_target(p / "t")), "hidden_size 64"),
    "another vocabulary": (lambda p: (saved_head(p / "d", vocab_size=40), saved_target(p / "t")), "vocab_size 40"),
    "scaled embeddings": (lambda p: (saved_head(p / "d"), saved_target(p / "t", "gemma")), "'gemma'"),
    "scaled logits": (lambda p: (saved_head(p / "d"), saved_target(p / "t", "granite")), "'granite'"),
    "medusa": (lambda p: (saved_medusa(p / "d"), saved_target(p / "t")), "Medusa"),
    "a language model": (lambda p: (saved_target(p / "d"), saved_target(p / "t")), "no drafter"),
    "no target": (lambda p: (saved_head(p / "d"), p / "absent"), "target"),
    "another target's exit": (
        lambda p: (saved_exit(p / "d"), saved_target(p / "t", num_hidden_layers=3)),
        "num_hidden_layers",
    ),
}


def saved_medusa(folder: Path) -> Path:
    return save_drafter(folder, MedusaHeads(MedusaConfig(hidden_size=32, vocab_size=32)), target_id="tiny")


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_run_otherwise_is_refused_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    make, word = REFUSED[case]
    drafter, target = make(tmp_path)
    with pytest.raises(UserError, match=word) as error:
        exported(tmp_path, drafter, target)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"d", "t"} & {p.name for p in tmp_path.iterdir()})


def test_heads_are_no_assistant_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="custom_generate"):
        exported(tmp_path, saved_head(tmp_path / "head"), saved_target(tmp_path / "target"), engine="hf")


def test_a_folder_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, target = saved_head(tmp_path / "head"), saved_target(tmp_path / "target")
    right = head_export.engine_tensors

    def swapped(head: FeatureHead) -> dict[str, Any]:
        tensors = right(head)
        gate, up = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
        return {**tensors, gate: tensors[up], up: tensors[gate]}

    monkeypatch.setattr(head_export, "engine_tensors", swapped)
    with pytest.raises(UserError, match="does not compute what the drafter does"):
        exported(tmp_path, head, target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors.pop("fc.fc.bias"), "lacks fc.fc.bias"),
        (lambda tensors: tensors.update({"input_layernorm.weight": torch.ones(32)}), "no place"),
        (lambda tensors: tensors.update({"fc.fc.bias": torch.ones(31)}), "31 where vLLM asks for 32"),
        (lambda tensors: tensors["fc.fc.bias"].fill_(torch.nan), "no numbers"),
    ],
)
def test_every_tensor_is_checked(change: Callable[[dict[str, Any]], Any], word: str) -> None:
    head = random_head()
    config = head_export.engine_config(head.config, tiny("llama-gqa").config, torch.float32)
    tensors = {name: tensor.detach().clone() for name, tensor in head_export.engine_tensors(head).items()}
    shapes = head_export.expected_shapes(config, tensors)
    check_tensors(shapes, tensors)
    change(tensors)
    with pytest.raises(UserError, match=word):
        check_tensors(shapes, tensors)


# --- EAGLE-3 -------------------------------------------------------------------------------------------------------


def saved_eagle3(folder: Path, layers: int = 6, kept: bool = True, **changes: Any) -> Path:
    """A head of random weights, its norms random too, that drafts a few tokens."""
    shape = {name: getattr(CONFIG, name) for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    taps = {"tap_ids": (1, 3, layers - 1), "tap_unit": "input", "draft_vocab_size": 12 if kept else 0}
    torch.manual_seed(6)
    head = Eagle3Head(Eagle3Config(**{**shape, **heads, "target_hidden_size": 32, **taps, **changes}))
    if head.draft_tokens is not None:
        head.draft_tokens.copy_(torch.tensor([1, 2, 3, 5, 8, 13, 14, 15, 21, 22, 27, 30]))
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.2 * torch.randn_like(weight)) if weight.ndim == 1 else weight.mul_(3)
    return save_drafter(folder, head, target_id="tiny")


SWITCHES: dict[str, dict[str, Any]] = {
    "EAGLE-3": {},
    "3.1": {"tap_norms": True, "norm_output": True},
    "other norms": {"norm_before_fc": True, "norm_before_residual": True},
    "whole vocabulary": {"kept": False},
    "default layers": {"tap_ids": (), "tap_unit": "none given", "layers": 8},
    "layers by their outputs": {"tap_ids": (0, 2, 4), "tap_unit": "output"},
    "positions as in Llama 3.1": {
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("name", SWITCHES)
def test_an_exported_eagle3_head_drafts_the_same_when_it_is_loaded(tmp_path: Path, name: str) -> None:
    layers = SWITCHES[name].get("layers", 6)
    drafter = saved_eagle3(tmp_path / "head", **SWITCHES[name])
    target = saved_target(tmp_path / "target", num_hidden_layers=layers)
    done = exported(tmp_path, drafter, target)
    assert (done.architecture, done.method, done.plugin) == ("LlamaForCausalLMEagle3", "eagle3", False)
    assert '"method": "eagle3"' in done.command and 0 < done.difference < 1e-5
    there, here = load_eagle3(tmp_path / "out").network, load_eagle3(drafter).network
    assert all(torch.equal(weight, there.state_dict()[key]) for key, weight in here.state_dict().items())
    assert there.layers_read(layers) == here.layers_read(layers)
    model = Target(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval())
    for shape in (TreeShape.chain(3), TreeShape(2, 3, 9), TreeShape.chain(3, candidates="sampled")):
        drafts = []
        for folder in (drafter, done.folder):
            recorded = Recorded(load_drafter_for(model, folder, method="eagle3"))
            settings, chances = SamplingSettings(temperature=1.0), [Dice(1), Dice(2)]
            finish(model, recorded, rows_of(model, [[1, 5, 9], [7, 3, 3, 8, 2]], settings, 16, chances), shape)
            drafts.append([tree.tokens[0].tolist() for _, tree in recorded.proposed])
        assert drafts[0] == drafts[1] and len({tuple(tokens) for tokens in drafts[0]}) > 8


def test_eagle3_layers_and_tokens_are_written_as_vllm_counts_them(tmp_path: Path) -> None:
    """vLLM reads the input of a layer, and adds the offset to the index in the output layer."""
    target = saved_target(tmp_path / "target", num_hidden_layers=6)
    exported(tmp_path, saved_eagle3(tmp_path / "head", tap_ids=(0, 2, 4), tap_unit="output"), target)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5] and config["num_aux_hidden_states"] == 3
    assert config["draft_vocab_size"] == 12 == len(tensors["d2t"]) and tensors["d2t"].dtype == torch.int64
    kept = torch.arange(12) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], kept) and kept[:5].tolist() == [1, 2, 3, 5, 8]
    assert {key for key in tensors if key.startswith("midlayer.")} and "embed_tokens.weight" not in tensors


EAGLE3_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers out of order": ({"tap_ids": (4, 1, 3)}, "vLLM only layers in rising order"),
    "a bias": ({"fc_bias": True}, "fc_bias"),
    "head norms": ({"head_norms": True}, "head_norms"),
    "another width": ({"hidden_size": 64, "target_hidden_size": 64}, "hidden_size 64"),
}


@pytest.mark.parametrize("case", EAGLE3_REFUSED)
def test_an_eagle3_head_that_vllm_would_run_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    changes, word = EAGLE3_REFUSED[case]
    drafter, target = saved_eagle3(tmp_path / "d", **changes), saved_target(tmp_path / "t", num_hidden_layers=6)
    with pytest.raises(UserError, match=word):
        exported(tmp_path, drafter, target)
    assert not (tmp_path / "out").exists()


def test_others_eagle3_folders_need_no_export(tmp_path: Path) -> None:
    target = saved_target(tmp_path / "target", num_hidden_layers=6)
    done = exported(tmp_path, saved_eagle3(tmp_path / "head"), target)
    with pytest.raises(UserError, match="an EAGLE-3 folder already, which engines read as it is"):
        export_drafter(str(target), done.folder, "vllm", tmp_path / "again")
    with pytest.raises(UserError, match="no EAGLE-3 head; use --engine vllm"):
        export_drafter(str(target), str(tmp_path / "head"), "hf", tmp_path / "again")


MISTAKES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "attention reads state and embedding swapped": lambda tensors: {
        **tensors,
        "midlayer.input_layernorm.weight": tensors["midlayer.hidden_norm.weight"],
        "midlayer.hidden_norm.weight": tensors["midlayer.input_layernorm.weight"],
    },
    "gate and up swapped": lambda tensors: {
        **tensors,
        "midlayer.mlp.gate_proj.weight": tensors["midlayer.mlp.up_proj.weight"],
        "midlayer.mlp.up_proj.weight": tensors["midlayer.mlp.gate_proj.weight"],
    },
    "ids in place of offsets": lambda tensors: {**tensors, "d2t": tensors["d2t"] + torch.arange(12)},
    "taps in another order": lambda tensors: {**tensors, "fc.weight": tensors["fc.weight"].roll(32, 1)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_eagle3_folder_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    right = eagle3_export._tensors
    monkeypatch.setattr(eagle3_export, "_tensors", lambda head: MISTAKES[mistake](right(head)))
    target = saved_target(tmp_path / "target", num_hidden_layers=6)
    with pytest.raises(UserError, match="does not compute what the drafter does"):
        exported(tmp_path, saved_eagle3(tmp_path / "head"), target)
    assert not (tmp_path / "out").exists()


# --- EESD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen2-sliding", "gemma2", "gpt-neox", "gpt2"])
def test_an_exit_layer_becomes_an_ordinary_model(tmp_path: Path, family: str, own_head: bool) -> None:
    drafter, target = saved_exit(tmp_path / "exit", family, own_head), saved_target(tmp_path / "target", family)
    done = exported(tmp_path, drafter, target)
    assert '"method": "draft_model"' in done.command and not done.plugin
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert small.config.num_hidden_layers == 2
    assert small.get_output_embeddings().weight is not small.get_input_embeddings().weight
    # Our own decoding with it as a draft model accepts what it accepts with the exit layer.
    model = outdraft.load(str(target), str(drafter), dtype="float32", backend="eager")
    chain: dict[str, Any] = {"max_new_tokens": 24, "num_speculative_tokens": 3}
    prompts = [[1, 5, 9], [7, 3, 3, 8, 2]]
    ours = model.generate(prompts, **chain)
    theirs = outdraft.load(str(target), small, dtype="float32", backend="eager").generate(prompts, **chain)
    assert ours.tokens == theirs.tokens
    assert ours.statistics.accepted_at == theirs.statistics.accepted_at and ours.statistics.accepted > 0


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_transformers_drafts_with_it_and_says_the_same(tmp_path: Path, engine: str) -> None:
    target = saved_target(tmp_path / "target")
    done = exported(tmp_path, saved_exit(tmp_path / "exit"), target, engine)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assistant = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32).eval()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    ids = torch.tensor([[1, 5, 9, 2]])
    settings: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    alone, calls = calls, 0
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), plain)
    assert 0 < calls < alone  # its drafts saved forwards
    assert engine == "vllm" or "assistant_model=assistant" in done.command


def test_an_exported_exit_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exit_export.exit_model

    def wrong(exit_layer: ExitLayer, model: Any) -> Any:
        small = right(exit_layer, model)
        small.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
        return small

    monkeypatch.setattr(exit_export, "exit_model", wrong)
    with pytest.raises(UserError, match="does not compute what the drafter does"):
        exported(tmp_path, saved_exit(tmp_path / "exit"), saved_target(tmp_path / "target"))
    assert not (tmp_path / "out").exists()


# --- the folder, the command ---------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        exported(tmp_path, saved_head(tmp_path / "head"), saved_target(tmp_path / "target"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_the_shipped_target_can_be_written_along(tmp_path: Path) -> None:
    done = export_drafter(
        "reference", "reference", "vllm", tmp_path / "out", method="eagle", target_dir=tmp_path / "target"
    )
    assert done.target == str(tmp_path / "target") and done.target in done.command
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32)
    ours = outdraft.load("reference", dtype="float32", backend="eager").target.model
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("out", "target"), [("out", "out/target"), ("target/out", "target"), ("one", "one")])
def test_neither_folder_goes_into_the_other(tmp_path: Path, out: str, target: str) -> None:
    with pytest.raises(UserError, match="side by side"):
        export_drafter("reference", "reference", "vllm", tmp_path / out, target_dir=tmp_path / target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"engine": "sglang"}, "vllm, hf"),
        ({"num_speculative_tokens": 0}, "at least 1"),
        ({"target_dir": "there"}, "for the shipped target"),
        ({"method": "eagle"}, "leave --method out"),
        ({"dtype": "int3"}, "unknown dtype"),
    ],
)
def test_other_mistakes_are_one_line(tmp_path: Path, more: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        exported(tmp_path, saved_head(tmp_path / "head"), saved_target(tmp_path / "target"), **more)
    assert not (tmp_path / "out").exists()
