"""Guided decoding: the text of an answer follows a JSON schema, a regular expression, a list of choices or a grammar.

`llguidance` says which tokens may follow a text. A `Grammar` is compiled once for a tokenizer; each row gets a logits
processor of it, which is a pure function of the tokens before a node: its matcher stands behind the last node that was
asked for, and moves to the next one by a rollback to their common prefix. So a tree costs a few steps of the matcher a
node, and the texts are those of plain decoding under the same masks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from outdraft.data.text import common_length, special_ids
from outdraft.errors import UserError, first_line

FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")
"""What the `type` of a `response_format` may be."""

JSON_OPTIONS = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}
"""Without a bound, a model that is barred from all that it would say may write spaces until its tokens are spent."""


def guides(
    formats: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    ends: Iterable[int],
    own_ends: Iterable[int],
) -> list[list[LogitsProcessor]]:
    """The logits processors that guide every row; none where the row's text is free.

    Raises:
        UserError: a format is unknown or cannot be compiled, or there is no tokenizer or no end token.
    """
    each = list(formats) if isinstance(formats, list | tuple) else [formats] * len(prompts)
    if len(each) != len(prompts):
        raise UserError(f"response_format lists {len(each)} formats for {len(prompts)} prompts; give one for each")
    sources = [source_of(one) for one in each]
    if not any(sources):
        return [[] for _ in prompts]
    vocabulary = Vocabulary(tokenizer, ends, own_ends)
    made = {source: Grammar(source, vocabulary) for source in set(sources) if source is not None}
    return [
        [] if source is None else [made[source].processor(len(prompt))]
        for source, prompt in zip(sources, prompts, strict=True)
    ]


def source_of(response_format: Any) -> str | None:
    """A `response_format` as a grammar in the library's own words; None for free text.

    Args:
        response_format: as in OpenAI's API, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema":
            {"schema": ...}}`, or `{"type": T, T: ...}` for `regex`, `choice` (a list of texts) and `grammar` (Lark);
            or a pydantic model's class.

    Raises:
        UserError: it is none of these.
    """
    if response_format is None:
        return None
    if hasattr(response_format, "model_json_schema"):
        response_format = {"type": "json_schema", "json_schema": {"schema": response_format.model_json_schema()}}
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in FORMATS:
        raise UserError(f"response_format must be a dictionary whose type is one of {', '.join(FORMATS)}")
    unknown = sorted(set(response_format) - {"type", kind})
    if unknown:
        raise UserError(f"response_format of type {kind} has no '{unknown[0]}'")
    if kind == "text":
        return None
    given, matcher = response_format.get(kind), _library().LLMatcher
    if kind == "json_object":
        given = {"type": "object"}
    elif kind == "json_schema":
        given = _schema(given)
    if kind.startswith("json"):
        try:
            return str(matcher.grammar_from_json_schema({"x-guidance": JSON_OPTIONS, **given}))
        except (ValueError, RecursionError) as error:
            raise UserError(f"the JSON schema cannot be read: {first_line(error)}") from error
    if kind == "choice":
        if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str) and one for one in given):
            raise UserError("response_format of type choice needs choice, a list of texts")
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in given)))
    if not isinstance(given, str) or not given:
        raise UserError(f"response_format of type {kind} needs {kind}, a text")
    return str(matcher.grammar_from_regex(given) if kind == "regex" else matcher.grammar_from_lark(given))


def _schema(given: Any) -> dict[str, Any]:
    """The schema of OpenAI's `json_schema`, which names and describes it, too."""
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the JSON schema is no JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise UserError('response_format of type json_schema needs json_schema: {"name": ..., "schema": {...}}')
    unknown = sorted(set(given) - {"name", "description", "schema", "strict"})
    if unknown:
        raise UserError(f"response_format's json_schema has no '{unknown[0]}'")
    return dict(schema)


class Vocabulary:
    """A tokenizer as the library sees it: the bytes of every token. Kept for the next request.

    Args:
        own_ends: those that the model itself ends with. A further one ends a guided text only if it is special, for
            the others are letters of the text like any other.

    Raises:
        UserError: there is no tokenizer that the library can read, or no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, ends: Iterable[int], own_ends: Iterable[int]):
        if tokenizer is None:
            raise UserError("response_format needs a tokenizer; give one with tokenizer=")
        self.ends = frozenset(ends) & (special_ids(tokenizer) | frozenset(own_ends))
        if not self.ends:
            raise UserError("response_format needs a token that ends an answer; give eos_token_id, or keep the model's")
        with _building:
            known = _known.setdefault(tokenizer, {})
            key = len(tokenizer), self.ends
            if key not in known:
                try:
                    known[key] = _library().hf.from_tokenizer(tokenizer, eos_token=sorted(self.ends))
                except Exception as error:  # the library's are of several kinds
                    raise UserError(f"response_format cannot read this tokenizer: {first_line(error)}") from error
            self.tokens = known[key]


_building = threading.Lock()
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, Any]] = WeakKeyDictionary()


def _library() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise UserError("response_format needs llguidance; install it with: pip install 'outdraft[guided]'") from error
    return llguidance


class Grammar:
    """What the text of an answer must be, compiled for a vocabulary.

    Raises:
        UserError: the source has a mistake or needs what the library does not know.
    """

    def __init__(self, source: str, vocabulary: Vocabulary):
        self.source, self.vocabulary = source, vocabulary
        self._start = _library().LLMatcher(vocabulary.tokens, source, log_level=0)
        if self._start.is_error():
            said = " ".join(self._start.get_error().split())
            fix = "; leave them out of the schema" if "Unimplemented keys" in said else ""
            raise UserError(f"the response format cannot be compiled: {said[:300]}{fix}")

    def matcher(self) -> Any:
        """A matcher at the beginning of the text."""
        return self._start.deep_copy()

    def processor(self, prompt_length: int) -> GuidedLogitsProcessor:
        """Guide one row's answer, which begins after so many tokens."""
        return GuidedLogitsProcessor(self, prompt_length)


class GuidedLogitsProcessor(LogitsProcessor):
    """Rules out every token that the grammar does not allow after a prefix.

    After a prefix that the grammar itself rules out, and after an end of sequence, logits stay as they are: nothing is
    decided there, though a drafter may look.
    """

    guides_drafts = True

    def __init__(self, grammar: Grammar, prompt_length: int):
        self.grammar, self.prompt_length = grammar, prompt_length
        self._matcher = grammar.matcher()
        self._path: list[int] = []  # what the matcher has consumed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask `(rows, vocab)` scores after `(rows, tokens)` prefixes, the prompt's tokens included."""
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for row, tokens in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if (found := self.mask(tokens)) is None:
                allowed[row] = True
            else:
                allowed[row, : len(found)] = torch.from_numpy(found[: scores.shape[-1]])
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Whether each token of the vocabulary may follow those of the text; None where nothing is decided."""
        if not self.go_to(tokens):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little").view(bool)

    def go_to(self, tokens: Sequence[int]) -> bool:
        """Move the matcher behind these tokens of the text; returns whether the grammar allows them all."""
        tokens, path, common = list(tokens), self._path, len(self._path)
        if tokens[:common] != path:
            common = common_length(path, tokens)
            self._matcher.rollback(len(path) - common)
            del path[common:]
        rest, ends, size = tokens[common:], self.grammar.vocabulary.ends, self.grammar.vocabulary.tokens.vocab_size
        # The library takes no end where nothing else may follow, and a token that only the model has is an error to it.
        text = rest[: next((i for i, token in enumerate(rest) if token in ends or token >= size), len(rest))]
        taken = self._matcher.try_consume_tokens(text) if text else 0
        path += text[:taken]
        self._check()
        return taken == len(rest)

    def _check(self) -> None:
        """Raise what the library found too much; the matcher begins anew, for other paths may be fine."""
        if self._matcher.is_error():
            said = " ".join(self._matcher.get_error().split())
            self._matcher, self._path = self.grammar.matcher(), []
            raise ValueError(f"the response format is too much for llguidance: {said[:200]}")
