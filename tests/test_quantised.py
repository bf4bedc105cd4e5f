"""Targets that other libraries quantised: decoded, read, and trained on, wherever the library is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

import outdraft
from outdraft.api.loading import load_target
from outdraft.console.facts import describe
from outdraft.losses.objective import weights_fingerprint
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.target.backends.packed import plain_linear, quantised_part
from trainer_runs import trainer
from training.tiny import byte_tokenizer, write_chats

WIDTH, VOCAB, LAYERS = 64, 260, 3
ENDLESS = {"eos_token_id": VOCAB}
PROMPTS = [[5, 9, 9, 3, 5, 9, 9], [7, 1, 4, 4], [1, 2, 3, 4, 1, 2, 3]]

Quantised = Callable[[Path], PreTrainedModel]


def ao(name: str, **settings: Any) -> Quantised:
    def load(folder: Path) -> PreTrainedModel:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        made = {key: value() if callable(value) else value for key, value in settings.items()}
        config = TorchAoConfig(getattr(quantization, name)(**made))
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)

    return load


def group() -> Any:
    return pytest.importorskip("torchao.quantization").PerGroup(32)


def bits(**settings: Any) -> Quantised:
    def load(folder: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        config = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)

    return load


def quanto(folder: Path) -> PreTrainedModel:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig("int8"), dtype=torch.float32)


def compressed(folder: Path) -> PreTrainedModel:
    """Weights stay packed until the whole model's first forward."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apply_quantization_config(plain, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in plain.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 127  # type: ignore[union-attr, operator]
    compressor = ModelCompressor.from_pretrained_model(plain)
    compressor.compress_model(plain)
    plain.save_pretrained(folder / "packed")
    compressor.update_config(str(folder / "packed"))
    return AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)


LIBRARIES: dict[str, Quantised] = {
    "torchao int8": ao("Int8WeightOnlyConfig"),
    "torchao int8, activations": ao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=group),
    "torchao fp8": ao("Float8WeightOnlyConfig"),
    "bitsandbytes int8": bits(load_in_8bit=True),
    "bitsandbytes nf4": bits(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto int8": quanto,
    "compressed-tensors int8": compressed,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths every library's groups divide."""
    root = tmp_path_factory.mktemp("plain")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(root)
    byte_tokenizer().save_pretrained(root)
    return root


@pytest.fixture(scope="module", params=LIBRARIES)
def model(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    return LIBRARIES[request.param](folder).eval()


def head() -> FeatureHead:
    torch.manual_seed(1)
    shapes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return FeatureHead(FeatureHeadConfig(**shapes, head_dim=16, vocab_size=VOCAB))  # type: ignore[arg-type]


def test_texts_are_plain_ones(model: PreTrainedModel) -> None:
    """Where activations are quantised, too, rounding the last bit of one moves it by a whole step."""
    plain = outdraft.load(model, method="none")
    assert plain.target.backend == "eager" and model.hf_quantizer is not None
    drafters: list[dict[str, Any]] = [
        {"method": "none"},
        {"draft_model": head()},
        {"draft_model": ExitLayer.beginning(model, ExitLayerConfig(1))},
        {"method": "prompt-lookup"},
    ]
    for settings in drafters:
        loaded = outdraft.load(model, **settings)
        for given, texts in (
            (PROMPTS, loaded.generate(PROMPTS, max_new_tokens=12, **ENDLESS).tokens),
            (PROMPTS[1:2], loaded.generate(PROMPTS[1], max_new_tokens=12, **ENDLESS).tokens),
        ):
            for prompt, text in zip(given, texts, strict=True):
                assert len(text) == 12 and max(gaps(model, prompt, text)) < 0.1
        drawn = loaded.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=3)
        assert drawn.tokens == loaded.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=3).tokens


@torch.no_grad()
def gaps(model: PreTrainedModel, prompt: list[int], text: list[int]) -> list[float]:
    """How much less than the largest logit each token of a text has, in standard deviations of the logits."""
    logits = model(input_ids=torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    own = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    return ((logits.amax(1) - own) / logits.std(1)).tolist()


def test_weights_are_read_as_what_they_stand_for(model: PreTrainedModel) -> None:
    load_target(model)
    layer: Any = model.model.layers[-1].mlp.up_proj
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight, bias = plain_linear(layer)
        found = nn.functional.linear(x, weight, bias)
        apart = (found - layer(x)).norm() / found.norm()
    assert weight.shape == (128, WIDTH) and type(weight) is torch.Tensor and apart < 0.02
    begun = ExitLayer.beginning(model, ExitLayerConfig(1)).layer.mlp.up_proj  # type: ignore[union-attr]
    assert torch.equal(begun.weight, weight.float())  # type: ignore[union-attr, arg-type]


def test_a_change_of_one_layers_weights_changes_the_fingerprint(model: PreTrainedModel) -> None:
    target = load_target(model)
    before = weights_fingerprint(target)
    assert weights_fingerprint(load_target(model)) == before
    norm: Any = model.model.norm
    norm.weight.data.mul_(2)
    assert weights_fingerprint(target) != before
    norm.weight.data.div_(2)


@pytest.mark.parametrize("method", ["fspad", "eesd"])
def test_drafters_are_trained_on_it(model: PreTrainedModel, method: str, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 12)
    more: dict[str, Any] = {"exit_layer": 1} if method == "eesd" else {"draft_vocab_size": 200}
    run = trainer(model, tmp_path / "drafter", data, {"method": method, **more}, tokenizer=byte_tokenizer())
    run.train()
    texts = outdraft.load(model, str(tmp_path / "drafter")).generate(PROMPTS, max_new_tokens=12, **ENDLESS).tokens
    assert all(max(gaps(model, prompt, text)) < 0.1 for prompt, text in zip(PROMPTS, texts, strict=True))


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def test_a_saved_folder_is_loaded_as_it_is_and_info_says_why_it_is_not_native(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    model = LIBRARIES[kind](folder)
    model.save_pretrained(tmp_path)
    facts = describe(str(tmp_path), "cpu")
    assert facts["quantised_by"] == kind.split()[0] and facts["here"]["backend"] == "eager"
    assert facts["here"]["not_native_because"] == "it is quantised"
    loaded = outdraft.load(str(tmp_path), method="prompt-lookup", dtype="float32", device="cpu")
    assert loaded.target.backend == "eager" and quantised_part(loaded.target.model) is not None
    assert len(loaded.generate(PROMPTS, max_new_tokens=12, **ENDLESS).tokens[0]) == 12


def test_hooks_of_the_whole_model_have_run_before_parts_of_it_do(folder: Path) -> None:
    """A model too large to be tried as a whole is read in parts, beside which such a hook would never run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(lambda own, _: (seen.append(own), handle.remove())[1])
    load_target(model)
    assert seen == [model]
