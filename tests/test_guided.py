"""Guided decoding keeps to its grammar and to the target's law under the grammar's masks, whatever tree is drafted.

What a grammar allows is expected from a list of all its texts, never from the library that decoding asks.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import outdraft
from enumeration import ScriptedChance, distance, law_of, sequence_law
from outdraft.api.generation import SpeculativeModel
from outdraft.api.guided import Grammar, GuidedLogitsProcessor, guides
from outdraft.core.coupling import chance_of
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import RowContext
from outdraft.drafting.expand import grow
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.target import named
from outdraft.target.target import Target
from test_losslessness import DRAFTERS, EXACT, finish, small
from tokens import byte_tokenizer, speaking

pytest.importorskip("llguidance", reason="outdraft[guided]")

TEXTS = ["", "a", "b", "c", "ab", "bc", None]
"""Of the small vocabulary: the end token, letters, pairs of them, and one that only the model has."""
END, VOCAB = 0, len(TEXTS)
CHOICES = {"short": ("abc", "ab", "cb"), "long": ("abcab", "bcbc", "b"), "one": ("cab",)}
PROMPT = [1, 2, 3, 1, 2]


@cache
def few_tokens() -> PreTrainedTokenizerFast:
    vocabulary = {"<e>": 0} | {text: i for i, text in enumerate(TEXTS) if text}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<e>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def choice(name: str) -> dict[str, Any]:
    return {"type": "choice", "choice": list(CHOICES[name])}


class Listed(LogitsProcessor):
    """The mask of a list of texts, by looking at each; of the last text left, only the tokenizer's own tokens."""

    def __init__(self, name: str, prompt_length: int):
        self.texts, self.prompt_length = CHOICES[name], prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = input_ids[0, self.prompt_length :].tolist()
        said = "".join(TEXTS[token] or "?" for token in tokens)
        if tokens and tokens[-1] == END:
            return scores
        allowed = [bool(text) and any(one.startswith(said + text) for one in self.texts) for text in TEXTS]
        allowed[END] = said in self.texts
        left = [one[len(said) :] for one in self.texts if one.startswith(said)]
        if len(left) == 1 and left[0]:
            own = few_tokens()(left[0])["input_ids"][0]
            allowed = [token == own for token in range(VOCAB)]
        return scores.masked_fill(~torch.tensor(allowed), -torch.inf)


def processor(name: str, prompt: Sequence[int] = PROMPT) -> LogitsProcessor:
    return guides(choice(name), [prompt], few_tokens(), [END], [END])[0][0]


# --- the law ---------------------------------------------------------------------------------------------------------

SAMPLED = SamplingSettings(temperature=1)
SHAPED = SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.3)
SHAPES = {
    "chain": TreeShape.chain(3),
    "tree": TreeShape(2, 3, 9),
    "drawn": TreeShape(1, 2, 5, "sampled"),
    "drawn again": TreeShape(1, 2, 5, "sampled-with-replacement"),
}


