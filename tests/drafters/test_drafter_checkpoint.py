"""Drafter folders: our own round trip, the official layouts as they are, and one-line errors that name the fix."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from drafter_reference import Shape, head_outputs, numbers, official_tensors
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from test_feature_head_equations import GQA, SWITCHES, inputs, torch_head

import outdraft
from outdraft import UserError
from outdraft.drafting.folder import push_to_hub
from outdraft.methods.checkpoint import save_drafter
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead


def official_config(shape: Shape, **more: Any) -> dict[str, Any]:
    """A Llama config as the authors' code reads it."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = {name: getattr(shape, name) for name in names}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "bos_token_id": 1}
    config |= {"hidden_act": "silu", "rms_norm_eps": shape.rms_norm_eps, "rope_theta": shape.rope_theta}
    return {**config, "head_dim": shape.head_dim, "torch_dtype": "float16", **more}


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], file: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: torch.tensor(value) for name, value in tensors.items()}
    if file == "model.safetensors":
        save_file(weights, folder / file)
    elif file == "pytorch_model.bin":
        torch.save(weights, folder / file)
    else:  # in two shards, with an index
        names, suffix = sorted(weights), "safetensors" if "safetensors" in file else "bin"
        parts = {f"part-{i}.{suffix}": {name: weights[name] for name in names[i::2]} for i in range(2)}
        for part, held in parts.items():
            save_file(held, folder / part) if suffix == "safetensors" else torch.save(held, folder / part)
        places = {name: part for part, held in parts.items() for name in held}
        (folder / file).write_text(json.dumps({"weight_map": places}))
    return folder


def agrees(head: FeatureHead, w: dict[str, np.ndarray], shape: Shape) -> None:
    """The head gives what the equations give with the raw tensors."""
    e, f = inputs(shape, 6)
    with torch.no_grad():
        out = head(torch.tensor(e)[None], torch.tensor(f)[None])
    p, r = head_outputs(w, shape, e, f)
    np.testing.assert_allclose(out.p[0].numpy(), p, rtol=0, atol=1e-10)
    np.testing.assert_allclose(out.r[0].numpy(), r, rtol=0, atol=1e-10)


def one_line(folder: Path | str, fix: str, **options: Any) -> str:
    """Loading fails with one line in which the fix stands."""
    with pytest.raises(UserError) as error:
        load_drafter(folder, **options)
    message = str(error.value)
    assert "\n" not in message and fix in message, message
    return message


# --- official layouts --------------------------------------------------------------------------------------------

FILES = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("switches", SWITCHES)
def test_official_folders_load_as_they_are(tmp_path: Path, switches: str, file: str) -> None:
    w = official_tensors(GQA, *SWITCHES[switches])
    loaded = load_drafter(write(tmp_path / "drafter", official_config(GQA), w, file))
    agrees(loaded.head, w, GQA)
    config = loaded.head.config
    assert (config.feature_sampling, config.partial_alignment) == SWITCHES[switches]
    assert loaded.layout == ("eagle" if switches == "eagle" else "fspad")
    assert loaded.head.embed_tokens is None and loaded.target_id is None


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("fc_bias", [True, False])
def test_the_fusion_has_a_bias_when_the_tensor_is_there(tmp_path: Path, fc_bias: bool, stated: bool | None) -> None:
    """Whatever the config's `bias` says: an absent key means true in EAGLE's own code."""
    w = official_tensors(GQA, False, False, fc_bias=fc_bias)
    more = {} if stated is None else {"bias": stated}
    head = load_drafter(write(tmp_path / "drafter", official_config(GQA, **more), w)).head
    assert head.config.fc_bias == fc_bias
    agrees(head, w, GQA)


def test_an_embedding_of_its_own_comes_along_frozen(tmp_path: Path) -> None:
    w = official_tensors(GQA, False, False, embedding=True)
    head = load_drafter(write(tmp_path / "drafter", official_config(GQA), w)).head
    assert head.embed_tokens is not None and not head.embed_tokens.weight.requires_grad
    assert np.array_equal(head.embed_tokens.weight.numpy(), w["embed_tokens.weight"])
    assert head.fusion.fc.weight.requires_grad
    agrees(head, w, GQA)


def test_attention_biases_of_qwen2_heads(tmp_path: Path) -> None:
    w = official_tensors(GQA, False, False, attention_bias=True)
    head = load_drafter(write(tmp_path / "drafter", official_config(GQA, qkv_bias=True), w)).head
    assert head.config.attention_bias
    agrees(head, w, GQA)


