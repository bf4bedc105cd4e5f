"""A draft model of another tokenizer drafts through text, and the output keeps the target's distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import tokenizers_of_all_types as types
from enumeration import ScriptedChance, distance, law_of, sequence_law
from models import perturbed, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.engine.continuous import Decoder
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.methods.draft_model import drafter as retokenised
from outdraft.methods.draft_model.drafter import DraftModel, Translation
from outdraft.target.target import Target

LETTERS = "abcdefgh"


def spelling(letters: str, *merged: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters and of pairs that are merged, in this order."""
    vocab = {piece: i for i, piece in enumerate([*reversed(merged), *letters])}
    merges = [(pair[: len(pair) // 2], pair[len(pair) // 2 :]) for pair in merged]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, merges))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def model(vocab: int, seed: int = 4) -> Any:
    return tiny("llama-gqa", vocab_size=vocab, hidden_size=16, initializer_range=0.3, seed=seed)


def successor(tokenizer: Any, text: str) -> Any:
    """A model that goes round and round a text, in which no token comes twice."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    size = 4 * len(tokenizer)
    found = tiny("llama-gqa", vocab_size=len(tokenizer), hidden_size=size)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding, head = found.get_input_embeddings().weight, found.get_output_embeddings().weight
        embedding.copy_(torch.eye(len(tokenizer), size))
        head.zero_()
        for token, after in zip(ids, [*ids[1:], ids[0]], strict=True):
            head[after, token] = 1.0
    return found


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizers of this file have no letters but these."""
    monkeypatch.setattr(retokenised, "PROBE", "abcd")


def pair(target_words: Any, draft_words: Any, seed: int = 4) -> tuple[Target, DraftModel]:
    target = Target(model(len(target_words), seed), target_words)
    return target, DraftModel(Target(model(len(draft_words), seed + 1), draft_words), target)


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "letters from pairs": lambda: (spelling("abcd"), spelling("abcd", "ab", "cd", "abcd")),
    "pairs from letters": lambda: (spelling("abcd", "ab", "cd"), spelling("dcba")),
    "pairs from other pairs": lambda: (spelling("abcd", "ab", "cd"), spelling("abcd", "bc", "da")),
}


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("settings", [SamplingSettings(temperature=1), SamplingSettings(temperature=0.7, top_k=2)])
def test_every_random_outcome_keeps_the_targets_distribution(kind: str, settings: Any) -> None:
    drafted, accepted = 0, 0
    for seed in (4,) if settings.top_k == 0 else range(4, 14):
        found = law_with(*pair(*PAIRS[kind](), seed), settings)
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0 < accepted < drafted


def law_with(target: Target, drafter: DraftModel, settings: SamplingSettings, length: int = 3) -> Statistics:
    """Compare the distributions of the first tokens; returns what was drafted over all ways."""
    prompt = target.tokenizer("abca")["input_ids"]  # type: ignore[misc]
    warper = Warper(settings, len(prompt), target.vocab_size)
    rows: list[Row] = []

    def run(chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows.append(Row(list(prompt), warper, chance(), length))
        for _ in decode(target, drafter, rows[-1:], TreeShape.chain(2)):
            pass
        return tuple(rows[-1].tokens)

    @torch.inference_mode()
    def next_law(path: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([*prompt, *path])
        return warper.probs_after(target.model(ids[None], use_cache=False).logits[0, -1], ids)

    assert distance(law_of(run), sequence_law(next_law, length)) < 1e-10
    return Statistics.sum(row.statistics for row in rows)


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_text_is_that_of_plain_decoding(kind: str) -> None:
    for seed in range(3):
        target, drafter = pair(*PAIRS[kind](), seed)
        plain, drafted = SpeculativeModel(target), SpeculativeModel(target, drafter)
        for prompts in ("abcd", ["abca", "d", "cdabcdab"]):
            found = drafted.generate(prompts, max_new_tokens=20)
            assert found.tokens == plain.generate(prompts, max_new_tokens=20).tokens


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("words", [("ab", "cd"), ("abcd", "ef", "gh"), ()])
@pytest.mark.parametrize("own", [("bc", "fg"), ("ab", "cd", "ef", "gh", "abcd", "efgh"), ()])
def test_drafts_of_the_same_text_are_accepted_whole(words: tuple[str, ...], own: tuple[str, ...]) -> None:
    pairs = [
        tuple(one for piece in kind for one in ((piece[:2], piece[2:], piece) if len(piece) > 2 else (piece,)))
        for kind in (words, own)
    ]
    tokenizers = [spelling(LETTERS, *dict.fromkeys(one)) for one in pairs]
    tokenizers[1] = spelling(LETTERS[::-1], *dict.fromkeys(pairs[1]))  # or the tokens would be the same ones
    target = Target(successor(tokenizers[0], LETTERS), tokenizers[0])
    drafter = DraftModel(Target(successor(tokenizers[1], LETTERS), tokenizers[1]), target)
    assert drafter.translation is not None
    plain, drafted = SpeculativeModel(target), SpeculativeModel(target, drafter)
    settings: dict[str, Any] = {"max_new_tokens": 24, "controller": "fixed", "prompt_lookup_min": 0}
    found = drafted.generate(["abcd", "abcdefgh"], **settings)
    assert found.tokens == plain.generate(["abcd", "abcdefgh"], max_new_tokens=24).tokens
    assert found.texts[0].startswith("efghabcdefgh")
    # A draft may end, and an answer may stand, amid a token of the other.
    assert found.statistics.accepted > 0.25 * found.statistics.drafted and found.tau > 1.5


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": lambda: types.byte_level(False),
    "byte level, prefix space": lambda: types.byte_level(True),
    "byte fallback": lambda: types.byte_fallback(False),
    "byte fallback, prefix space": lambda: types.byte_fallback(True),
    "metaspace": lambda: types.metaspace(True),
}


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("text", ["Once upon a time, there was a cat. It said: don't!", "a 中文 naïve café cat"])
def test_a_draft_of_the_text_is_the_text_in_the_targets_tokens(own: str, theirs: str, text: str) -> None:
    """After any number of the target's tokens, if the draft model tokenises the text up to there as all of it."""
    first, second = KINDS[own](), KINDS[theirs]()
    translation = Translation(first, second)
    tokens, possible, kept = types_ids(second, text), 0, 0
    for cut in range(1, len(tokens)):
        known = translation.of_text(tokens[:cut])
        whole = types_ids(first, second.decode(tokens))
        if whole[: len(known)] != known:
            continue
        possible += 1
        found = translation.candidates(tokens[:cut], known, whole[len(known) :])
        assert not found or second.decode([*tokens[:cut], *found]) == second.decode(tokens)
        kept += bool(found)
    assert kept == possible > 2


def types_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_characters_that_are_unfinished_go_on() -> None:
    words, whole = types.byte_fallback(False), types.byte_level(False)
    translation = Translation(whole, words)
    tokens = types_ids(words, "a 中文")
    cut = tokens[:-2]  # two of the three bytes of the last character are not there
    known = translation.of_text(cut)
    assert whole.decode(known).rstrip() == "a"
    assert translation.candidates(cut, known, types_ids(whole, "中文")) == tokens[-2:]
    assert translation.candidates(cut, known, types_ids(whole, "b文")) == []


def test_special_tokens_that_both_have_are_the_same_ones() -> None:
    first, second = types.byte_fallback(True), types.byte_level(False)
    translation = Translation(first, second)
    asked = [*types_ids(second, "a cat"), second.eos_token_id, *types_ids(second, "c")]
    assert first.eos_token_id in translation.of_text(asked)
    drafts = [*types_ids(first, "at"), first.eos_token_id, *types_ids(first, "a")]
    found = translation.candidates(asked, translation.of_text(asked), drafts)
    assert found[-1] == second.eos_token_id and second.decode(found, skip_special_tokens=True).strip() == "at"


def test_a_text_of_the_drafters_begins_as_its_texts_do() -> None:
    letters = spelling(LETTERS, bos_token="<s>")
    number = letters.convert_tokens_to_ids("<s>")
    letters.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", number)]
    )
    words = spelling(LETTERS, "ab", bos_token="<s>")
    translation = Translation(letters, words)
    text = types_ids(words, "abc")
    assert translation.of_text(text)[0] == number
    assert translation.of_text([words.bos_token_id, *text]) == translation.of_text(text), "once only"
    assert translation.of_text([]) == [number]


def test_tokenizers_that_change_texts_are_refused_with_both_names() -> None:
    bert, words = types.word_piece(True), types.byte_level(False)
    bert.name_or_path, words.name_or_path = "lower", "whole"
    target, draft = Target(model(len(words)), words), Target(model(len(bert)), bert)
    with pytest.raises(UserError, match=r"draft model lower is not that of the target whole .* keep texts"):
        DraftModel(draft, target)


@pytest.mark.usefixtures("probe")
def test_rows_join_and_leave() -> None:
    """Served rows come and go, each with the text that it has alone."""
    target, drafter = pair(*PAIRS["pairs from letters"]())
    near = perturbed(target.model, lambda: model(target.vocab_size), 0.2)  # type: ignore[arg-type]
    drafter = DraftModel(Target(near, target.tokenizer), target)
    drafter.translation = Translation(target.tokenizer, target.tokenizer)  # type: ignore[arg-type]
    plain = SpeculativeModel(target)
    prompts = [target.tokenizer(text)["input_ids"] for text in ("abc", "dcba", "b")]  # type: ignore[misc]
    expected = [
        plain.generate(prompt, max_new_tokens=count).tokens[0]
        for prompt, count in zip(prompts, (20, 9, 14), strict=True)
    ]
    rows = [
        Row(list(prompt), Warper(SamplingSettings(temperature=0), len(prompt), target.vocab_size), Dice(0), count)
        for prompt, count in zip(prompts, (20, 9, 14), strict=True)
    ]
    decoder = Decoder(target, drafter, TreeShape.chain(3))
    waiting = list(rows)
    while waiting or decoder.rows:
        if waiting:
            decoder.add([waiting.pop(0)])
        decoder.prefill(8)
        decoder.round()
    assert [row.tokens for row in rows] == [tokens[: 20 - number] for number, tokens in enumerate(expected)]
    assert sum(row.statistics.accepted for row in rows) > 0
