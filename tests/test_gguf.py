"""GGUF files as targets: an ordinary model with the weights, tokenizer and ends that the file says, or one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import outdraft
from gguf_fixtures import WORDS, refused, run, tiny_llama, write_gguf
from outdraft.api.loading import load_target
from outdraft.errors import UserError
from outdraft.target import gguf_file
from training.tiny import write_chats

gguf = pytest.importorskip("gguf", reason="reading and writing GGUF files needs the extra `gguf`")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.F32.gguf", tiny_llama())


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_unquantised_weights_are_the_source_s_own(tmp_path: Path, tied: bool) -> None:
    source = tiny_llama(tied=tied)
    model = load_target(write_gguf(tmp_path / "a.gguf", source), dtype="float32", backend="eager").model
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, source(ids).logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_weights_are_rounded_once_to_bfloat16(tmp_path: Path, kind: str) -> None:
    source = tiny_llama()
    file = write_gguf(tmp_path / "a.gguf", source, kind=kind)
    stored = gguf.GGMLQuantizationType[kind]
    for dtype in ("float32", "bfloat16"):
        model = load_target(file, dtype=dtype, backend="eager").model
        for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
            quantised = gguf.quantize(source.state_dict()[name].numpy(), stored)
            expected = torch.from_numpy(gguf.dequantize(quantised, stored)).bfloat16()
            found = model.state_dict()[name]
            assert found.dtype == getattr(torch, dtype) and torch.equal(found, expected.to(found.dtype)), name


@pytest.mark.parametrize("in_one_dtype", [False, True])
def test_every_weight_is_that_of_transformers_rounded(
    tmp_path: Path, in_one_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_computed_in_dtype", lambda architecture: in_one_dtype)
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(tied=False), kind="Q5_1", kinds={"attn_v": "Q8_0"})
    right = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    found = load_target(file, dtype="bfloat16", backend="eager").model.state_dict()
    assert found.keys() == right.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, right[name].bfloat16()), name


def test_the_loaded_model_is_an_ordinary_one(file: Path, tmp_path: Path) -> None:
    target = load_target(file, dtype="float32", backend="eager")
    assert not hasattr(target.model.config, "quantization_config")
    target.model.save_pretrained(tmp_path / "saved")
    target.tokenizer.save_pretrained(tmp_path / "saved")  # type: ignore[union-attr]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, target.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("hello 12")["input_ids"] == [*_ids("hello", "Ġ", "1", "2")]
    target.model.train()(ids, labels=ids).loss.backward()
    assert target.model.get_input_embeddings().weight.grad is not None


# --- words -------------------------------------------------------------------------------------------------------


def _ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def test_text_is_split_as_the_file_says(file: Path, tmp_path: Path) -> None:
    digits_alone = load_target(file).tokenizer
    assert digits_alone is not None
    assert digits_alone("hello\n\n12")["input_ids"] == _ids("hello", "ĊĊ", "1", "2")
    as_gpt2 = load_target(write_gguf(tmp_path / "b.gguf", tiny_llama(), fields={"pre": "gpt-2"})).tokenizer
    assert as_gpt2 is not None
    assert as_gpt2("hello\n\n12")["input_ids"] == _ids("hello", "Ċ", "Ċ", "12")
    text = "hello  é 中文 🙂\n\n 3+4"
    assert digits_alone.decode(digits_alone(text)["input_ids"]) == text


def test_an_unknown_way_of_splitting_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_target(write_gguf(tmp_path / "b.gguf", tiny_llama(), fields={"pre": "of-my-own"}))
    assert "splitting 'of-my-own' is unknown" in capsys.readouterr().err


def test_chat_template_and_ends_are_the_file_s(file: Path, tmp_path: Path) -> None:
    target = load_target(file)
    assert target.tokenizer is not None and target.eos_token_ids == [2]
    assert (target.tokenizer.bos_token_id, target.tokenizer.eos_token_id) == (1, 2)
    chat = [{"role": "user", "content": "hello"}]
    assert target.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert target.tokenizer("hello")["input_ids"] == _ids("hello")
    more = {"add_bos_token": True, "eos_token_id": 0, "eot_token_id": 2}
    other = load_target(write_gguf(tmp_path / "b.gguf", tiny_llama(), fields=more))
    assert other.tokenizer is not None and other.eos_token_ids == [0, 2]
    assert other.tokenizer("hello")["input_ids"] == [1, *_ids("hello")]


# --- the folder in the cache -------------------------------------------------------------------------------------


def test_a_file_is_dequantised_once(
    file: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_target(file)
    said = capsys.readouterr().err
    assert said.startswith("tiny.F32.gguf: F32 weights are dequantised to bfloat16") and said.count("tiny.F32") == 1
    before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # the folder needs no `gguf`
    load_target(file)
    assert "tiny.F32" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before


def test_a_changed_file_is_another_model(file: Path) -> None:
    before = load_target(file, dtype="float32").model.state_dict()["model.norm.weight"].clone()
    changed = tiny_llama()
    changed.model.norm.weight.data += 1
    write_gguf(file, changed)
    after = load_target(file, dtype="float32").model.state_dict()["model.norm.weight"]
    assert torch.equal(after, before + 1)


def test_records_name_the_file_and_no_folder_of_this_machine(file: Path, tmp_path: Path) -> None:
    target = load_target(file)
    assert target.tokenizer is not None
    assert target.model.config._name_or_path == target.tokenizer.name_or_path == "tiny.F32.gguf"
    (folder,) = (tmp_path / "cache").iterdir()
    for written in folder.glob("*.json"):
        assert str(tmp_path) not in written.read_text(), written.name


# --- what cannot be loaded ---------------------------------------------------------------------------------------


def test_a_folder_with_one_file_is_that_file(file: Path) -> None:
    assert load_target(file.parent).model.config._name_or_path == file.name
    write_gguf(file.with_name("other.gguf"), tiny_llama(4))
    assert "2 GGUF files (other.gguf, tiny.F32.gguf)" in refused("info", file.parent)
    assert "2 GGUF files" in refused("generate", "hello", "--model", file.parent)


def test_files_that_are_no_models_are_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut, text, absent = tmp_path / "cut.gguf", tmp_path / "text.gguf", tmp_path / "absent.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("hello")
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="nonsense")
    for path in (cut, text, other):
        for verb in (("info", path), ("generate", "hello", "--model", path)):
            said = refused(*verb)
            assert path.name in said and "download it again" in said
    assert "nonsense" in refused("info", other)
    assert "there is no file" in refused("info", absent) and "there is no file" in refused("serve", "-m", absent)
    assert not any(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())


def test_a_file_without_all_weights_is_refused(tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "part.gguf", tiny_llama(), leave_out="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up_proj"):
        load_target(part)


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else found(name, *more))
    assert "pip install 'outdraft[gguf]'" in refused("info", file)


def test_a_cache_that_cannot_be_written_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("OUTDRAFT_CACHE", str(tmp_path / "occupied"))
    assert "set OUTDRAFT_CACHE" in refused("info", file)


# --- the verbs ---------------------------------------------------------------------------------------------------


def test_verbs_take_the_file(file: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = json.loads(run("info", file, "--json").stdout)
    assert (facts["file"], facts["weights"], facts["family"]) == ("tiny.F32.gguf", "F32, as bfloat16", "llama")
    assert facts["tokenizer"] and facts["chat_template"]
    common = ("generate", "hello", "--model", file, "--max-new-tokens", 8, "--dtype", "float32", "--json")
    plain = json.loads(run(*common).stdout)
    drafted = json.loads(run(*common, "-d", file).stdout)  # the model drafts for itself
    assert drafted["tokens"] == plain["tokens"] and drafted["tau"] > 1
    chat = [{"role": "user", "content": "hello"}]
    assert outdraft.load(file, dtype="float32").generate(chat, max_new_tokens=8).tokens[0] == plain["tokens"]


def test_a_drafter_is_trained_on_the_file_and_exported(file: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 6)
    trained = run(
        *("train", "--model", file, "--data", chats, "--output-dir", tmp_path / "exit", "--method", "eesd"),
        *("--exit-layer", 1, "--max-steps", 1, "--batch-size", 2, "--hold-out", 0, "--dtype", "float32"),
    )
    assert trained.exit_code == 0, trained.output
    assert json.loads((tmp_path / "exit/config.json").read_text())["target"]["id"] == "tiny.F32.gguf"
    assert json.loads((tmp_path / "exit/provenance.json").read_text())["target"] == "tiny.F32.gguf"
    exported = run(
        *("export", "--model", file, "-d", tmp_path / "exit", "--engine", "hf", "--output-dir", tmp_path / "hf"),
        *("--target-dir", tmp_path / "ordinary"),
    )
    assert exported.exit_code == 0, exported.output
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "ordinary")
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([_ids("hello")])
    alone = target.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant), alone)
