"""Targets and draft models in wrappers are decoded as the model in them; quantised ones are known by their modules."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import outdraft
from models import tiny
from outdraft.api.loading import load_target
from outdraft.console.facts import describe
from outdraft.errors import UserError
from outdraft.target.backends import best_backend, why_not_packed
from outdraft.target.backends.packed import quantised_part
from outdraft.target.named import unwrapped
from tokens import byte_tokenizer

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def model() -> PreTrainedModel:
    return tiny("llama-gqa", dtype=torch.float32)


def tokens(given: Any, **settings: Any) -> list[int]:
    return outdraft.load(given, **settings).generate(IDS, max_new_tokens=8).tokens[0]


class Low(nn.Module):
    """A linear layer with a change of low rank beside it, built as PEFT builds it."""

    def __init__(self, base: nn.Linear, amount: float = 9.0):
        super().__init__()
        self.base_layer, self.amount = base, amount
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.amount * self.lora_B(self.lora_A(x))


class Peft(nn.Module):
    """What PEFT's wrapper looks like from outside; `soft` puts tokens of its own before the prompt."""

    def __init__(self, inner: PreTrainedModel, soft: bool = False):
        super().__init__()
        self.base_model, self.soft = SimpleNamespace(model=inner), soft
        self.inner = inner

    def get_base_model(self) -> PreTrainedModel:
        return self.inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        ids = torch.cat([torch.full((len(input_ids), 2), 7), input_ids], dim=1) if self.soft else input_ids
        return self.inner(input_ids=ids)


def adapted() -> PreTrainedModel:
    torch.manual_seed(1)
    inner = model()
    for layer in inner.model.layers:
        layer.self_attn.q_proj = Low(layer.self_attn.q_proj)
        layer.mlp.up_proj = Low(layer.mlp.up_proj)
    return inner.eval()


WRAPPERS: dict[str, Any] = {
    "torch.compile": lambda inner: torch.compile(inner, backend="eager"),
    "data parallel": nn.DataParallel,
    "PEFT": Peft,
    "compiled PEFT": lambda inner: torch.compile(Peft(inner), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_decoded_as_the_model_in_it(kind: str) -> None:
    inner = model()
    expected = tokens(inner)
    assert unwrapped(WRAPPERS[kind](inner)) is inner
    assert tokens(WRAPPERS[kind](inner), method="prompt-lookup") == expected
    drafted = outdraft.load(inner, WRAPPERS[kind](model()), backend="eager").generate(IDS, max_new_tokens=8)
    assert drafted.tokens[0] == expected and drafted.tau > 2


def test_a_model_compiled_in_place_or_in_parts_is_decoded_as_it_would_be_plain() -> None:
    expected = tokens(model())
    whole, parts = model(), model()
    whole.compile(backend="eager")
    parts.model.layers[0] = torch.compile(parts.model.layers[0], backend="eager")
    assert tokens(whole, method="prompt-lookup") == expected
    assert outdraft.load(parts).generate(IDS, max_new_tokens=2).tokens[0] == expected[:2]
    assert best_backend(parts) == "eager" and "compiled" in str(why_not_packed(parts))


def test_adapters_that_are_not_merged_count() -> None:
    inner = adapted()
    given = torch.tensor([IDS])
    stock = inner.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    assert tokens(Peft(inner), method="prompt-lookup") == stock[0, len(IDS) :].tolist() != tokens(model())
    assert best_backend(inner) == "eager" and "adapters" in str(why_not_packed(inner))


def test_a_wrapper_that_does_more_than_its_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"Peft does more than the LlamaForCausalLM in it \(prompt tuning\?\)"):
        load_target(Peft(model(), soft=True))


@pytest.mark.parametrize("given", [None, 7, nn.Linear(2, 2), SimpleNamespace(model=1)])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="a model is a folder, a hub id or a loaded causal language model, not a "):
        load_target(given)
    if given is not None:
        with pytest.raises(UserError, match="a drafter is a folder, a hub id or a loaded model, not a "):
            outdraft.load(model(), given)


# --- folders of adapters ---------------------------------------------------------------------------------------------


def adapter_folder(folder: Path, **config: Any) -> tuple[Path, Path]:
    """A base model's folder and one of an adapter for it."""
    base, adapter = folder / "base", folder / "adapter"
    model().save_pretrained(base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), **config}))
    return base, adapter


def test_an_adapters_folder_needs_peft_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapter_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="is an adapter, which needs a package: pip install peft"):
        load_target(adapter)
    with pytest.raises(UserError, match=r"is an adapter for .*base', whose facts it shares"):
        describe(str(adapter))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        load_target(adapter)


def test_an_adapters_folder_is_its_base_model_with_the_adapter_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapter_folder(tmp_path)

    class Loaded:
        def __init__(self, inner: PreTrainedModel):
            self.inner = inner

        @classmethod
        def from_pretrained(cls, inner: PreTrainedModel, folder: str) -> Loaded:
            assert folder == str(adapter)
            return cls(inner)

        def merge_and_unload(self) -> PreTrainedModel:
            with torch.no_grad():
                self.inner.lm_head.weight.copy_(self.inner.lm_head.weight.flip(0))
            return self.inner

    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=Loaded, __spec__=ModuleSpec("peft", None)))
    target = load_target(adapter, dtype="float32", device="cpu")
    assert target.model.name_or_path == str(adapter) and target.tokenizer is None
    plain = load_target(base, dtype="float32", device="cpu")
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        found, expected = (one.head(one.features(ids)) for one in (target, plain))
    assert torch.allclose(found, expected.flip(-1), atol=1e-5)
    drafted = outdraft.load(adapter, adapter, dtype="float32", device="cpu").generate(IDS, max_new_tokens=8)
    assert drafted.tau > 2
    monkeypatch.setattr(Loaded, "merge_and_unload", lambda self: 1 / 0)
    with pytest.raises(UserError, match="cannot be merged into its base model: division by zero"):
        load_target(adapter, dtype="float32")


