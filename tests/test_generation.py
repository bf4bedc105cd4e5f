"""The public ways in say what plain decoding says, and refuse what they cannot honour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer

import outdraft
from models import perturbed, tiny
from outdraft.data.text import Detokenizer
from outdraft.errors import UserError
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from tokens import byte_tokenizer, speaking

PROMPTS = ["Once upon a time", "2 + 2 =", "a"]


@pytest.fixture(scope="module")
def target() -> Any:
    return speaking()


@pytest.fixture(scope="module")
def fast(target: Any) -> outdraft.SpeculativeModel:
    """The target with a drafter that is right often and wrong often."""
    draft = perturbed(target, speaking, 0.05)
    return outdraft.load(target, draft, tokenizer=byte_tokenizer(), backend="eager")


@pytest.fixture(scope="module")
def plain(fast: outdraft.SpeculativeModel) -> outdraft.SpeculativeModel:
    return fast.with_drafter(None)


def test_greedy_text_is_that_of_plain_decoding(fast: Any, plain: Any) -> None:
    quick = fast.generate(PROMPTS, max_new_tokens=40, controller="fixed")
    slow = plain.generate(PROMPTS, max_new_tokens=40)
    assert quick.texts == slow.texts and quick.tokens == slow.tokens
    assert quick.finish_reasons == slow.finish_reasons
    assert 0 < quick.statistics.accepted < quick.statistics.drafted
    assert quick.tau > 1.3 and slow.tau == 1


def test_output_carries_what_happened(fast: Any) -> None:
    out = fast.generate("Once", max_new_tokens=30)
    assert len(out.tokens[0]) == len(out.accepted[0]) <= 30
    assert out.statistics.emitted == len(out.tokens[0]) - 1, "the prefill decides the first token"
    assert out.sequences.tolist()[0] == out.prompts[0] + out.tokens[0]
    assert out.tokens_per_second > 0 and out.statistics.draft_seconds > 0 and out.statistics.verify_seconds > 0
    assert out.text == out.texts[0]


def test_streaming_gives_the_same_text_in_pieces(fast: Any) -> None:
    whole = fast.generate(PROMPTS[:2], max_new_tokens=30)
    pieces = list(fast.stream(PROMPTS[:2], max_new_tokens=30))
    for row in range(2):
        assert [piece.token for piece in pieces if piece.row == row] == whole.tokens[row]
        streamed = "".join(piece.text for piece in pieces if piece.row == row)
        assert streamed == whole.texts[row]
        assert [piece.finish_reason for piece in pieces if piece.row == row][-1] == whole.finish_reasons[row]
    assert any(piece.accepted for piece in pieces)


def test_streamed_text_that_ends_within_a_character_is_whole() -> None:
    tokenizer = byte_tokenizer()
    for text, cut in (("a€", 1), ("line\n€", 2), ("€" * 40, 1), ("x" * 200 + "é", 1)):
        tokens = tokenizer(text)["input_ids"][:-cut]
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in tokens]
        assert "�" not in "".join(pieces)
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(tokens)
        assert detokenizer.finish() == ""


def test_transformers_streamers_work(fast: Any, capsys: Any) -> None:
    fast.generate("Once", max_new_tokens=8, streamer=TextStreamer(byte_tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out.strip()


def test_the_same_seed_gives_the_same_sample(fast: Any) -> None:
    first, again, other = (fast.generate("Once", temperature=1.0, seed=s, max_new_tokens=20) for s in (3, 3, 4))
    assert first.tokens == again.tokens != other.tokens


def test_batched_samples_are_those_of_single_rows(fast: Any) -> None:
    together = fast.generate(PROMPTS, temperature=1.0, seed=7, max_new_tokens=20)
    for row, prompt in enumerate(PROMPTS):
        assert fast.generate(prompt, temperature=1.0, seed=7 + row, max_new_tokens=20).tokens[0] == together.tokens[row]


def test_a_stop_string_ends_the_answer_where_plain_decoding_ends_it(fast: Any, plain: Any) -> None:
    text = plain.generate("Once", max_new_tokens=40).text
    stop = text[12:14]
    quick, slow = (model.generate("Once", max_new_tokens=40, stop_strings=stop) for model in (fast, plain))
    assert quick.finish_reasons == ["stop"] and quick.tokens == slow.tokens
    assert stop in quick.text and len(quick.tokens[0]) < 40


def test_the_context_limit_ends_an_answer_with_its_reason(fast: Any) -> None:
    out = fast.generate([5] * 120, max_new_tokens=50, eos_token_id=[])
    assert out.finish_reasons == ["context"] and len(out.tokens[0]) == 8


def test_conversations_go_through_the_chat_template(fast: Any) -> None:
    out = fast.generate([{"role": "user", "content": "hi"}], max_new_tokens=4)
    assert byte_tokenizer().decode(out.prompts[0]) == "<|user|>hi<|end|><|assistant|>"
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    out = fast.generate(begun, max_new_tokens=4)
    assert byte_tokenizer().decode(out.prompts[0]) == "<|user|>hi<|end|><|assistant|>Well,", "its turn goes on"


def test_token_ids_need_no_tokenizer() -> None:
    model = outdraft.load(tiny("gpt2"), method="prompt-lookup", backend="eager")
    out = model.generate([1, 2, 3, 1, 2], max_new_tokens=6)
    assert out.texts is None and len(out.tokens[0]) == 6


def test_sampled_candidates_are_drawn_and_kept(fast: Any) -> None:
    for candidates in ("sampled", "sampled-with-replacement"):
        out = fast.generate("Once", temperature=1.0, seed=1, max_new_tokens=30, candidates=candidates, tree_top_k=2)
        assert 0 < out.statistics.accepted < out.statistics.drafted


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tree_size": 0}, "tree_size must be at least 1"),
        ({"tree_depth": -1}, "tree_depth"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 3, "tree_size": 9}, "give one"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0, "do_sample": True}, "contradicts"),
        ({"temperature": 1, "top_p": 0.0}, "top_p"),
        ({"num_beams": 4}, "beam"),
        ({"guidance_scale": 2.0}, "guidance"),
        ({"tempreature": 1}, "unknown setting 'tempreature'"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"logit_bias": {999: 1.0}}, "999"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {5: "x"}}, "logit_bias"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"bad_words_ids": [["x"]]}, "bad_words_ids"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"max_new_tokens": "x"}, "max_new_tokens"),
        ({"seed": "x"}, "seed"),
        ({"temperature": "x"}, "temperature"),
        ({"temperature": 1, "top_k": 2.5}, "top_k"),
        ({"candidates": "best"}, "candidates"),
        ({"tree_size": "many"}, "tree_size"),
        ({"num_speculative_tokens": 2.5}, "num_speculative_tokens"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"stop_strings": [""]}, "stop string is empty"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(fast: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        fast.generate("Once", **settings)
    assert "\n" not in str(error.value)


def test_logit_bias_takes_the_keys_of_json(fast: Any) -> None:
    plain, named, text = (
        fast.generate("Once", max_new_tokens=4, logit_bias=bias) for bias in ({}, {5: 100.0}, {"5": 100})
    )
    assert named.tokens == text.tokens == [[5] * 4] != plain.tokens


def test_impossible_prompts_are_refused_in_one_line(fast: Any) -> None:
    for prompt, says in (
        ([5] * 128, "context"),
        ("", "empty"),
        ([], "no prompt"),
        ([700], "token 700, the vocabulary"),
        ([-1, 5], "token -1, the vocabulary"),
        (torch.empty(1, 0, dtype=torch.long), "empty"),
        (byte_tokenizer()("Once", return_tensors="pt"), "no dictionary"),
    ):
        with pytest.raises(UserError, match=says):
            fast.generate(prompt, max_new_tokens=5)


def test_no_new_tokens_are_no_work(fast: Any) -> None:
    out = fast.generate("Once", max_new_tokens=0)
    assert out.tokens == [[]] and out.finish_reasons == ["length"]


def test_a_drafter_of_another_target_is_refused(target: Any) -> None:
    for config in (FeatureHeadConfig(48, 48, 4, 2, 8, 260), FeatureHeadConfig(32, 48, 4, 2, 8, 99)):
        with pytest.raises(UserError, match="trained for a target"):
            outdraft.load(target, FeatureHead(config), backend="eager")
    with pytest.raises(UserError, match="share the target's tokenizer"):
        outdraft.load(target, tiny("llama-mha"), backend="eager")


def test_a_drafter_handed_over_stays_as_it_is(target: Any) -> None:
    config = FeatureHeadConfig(target.config.hidden_size, 8, 4, 4, 8, 260)
    head = FeatureHead(config).train()
    assert next(head.parameters()).dtype != target.dtype
    outdraft.load(target, head, backend="eager")
    assert head.training and next(head.parameters()).dtype == torch.float32


# --- transformers' own generate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def custom(target: Any) -> Any:
    return outdraft.custom_generate(perturbed(target, speaking, 0.05))


def left_padded(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


def test_custom_generate_says_what_the_stock_model_says(target: Any, custom: Any) -> None:
    batch = left_padded(byte_tokenizer())
    for settings in (
        {},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 12},
        {"bad_words_ids": [[40], [41, 42]]},
        {"forced_eos_token_id": 7},  # counts the padding
    ):
        stock = target.generate(**batch, max_new_tokens=24, do_sample=False, **settings)
        ours = target.generate(**batch, max_new_tokens=24, do_sample=False, custom_generate=custom, **settings)
        assert torch.equal(stock, ours), settings


def test_custom_generate_obeys_the_global_seed_and_the_warpers(target: Any, custom: Any) -> None:
    batch = byte_tokenizer()("Once", return_tensors="pt")
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(target.generate(**batch, max_new_tokens=20, do_sample=True, custom_generate=custom).tolist())
    assert sampled[0] == sampled[1] != sampled[2]
    narrow = target.generate(**batch, max_new_tokens=20, do_sample=True, top_k=1, custom_generate=custom)
    assert torch.equal(narrow, target.generate(**batch, max_new_tokens=20, do_sample=False))


def test_custom_generate_stops_at_stop_strings(target: Any, custom: Any) -> None:
    tokenizer = byte_tokenizer()
    batch = tokenizer("Once", return_tensors="pt")
    stock = target.generate(**batch, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(stock[0, 8:])
    stop = next(character for character in text if character.isascii() and character.isprintable())
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    settings = {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": criteria}
    ended = target.generate(**batch, **settings)
    assert torch.equal(ended, target.generate(**batch, **settings, custom_generate=custom))
    assert ended.shape[1] < stock.shape[1]


def test_custom_generate_refuses_beams(target: Any, custom: Any) -> None:
    with pytest.raises(UserError, match="beam"):
        target.generate(**byte_tokenizer()("Once", return_tensors="pt"), num_beams=2, custom_generate=custom)


def test_custom_generate_refuses_what_it_cannot_keep(target: Any, custom: Any) -> None:
    batch = left_padded(byte_tokenizer())
    for settings, says in (
        ({"prefix_allowed_tokens_fn": lambda row, ids: [5 + row]}, "tells rows apart"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ):
        with pytest.raises(UserError, match=says):
            target.generate(**batch, max_new_tokens=4, custom_generate=custom, **settings)
    embedded = target.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(UserError, match="inputs_embeds"):
        target.generate(inputs_embeds=embedded, max_new_tokens=4, custom_generate=custom)
