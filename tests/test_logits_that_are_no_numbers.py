"""A row whose logits are no numbers, or whose processor fails, ends alone with the reason, however it is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import outdraft
from models import perturbed
from outdraft.errors import UserError
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.target.target import Target
from tokens import byte_tokenizer, speaking

PROMPTS = ["Once upon", "no more", "2 + 2"]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    {"temperature": 1.0, "seed": 1, "candidates": "sampled", "tree_top_k": 2, "tree_depth": 2, "tree_size": 5},
    {"repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2},
]
VALUES = {"nan": float("nan"), "infinite": float("inf"), "all ruled out": -float("inf")}


@pytest.fixture(scope="module")
def fast() -> Any:
    target = speaking()
    return outdraft.load(target, perturbed(target, speaking, 0.05), tokenizer=byte_tokenizer(), backend="eager")


class Breaks(LogitsProcessor):
    """Of one prompt, after so many tokens: gives a value in place of logits, or raises an error."""

    def __init__(self, prompt: str, after: int, value: float | None):
        self.prompt, self.value = byte_tokenizer()(prompt)["input_ids"], value
        self.length = len(self.prompt) + after

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] < self.length or input_ids[0, : len(self.prompt)].tolist() != self.prompt:
            return scores
        if self.value is None:
            raise RuntimeError("this processor fails")
        scores = scores.clone()
        scores[:, :: 1 if self.value == -float("inf") else 9] = self.value
        return scores


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_broken_model_is_an_error_and_no_text(
    fast: Any, value: float, drafted: bool, settings: dict[str, Any]
) -> None:
    broken = speaking()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(value)
        broken.get_output_embeddings().weight[0] = value
    target = Target(broken, byte_tokenizer())
    if value == -float("inf"):  # as a sum it is NaN
        target.head = lambda features: features.new_full((*features.shape[:-1], 260), value)  # type: ignore[method-assign]
    model = outdraft.SpeculativeModel(target, DraftModel(fast.target, target) if drafted else None)
    settings = settings if drafted else {k: v for k, v in settings.items() if not k.startswith(("tree", "cand"))}
    with pytest.raises(UserError, match="after 0 new tokens the logits are not finite"):
        model.generate("Once upon", max_new_tokens=8, **settings)
    with pytest.raises(UserError, match="not finite"):
        list(model.stream("Once upon", max_new_tokens=8, **settings))


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("value", [*VALUES.values(), None], ids=[*VALUES, "raising"])
@pytest.mark.parametrize("after", [0, 5])
def test_the_other_rows_go_on(fast: Any, after: int, value: float | None, settings: dict[str, Any]) -> None:
    whole = fast.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **settings)
    with pytest.warns(UserWarning, match="row 1 has ended early"):
        out = fast.generate(
            PROMPTS,
            max_new_tokens=20,
            eos_token_id=[],
            logits_processor=[Breaks(PROMPTS[1], after, value)],
            **settings,
        )
    assert [out.tokens[0], out.tokens[2]] == [whole.tokens[0], whole.tokens[2]]
    assert out.tokens[1] == whole.tokens[1][:after] and len(out.accepted[1]) == after
    assert out.finish_reasons[1] == "error" and out.errors[0] is out.errors[2] is None
    assert ("RuntimeError was raised: this processor fails" if value is None else "not finite") in str(out.errors[1])


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_drafter_whose_logits_are_no_numbers_changes_nothing(fast: Any, settings: dict[str, Any]) -> None:
    broken = speaking()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    model = outdraft.SpeculativeModel(fast.target, DraftModel(Target(broken), fast.target))
    plain = fast.with_drafter(None)
    out = model.generate(PROMPTS, max_new_tokens=12, **settings)
    assert out.statistics.accepted == 0 and all(reason != "error" for reason in out.finish_reasons)
    if "temperature" not in settings:
        assert out.tokens == plain.generate(PROMPTS, max_new_tokens=12, **settings).tokens


def test_a_stopping_test_that_fails_ends_its_row_alone(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from outdraft.api import generation

    def failing(strings: Any, tokenizer: Any, prompt: list[int]) -> Any:
        def completed(tokens: list[int]) -> bool:
            if len(prompt) == len(PROMPTS[1]) and len(tokens) == 4:
                raise ValueError("no such token")
            return False

        return completed

    whole = fast.generate(PROMPTS, max_new_tokens=12, eos_token_id=[])
    monkeypatch.setattr(generation, "stops_at", failing)
    with pytest.warns(UserWarning, match="ValueError was raised: no such token"):
        out = fast.generate(PROMPTS, max_new_tokens=12, eos_token_id=[], stop_strings=["x"])
    assert [out.tokens[0], out.tokens[2]] == [whole.tokens[0], whole.tokens[2]] and len(out.tokens[1]) == 4


@pytest.mark.parametrize("place", ["layer", "head"])
def test_exact_decoding_of_a_broken_model_says_the_same(place: str) -> None:
    broken: Any = speaking()
    with torch.no_grad():
        (broken.model.layers[0].mlp.down_proj if place == "layer" else broken.lm_head).weight[0] = float("nan")
    model = outdraft.load(broken, method="prompt-lookup", tokenizer=byte_tokenizer(), backend="eager")
    with pytest.raises(UserError, match="after 0 new tokens the logits are not finite"):
        model.generate("Once upon", max_new_tokens=8, exact=True)


def test_custom_generate_says_so(fast: Any) -> None:
    broken = speaking()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    custom = outdraft.custom_generate(None, method="prompt-lookup")
    with pytest.raises(UserError, match="not finite"):
        broken.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, custom_generate=custom)
