"""What a model's own generation config says holds wherever nothing is given, as in `transformers`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import outdraft
from models import perturbed
from outdraft.errors import UserError
from tokens import byte_tokenizer, speaking

PROMPT = "Once upon"
BANS: list[dict[str, Any]] = [
    {"suppress_tokens": [70, 71, 72, 73]},
    {"begin_suppress_tokens": "first"},
    {"bad_words_ids": "first"},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 20},
    {"min_length": 25},
    {"sequence_bias": [[[90], 30.0]]},
]


def loaded(drafted: bool, generation_config: str = "auto", **own: Any) -> Any:
    model: Any = speaking()
    draft = perturbed(model, speaking, 0.05) if drafted else None
    model.generation_config.update(**own)
    return outdraft.load(model, draft, tokenizer=byte_tokenizer(), backend="eager", generation_config=generation_config)


def stock(model: Any, **settings: Any) -> list[int]:
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    out = model.target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **settings)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("own", BANS, ids=lambda own: next(iter(own)))
def test_bans_are_obeyed_and_said_once(own: dict[str, Any], drafted: bool) -> None:
    free = loaded(drafted).generate(PROMPT, max_new_tokens=24).tokens[0]
    name, value = next(iter(own.items()))
    if value == "first":
        value = [free[0]] if name == "begin_suppress_tokens" else [[free[0]]]
    model = loaded(drafted, **{name: value})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        banned = [model.generate(PROMPT, max_new_tokens=24).tokens[0] for _ in range(2)]
        assert "".join(piece.text for piece in model.stream(PROMPT, max_new_tokens=24))
    assert banned[0] == banned[1] == stock(model)
    assert [name in str(one.message) for one in said if "generation config" in str(one.message)] == [True]


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens"])
def test_bans_of_tokens_that_the_model_lacks_ban_nothing(name: str) -> None:
    free = loaded(False).generate(PROMPT, max_new_tokens=8).tokens[0]
    model = loaded(False, **{name: [-1, 10**6]})
    assert model.generate(PROMPT, max_new_tokens=8).tokens[0] == free == stock(model)[:8]


def test_the_bans_of_these_tests_change_something() -> None:
    free = loaded(False).generate(PROMPT, max_new_tokens=24).tokens
    for own in ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"sequence_bias": [[[90], 30.0]]}):
        assert loaded(False, **own).generate(PROMPT, max_new_tokens=24).tokens != free


def test_a_model_that_samples_is_sampled_from_unless_told_otherwise() -> None:
    model = loaded(True, do_sample=True, temperature=0.7, top_k=5)
    drawn = {tuple(model.generate(PROMPT, max_new_tokens=12, seed=seed).tokens[0]) for seed in range(4)}
    given = {
        tuple(loaded(True).generate(PROMPT, max_new_tokens=12, seed=seed, temperature=0.7, top_k=5).tokens[0])
        for seed in range(4)
    }
    assert drawn == given and len(drawn) > 1
    greedy = loaded(True).generate(PROMPT, max_new_tokens=12).tokens
    for settings in ({"do_sample": False}, {"temperature": 0}):
        assert model.generate(PROMPT, max_new_tokens=12, **settings).tokens == greedy


def test_what_is_given_wins() -> None:
    model = loaded(False, repetition_penalty=3.0)
    free = loaded(False).generate(PROMPT, max_new_tokens=24).tokens
    assert model.generate(PROMPT, max_new_tokens=24, repetition_penalty=1.0).tokens == free


def test_the_config_is_ignored_on_request() -> None:
    free = loaded(False).generate(PROMPT, max_new_tokens=24).tokens
    own = {"repetition_penalty": 3.0, "do_sample": True, "num_beams": 4}
    assert loaded(False, "vllm", **own).generate(PROMPT, max_new_tokens=24).tokens == free
    with pytest.raises(UserError, match="must be auto or vllm"):
        loaded(False, "none")


def test_stop_strings_hold_until_others_are_given() -> None:
    free = loaded(True).generate(PROMPT, max_new_tokens=24)
    pairs = (free.text[place : place + 2] for place in range(3, 23))
    stop, other, *_ = (pair for pair in pairs if pair.isascii() and pair.isprintable())
    model = loaded(True, stop_strings=[stop])
    with pytest.warns(UserWarning, match="sets stop_strings="):
        ended = model.generate(PROMPT, max_new_tokens=24)
    assert ended.finish_reasons == ["stop"] and stop in ended.text and len(ended.text) < len(free.text)
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    own = model.target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, tokenizer=model.tokenizer
    )
    assert ended.tokens[0] == own[0, ids.shape[1] :].tolist()
    assert other in model.generate(PROMPT, max_new_tokens=24, stop_strings=other).text
    assert model.generate(PROMPT, max_new_tokens=24, stop_strings=[]).tokens == free.tokens
    assert loaded(True, "vllm", stop_strings=[stop]).generate(PROMPT, max_new_tokens=24).tokens == free.tokens


SETTINGS_REFUSED: list[dict[str, Any]] = [
    *({"num_beams": 2}, {"guidance_scale": 1.5}, {"forced_eos_token_id": 3}, {"max_time": 1.0}),
    *({"exponential_decay_length_penalty": [5, 1.5]}, {"remove_invalid_values": True}, {"forced_bos_token_id": 3}),
]


@pytest.mark.parametrize("own", SETTINGS_REFUSED, ids=lambda own: next(iter(own)))
def test_what_cannot_be_kept_is_refused_by_name(own: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"sets {next(iter(own))}, .*generation_config='vllm'"):
        loaded(True, **own).generate(PROMPT)