@pytest.mark.parametrize("told_by", ["its tables", "its tokenizer"])
def test_an_adapter_with_tokens_of_its_own_finds_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    """As chat adapters have them, whose marks were added to a base model."""
    _, adapter = adapter_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(3)])
    tokenizer.save_pretrained(adapter)
    rows = len(tokenizer)
    if told_by == "its tables":
        rows += 5  # as tables are that were padded
        tables = {"base_model.model.lm_head.weight": torch.zeros(rows, 2), "lora_A.weight": torch.zeros(999, 2)}
        save_file(tables, adapter / "adapter_model.safetensors")

    class Loaded:
        @staticmethod
        def from_pretrained(inner: PreTrainedModel, folder: str) -> Any:
            assert inner.get_input_embeddings().weight.shape[0] == inner.config.vocab_size == rows
            return SimpleNamespace(merge_and_unload=lambda: inner)

    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=Loaded, __spec__=ModuleSpec("peft", None)))
    target = load_target(adapter, dtype="float32", device="cpu")
    assert target.vocab_size == rows and len(target.tokenizer) == len(tokenizer)  # type: ignore[arg-type]


def test_real_adapters_of_peft_are_decoded_merged_or_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, _ = adapter_folder(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(load_target(base, dtype="float32", backend="eager").model, config).eval()
    wrapped.save_pretrained(tmp_path / "lora")
    expected = tokens(wrapped)
    assert expected != tokens(base, dtype="float32")
    assert tokens(tmp_path / "lora", dtype="float32", method="prompt-lookup") == expected
    assert load_target(tmp_path / "lora", dtype="float32", device="cpu").backend == load_target(base).backend
    given = torch.tensor([IDS])
    stock = wrapped.generate(input_ids=given, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert stock[0, len(IDS) :].tolist() == expected
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="does more than"):
        load_target(peft.get_peft_model(model(), soft))


# --- quantised models ------------------------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """A kind of tensor of its own, as libraries keep packed numbers in."""


class Bits(nn.Module):
    """A linear layer that keeps its weight as whole numbers and a scale, with nothing that says so."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("whole", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.whole.to(x.dtype) * self.scale.to(x.dtype))


def in_place(change: Any) -> PreTrainedModel:
    found = model()
    for layer in found.model.layers:
        change(layer.mlp, "up_proj")
        change(layer.self_attn, "q_proj")
    return found


def as_subclass(parent: Any, name: str) -> None:
    weight = getattr(parent, name).weight.detach().as_subclass(Packed)
    getattr(parent, name).weight = nn.Parameter(weight, requires_grad=False)


def dynamic() -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)


QUANTISED: dict[str, Any] = {
    "torch dynamic": dynamic,
    "layers of one's own": lambda: in_place(lambda parent, name: setattr(parent, name, Bits(getattr(parent, name)))),
    "tensors of one's own": lambda: in_place(as_subclass),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_are_known_by_their_modules_and_decoded_as_stock(kind: str) -> None:
    quantised = QUANTISED[kind]()
    assert quantised_part(quantised) is not None and why_not_packed(quantised) == "it is quantised"
    given = torch.tensor([IDS])
    stock = quantised.generate(given, do_sample=False, max_new_tokens=8, pad_token_id=0, attention_mask=given * 0 + 1)
    assert tokens(quantised, method="prompt-lookup") == stock[0, len(IDS) :].tolist()
    target = load_target(quantised)
    assert target.backend == "eager"
    with pytest.raises(UserError, match="quantised"):
        outdraft.load(quantised).generate(IDS, max_new_tokens=2, exact=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scale_of_all_activations_together_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="depends on how many tokens it reads at once"):
        load_target(dynamic())


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mixtral", "deepseek"])
def test_plain_models_are_not_taken_for_quantised(family: str) -> None:
    assert quantised_part(tiny(family, dtype=torch.float32)) is None


def test_torchao_is_known(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = model()
    quantize_(quantised, Int8WeightOnlyConfig(), lambda part, name: type(part) is nn.Linear and "head" not in name)
    assert why_not_packed(quantised) == "it is quantised"
    given = torch.tensor([IDS])
    stock = quantised.generate(given, do_sample=False, max_new_tokens=8, pad_token_id=0, attention_mask=given * 0 + 1)
    assert tokens(quantised, method="prompt-lookup") == stock[0, len(IDS) :].tolist()


def test_a_quantised_embedding_is_refused_with_the_reason() -> None:
    quantised = model()

    class Table(nn.Module):
        def weight(self) -> None: ...

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 32)

    quantised.set_input_embeddings(Table())
    with pytest.raises(UserError, match="embedding"):
        load_target(quantised)