def expected(
    name: str, settings: SamplingSettings, prompt: Sequence[int] = PROMPT, length: int = 6
) -> dict[Any, float]:
    model = small(VOCAB)[0]
    warper = Warper(settings, len(prompt), VOCAB, [END], [Listed(name, len(prompt))])

    @torch.inference_mode()
    def next_law(path: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([*prompt, *path])
        return warper.probs_after(model(ids[None], use_cache=False).logits[0, -1], ids)

    return sequence_law(next_law, length, frozenset([END]))  # type: ignore[return-value]


def row(name: str, settings: SamplingSettings, chance: Any, prompt: Sequence[int] = PROMPT, length: int = 6) -> Row:
    warper = Warper(settings, len(prompt), VOCAB, [END], [processor(name, prompt)])
    return Row(list(prompt), warper, chance, length, frozenset([END]))


@pytest.mark.parametrize("settings", [SamplingSettings(), SAMPLED, SHAPED], ids=["greedy", "plain", "shaped"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["draft-model", "fspad", "eagle3", "prompt-lookup"])
def test_texts_have_the_law_of_plain_decoding_under_the_masks(kind, name, shape, settings):
    if kind == "prompt-lookup" and shape.candidates != "top-k":
        pytest.skip("it draws no candidates")
    if kind == "eagle3" and shape.candidates != "top-k":
        pytest.skip("it stands for a vocabulary of its own, which only chosen candidates see")
    if shape.candidates == "sampled-with-replacement" and settings is SAMPLED:
        pytest.skip("minutes of branches; the other settings walk fewer")
    model, near = small(VOCAB)
    target = Target(model)
    drafter, accepted = DRAFTERS[kind](target, near), []

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        (done,) = finish(target, drafter, [row(name, settings, new_chance())], shape)
        accepted.append(done.statistics.accepted)
        assert done.error is None
        return tuple(done.tokens)

    law = law_of(run)
    assert distance(law, expected(name, settings)) < EXACT
    assert sum(accepted) > 0 or settings is not SAMPLED or kind != "draft-model" or name == "one"


@pytest.mark.parametrize("kind", ["draft-model", "prompt-lookup"])
def test_each_row_of_a_batch_keeps_to_its_own_grammar(kind):
    model, near = small(VOCAB)
    target = Target(model)
    drafter, other = DRAFTERS[kind](target, near), [3, 3]

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[tuple[int, ...], ...]:
        rows = [row("short", SAMPLED, new_chance(), length=3), row("one", SHAPED, new_chance(), other, length=3)]
        return tuple(tuple(done.tokens) for done in finish(target, drafter, rows, TreeShape(1, 2, 5)))

    first, second = expected("short", SAMPLED, length=3), expected("one", SHAPED, other, length=3)
    product = {(a, b): p * q for a, p in first.items() for b, q in second.items()}
    assert distance(law_of(run), product) < EXACT


# --- the same texts --------------------------------------------------------------------------------------------------


@cache
def spelling(drafted: bool) -> SpeculativeModel:
    model, near = small(VOCAB)
    return outdraft.load(model, near if drafted else None, tokenizer=few_tokens(), backend="eager")


WAYS: list[dict[str, Any]] = [
    {"num_speculative_tokens": 3},
    {"tree_depth": 2, "tree_top_k": 3, "tree_size": 9},
    {"tree_depth": 2, "tree_top_k": 3, "tree_size": 9, "temperature": 0.8},
    {"num_speculative_tokens": 3, "temperature": 1.3, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("drafted", [False, True], ids=["lookup", "draft-model"])
def test_a_seed_gives_the_text_of_stock_generate_under_the_masks(drafted, settings):
    model, seen = small(VOCAB)[0], set()
    drawing = {name: settings[name] for name in ("temperature", "repetition_penalty") if name in settings}
    for name in CHOICES:
        for seed in range(6):
            torch.manual_seed(seed)
            ids = torch.tensor([PROMPT])
            stock = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample="temperature" in drawing,
                logits_processor=[Listed(name, len(PROMPT))],
                max_new_tokens=8,
                eos_token_id=END,
                pad_token_id=END,
                **drawing,
            )[0, len(PROMPT) :]
            said = spelling(drafted).generate(
                PROMPT, eos_token_id=END, seed=seed, max_new_tokens=8, response_format=choice(name), **settings
            )
            assert said.tokens[0] == stock.tolist() and said.text in CHOICES[name]
            seen.add(said.text)
    assert len(seen) > 3 or not drawing, "chance decides"


def test_rows_with_grammars_of_their_own_are_as_alone():
    model, formats = spelling(True), [choice("short"), None, choice("long"), {"type": "text"}]
    prompts: list[Any] = [PROMPT, [1, 2], [3], [2, 2]]
    settings: dict[str, Any] = {"eos_token_id": END, "max_new_tokens": 8, "tree_depth": 2, "temperature": 1.0}
    together = model.generate(prompts, response_format=formats, seed=3, **settings)
    for place, (prompt, one) in enumerate(zip(prompts, formats, strict=True)):
        alone = model.generate(prompt, response_format=one, seed=3 + place, **settings)
        assert together.tokens[place] == alone.tokens[0]
    streamed = "".join(piece.text for piece in model.stream(prompts[0], response_format=formats[0], seed=3, **settings))
    assert streamed == together.texts[0] and streamed in CHOICES["short"]


# --- masks -----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["new", "old"]},
        "n": {"type": "integer"},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
FORMATS = [
    JSON,
    {"type": "json_object"},
    {"type": "regex", "regex": "(ab|a)*c?[0-9]{2,4}"},
    {"type": "grammar", "grammar": 'start: "x" start "z" | "y"+'},
]


def guided(response_format: Any, prompt: Sequence[int] = ()) -> GuidedLogitsProcessor:
    return guides(response_format, [prompt], byte_tokenizer(), [0], [0])[0][0]  # type: ignore[return-value]


@pytest.mark.parametrize("response_format", FORMATS, ids=lambda one: one["type"])
def test_a_mask_does_not_depend_on_what_was_asked_before(response_format):
    walker, rng, nodes, ruled_out = guided(response_format), random.Random(1), [[]], 0
    grammar: Grammar = walker.grammar
    for _ in range(400):
        node = rng.choice(nodes[-20:])
        found, fresh = walker.mask(node), grammar.processor(0).mask(node)
        ruled_out += found is None
        assert (found is None) == (fresh is None)
        if found is not None and fresh is not None:
            assert found.any() and (found == fresh).all()
            allowed = found.nonzero()[0].tolist()
            nodes += [[*node, rng.choice(allowed) if rng.random() < 0.9 else rng.randrange(260)] for _ in range(2)]
    assert 0 < ruled_out < 380 and max(map(len, nodes)) > 4


def test_masks_are_those_of_the_listed_texts():
    rng = random.Random(2)
    for name in CHOICES:
        ours, listed = processor(name), Listed(name, len(PROMPT))
        for _ in range(60):
            path = [rng.randrange(1, VOCAB - 1) for _ in range(rng.randrange(4))]
            scores, ids = torch.randn(1, VOCAB), torch.tensor([[*PROMPT, *path]])
            expected = listed(ids, scores)
            if expected.isinf().all():  # not a beginning of any text: nothing is decided there
                expected = scores
            assert torch.equal(ours(ids, scores), expected)


def test_rows_of_a_batch_of_prefixes_are_masked_each():
    walker = guided(JSON, [5, 5])
    ids = torch.tensor([[5, 5, *byte_tokenizer()('{"')["input_ids"]], [5, 5, *byte_tokenizer()("no")["input_ids"]]])
    masked = walker(ids, torch.zeros(2, 261))
    assert masked[0].isfinite().sum() == 1 and masked[0, 260] == -torch.inf
    assert masked[1].isfinite().all()


@pytest.mark.parametrize("settings", [SamplingSettings(), SAMPLED], ids=["greedy", "noise"])
@pytest.mark.parametrize("name", CHOICES)
def test_drafts_keep_to_the_grammar(name, settings):
    """A chain of a drafter that would say anything else; below the end token it may."""
    walker = processor(name)
    warper = Warper(settings, len(PROMPT), VOCAB, [END], [walker])
    texts = set()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        chance = Dice(seed) if settings.temperature == 0 else chance_of(warper, VOCAB, torch.device("cpu"), seed, [])
        rows = RowContext([torch.tensor(PROMPT)], [warper], [chance])

        def step(tokens: torch.Tensor, above: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*tokens.shape, VOCAB, generator=generator)

        logits = torch.randn(1, VOCAB, generator=generator)
        tree = grow(torch.tensor(PROMPT[-1:]), logits, step, TreeShape.chain(6), rows)
        drafted = tree.tokens[0, 1:].tolist()
        assert END in drafted, "the texts are short"
        texts.add("".join(str(TEXTS[token]) for token in drafted[: drafted.index(END)]))
    assert texts <= set(CHOICES[name]) and (len(texts) > 1 or name == "one")


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker() -> SpeculativeModel:
    return outdraft.load(speaking(max_position_embeddings=512), tokenizer=byte_tokenizer(), backend="eager")


class Thing(BaseModel):
    name: str
    count: int


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 2.0, "seed": 5, "top_k": 50}]
)
def test_whatever_a_random_model_says_follows_the_schema(speaker, settings):
    said = speaker.generate(["one", "two"], max_new_tokens=300, response_format=JSON, **settings)
    for text, reason in zip(said.texts, said.finish_reasons, strict=True):
        if reason == "eos":
            thing = json.loads(text)
            assert thing["kind"] in ("new", "old") and len(thing["name"]) <= 6
        else:
            assert reason == "length" and text.lstrip().startswith("{")
    told = speaker.generate("x", response_format={"type": "choice", "choice": ['né "e"', "日本"]}, **settings)
    assert told.text in ('né "e"', "日本")
    (digits,) = speaker.generate("x", response_format={"type": "regex", "regex": "[0-9]{3}"}, **settings).texts
    assert len(digits) == 3 and digits.isdigit()


