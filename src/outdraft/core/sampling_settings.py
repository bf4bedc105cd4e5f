"""The checked settings of sampling. This module imports no torch, so that help texts are quick."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from outdraft.errors import UserError


@dataclass
class SamplingSettings:
    """The settings of sampling; names and meaning as in Hugging Face `generate` where it has them."""

    temperature: float = 0.0
    """Randomness: 0 takes the most probable token (greedy), 1 draws from the model's own distribution."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Drop tokens less probable than this times the most probable one."""
    repetition_penalty: float = 1.0
    """Divide (if positive, else multiply) the logits of tokens that occurred before, prompt included."""
    presence_penalty: float = 0.0
    """Subtract this from the logit of every token that was generated before (prompt not counted), as OpenAI does."""
    frequency_penalty: float = 0.0
    """Subtract this times the number of times a token was generated before (prompt not counted)."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Bias added to the logits of these token ids, which may be text, as JSON has them."""
    bad_words_ids: list[list[int]] = field(default_factory=list)
    """Token sequences that are never completed."""
    min_new_tokens: int = 0
    """No end-of-sequence token before so many new ones."""
    min_length: int = 0
    """No end-of-sequence token before so many of prompt and answer together."""
    suppress_tokens: list[int] = field(default_factory=list)
    """Tokens that are never chosen."""
    begin_suppress_tokens: list[int] = field(default_factory=list)
    """Tokens that no answer begins with."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens twice, prompt included; 0 is off."""
    sequence_bias: Any = None
    """Bias added to the logits of tokens that complete sequences: `[[token ids], bias]` pairs."""
    typical_p: float = 1.0
    """Keep the most typical tokens up to this probability; 1 keeps all."""
    epsilon_cutoff: float = 0.0
    """Drop tokens less probable than this; 0 keeps all."""
    eta_cutoff: float = 0.0
    """Drop improbable tokens as epsilon_cutoff does, fewer where many tokens are probable; 0 keeps all."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            if read := {"int": whole, "float": real}.get(str(setting.type)):
                number = read(setting.name, getattr(self, setting.name))
                if not math.isfinite(number):
                    raise UserError(f"{setting.name} must be finite, not {number}")
                setattr(self, setting.name, number)
        self.logit_bias = _bias(self.logit_bias)
        self.bad_words_ids = _words(self.bad_words_ids)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(self, name, _words([getattr(self, name)], name)[0] if getattr(self, name) else [])
        bounds = [
            (self.temperature >= 0, "temperature must be 0 (greedy) or more"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]; 1 turns it off"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]; 0 turns it off"),
            (self.repetition_penalty > 0, "repetition_penalty must be more than 0; 1 turns it off"),
            (self.min_new_tokens >= 0, "min_new_tokens must be 0 or more"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must be 0 (off) or more"),
            (0 < self.typical_p <= 1, "typical_p must be in (0, 1]; 1 turns it off"),
            (0 <= self.epsilon_cutoff < 1, "epsilon_cutoff must be in [0, 1); 0 turns it off"),
            (0 <= self.eta_cutoff < 1, "eta_cutoff must be in [0, 1); 0 turns it off"),
        ]
        for holds, message in bounds:
            if not holds:
                raise UserError(message)


def whole(name: str, value: Any) -> int:
    """Return the value as an int, or raise the UserError that names the setting."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {value!r}") from None


def seed_of(value: Any) -> int:
    """Return the value as a seed, or raise the UserError that says which numbers torch's generators take."""
    seed = whole("seed", value)
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must lie between -2**63 and 2**63 - 1, not {seed}")
    return seed


def real(name: str, value: Any) -> float:
    """Return the value as a float, or raise the UserError that names the setting."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, not {value!r}") from None


def _bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise UserError(f"logit_bias must map token ids to numbers, not {given!r}")
    return {_token_id(token): real("logit_bias", bias) for token, bias in given.items()}


def _token_id(key: Any) -> int:
    digits = isinstance(key, str) and key.isdecimal()
    return int(key) if digits else whole("a token id in logit_bias", key)


def _words(given: Any, name: str = "bad_words_ids") -> list[list[int]]:
    lists = isinstance(given, list | tuple) and all(isinstance(word, list | tuple) and word for word in given)
    if not lists:
        raise UserError(f"{name} must hold lists of token ids, none of them empty, not {given!r}")
    return [[whole(f"a token id in {name}", token) for token in word] for word in given]
