"""Streamed text is the whole text, piece by piece, and never shows what a stop string cuts off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outdraft.serving.jobs import AnswerText
from training.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def streamed(text: str, stops: list[str], steps: list[int]) -> tuple[AnswerText, list[str]]:
    """The text's tokens, so many at a time, and what was handed out after each of them."""
    tokens = TOKENIZER(text)["input_ids"]
    answer, pieces, end = AnswerText(TOKENIZER, stops), [], 0
    for step in [*steps, len(tokens)]:
        end = min(len(tokens), end + step)
        stopped = answer.take(tokens[:end], [place % 2 == 0 for place in range(end)])
        pieces += [piece.text for piece in answer.release()]
        if stopped:
            break
    answer.finish()
    return answer, pieces + [piece.text for piece in answer.release()]


TEXTS = st.text(alphabet="abSTOP é世\n", max_size=30)


@given(TEXTS, st.lists(st.text(alphabet="abSTOP", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 4)))
def test_pieces_are_the_text_up_to_the_first_stop_string(text: str, stops: list[str], steps: list[int]) -> None:
    answer, pieces = streamed(text, stops, steps)
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    expected = text[: min(ends)] if ends else text
    # Where two stop strings overlap, the one that is complete first ends the answer.
    if len(ends) > 1:
        first = min(place + len(stop) for stop in stops if (place := text.find(stop)) >= 0)
        whole = text[:first]
        expected = whole[: min(place for stop in stops if (place := whole.find(stop)) >= 0)]
    assert "".join(pieces) == answer.text == expected


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back() -> None:
    answer = AnswerText(TOKENIZER, ["END"])
    tokens = TOKENIZER("a ENemy END b")["input_ids"]
    said = []
    for count in range(1, len(tokens) + 1):
        if answer.take(tokens[:count], [False] * count):
            break
        said.append("".join(piece.text for piece in answer.release()))
    assert said[2] == "" and said[3] == "" and said[4] == "ENe", "held until it is no stop string"
    assert answer.stopped and count == len("a ENemy END")
    answer.finish()
    assert "".join(said) + "".join(piece.text for piece in answer.release()) == "a ENemy "


def test_pieces_say_whose_guess_they_were() -> None:
    answer = AnswerText(TOKENIZER)
    tokens = TOKENIZER("abcd")["input_ids"]
    answer.take(tokens, [True, False, True, True], [False, False, True, False])
    pieces = answer.release()
    assert [piece[:2] for piece in pieces] == [("a", True), ("b", False), ("c", True), ("d", True)]
    assert [piece.source for piece in pieces] == ["drafter", None, "ngram", "drafter"]
    assert answer.starts == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", [1, 2])
def test_an_unfinished_character_appears_at_the_end_only(cut: int) -> None:
    tokens = TOKENIZER("a世")["input_ids"][: 1 + cut]
    answer = AnswerText(TOKENIZER)
    answer.take(tokens, [False] * len(tokens))
    assert [piece.text for piece in answer.release()] == ["a"]
    answer.finish()
    assert [piece.text for piece in answer.release()] == ["�"]
