"""Which tokens carry loss."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from outdraft.api.prompts import encode_chat
from outdraft.data.conversations import Conversation
from outdraft.data.tokenization import Example, tokenize
from outdraft.errors import UserError

from .tiny import CHATML, byte_tokenizer

TWO_TURNS = Conversation(
    "data:1",
    messages=(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Grüß"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ok"},
    ),
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
FORGETFUL = (  # earlier answers lose what they said, as reasoning templates do
    "{% for m in messages %}[{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}"
    "{% endif %}]{% endfor %}"
)
TRIMMING = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
REVERSED = "{% for m in messages | reverse %}{{ m['content'] }};{% endfor %}"


def responses(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Text of each run of masked tokens."""
    runs: list[list[int]] = []
    before = False
    for token, masked in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if masked:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = masked
    return [tokenizer.decode(run) for run in runs]


def marked(template: str | None, conversations: Sequence[Conversation] = (TWO_TURNS,), length: int = 999) -> list[str]:
    tokenizer = byte_tokenizer(template)
    found = tokenize(conversations, tokenizer, length)
    return [text for example in found.examples for text in responses(example, tokenizer)]


def test_only_the_answers_and_their_end_tokens_carry_loss() -> None:
    assert marked(CHATML) == ["Grüß<|im_end|>", "ok<|im_end|>"]


def test_the_template_s_switches_stand_in_every_rendering() -> None:
    """In those, too, by which the answers are found."""
    tokenizer = byte_tokenizer("{{ mood }}" + CHATML)
    found = tokenize([TWO_TURNS], tokenizer, 999, {"mood": "calm"})
    assert tokenizer.decode(found[0].input_ids).startswith("calm<|im_start|>")
    assert responses(found[0], tokenizer) == ["Grüß<|im_end|>", "ok<|im_end|>"] and not found.unmarked_turns


CUT = Conversation("data:1", messages=TWO_TURNS.messages, cut=frozenset({3}))
BOTH_CUT = Conversation("data:1", messages=TWO_TURNS.messages, cut=frozenset({1, 3}))
TWO_ENDS = MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|><|im_end|>\n{% endgeneration %}")


@pytest.mark.parametrize("template", [CHATML, MARKED, TWO_ENDS], ids=["prefixes", "marks", "two ends"])
def test_no_end_token_is_learned_after_an_answer_that_was_cut_off(template: str) -> None:
    whole = marked(template)
    assert whole[0].startswith("Grüß<|im_end|>") and whole[1].startswith("ok<|im_end|>")
    assert marked(template, [CUT]) == [whole[0], "ok"]
    assert marked(template, [BOTH_CUT]) == ["Grüß", "ok"]


def test_an_end_without_special_tokens_is_left_out_as_well() -> None:
    assert marked(TRIMMING, [BOTH_CUT]) == ["(Grüß", "(ok"]


def test_ids_do_not_depend_on_whether_an_answer_was_cut_off() -> None:
    tokenizer = byte_tokenizer()
    assert tokenize([CUT], tokenizer, 999)[0].input_ids.equal(tokenize([TWO_TURNS], tokenizer, 999)[0].input_ids)


def test_an_end_that_the_tokenizer_adds_to_a_text_counts_only_if_the_text_ended() -> None:
    class Ending:
        """Ends every text, as some tokenizers do."""

        eos_token_id = 2

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [7, 8, 9, 2]}

    ended, cut = Conversation("data:1", text="x"), Conversation("data:1", text="x", cut=frozenset({0}))
    masks = [tokenize([one], Ending(), 99)[0].loss_mask.tolist() for one in (ended, cut)]
    assert masks == [[True] * 4, [True, True, True, False]]


def test_generation_marks_of_the_template_are_used() -> None:
    assert marked(MARKED) == ["Grüß<|im_end|>", "ok<|im_end|>"]


def test_ids_are_those_of_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    example = tokenize([TWO_TURNS], tokenizer, 999)[0]
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(list(TWO_TURNS.messages))["input_ids"]


def test_an_end_token_written_by_the_next_turn_belongs_to_the_answer() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% if not loop.first %}{{ eos_token }}\n{% endif %}U: "
        "{{ m['content'] }}\n{% else %}B: {{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}B:{% endif %}"
    )
    assert marked(template) == [" Grüß<|im_end|>", " ok"]


def test_turns_that_the_template_rewrites_later_carry_no_loss_and_are_counted() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    found = tokenize([TWO_TURNS], tokenizer, 999)
    assert responses(found[0], tokenizer) == ["[ok]"]
    assert found.unmarked_turns == 1


def test_a_generation_prompt_that_finished_turns_lack_is_left_out() -> None:
    assert marked(TRIMMING) == ["(Grüß)", "(ok)"]


def test_an_end_after_the_last_turn_hides_no_earlier_one() -> None:
    """Phi-3's template ends whole conversations, so those of its beginnings with an end that the whole lacks."""
    assert marked(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}") == [
        "Grüß<|im_end|>",
        "ok<|im_end|>",
    ]