def test_a_pydantic_model_is_a_schema(speaker):
    text = speaker.generate("x", response_format=Thing, max_new_tokens=9).text
    assert '{"name":'.startswith("".join(text.split())[:8])


def test_further_end_tokens_that_are_letters_stay_letters(speaker):
    closing = byte_tokenizer().convert_tokens_to_ids("}")
    said = speaker.generate(
        "x", eos_token_id=[0, closing], response_format={"type": "regex", "regex": r"a\}b"}, max_new_tokens=9
    )
    assert said.text == "a}" and said.finish_reasons == ["eos"]


UNKNOWN = {
    "not": {"not": {}},
    "uniqueItems": {"type": "object", "properties": {"k": {"type": "array", "uniqueItems": True}}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
}


@pytest.mark.parametrize(
    ("response_format", "said"),
    [
        ("json", "type is one of"),
        ({"type": "xml"}, "type is one of"),
        ({"type": "json_object", "schema": {}}, "has no 'schema'"),
        ({"type": "json_schema"}, "needs json_schema"),
        *(
            ({"type": "json_schema", "json_schema": {"schema": schema}}, rf'keys: \["{key}"\]; leave them out')
            for key, schema in UNKNOWN.items()
        ),
        ({"type": "json_schema", "json_schema": {"schema": "{"}}, "no JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": True, "more": 1}}, "has no 'more'"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "http://localhost/x"}}}, "not present"),
        ({"type": "regex", "regex": "("}, "unclosed group"),
        ({"type": "choice", "choice": []}, "a list of texts"),
        ({"type": "grammar", "grammar": 3}, "a text"),
        ([JSON, JSON], "2 formats for 1 prompts"),
    ],
    ids=str,
)
def test_a_format_that_cannot_be_followed_is_refused(speaker, response_format, said):
    with pytest.raises(UserError, match=said) as refusal:
        speaker.generate("x", response_format=response_format)
    assert "\n" not in str(refusal.value)


