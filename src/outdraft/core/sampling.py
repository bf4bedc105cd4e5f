"""Logits to the probabilities that a token is drawn from.

`Warper` turns one node's logits, given the tokens before it, into probabilities. It uses the processors of
`transformers` wherever one exists.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import generation as hf

from outdraft.core.sampling_settings import SamplingSettings
from outdraft.errors import UserError, first_line


class OccurrencePenalty(hf.LogitsProcessor):
    """OpenAI's presence and frequency penalties, over the tokens generated after the prompt."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


class LogitBias(hf.LogitsProcessor):
    """Adds a constant to the logits of chosen tokens."""

    def __init__(self, bias: dict[int, float], vocab_size: int):
        outside = [token for token in bias if not 0 <= token < vocab_size]
        if outside:
            raise UserError(f"logit_bias names token {outside[0]}, but the vocabulary ends at {vocab_size - 1}")
        self.tokens, self.values = list(bias), list(bias.values())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += torch.tensor(self.values, dtype=scores.dtype, device=scores.device)
        return scores


def _sequence_bias(given: Any, vocab_size: int) -> hf.LogitsProcessor:
    try:
        processor = hf.SequenceBiasLogitsProcessor(given)
    except ValueError as error:
        raise UserError(f"sequence_bias must be [[token ids], bias] pairs: {first_line(error)}") from error
    check_token_ids([list(sequence) for sequence in processor.sequence_bias], vocab_size)
    return processor


