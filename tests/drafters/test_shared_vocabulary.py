"""Draft models whose tables were padded, or whose tokenizers have tokens of their own, draft what both have in common,
and the output keeps the target's distribution."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from enumeration import ScriptedChance, distance, law_of, sequence_law
from models import perturbed, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.vocabulary import SharedVocabulary
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.target.target import Target

PROMPT = [0, 2, 1, 3, 0, 2]


def model(vocab: int) -> PreTrainedModel:
    return tiny("llama-gqa", vocab_size=vocab, hidden_size=16, initializer_range=0.3, seed=4)


def words(*tokens: str, **places: int) -> Any:
    """A tokenizer of these tokens in their order, and of others at their places."""
    vocab = {token: place for place, token in enumerate(tokens)} | places
    facts = {"unk_token_id": None, "eos_token_id": None, "name_or_path": f"a {tokens[0]}"}
    return Words(get_vocab=lambda: vocab, decode=lambda ids, **_: str(ids), all_special_ids=[], **facts)


class Words(SimpleNamespace):
    """What may stand for a tokenizer."""

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return len(self.get_vocab())


def pair(target: int, draft: int, target_words: Any = None, draft_words: Any = None) -> tuple[Target, DraftModel]:
    """A target of so many tokens, and a draft model that is near it on those that both have."""
    own, near = model(target), model(draft)
    least = min(target, draft)
    weights = perturbed(own, lambda: model(target), 0.3).state_dict()
    for name, weight in near.state_dict().items():
        if weight.shape == weights[name].shape:
            weight.copy_(weights[name])
        else:
            weight[:least] = weights[name][:least]
    whole = Target(own, target_words)
    return whole, DraftModel(Target(near, draft_words), whole)


PAIRS: dict[str, Callable[[], tuple[Target, DraftModel]]] = {
    "padded draft": lambda: pair(4, 5),
    "padded target": lambda: pair(5, 4),
    "both padded, one tokenizer known": lambda: pair(5, 4, words(*"abcd")),
    "a token added to the target": lambda: pair(5, 4, words(*"abcd", tool=4), words(*"abcd")),
    "a token added to the draft": lambda: pair(4, 5, words(*"abcd"), words(*"abcd", tool=4)),
    "tokens added to both at one place": lambda: pair(4, 4, words(*"abc", tool=3), words(*"abc", think=3)),
    "another token amid the same": lambda: pair(4, 4, words(*"abcd"), words(*"axcd")),
}


def law(
    target: Target, drafter: DraftModel, settings: SamplingSettings, shape: TreeShape, length: int
) -> tuple[Any, int, int]:
    counts = [0, 0]

    def run(chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        row = Row(list(PROMPT), warper(target, settings), chance(), length)
        for _ in decode(target, drafter, [row], shape):
            pass
        counts[0] += row.statistics.drafted
        counts[1] += row.statistics.accepted
        return tuple(row.tokens)

    return law_of(run), *counts  # type: ignore[return-value]


def warper(target: Target, settings: SamplingSettings) -> Warper:
    return Warper(settings, len(PROMPT), target.vocab_size)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    "shape",
    [TreeShape.chain(2), TreeShape(1, 2, 5), TreeShape.chain(2, candidates="sampled")],
    ids=["chain", "tree", "sampled"],
)
@pytest.mark.parametrize("settings", [SamplingSettings(temperature=1), SamplingSettings(temperature=0.7, top_k=2)])
def test_every_random_outcome_keeps_the_targets_distribution(kind: str, shape: TreeShape, settings: Any) -> None:
    target, drafter = PAIRS[kind]()
    length = 3 if shape == TreeShape.chain(2) else 2
    found, drafted, accepted = law(target, drafter, settings, shape, length)

    @torch.inference_mode()
    def next_law(path: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([*PROMPT, *path])
        return warper(target, settings).probs_after(target.model(ids[None], use_cache=False).logits[0, -1], ids)

    assert distance(found, sequence_law(next_law, length)) < 1e-10
    assert 0 < accepted < drafted


@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_text_is_that_of_plain_decoding_and_drafts_are_accepted(kind: str) -> None:
    target, drafter = PAIRS[kind]()
    plain, drafted = SpeculativeModel(target), SpeculativeModel(target, drafter)
    for prompts in (PROMPT, [PROMPT, PROMPT[2:]], [[target.vocab_size - 1] * 3]):
        found = drafted.generate(prompts, max_new_tokens=20)
        assert found.tokens == plain.generate(prompts, max_new_tokens=20).tokens
    assert found.tau > 1


def test_only_common_tokens_are_drafted_and_only_known_ones_are_read() -> None:
    target, drafter = pair(5, 4, words(*"abcd", tool=4), words(*"axcd"))
    shared = drafter.shared
    assert shared.known(torch.tensor([[0, 1, 2, 3, 4]])).tolist() == [[0, 0, 2, 3, 0]]
    logits = shared.logits(torch.zeros(2, 4))
    assert logits.shape == (2, 5) and (logits.softmax(-1) > 0).tolist() == [[True, False, True, True, False]] * 2
    same = SharedVocabulary(target, target)
    assert same.same and same.logits(logits) is logits


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: pair(4, 4, words(*"abcd"), words(*"dcba")), r"0 of 4 tokens are the same"),
        (lambda: pair(8, 3, words(*"abcdefgh")), "has 3 tokens, the target .* 8"),
        (lambda: pair(8, 3), "has 3 tokens, the target .* 8; a draft model must share the target's tokenizer"),
    ],
)
def test_another_tokenizer_is_refused_with_both_names(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
    if "same" in says:
        with pytest.raises(UserError, match=r"of the draft model a d .* of the target a a "):
            make()
