"""With shared noise a seed gives the tokens of stock `generate`, whatever drafts, however far and in which company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from outdraft_lookahead import LOOKAHEAD
from torch import Tensor

import outdraft
from models import tiny
from outdraft.core.coupling import Coupled, FreshNoise, Noise, under
from outdraft.errors import UserError
from outdraft.methods import registry
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.registry import register
from outdraft.target.target import Target
from test_losslessness import one_forward_drafter

LENGTH = 20
PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6, 7, 5]]
NEVER = 10**6
"""An end token that no model gives."""

PROCESSED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"bad_words_ids": [[3], [5, 6]]},
]


def head(model: Any, **switches: Any) -> FeatureHead:
    config = model.config.get_text_config()
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    torch.manual_seed(0)
    own = FeatureHead(FeatureHeadConfig(**{name: getattr(config, name) for name in names}, **switches))
    if own.draft_tokens is not None:
        own.draft_tokens = torch.arange(len(own.draft_tokens)) * 2
    return own


@pytest.fixture(autouse=True)
def with_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of a package outside, in these tests alone."""
    monkeypatch.setattr(registry, "_registered", {})
    register(LOOKAHEAD)


DRAFTERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "plain": lambda model: {"method": "none"},
    "prompt-lookup": lambda model: {"method": "prompt-lookup"},
    "lookahead": lambda model: {"method": "lookahead"},
    "fspad": lambda model: {"draft_model": head(model)},
    "fspad-reduced": lambda model: {"draft_model": head(model, draft_vocab_size=12)},
    "fspad-1f": lambda model: {"draft_model": one_forward_drafter(Target(model), True).head},
    "eesd": lambda model: {"draft_model": ExitLayer.beginning(model, ExitLayerConfig(1))},
    "draft-model": lambda model: {"draft_model": tiny("llama-gqa").float()},
}
DRAFTS: list[dict[str, Any]] = [
    {"controller": "fixed"},
    {"controller": "calibrated"},
    {"num_speculative_tokens": 3},
    {"tree_depth": 2, "tree_top_k": 3, "tree_size": 9},
]


def stock(model: Any, prompts: list[list[int]], seed: int, **settings: Any) -> list[list[int]]:
    """What `transformers` samples for each of them after `torch.manual_seed`."""
    texts = []
    for place, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        torch.manual_seed(seed + place)
        given: dict[str, Any] = {"do_sample": True, "max_new_tokens": LENGTH, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **{**given, "top_k": 0, **settings})
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def ours(model: Any, prompts: list[list[int]], seed: int, drafter: str, **settings: Any) -> Any:
    loaded = outdraft.load(model, backend="eager", **DRAFTERS[drafter](model))
    given: dict[str, Any] = {"do_sample": True, "max_new_tokens": LENGTH, "eos_token_id": NEVER}
    return loaded.generate(prompts, seed=seed, **given, **settings)


@pytest.mark.parametrize("settings", PROCESSED, ids=str)
def test_a_seed_gives_the_tokens_of_stock_generate(settings: dict[str, Any]) -> None:
    model = tiny("llama-gqa").float()
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = stock(model, prompts, 7, **settings)
        assert expected != stock(model, prompts, 8, **settings)
        for drafter in ("plain", "prompt-lookup", "fspad"):
            assert ours(model, prompts, 7, drafter, **settings).tokens == expected, drafter


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_neither_drafter_nor_draft_changes_it(drafter: str) -> None:
    model = tiny("llama-gqa").float()
    expected, accepted = stock(model, PROMPTS, 3), 0
    for settings in DRAFTS if drafter != "plain" else [{}]:
        out = ours(model, PROMPTS, 3, drafter, **settings)
        assert out.tokens == expected, settings
        accepted += out.statistics.accepted
    assert accepted > 0 or drafter in ("plain", "lookahead", "prompt-lookup"), "nothing was drafted that was right"


