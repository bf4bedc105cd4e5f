"""Text that comes token by token is the whole text, for every type of tokenizer and wherever it is cut."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from outdraft.api.output import Piece
from outdraft.console.generate import stream
from outdraft.data.text import Detokenizer, answer_text, bytes_of, prompt_text, stops_at
from outdraft.serving.jobs import AnswerText
from tokenizers_of_all_types import ALL, END

TEXTS = st.text(
    alphabet="abct nsdo.,!?'<>think\n\t éß中文国\U0001f600\U0001f468\u200d\u0301\u2028\u00a0\ufffd", max_size=60
) | st.sampled_from(
    [
        "中文" * 30,
        "don ' t 's 've n't 'm",
        "  lead   in",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 9,
        "é" * 70 + "中" * 30 + "été é",
        "<think> a cat <l> c  中文é<think>at<l>",
    ]
)
KINDS = pytest.mark.parametrize("tokenizer", [ALL[name]() for name in ALL], ids=list(ALL))


def streamed(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    return "".join([detokenizer.add(token) for token in tokens] + [detokenizer.finish()])


def served(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    answer, pieces = AnswerText(tokenizer, prompt=prompt), []
    for count in range(1, len(tokens) + 1):
        answer.take(tokens[:count], [False] * count)
        pieces += answer.release()
    answer.finish()
    assert answer.starts == sorted(answer.starts) and all(start <= len(answer.text) for start in answer.starts)
    return "".join(piece.text for piece in [*pieces, *answer.release()])


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@KINDS
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, cut=st.integers(0, 3))
def test_pieces_of_a_text_add_up_to_it(tokenizer: Any, text: str, cut: int) -> None:
    tokens = ids(tokenizer, text)
    tokens = tokens[: max(0, len(tokens) - cut)]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert streamed(tokenizer, tokens) == served(tokenizer, tokens) == answer_text(tokenizer, [], tokens) == whole


@KINDS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_their_text(tokenizer: Any, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=120))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


@KINDS
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS.filter(str.strip), text=TEXTS)
def test_an_answer_goes_on_where_its_prompt_ended(tokenizer: Any, prompt: str, text: str) -> None:
    before, tokens = ids(tokenizer, prompt), ids(tokenizer, text)
    whole, begun = (tokenizer.decode(some, skip_special_tokens=True) for some in (before + tokens, before))
    if (begun.endswith("\ufffd") and not prompt.endswith("\ufffd")) or not whole.startswith(begun):
        return  # bytes that are no text, or the answer's first mark takes a space from the prompt (clean-up)
    assert begun + streamed(tokenizer, tokens, before) == begun + answer_text(tokenizer, before, tokens) == whole


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "byte fallback", "byte fallback, prefix space"])
def test_of_a_character_in_two_the_answer_has_the_whole(kind: str) -> None:
    tokenizer: Any = ALL[kind]()
    tokens = ids(tokenizer, "a \ufffd\U0001f989")  # no token is the owl
    for cut in range(1, len(tokens)):
        shown = prompt_text(tokenizer, tokens[:cut])
        assert shown + streamed(tokenizer, tokens[cut:], tokens[:cut]) == "a \ufffd\U0001f989"


@KINDS
def test_nothing_before_a_special_token_lends_a_space(tokenizer: Any) -> None:
    prompt, tokens = [*ids(tokenizer, "a cat"), tokenizer.eos_token_id], ids(tokenizer, "a cat")
    assert answer_text(tokenizer, prompt, tokens) == tokenizer.decode(tokens)


@KINDS
def test_text_does_not_wait_for_long(tokenizer: Any) -> None:
    """A word is handed out with the token after it at the latest."""
    tokens, detokenizer, given_out = ids(tokenizer, "a cat a cat a cat a cat"), Detokenizer(tokenizer), ""
    for count, token in enumerate(tokens, start=1):
        given_out += detokenizer.add(token)
        assert len(given_out) >= len(tokenizer.decode(tokens[: count - 1]).rstrip()) - 2


@KINDS
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, data=st.data())
def test_a_stop_string_is_found_with_the_token_that_completes_it(
    tokenizer: Any, text: str, data: st.DataObject
) -> None:
    tokens = ids(tokenizer, text)
    whole = tokenizer.decode(tokens)
    if not whole or "\ufffd" in whole or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 3))]
    first = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    offline, answer = stops_at([stop], tokenizer), AnswerText(tokenizer, [stop])
    ends = []
    for count in range(1, len(tokens) + 1):
        found = offline(tokens[:count]), answer.take(tokens[:count], [False] * count)
        assert found[0] == found[1], "one rule"
        if found[0]:
            ends.append(count)
            break
    assert ends == [first]
    assert answer.text == whole[: whole.index(stop)]


@KINDS
def test_special_tokens_are_stop_strings_and_no_text(tokenizer: Any) -> None:
    tokens = [*ids(tokenizer, "a cat"), tokenizer.eos_token_id, *ids(tokenizer, "a")]
    text = tokenizer.decode(ids(tokenizer, "a cat"))
    for stop, expected in ((END, text), (text[-1] + END, text[:-1])):
        answer, offline = AnswerText(tokenizer, [stop]), stops_at([stop], tokenizer)
        count = next(n for n in range(1, len(tokens) + 1) if answer.take(tokens[:n], [False] * n))
        assert (
            count
            == next(n for n in range(1, len(tokens) + 1) if offline(tokens[:n]))
            == len(tokens) - len(ids(tokenizer, "a"))
        )
        assert answer.text == expected
    ended = AnswerText(tokenizer)
    ended.take(tokens[: len(ids(tokenizer, "a cat")) + 1], [False] * 99)
    ended.finish()
    assert ended.text == text


@KINDS
def test_special_tokens_are_text_where_none_is_hidden(tokenizer: Any) -> None:
    tokens = [*ids(tokenizer, "a cat"), tokenizer.eos_token_id, *ids(tokenizer, "a cat")]
    whole = tokenizer.decode(tokens)
    assert END in whole
    for hidden, expected in ((frozenset(), whole), (frozenset({tokenizer.eos_token_id}), whole.replace(END, ""))):
        answer, pieces = AnswerText(tokenizer, hidden=hidden), []
        for count in range(1, len(tokens) + 1):
            answer.take(tokens[:count], [False] * count)
            pieces += answer.release()
        answer.finish()
        said = "".join(piece.text for piece in [*pieces, *answer.release()])
        assert said.replace(" ", "") == expected.replace(" ", "") and (hidden or said == expected)
    stopped = AnswerText(tokenizer, [END], hidden=frozenset())
    assert stopped.take(tokens, [False] * len(tokens)) and stopped.text == whole[: whole.index(END)]


@KINDS
@settings(max_examples=40, deadline=None)
@given(text=TEXTS.filter(bool))
def test_bytes_of_tokens_are_their_own(tokenizer: Any, text: str) -> None:
    detokenizer, tokens, names, own = Detokenizer(tokenizer), ids(tokenizer, text), [], []
    for token in tokens:
        names.append(detokenizer.peek(token))
        own.append(bytes_of(tokenizer, token, names[-1]))
        detokenizer.add(token)
    whole = tokenizer.decode(tokens)
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return  # a mark takes a space from the token before it
    assert b"".join(own).decode("utf-8", "replace") == whole
    if "\ufffd" not in whole:
        assert "".join(names) == whole


def test_bytes_of_a_special_token_are_those_of_its_text() -> None:
    for make in ALL.values():
        assert bytes_of(make(), make().eos_token_id, END) == END.encode()


def test_the_terminal_shows_text_as_it_is() -> None:
    text = "\ta\tb :smile: [bold] x\r\n"
    for show_drafts in (False, True):
        shown = io.StringIO()
        pieces = [Piece(0, 1, letter, False, None) for letter in text]
        assert stream(pieces, Console(file=shown, width=20, soft_wrap=True), show_drafts).text == text
        assert shown.getvalue() == text + "\n"
    guessed, shown = [Piece(0, 1, ":smile: [bold]", True, None)], io.StringIO()
    stream(guessed, Console(file=shown), True)
    assert shown.getvalue() == ":smile: [bold]\n"