class Warper:
    """Turns one node's logits into the distribution that its token is drawn from.

    Args:
        prompt_length: tokens of the prompt, which some processors leave out of their counting.
        vocab_size: number of tokens, to check token ids.
        eos_token_ids: end-of-sequence tokens, held back until `min_new_tokens`.
        extra: further `transformers` processors, pure functions of (prefix, logits), applied first.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        prompt_length: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        extra: Sequence[hf.LogitsProcessor] = (),
        device: torch.device | str = "cpu",
    ):
        self.error: Exception | None = None
        """The error that a processor raised while a batch was computed (`probs_of`)."""
        self.guides = [processor for processor in extra if getattr(processor, "guides_drafts", False)]
        """Those of `extra` that rule tokens out, cheaply enough to be asked of drafts, too."""
        self.greedy, self.temperature = settings.temperature == 0, settings.temperature
        s = settings
        reading: list[hf.LogitsProcessor] = list(extra)  # those that look at the tokens before the node
        ends = list(eos_token_ids)
        check_token_ids([*s.bad_words_ids, s.suppress_tokens, s.begin_suppress_tokens], vocab_size)
        if s.sequence_bias:
            reading.append(_sequence_bias(s.sequence_bias, vocab_size))
        if s.repetition_penalty != 1:
            reading.append(hf.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)))
        if s.presence_penalty or s.frequency_penalty:
            reading.append(OccurrencePenalty(s.presence_penalty, s.frequency_penalty, prompt_length))
        if s.no_repeat_ngram_size:
            reading.append(hf.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
        if s.bad_words_ids:
            reading.append(hf.NoBadWordsLogitsProcessor(s.bad_words_ids, eos_token_id=ends or None))
        if s.min_length and ends:
            reading.append(hf.MinLengthLogitsProcessor(s.min_length, ends, device=str(device)))
        if s.min_new_tokens and ends:
            reading.append(
                hf.MinNewTokensLengthLogitsProcessor(prompt_length, s.min_new_tokens, ends, device=str(device))
            )
        if s.begin_suppress_tokens:
            reading.append(
                hf.SuppressTokensAtBeginLogitsProcessor(s.begin_suppress_tokens, prompt_length, device=str(device))
            )
        self.reads_prefix = bool(reading)
        bias = tuple(s.logit_bias.items())
        rare = (s.typical_p, s.epsilon_cutoff, s.eta_cutoff)
        shape = (0,) if self.greedy else (s.temperature, s.top_k, s.top_p, s.min_p, *rare)
        self.scoring: Hashable = (*shape, bias, tuple(s.suppress_tokens))
        """Equal for warpers that make the same `scores` of the same logits."""
        self.kind: Hashable = None if self.reads_prefix else self.scoring
        """Equal for warpers that make the same distribution of the same logits; None if it depends on the prefix."""
        self.sorts = not self.greedy and bool(s.top_k or s.top_p < 1 or s.typical_p < 1)
        """True if a distribution costs a search through the vocabulary, so that none should be made in vain."""
        self.names_tokens = bool(s.logit_bias)
        """True if the warper looks tokens up by their ids, not counting processors that read the prefix."""
        self._processors, self._reading = [*reading], len(reading)
        if s.logit_bias:
            self._processors.append(LogitBias(s.logit_bias, vocab_size))
        if s.suppress_tokens:
            self._processors.append(hf.SuppressTokensLogitsProcessor(s.suppress_tokens, device=str(device)))
        if not self.greedy:
            self._processors += self._warpers(s, device)

    @staticmethod
    def _warpers(s: SamplingSettings, device: torch.device | str) -> list[hf.LogitsProcessor]:
        warpers: list[hf.LogitsProcessor] = []
        if s.temperature != 1:
            warpers.append(hf.TemperatureLogitsWarper(float(s.temperature)))
        if s.top_k:
            warpers.append(hf.TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            warpers.append(TopP(s.top_p))
        if s.min_p:
            warpers.append(hf.MinPLogitsWarper(s.min_p))
        if s.typical_p < 1:
            warpers.append(hf.TypicalLogitsWarper(s.typical_p))
        if s.epsilon_cutoff:
            warpers.append(hf.EpsilonLogitsWarper(s.epsilon_cutoff))
        if s.eta_cutoff:
            warpers.append(hf.EtaLogitsWarper(s.eta_cutoff, device=str(device)))
        return warpers

    def probs_after(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the probabilities `(vocab,)`, at least float32, of the token after `prefix`.

        Args:
            logits: `(vocab,)` logits of the model.
            prefix: `(tokens,)` prompt and all tokens up to the node; read only when `reads_prefix`.
        """
        return self._laws(logits[None], prefix[None])[0]

    def probs(self, logits: Tensor) -> Tensor:
        """Return `(..., vocab)` probabilities of `(..., vocab)` logits at once; not defined when `reads_prefix`."""
        flat = logits.reshape(-1, logits.shape[-1])
        return self._laws(flat, _NO_PREFIX).view_as(logits)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the `(..., vocab)` log-probabilities up to a constant, without the processors that read the prefix."""
        flat = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
        for processor in self._processors[self._reading :]:
            flat = processor(_NO_PREFIX, flat)
        return flat.view_as(logits)

    def choices(self, logits: Tensor) -> Tensor:
        """Return the `(...)` only tokens of the distributions; defined only when `greedy` and not `reads_prefix`.

        The token is one past the vocabulary, as in `draw_each`, where the logits leave none.
        """
        scores = logits
        if self._processors:
            scores = self._scores(logits.reshape(-1, logits.shape[-1]), _NO_PREFIX).view_as(logits)
        chosen, best = with_greatest(scores)
        return torch.where(best.isfinite(), chosen, scores.shape[-1])

    def _scores(self, logits: Tensor, prefixes: Tensor) -> Tensor:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for processor in self._processors:
            scores = processor(prefixes, scores)
        return scores

    def _laws(self, logits: Tensor, prefixes: Tensor) -> Tensor:
        scores = self._scores(logits, prefixes)
        if self.greedy:
            chosen, best = with_greatest(scores)
            certain = torch.where(best.isfinite(), 1.0, torch.nan).to(scores.dtype)
            return torch.zeros_like(scores).scatter_(1, chosen[:, None], certain[:, None])
        return scores.softmax(-1)


UNREAD = torch.empty(0, dtype=torch.long)
"""Stands for the prefix of a node whose warper does not read it."""

_NO_PREFIX = torch.empty(0, 0, dtype=torch.long)


def alike(warpers: Sequence[Warper]) -> bool:
    """Return True if all warpers make the same distribution of the same logits, whatever the prefix is."""
    kind = warpers[0].kind
    return kind is not None and all(warper.kind == kind for warper in warpers)


def probs_of(warpers: Sequence[Warper], logits: Tensor, prefixes: Sequence[Tensor]) -> Tensor:
    """Return `(rows, vocab)` probabilities, each row by its own warper; rows of one kind are computed together.

    A distribution is NaN if the logits are not finite or a processor fails, which then sets the warper's `error`.

    Args:
        warpers: one warper per row.
        logits: `(rows, vocab)` logits of the model.
        prefixes: one prefix per row, as in `Warper.probs_after`; read only where a warper needs them.
    """
    if alike(warpers):
        return warpers[0].probs(logits)
    found = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    groups: dict[Hashable, list[int]] = {}
    for row, warper in enumerate(warpers):
        if warper.kind is None:
            try:
                found[row] = warper.probs_after(logits[row], prefixes[row])
            except Exception as error:  # processors are the user's and raise what they like: the other rows go on
                warper.error, found[row] = error.with_traceback(None), torch.nan
        else:
            groups.setdefault(warper.kind, []).append(row)
    for rows in groups.values():
        index = torch.tensor(rows, device=logits.device)
        found[index] = warpers[rows[0]].probs(logits[index])
    return found


def scores_of(warpers: Sequence[Warper], logits: Tensor) -> Tensor:
    """Return `Warper.scores` of `(rows, ..., vocab)` logits, each row by its own warper."""
    if len({warper.scoring for warper in warpers}) == 1:
        return warpers[0].scores(logits)
    return torch.stack([warper.scores(row) for warper, row in zip(warpers, logits, strict=True)])


def with_greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return `greatest` and the value there, not finite if any score is NaN or infinite or all are ruled out."""
    chosen = greatest(scores)
    return chosen, scores.gather(-1, chosen[..., None])[..., 0]