def test_what_old_configs_leave_out(tmp_path: Path) -> None:
    """The published 33B config has no rope_theta, no max_position_embeddings, no head_dim."""
    shape = Shape(num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    config = official_config(shape)
    for name in ("rope_theta", "rms_norm_eps", "head_dim", "num_key_value_heads", "hidden_act"):
        del config[name]
    w = official_tensors(shape)
    head = load_drafter(write(tmp_path / "drafter", config, w)).head
    assert head.config.max_position_embeddings == 2048
    agrees(head, w, shape)


def test_rope_theta_inside_rope_parameters(tmp_path: Path) -> None:
    w, config = official_tensors(GQA), official_config(GQA)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    agrees(load_drafter(write(tmp_path / "drafter", config, w)).head, w, GQA)


def test_head_dim_of_the_target_family_that_the_authors_code_ignores(tmp_path: Path) -> None:
    shape = Shape(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    w = official_tensors(shape)
    agrees(load_drafter(write(tmp_path / "drafter", official_config(shape, head_dim=128), w)).head, w, shape)


def test_unknown_tensors_are_named_and_left_out(tmp_path: Path) -> None:
    w = official_tensors(GQA)
    extra = {"layers.0.input_layernorm.weight": np.ones(8), "lm_head.weight": np.ones((11, 8))}
    folder = write(tmp_path / "drafter", official_config(GQA), {**w, **extra})
    with pytest.warns(UserWarning, match=r"layers\.0\.input_layernorm\.weight, lm_head\.weight.*left out"):
        agrees(load_drafter(folder).head, w, GQA)


def test_rotary_buffers_of_old_checkpoints_are_no_news(tmp_path: Path) -> None:
    w = official_tensors(GQA)
    folder = write(
        tmp_path / "drafter", official_config(GQA), {**w, "layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(load_drafter(folder).head, w, GQA)


def test_precision_is_as_stored_or_as_asked(tmp_path: Path) -> None:
    w = {name: value.astype(np.float16) for name, value in official_tensors(GQA, embedding=True).items()}
    folder = write(tmp_path / "drafter", official_config(GQA), w, "pytorch_model.bin")
    assert {p.dtype for p in load_drafter(folder).head.parameters()} == {torch.float16}
    assert {p.dtype for p in load_drafter(folder, dtype=torch.bfloat16).head.parameters()} == {torch.bfloat16}


# --- our own folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
def test_own_folder_round_trip_is_exact(tmp_path: Path, switches: str, dtype: torch.dtype) -> None:
    head = torch_head(official_tensors(GQA, *SWITCHES[switches], attention_bias=True), GQA).to(dtype)
    if switches == "eagle":
        head.embed_tokens = torch.nn.Embedding(11, 8, dtype=dtype)
    folder = save_drafter(
        tmp_path / "run" / "drafter",
        head,
        target_id="some/target",
        training={"steps": 7, "data": Path("chats.jsonl")},
        target={"num_hidden_layers": 12},
    )
    loaded = load_drafter(folder)
    assert loaded.head.config == head.config and loaded.head.method == head.method
    before, after = head.state_dict(), loaded.head.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert (loaded.target_id, loaded.layout) == ("some/target", "outdraft")
    assert loaded.training == {"steps": 7, "data": "chats.jsonl"}
    assert loaded.target == {"id": "some/target", "hidden_size": 8, "vocab_size": 11, "num_hidden_layers": 12}
    stored = json.loads((folder / "config.json").read_text())
    assert stored["outdraft_version"] == outdraft.__version__ and stored["method"] == head.method
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["drafter"]


def own_folder(tmp_path: Path, **changes: Any) -> Path:
    """A saved drafter, with changes to its config; None takes a key away."""
    folder = save_drafter(tmp_path / "own", torch_head(official_tensors(GQA), GQA).float(), target_id="t")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_saving_again_replaces_the_drafter_and_nothing_else(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    (folder / "notes.txt").write_text("mine")
    head = load_drafter(folder).head
    with torch.no_grad():
        head.norm.weight += 1
    save_drafter(folder, head, target_id="other")
    again = load_drafter(folder)
    assert torch.equal(again.head.norm.weight, head.norm.weight) and again.target_id == "other"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_a_save_that_fails_leaves_the_old_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outdraft.drafting.folder.save_file", full)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match=r"No space left on device.*choose another folder"):
            save_drafter(place, torch_head(official_tensors(GQA), GQA), target_id="t")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_new_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    (tmp_path / "other").mkdir()
    assert folder.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    head = load_drafter(folder).head
    before = head.fusion.fc.weight.clone()
    os.truncate(folder / "model.safetensors", 16)
    assert torch.equal(head.fusion.fc.weight, before)


def test_loading_spends_no_randomness(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    state = torch.get_rng_state()
    load_drafter(folder)
    assert torch.equal(state, torch.get_rng_state())


def test_folders_from_before_the_switches_load_unchanged(tmp_path: Path) -> None:
    folder = own_folder(tmp_path, tap_layers=None, state_norm=None)
    assert "state_norm" not in json.loads((folder / "config.json").read_text())
    head = load_drafter(folder).head
    assert (head.config.tap_layers, head.config.state_norm) == ((), False)
    assert not [name for name in head.state_dict() if "taps" in name or "state_norm" in name]


def test_settings_of_later_versions_warn(tmp_path: Path) -> None:
    folder = own_folder(tmp_path, fed_back_norm=True, outdraft_version="99.0")
    with pytest.warns(UserWarning, match=r"outdraft 99\.0.*fed_back_norm"):
        load_drafter(folder)


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_nothing_at_the_path(tmp_path: Path) -> None:
    one_line(tmp_path / "drfater", "check the path")
    one_line("./runs/drafter", "check the path")
    one_line("runs/v1/drafter", "check the path")


def test_a_file_in_place_of_its_folder(tmp_path: Path) -> None:
    one_line(own_folder(tmp_path) / "model.safetensors", "give the folder")


def test_no_config(tmp_path: Path) -> None:
    one_line(tmp_path, "give the folder")


@pytest.mark.parametrize("text", ["{", "[]", "\x00", ""])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    folder = own_folder(tmp_path)
    (folder / "config.json").write_text(text)
    one_line(folder, "copy or train")


def test_no_weights(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    one_line(folder, "copy or train")


@pytest.mark.parametrize("left", [0, 5, 100, 2000])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights(tmp_path: Path, file: str, left: int) -> None:
    folder = write(tmp_path / "drafter", official_config(GQA), official_tensors(GQA), file)
    os.truncate(folder / file, left)
    assert file in one_line(folder, "copy or download it again")


def test_a_pickle_of_code_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "drafter", official_config(GQA), official_tensors(GQA))
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Trap()}, folder / "pytorch_model.bin")
    one_line(folder, "copy or download it again")
    assert not Trap.sprung


class Trap:
    """Unpickling it calls `spring`."""

    sprung = False

    @staticmethod
    def spring() -> None:
        Trap.sprung = True

    def __reduce__(self) -> Any:
        return Trap.spring, ()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"fc.weight": torch.ones(2)}}])
