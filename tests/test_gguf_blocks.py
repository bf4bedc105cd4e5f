"""A GGUF file's own blocks as weights of our CPU kernels: what is kept, what is rounded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import outdraft
from gguf_fixtures import refused, run, tiny_llama, write_gguf
from outdraft.api.loading import load_target
from outdraft.errors import UserError
from outdraft.target import gguf_blocks, gguf_file
from outdraft.target.backends.native.modules import NativeLayer
from outdraft.target.backends.native.weights import NativeLinear
from outdraft.target.gguf_blocks import blocks_of

gguf = pytest.importorskip("gguf", reason="reading and writing GGUF files needs the extra `gguf`")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTDRAFT_CACHE", str(tmp_path / "cache"))


def bits_of(loaded: Any) -> set[int | None]:
    """Bits of the layers' weights and of the head's."""
    parts = list(loaded.target.model.modules())
    layers = [weight for part in parts if isinstance(part, NativeLayer) for weight in part.kernel.weights]
    heads = [part._packed for part in parts if isinstance(part, NativeLinear)]
    assert layers and heads
    return {weight.bits for weight in (*layers, *heads)}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_decoded_with_its_own_blocks(kind: str, tied: bool, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=tied, head_dim=16), kind=kind)
    whole, own = (outdraft.load(str(file), method="none", quantize=quantize) for quantize in (None, "gguf"))
    assert own.target.backend == "native-gguf"
    assert bits_of(own) == {8 if kind == "Q8_0" else 4}, "layers that were not found would keep whole weights"
    stock = own.target.model.state_dict()
    for name, weight in whole.target.model.state_dict().items():
        assert torch.equal(weight, stock[name]), f"{name}: the same file is the same model"
    prompts = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6], [8, 9]]
    drafted = outdraft.load(str(file), method="prompt-lookup", quantize="gguf").generate(
        prompts, max_new_tokens=40, num_speculative_tokens=4, exact=True
    )
    assert drafted.statistics.drafted > 0
    assert drafted.tokens == own.generate(prompts, max_new_tokens=40).tokens


def test_a_smaller_model_beside_a_file_s_blocks_need_not_be_a_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(head_dim=16), kind="Q4_1")
    load_target(file).model.save_pretrained(tmp_path / "small")
    target = outdraft.load(str(file), method="none", quantize="gguf")
    target.target.tokenizer.save_pretrained(tmp_path / "small")
    drafted = outdraft.load(str(file), str(tmp_path / "small"), quantize="gguf")
    tokens = drafted.generate([[1, 2, 3, 4]], max_new_tokens=20)
    assert tokens.statistics.drafted > 0
    assert tokens.tokens == target.generate([[1, 2, 3, 4]], max_new_tokens=20).tokens


def test_blocks_are_what_they_stand_for() -> None:
    dice = np.random.default_rng(0)
    for kind, size in (("Q8_0", 34), ("Q4_0", 18), ("Q4_1", 20), ("Q4_K", 144)):
        rows = dice.integers(0, 256, (5, 3, size), dtype=np.uint8)
        rows[:, :, 1] = dice.integers(40, 50, (5, 3))  # the upper bytes of float16 scales and offsets
        rows[:, :, 3 if kind in ("Q4_1", "Q4_K") else 1] = dice.integers(40, 50, (5, 3))
        if kind == "Q8_0":
            rows[:, :, 2:] = np.where(rows[:, :, 2:] == 128, 127, rows[:, :, 2:])
        found = blocks_of(rows.reshape(5, -1), kind)
        assert found is not None and found.bits == (8 if kind == "Q8_0" else 4)
        right = torch.from_numpy(gguf.dequantize(rows.reshape(5, -1), gguf.GGMLQuantizationType[kind]))
        # Scales of Q4_K are products, rounded to 11 bits.
        close = 16 * 2**-11 * right.abs().max().item() if kind == "Q4_K" else 0
        torch.testing.assert_close(found.dense(), right, atol=close, rtol=0, msg=kind)
    rows = np.full((1, 34), 128, dtype=np.uint8)  # -128 is no number of our kernels
    assert blocks_of(rows, "Q8_0") is None and blocks_of(rows, "Q6_K") is None


def test_kinds_without_blocks_of_ours_have_eight_bits(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(head_dim=16), kind="Q5_1")
    assert bits_of(outdraft.load(str(file), method="none", quantize="gguf")) == {8}


def test_equal_layers_have_blocks_each(tmp_path: Path) -> None:
    model = tiny_llama(head_dim=16)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    file = write_gguf(tmp_path / "tiny.gguf", model, kind="Q4_1")
    assert bits_of(outdraft.load(str(file), method="none", quantize="gguf")) == {4}


def test_products_of_mixed_kinds_have_eight_bits(tmp_path: Path) -> None:
    mixed = {"blk.0.attn_v": "Q8_0", "blk.1.ffn_up": "Q5_1", "blk.1.attn_v": "F32"}
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(head_dim=16), kind="Q4_1", kinds=mixed)
    whole, own = (outdraft.load(str(file), method="none", quantize=quantize) for quantize in (None, "gguf"))
    first, second = (part for part in own.target.model.modules() if isinstance(part, NativeLayer))
    assert [weight.bits for weight in first.kernel.weights] == [8, 4, 4, 4]
    assert [weight.bits for weight in second.kernel.weights] == [None, 4, 8, 4]
    theirs, ours = whole.target.model.state_dict(), own.target.model.state_dict()
    rounded = ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.gate_proj", "1.mlp.up_proj")
    for name, weight in theirs.items():
        close = weight.abs().max() / 100 if any(part in name for part in rounded) else 0
        assert (ours[name] - weight).abs().max() <= close, name
    drafted = outdraft.load(str(file), method="prompt-lookup", quantize="gguf")
    tokens = drafted.generate([[1, 2, 3, 1, 2]], max_new_tokens=30, exact=True)
    assert tokens.tokens == own.generate([[1, 2, 3, 1, 2]], max_new_tokens=30).tokens


def test_what_becomes_of_a_kind_is_said_where_the_blocks_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gguf_blocks.told("Q4_K and Q6_K and F32") == "Q4_K with scales rounded to float16, Q6_K rounded to 8 bits"
    for heads_of, said in ((16, True), (8, False)):  # heads that are no whole vectors have no kernels
        model = tiny_llama(head_dim=heads_of)
        file = write_gguf(tmp_path / f"{heads_of}.gguf", model, kind="Q4_1", kinds={"ffn_down": "Q5_1"})
        kinds = "Q4_1 as they are, Q5_1 rounded to 8 bits"
        load_target(file)
        assert (f"; --quantize gguf decodes with {kinds}" in capsys.readouterr().err) == said
        weights = json.loads(run("info", file, "--json").stdout)["weights"]
        assert weights == "Q4_1 and Q5_1, as bfloat16" + f" (--quantize gguf: {kinds})" * said


def test_what_has_no_use_of_the_blocks_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(head_dim=8), kind="Q8_0")
    adapter, plain = tmp_path / "adapter", tmp_path / "plain"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    tiny_llama(head_dim=16).save_pretrained(plain)
    gguf_file.unpacked(other)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for model, reason in ((other, "its layers have another form"), (adapter, "an adapter"), (plain, "comes from none")):
        with pytest.raises(UserError, match=reason):
            outdraft.load(str(model), method="none", quantize="gguf")


def test_blocks_are_no_weights_for_other_tools_and_damage_is_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(head_dim=16), kind="Q8_0")
    folder = gguf_file.unpacked(file)
    assert [found.name for found in folder.rglob("*.safetensors")] == ["model.safetensors"]
    damaged = folder / gguf_blocks.FOLDER / "model.layers.1.mlp.up_proj.blocks"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for verb in (("info", file), ("generate", "hello", "--model", file, "--quantize", "gguf")):
        assert f"{damaged.name}' is damaged" in refused(*verb)


def test_whole_weights_and_folders_have_no_blocks(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    tiny_llama().save_pretrained(tmp_path / "folder")
    load_target(file)
    for model in (file, tmp_path / "folder"):
        assert "this model comes from none with quantised" in refused(
            *("generate", "Hello", "--model", model, "--method", "none", "--quantize", "gguf")
        )
