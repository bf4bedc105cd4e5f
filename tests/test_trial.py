"""Whether a model can verify trees is tried when it is loaded, not looked up by its family's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import outdraft
from models import FAMILIES, FURTHER, VOCAB, tiny
from outdraft.api.loading import load_target
from outdraft.errors import UserError
from outdraft.target import trial
from outdraft.target.limits import windows_of
from outdraft.target.target import Target

LLAMA = {**FAMILIES["llama-gqa"], "num_hidden_layers": 4}
LATENT = {
    **FURTHER["deepseek"],
    "num_hidden_layers": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}


def built(model_type: str, /, **settings: Any) -> PreTrainedModel:
    settings.pop("model_type", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [False, True], ids=["whole", "a layer of each kind"])
def test_families_that_verify_trees_pass(family: str, dtype: torch.dtype, large: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(trial, "LARGE", 0 if large else 1 << 40)
    model = tiny(family, dtype=dtype)
    target = load_target(model, backend="eager")
    assert target.windows == windows_of(model.config)


REFUSED: dict[str, Any] = {
    "an indexer beside the cache": lambda: built("deepseek_v32", **LATENT),
    "another one": lambda: built("glm_moe_dsa", **LATENT),
    "no cache at all": lambda: built("openai-gpt", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "sight of what follows": lambda: built("bert", **SMALL),
    "the same, and a head on something else": lambda: built("electra", **SMALL, embedding_size=16),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("large", [False, True], ids=["whole", "a layer of each kind"])
def test_a_family_that_cannot_is_refused_with_the_reason(kind: str, large: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(trial, "LARGE", 0 if large else 1 << 40)
    with pytest.raises(UserError, match=r"(cannot verify trees: it (fails with|says something else)|makes its logits)"):
        load_target(REFUSED[kind]())


class Remembering(nn.Module):
    """A layer that adds what it gave for the newest token before, which no cache of ours can take back."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.last = layer, 0.0

    def forward(self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = self.layer(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        given = output[0] if isinstance(output, tuple) else output
        before = self.last if past_key_values is not None else torch.zeros_like(given[:, :1])
        moved = torch.cat([before + torch.zeros_like(given[:, :1]), given[:, :-1]], dim=1)
        self.last = given[:1, -1:].detach()
        return given + moved


def test_state_in_a_layer_of_its_own_shows_in_what_is_said() -> None:
    model = built("llama", **LLAMA)
    model.model.layers[1] = Remembering(model.model.layers[1])
    with pytest.raises(UserError, match="it says something else than over plain text"):
        load_target(model)


def test_a_window_that_the_family_ignores_ends_the_context() -> None:
    """Moshi's forward looks at all tokens, `generate`'s cache at those in the window: they agree up to it."""
    settings = {**SMALL, "ffn_dim": 48, "head_dim": 8, "sliding_window": 20, "max_position_embeddings": 64}
    model = built("moshi", **settings, num_key_value_heads=4)
    target = load_target(model)
    assert set(windows_of(model.config).values()) == {20} and set(target.windows.values()) == {None}
    assert target.context_length == 20
    ids = list(range(3, 15))
    given = torch.tensor([ids])
    stock = model.generate(given, attention_mask=given * 0 + 1, do_sample=False, max_new_tokens=8, pad_token_id=0)
    found = outdraft.load(model, method="prompt-lookup").generate(ids, max_new_tokens=30)
    assert found.tokens[0] == stock[0, len(ids) :].tolist() and found.finish_reasons == ["context"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool) -> None:
    model = tiny("mistral-sliding", dtype=torch.float32)
    if fails:
        model.model.layers[1] = Remembering(model.model.layers[1])
    before = model.config.to_dict(), dict(model.named_modules())
    try:
        load_target(model)
    except UserError:
        assert fails
    assert (model.config.to_dict(), dict(model.named_modules())) == before
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def calls(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, count: list[int]) -> None:
    real = type(model.model.layers[0]).forward

    def counted(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count.append(hidden.shape[1])
        return real(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", counted)


@pytest.mark.parametrize(("large", "layers"), [(False, 4), (True, 1)])
def test_the_trial_is_three_forwards_over_a_few_tokens(large: bool, layers: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(trial, "LARGE", 0 if large else 1 << 40)
    model, count = built("llama", **LLAMA), list[int]()
    target = Target(model)
    calls(monkeypatch, model, count)
    trial.tried(target)
    assert len(count) == 3 * layers and max(count) <= 5


def test_a_backend_is_not_warmed_up_by_the_trial() -> None:
    target = load_target(tiny("llama-gqa", dtype=torch.float32), backend="graphs")
    run: Any = target._run
    assert target.backend == "graphs" and not run.recordings and not run._compared
    assert target.pool is not None and not target.pool._free