@pytest.mark.parametrize("family", ["qwen2-sliding", "gemma2", "gpt2", "phi3"])
def test_it_holds_in_every_family(family: str) -> None:
    model = tiny(family).float()
    assert ours(model, PROMPTS, 5, "prompt-lookup").tokens == stock(model, PROMPTS, 5)


def test_custom_generate_gives_the_stock_models_own_tokens_padding_and_all() -> None:
    model = tiny("llama-gqa").float()
    ids = torch.tensor([[0, 0, 1, 2, 3, 1, 2], PROMPTS[1]])
    given: dict[str, Any] = {"attention_mask": (ids > 0).long(), "do_sample": True, "max_new_tokens": LENGTH}
    given |= {"pad_token_id": 0, "eos_token_id": 11, "top_k": 0, "repetition_penalty": 1.2}
    custom = outdraft.custom_generate(head(model), backend="eager", controller="fixed")
    texts: list[list[Tensor]] = []
    for way in ({}, {"custom_generate": custom}):
        torch.manual_seed(4)
        # Twice: the generator has to stand where the stock model leaves it.
        texts.append([model.generate(ids, **given, **way) for _ in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(*texts, strict=True))
    assert not torch.equal(*texts[0])


def test_without_a_seed_every_text_is_another() -> None:
    model = tiny("llama-gqa").float()
    loaded = outdraft.load(model, head(model), backend="eager")
    given: dict[str, Any] = {"do_sample": True, "max_new_tokens": LENGTH, "eos_token_id": NEVER}
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        texts += loaded.generate([PROMPTS[0], PROMPTS[0]], **given).tokens
    assert len(set(map(tuple, texts))) == 4


def test_candidates_that_are_drawn_keep_their_dice() -> None:
    model = tiny("llama-gqa").float()
    drawn = ours(model, PROMPTS, 7, "fspad", candidates="sampled", tree_depth=1, tree_top_k=1, tree_size=3)
    thrown = ours(model, PROMPTS, 7, "fspad", coupling="dice", num_speculative_tokens=2)
    assert drawn.tokens == thrown.tokens != stock(model, PROMPTS, 7)
    with pytest.raises(UserError, match="candidates"):
        ours(model, PROMPTS, 7, "fspad", candidates="sampled", coupling="noise")


def test_noise_is_the_same_whenever_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outdraft.core.coupling.KEPT_BYTES", 0)  # eight steps are kept
    noise, again = (Noise(2, 50, torch.device("cpu"), seed=9) for _ in range(2))
    early = [noise.step(index).clone() for index in range(30)]
    assert all(torch.equal(again.step(index), early[index]) for index in (29, 3, 17, 0, 29, 12))
    fresh, other = FreshNoise(50), FreshNoise(50)
    early = [fresh.step(index).clone() for index in range(30)]
    assert all(torch.equal(fresh.step(index), early[index]) for index in (29, 3, 17, 0, 29, 12))
    assert len(torch.cat([*early, other.step(0)]).unique()) == 31 * 50, "steps and rows have noise of their own"


@pytest.mark.parametrize("fresh", [False, True])
def test_over_the_noise_tokens_have_their_probabilities(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    monkeypatch.setattr("outdraft.core.coupling.secrets.randbits", lambda bits: 7)
    noise = FreshNoise(4) if fresh else Noise(1, 4, torch.device("cpu"), seed=0)
    drawn = under(law, torch.stack([noise.step(index)[0] for index in range(20_000)])).bincount(minlength=4)
    assert torch.allclose(drawn / 20_000, law, atol=0.015)
    with pytest.raises(NotImplementedError):
        Coupled(noise, 0, []).accept(0.5)


def test_an_unknown_coupling_is_refused() -> None:
    with pytest.raises(UserError, match="coupling must be dice or noise, not 'gum'"):
        outdraft.load(tiny("llama-gqa"), method="none").generate([1, 2], coupling="gum")