def test_what_is_missing_is_named(speaker, monkeypatch):
    with pytest.raises(UserError, match="eos_token_id"):
        speaker.generate("x", response_format=JSON, eos_token_id=[70])
    with pytest.raises(UserError, match="tokenizer="):
        SpeculativeModel(Target(small(VOCAB)[0])).generate([1], response_format=JSON)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'outdraft\[guided\]'"):
        speaker.generate("x", response_format=JSON)
    speaker.generate("x", max_new_tokens=2)  # which needs nothing of it


def test_every_answer_of_a_real_model_parses():
    if importlib.util.find_spec(named.PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"SmolLM2 needs {named.PACKAGE} and gguf")
    model = outdraft.load("smollm2", "smollm2", dtype="float32")
    chats = [[{"role": "user", "content": f"Describe a {what} as JSON."}] for what in ("dog", "town", "song")]
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["big", "small"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": " "},
    }
    response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    for settings in ({}, {"temperature": 1.0, "seed": 1, "coupling": "dice"}):
        said = model.generate(chats, response_format=response_format, max_new_tokens=60, **settings)
        for text in said.texts:
            thing = json.loads(text)
            assert thing.keys() == {"name", "kind"} and len(thing["name"]) <= 12 and thing["kind"] in ("big", "small")
        assert said.statistics.accepted > 0
    plain = model.with_drafter(None).generate(chats, response_format=response_format, max_new_tokens=60)
    assert plain.tokens == model.generate(chats, response_format=response_format, max_new_tokens=60).tokens