def test_a_bin_file_of_something_else(tmp_path: Path, content: object) -> None:
    folder = write(tmp_path / "drafter", official_config(GQA), {}, "pytorch_model.bin")
    torch.save(content, folder / "pytorch_model.bin")
    one_line(folder, "save the drafter's state_dict there")


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"fc.weight": "../w.bin"}}', '{"weight_map": {"a": "gone.bin"}}']
)
def test_an_index_that_leads_nowhere(tmp_path: Path, index: str) -> None:
    folder = write(tmp_path / "drafter", official_config(GQA), official_tensors(GQA), "pytorch_model.bin.index.json")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    one_line(folder, "again")


@pytest.mark.parametrize("name", sorted(official_tensors(GQA, attention_bias=True)))
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    w = official_tensors(GQA, attention_bias=True)
    del w[name]
    folder = write(tmp_path / "drafter", official_config(GQA), w)
    if name in ("fc.fc.bias", "layers.0.self_attn.q_proj.bias"):  # their absence says that the head has none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_drafter(folder)
    else:
        assert name in one_line(folder, "download or train it again")


def test_a_missing_tensor_of_our_own_is_named(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    w = load_file(folder / "model.safetensors")
    del w["self_attn.k_proj.weight"]
    save_file(w, folder / "model.safetensors")
    assert "lacks self_attn.k_proj.weight;" in one_line(folder, "download or train it again")


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_missing_fusion_of_any_layout_is_named(tmp_path: Path, switches: str) -> None:
    w = official_tensors(GQA, *SWITCHES[switches])
    name = "fc.fc.weight" if "fc.fc.weight" in w else "fc.weight"
    del w[name]
    assert f"lacks {name};" in one_line(
        write(tmp_path / "drafter", official_config(GQA), w), "download or train it again"
    )


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 16}, {"intermediate_size": 10}, {"num_key_value_heads": 4}, {"vocab_size": 12}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_does_not_fit_its_weights(tmp_path: Path, changes: dict[str, int]) -> None:
    w = official_tensors(GQA, embedding=True)
    one_line(
        write(tmp_path / "drafter", official_config(GQA, **changes), w), "put the config.json beside it that belongs"
    )