def test_a_template_that_reads_parts_alone_is_given_parts() -> None:
    """As those of SmolVLM and Idefics do, which show nothing of a content that is a plain text."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    assert marked(template) == ["Grüß<|im_end|>", "ok<|im_end|>"]
    tokenizer = byte_tokenizer(template)
    for content in ("red cat", [{"type": "text", "text": "red cat"}]):
        ids = encode_chat([{"role": "user", "content": content}], tokenizer)
        assert tokenizer.decode(ids) == "u:red cat<|im_end|>a:"


def test_a_template_that_hides_the_answers_is_refused() -> None:
    with pytest.raises(UserError, match=r"add \{% generation %\} marks"):
        marked(REVERSED)


def test_chats_without_a_template_are_refused_with_the_fix() -> None:
    with pytest.raises(UserError, match=r"data:1 is a conversation.*no chat template.*add one"):
        marked(None)


AGENT = Conversation(
    "data:2",
    messages=(
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "1+2"},
        {"role": "user", "content": "please"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ),
    tools=({"name": "add"},),
)
CALLING = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
).replace("{% for m", "{% if tools %}{{ tools | tojson }}{% endif %}{% for m", 1)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


def test_every_turn_of_an_agents_assistant_carries_loss_and_no_tool_or_user() -> None:
    call = '{"name": "add", "arguments": {"a": 1}}<|im_end|>'
    assert marked(CALLING, [AGENT]) == ["hello<|im_end|>", call, "three<|im_end|>"]
    text = byte_tokenizer(CALLING).decode(tokenize([AGENT], byte_tokenizer(CALLING), 999)[0].input_ids)
    assert text.startswith('[{"name": "add"}]<|im_start|>assistant\nhello')


def test_a_first_turn_of_the_assistants_is_told_from_a_system_turn_of_the_templates() -> None:
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if loop.first %}SYSTEM<|im_end|>{% endif %}"
    )
    begun = Conversation("data:1", messages=(TWO_TURNS.messages[1], *TWO_TURNS.messages))
    assert marked(template, [begun]) == ["Grüß<|im_end|>"] * 2 + ["ok<|im_end|>"]
    bare = template.replace("<|im_start|>assistant\n", "")
    assert marked(bare, [begun])[0] != "SYSTEM<|im_end|>"


def test_what_the_template_refuses_is_left_out_counted_and_named() -> None:
    found = tokenize([TWO_TURNS, AGENT, TWO_TURNS], byte_tokenizer(STRICT), 999)
    assert len(found) == 2
    (line,) = found.refused
    assert line.startswith("data:2: the chat template refuses a conversation with roles assistant, user, user")
    assert line.endswith("roles must alternate")
    with pytest.raises(UserError, match=r"1 conversations are refused, first data:2: .*must alternate"):
        tokenize([AGENT], byte_tokenizer(STRICT), 999)


def test_answers_that_were_cut_off_are_counted() -> None:
    found = tokenize(
        [CUT, BOTH_CUT, TWO_TURNS, Conversation("data:3", text="once", cut=frozenset({0}))], byte_tokenizer(), 999
    )
    assert found.cut_answers == 4


def untrained(*places: int) -> Conversation:
    return Conversation("data:1", messages=TWO_TURNS.messages, untrained=frozenset(places))


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_of_weight_0_are_read_and_not_learned(template: str) -> None:
    assert marked(template, [untrained(1)]) == ["ok<|im_end|>"]
    assert marked(template, [untrained(3)]) == ["Grüß<|im_end|>"]
    tokenizer = byte_tokenizer(template)
    found = tokenize([untrained(1), untrained(1, 3), TWO_TURNS], tokenizer, 999)
    assert (found.untrained, found.unmarked_turns, found.without_response) == (3, 0, 1)
    assert found[0].input_ids.equal(found[1].input_ids), "the ids are those of the whole conversation"
    with pytest.raises(UserError, match="all 2 answers have weight 0"):
        tokenize([untrained(1, 3)], tokenizer, 999)


def test_texts_need_no_template_and_carry_loss_everywhere() -> None:
    assert marked(None, [Conversation("data:1", text="once upon")]) == ["once upon"]


def test_long_examples_are_cut_and_those_without_an_answer_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer()
    silent = Conversation("data:2", messages=({"role": "user", "content": "hello?"},))
    start = len(tokenizer.apply_chat_template(list(TWO_TURNS.messages[:1]), add_generation_prompt=True)["input_ids"])
    found = tokenize([silent, TWO_TURNS], tokenizer, start + 2)
    assert (len(found), found.truncated, found.without_response) == (1, 1, 1)
    assert len(found[0]) == start + 2 and found[0].loss_mask.sum() == 2
    with pytest.raises(UserError, match="raise --max-length"):
        tokenize([TWO_TURNS], tokenizer, start)


def test_slow_tokenizers_are_marked_piece_by_piece() -> None:
    class Slow:
        """The same tokenizer without character offsets."""

        def __init__(self, inner: PreTrainedTokenizerFast):
            self.inner, self.is_fast = inner, False
            self.chat_template, self.eos_token_id = inner.chat_template, inner.eos_token_id
            self.apply_chat_template = inner.apply_chat_template

        def __call__(self, text: str, **settings: object) -> object:
            assert "return_offsets_mapping" not in settings
            return self.inner(text, **settings)

    fast = byte_tokenizer()
    slow, expected = tokenize([TWO_TURNS], Slow(fast), 999)[0], tokenize([TWO_TURNS], fast, 999)[0]
    assert slow.input_ids.equal(expected.input_ids) and slow.loss_mask.equal(expected.loss_mask)
