"""The law a token is drawn from: that of `transformers`' own generate, of OpenAI's formula, of plain arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import VOCAB, tiny
from outdraft.core.dice import Dice, Thrown, at_shares, at_shares_by_blocks, draw_each
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.errors import UserError

PROMPT = [4, 9, 9, 2, 17]
END = 6

AS_IN_GENERATE: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "repetition_penalty": 0.6},
    {"temperature": 1.0, "bad_words_ids": [[3], [17, 5], [9, 2, 17]]},
    {"temperature": 1.0, "bad_words_ids": [[token, token] for token in range(VOCAB)]},
    {"temperature": 1.0, "min_new_tokens": 4},
    {"temperature": 1.0, "min_length": 9},
    {"temperature": 1.0, "suppress_tokens": [3, 17, 20]},
    {"temperature": 1.0, "begin_suppress_tokens": [3, 17, 20]},
    {"temperature": 1.0, "no_repeat_ngram_size": 2},
    {"temperature": 1.0, "sequence_bias": [[[3], 2.5], [[17, 5], -3.0]]},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.0, "epsilon_cutoff": 0.02},
    {"temperature": 1.0, "eta_cutoff": 0.05},
    {
        "temperature": 0.8,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "bad_words_ids": [[9], [2, 5]],
        "min_new_tokens": 3,
    },
]


@pytest.mark.parametrize("asked", AS_IN_GENERATE, ids=lambda asked: ",".join(f"{k}={v}"[:24] for k, v in asked.items()))
def test_the_law_is_that_of_transformers_generate(asked):
    model = tiny("llama-gqa")
    off = {"top_k": 0, "top_p": 1.0}
    warper = Warper(SamplingSettings(**asked), len(PROMPT), VOCAB, [END])
    for seed in range(3):
        torch.manual_seed(seed)
        out = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            do_sample=True,
            max_new_tokens=6,
            eos_token_id=END,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **{**off, **asked},
        )
        for place, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
            prefix = out.sequences[0, : len(PROMPT) + place]
            law = warper.probs_after(logits[0], prefix)
            assert torch.allclose(law, scores[0].to(law.dtype).softmax(-1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("bias", [{3: 2.5, 7: -100.0}, {0: 1.0}])
def test_logit_bias_is_that_of_transformers_sequence_bias(bias):
    from transformers.generation import SequenceBiasLogitsProcessor

    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = theirs(torch.tensor([PROMPT]), logits)[0].softmax(-1)
    warper = Warper(SamplingSettings(temperature=1, logit_bias=bias), len(PROMPT), VOCAB)
    assert torch.allclose(warper.probs_after(logits[0], torch.tensor(PROMPT)), expected, atol=1e-6)
    assert not warper.reads_prefix


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.lists(st.integers(0, 7), max_size=8),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_presence_and_frequency_count_the_answer_only(prompt, answer, presence, frequency):
    logits = torch.linspace(-1, 2, 8, dtype=torch.float64)
    asked = SamplingSettings(temperature=1, presence_penalty=presence, frequency_penalty=frequency)
    law = Warper(asked, len(prompt), 8).probs_after(logits, torch.tensor(prompt + answer))
    expected = logits.clone()
    for token, count in Counter(answer).items():
        expected[token] -= presence + frequency * count
    assert torch.allclose(law, expected.softmax(-1), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 3),
    st.integers(0, 12),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
def test_every_law_is_a_law(seed, temperature, top_k, top_p, min_p, prefix):
    logits = 3 * torch.randn(10, generator=torch.Generator().manual_seed(seed))
    asked = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.2, frequency_penalty=0.1
    )
    untouched = logits.clone()
    law = Warper(asked, 1, 10).probs_after(logits, torch.tensor(prefix))
    assert torch.equal(logits, untouched), "the model's logits are left as they were"
    assert law.dtype == torch.float32 and (law >= 0).all() and abs(law.sum() - 1) < 1e-5
    if top_k:
        assert (law > 0).sum() <= top_k


def test_greedy_is_the_most_probable_token_after_the_penalties():
    logits = torch.tensor([1.0, 3.0, 2.5, 0.0])
    assert Warper(SamplingSettings(), 1, 4).probs_after(logits, torch.tensor([1])).tolist() == [0, 1, 0, 0]
    punished = SamplingSettings(repetition_penalty=2.0)
    assert Warper(punished, 1, 4).probs_after(logits, torch.tensor([1])).tolist() == [0, 0, 1, 0]
    held_back = SamplingSettings(min_new_tokens=1)
    assert Warper(held_back, 1, 4, [1]).probs_after(logits, torch.tensor([0])).tolist() == [0, 0, 1, 0]
    assert Warper(held_back, 1, 4, [1]).probs_after(logits, torch.tensor([0, 3])).tolist() == [0, 1, 0, 0]
    assert Warper(SamplingSettings(top_k=2, top_p=0.1), 1, 4).greedy


def test_half_precision_logits_give_a_law_in_float32():
    law = Warper(SamplingSettings(temperature=1), 1, 8).probs_after(
        torch.zeros(8, dtype=torch.bfloat16), torch.tensor([0])
    )
    assert law.dtype == torch.float32 and torch.allclose(law, torch.full((8,), 0.125))


def test_only_settings_that_need_the_prefix_read_it():
    reading = [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"bad_words_ids": [[1, 2]]},
        {"min_new_tokens": 1},
    ]
    for asked in reading:
        assert Warper(SamplingSettings(**asked), 1, 8, [0]).reads_prefix
    for asked in [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"logit_bias": {1: 1.0}}]:
        assert not Warper(SamplingSettings(**asked), 1, 8, [0]).reads_prefix


def test_further_processors_are_applied_first():
    warper = Warper(SamplingSettings(temperature=0.5), 1, 4, extra=[lambda ids, scores: scores + ids.sum()])
    assert warper.reads_prefix
    only_third = Warper(SamplingSettings(), 1, 4, extra=[lambda ids, scores: scores.index_fill(1, ids[0, -1:], 99.0)])
    assert only_third.probs_after(torch.zeros(4), torch.tensor([0, 2])).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "impossible",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"min_new_tokens": -1},
    ],
)
def test_impossible_settings_are_refused_by_name(impossible):
    (name,) = impossible
    with pytest.raises(UserError, match=name):
        SamplingSettings(**impossible)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match="token 8, but the vocabulary ends at 7"):
        Warper(SamplingSettings(logit_bias={8: 1.0}), 1, 8)
    with pytest.raises(UserError, match="token id 9 is outside"):
        Warper(SamplingSettings(bad_words_ids=[[1, 9]]), 1, 8)


def test_whole_numbers_are_as_good_as_fractions():
    asked = SamplingSettings(temperature=2, repetition_penalty=2, presence_penalty=1, min_p=0, logit_bias={1: 1})
    law = Warper(asked, 1, 4).probs_after(torch.tensor([2.0, 1.0, -1.0, 0.0]), torch.tensor([0, 2]))
    assert torch.allclose(law, torch.tensor([1 / 2, 2 / 2, (-2 - 1) / 2, 0]).softmax(-1))


# --- dice ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_throws_the_same():
    law = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def throws(seed: int | None) -> list[int]:
        dice = Dice(seed)
        return [dice.draw(law) for _ in range(40)] + [int(dice.accept(0.5)) for _ in range(40)]

    assert throws(7) == throws(7) != throws(8)
    assert throws(None) != throws(None)


def test_torchs_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dice = Dice(3)
    dice.draw(torch.ones(5)), dice.accept(0.5), Dice().draw(torch.ones(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_frequencies_are_the_law_given():
    """Chi-square over 20,000 throws of a law that need not add up to one; tokens without mass never come."""
    from scipy.stats import chisquare

    dice, law = Dice(11), torch.tensor([0.2, 0.0, 1.0, 0.4, 0.4])
    counts = Counter(dice.draw(law) for _ in range(20_000))
    assert 1 not in counts
    support = [0, 2, 3, 4]
    assert chisquare([counts[i] for i in support], [10_000 * law[i].item() for i in support]).pvalue > 1e-3
    accepted = sum(dice.accept(0.3) for _ in range(20_000))
    assert chisquare([accepted, 20_000 - accepted], [6_000, 14_000]).pvalue > 1e-3


def test_certainty_spends_no_throw():
    dice = Dice(5)
    before = dice.generator.get_state()
    assert dice.accept(1.0) and dice.accept(1.5) and not dice.accept(0.0)
    assert torch.equal(dice.generator.get_state(), before)


@pytest.mark.parametrize("vocab", [3, 31, 512, 513, 4096, 9000])
def test_a_draw_by_blocks_is_the_draw_of_all_at_once(vocab: int) -> None:
    dice = torch.Generator().manual_seed(vocab)
    for case in range(30):
        laws = (torch.randn(6, vocab, generator=dice) * 4).softmax(-1)
        if case % 3 == 0:  # few tokens that are possible at all
            laws *= torch.rand(6, vocab, generator=dice) < 0.01
            laws[:, case % vocab] += 1e-9
        shares = torch.rand(6, generator=dice, dtype=torch.float64)
        shares[0], shares[1] = 0.0, 1 - 2**-53
        drawn = at_shares_by_blocks(shares, laws)
        assert torch.equal(drawn, at_shares(shares, laws))
        assert (laws.gather(1, drawn[:, None]) > 0).all()


def test_dice_thrown_ahead_give_what_dice_give_in_the_same_order():
    """Of several rows, each asked for several tokens a time, some laws with nothing at their ends."""
    laws = torch.rand(4, 6, VOCAB, generator=torch.Generator().manual_seed(0)).log().neg()
    laws[:, :, :3] = laws[:, :, -5:] = 0.0
    dice, ahead = [Dice(seed) for seed in range(4)], [Dice(seed) for seed in range(4)]
    thrown = [Thrown(torch.tensor([one.uniform() for _ in range(6)], dtype=torch.float64)) for one in ahead]
    for first, last in ((0, 1), (1, 4), (4, 6)):
        asked = laws[:, first:last].flatten(0, 1)
        drawn = [draw_each([one for one in chances for _ in range(last - first)], asked) for chances in (dice, thrown)]
        assert drawn[0].tolist() == drawn[1].tolist()
        assert all(3 <= token < VOCAB - 5 for token in drawn[0].tolist())
    assert [one.uniform() for one in dice] == [one.uniform() for one in ahead], "as many throws"
    with pytest.raises(NotImplementedError):
        thrown[0].accept(0.5)


def test_the_largest_share_still_draws_a_token_of_the_law():
    law = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    shares = torch.tensor([0.0, 0.29, 0.31, 1 - 2**-53], dtype=torch.float64)
    assert [at_shares(share[None], law).tolist() for share in shares] == [[1], [1], [2], [2]]
    assert Thrown(shares).draw(law[0]) == 1
