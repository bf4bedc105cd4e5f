"""What ships: a small target that stock transformers loads, its prompts, and a drafter that pays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import outdraft
from outdraft.errors import UserError
from outdraft.reference import (
    PACKAGED,
    PACKED,
    load_prompts,
    load_reference_target,
    reference_drafter_path,
    reference_target_path,
    unpack,
)
from pack_rows import pack, quantize_rows


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTDRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_packed_rows_are_near_and_packing_again_changes_nothing() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8 and scale.shape == (16,)
    state = {"matrix": weight, "norm": torch.linspace(0.5, 1.5, 8)}
    once = unpack(pack(state))
    assert once["matrix"].dtype == once["norm"].dtype == torch.bfloat16
    assert (once["matrix"].float() - weight).abs().max() < 0.04 and (once["matrix"] != weight).any()
    twice = unpack(pack({name: tensor.float() for name, tensor in once.items()}))
    assert (twice["matrix"].float() - once["matrix"].float()).abs().max() < 0.04


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= 25e6
    assert sum(path.stat().st_size for path in reference_drafter_path().iterdir()) <= 5e6


def test_stock_transformers_load_the_target_and_both_precisions_are_the_same_weights() -> None:
    half, tokenizer = load_reference_target()
    whole = AutoModelForCausalLM.from_pretrained(reference_target_path(), dtype=torch.float32)
    assert half.dtype == torch.bfloat16 and half.config.num_hidden_layers >= 16
    assert half.config.max_position_embeddings == 2048
    for (name, a), b in zip(half.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.float(), b), name
    text = "def f(x):\n    return x + 1  # é 中文 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    stock = AutoTokenizer.from_pretrained(reference_target_path())
    chat = stock.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|user|>\nhi<|end|>\n<|assistant|>\n"


def test_the_folder_is_written_once(tmp_path: Path) -> None:
    folder = reference_target_path()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert reference_target_path() == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    other = tmp_path / "other"
    other.mkdir()
    for path in PACKAGED.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    changed = load_file(other / PACKED)
    changed["model.norm.weight"] += 1
    save_file(changed, other / PACKED)
    assert reference_target_path(other) != folder, "other weights must not be served from the same folder"


def test_a_package_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reinstall the package"):
        reference_target_path(tmp_path)


def test_held_out_prompts_are_held_out() -> None:
    held_out, trained = ({m[-1]["content"] for m in load_prompts(which)} for which in ("heldout", "train"))
    assert len(held_out) == 40 and len(trained) >= 1000 and not held_out & trained


def test_the_shipped_drafter_pays_and_changes_nothing() -> None:
    model = outdraft.load("reference", "reference", dtype="float32")
    assert model.method == "fspad"
    prompts = load_prompts("heldout")[:4]
    fast = model.generate(prompts, max_new_tokens=48, controller="fixed")
    slow = model.with_drafter(None).generate(prompts, max_new_tokens=48)
    assert fast.tokens == slow.tokens and fast.texts == slow.texts
    assert fast.tau > 2.5 and slow.tau == 1