def test_our_own_config_that_does_not_fit_its_weights(tmp_path: Path) -> None:
    message = one_line(own_folder(tmp_path, intermediate_size=10), "put the config.json beside it that belongs")
    assert "fusion.gate_proj.weight is 12x8 where config.json asks for 10x8" in message


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"feature_sampling": 1}, "feature_sampling"),
        ({"rope_theta": "high"}, "rope_theta"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"tap_layers": 2}, "tap_layers must be a list"),
        ({"tap_layers": [0]}, "tap_layers must be a positive whole number"),
        ({"tap_layers": [3, 1]}, "rising order"),
        ({"state_norm": "yes"}, "state_norm"),
        ({"method": "eesd"}, "together with its target"),
    ],
)
def test_settings_of_our_own_that_cannot_be(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    one_line(own_folder(tmp_path, **changes), names)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, "many", -1, 0])
def test_settings_of_official_folders_that_cannot_be(tmp_path: Path, name: str, value: object) -> None:
    config = official_config(GQA, **{name: value})
    if value is None:
        del config[name]
    one_line(write(tmp_path / "drafter", config, official_tensors(GQA)), name)


def test_what_is_no_drafter_of_this_kind(tmp_path: Path) -> None:
    w = official_tensors(GQA)
    whole = {"model.layers.0.self_attn.q_proj.weight": np.ones((8, 8)), "lm_head.weight": np.ones((11, 8))}
    eagle3 = {"fc.weight": np.ones((8, 24)), "midlayer.hidden_norm.weight": np.ones(8), "d2t": np.ones(4)}
    assert "whole language model" in one_line(
        write(tmp_path / "a", official_config(GQA), whole), "give a drafter's folder"
    )
    assert "EAGLE-3" in one_line(write(tmp_path / "b", official_config(GQA), eagle3), "train one")
    one_line(write(tmp_path / "c", official_config(GQA, num_hidden_layers=2), w), "one-layer")
    one_line(write(tmp_path / "d", official_config(GQA, hidden_act="gelu"), w), "silu")
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    one_line(write(tmp_path / "e", official_config(GQA, **scaled), w), "outdraft train")
    whole_numbers = {name: value.astype(np.int8) for name, value in w.items()}
    one_line(write(tmp_path / "f", official_config(GQA), whole_numbers), "unquantised")


# --- the hub -------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    one_line("yuhuili/EAGLE-Vicuna-7B-v1.3", "check the name and the network, or give a folder")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_fetches_safetensors_else_the_bin_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    w, asked = official_tensors(GQA), []

    def fetch(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if any(Path(file).match(pattern) for pattern in allow_patterns):
            write(tmp_path / "copy", official_config(GQA), w, file)
        return str(tmp_path / "copy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    agrees(load_drafter("who/what").head, w, GQA)
    assert len(asked) == (1 if file == "model.safetensors" else 2)
    assert all(call[0] == "who/what" for call in asked)


def test_upload_sends_the_folder_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None):
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> Any:
            calls.append((options["repo_id"], options))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = own_folder(tmp_path)
    assert push_to_hub(folder, "me/drafter", private=True, token="secret") == "https://hub/commit/1"
    assert calls[0] == ("me/drafter", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == folder

    def refuse(*_: object, **__: object) -> None:
        raise OSError("401 Unauthorized\nlong text")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(UserError, match=r"^[^\n]*401 Unauthorized[^\n]*hf auth login[^\n]*$"):
        push_to_hub(folder, "me/drafter", token="secret")
    with pytest.raises(UserError, match="no config"):
        push_to_hub(tmp_path, "me/drafter")


def test_numbers_of_the_tests_are_not_all_alike() -> None:
    assert len(np.unique(numbers((20,), 1).round(6))) == 20