def greatest(scores: Tensor) -> Tensor:
    """Return the `(...)` index of the largest of `(..., vocab)` scores, the first of equal ones."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    # NumPy's search is vectorised: over 4096 to 128,000 tokens it takes a third to a twelfth of torch's time on a CPU.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.from_numpy(wide.detach().numpy().argmax(-1, keepdims=True))[..., 0]


def check_token_ids(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise UserError for a token id outside the vocabulary."""
    for token in (token for sequence in sequences for token in sequence):
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is outside the vocabulary of {vocab_size}; check the tokenizer")


NEAR = 64
"""Distance of a sum of probabilities from the threshold, in units of the dtype's rounding, within which the order of
summation might decide."""


class TopP(hf.TopPLogitsWarper):
    """The nucleus (`top_p`, arXiv 1904.09751) as the warper of `transformers` gives it, bit for bit; on a CPU in a
    tenth of the time or less, since the whole vocabulary is not sorted.

    Tokens of which all together could not reach the threshold are left out, and the few others are sorted. Where equal
    logits lie on both sides of the nucleus' edge, or rounding might move it, the whole row is sorted as `transformers`
    does, since its sort alone decides which of the equal ones stay.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu" or self.min_tokens_to_keep > 1:
            return super().__call__(input_ids, scores)
        return torch.cat([self._warped(input_ids, row) for row in scores.split(1)])

    def _warped(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Warp `(1, vocab)` scores."""
        least = self._least(scores[0])
        if least is None:
            return super().__call__(input_ids, scores)
        return scores.masked_fill(scores < least, self.filter_value)

    def _least(self, scores: Tensor) -> Tensor | None:
        """Return the smallest of `(vocab,)` scores that is in the nucleus; None if that takes a sort of all."""
        probs, removed = scores.softmax(-1), 1 - self.top_p
        able = (probs >= removed / len(probs)).nonzero()[:, 0]
        if not len(able):  # NaN
            return None
        best, order = scores[able].sort(descending=True)
        own = probs[able[order]].double()
        # The mass of every token and of those below it, which decides.
        up_to = probs.sum(dtype=torch.float64) - (own.cumsum(0) - own)
        if bool((up_to - removed).abs().min() < NEAR * torch.finfo(scores.dtype).eps):
            return None
        count = max(1, int((up_to > removed).sum()))
        if count < len(best) and bool(best[count] == best[count - 1]):
            return None
        return best[count - 1]
