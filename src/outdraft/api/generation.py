"""The public ways in: `load`, `.generate` and `.stream` (`hugging_face.py` has the way in from a stock model).

Argument names are Hugging Face's. Turns settings into rows for `decoding.py` and what comes back into an output that
carries all statistics. Knows nothing of trees or verification.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from outdraft.api.guided import guides
from outdraft.api.inputs import plain_prompts, whole_numbers
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.settings import (
    EXACT_TREE,
    LOOKUP_SETTINGS,
    LOSSY,
    TREE_SETTINGS,
    check_prompt,
    controller_of,
    default_controller,
    in_effect,
    model_settings,
    pacer_of,
    repeats_of,
    sampling_settings,
    tree_shape,
)
from outdraft.api.shown import shown_model, shown_output
from outdraft.api.stops import stops_at
from outdraft.api.text import Detokenizer, answer_text, encode_prompts
from outdraft.control import ControlSettings, Costs
from outdraft.control.pacing import Pacer
from outdraft.core.coupling import chance_of
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import whole
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.drafting.base import Drafter
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError, meant
from outdraft.target.exact.target import Exactness, ExactTarget, exactly
from outdraft.target.target import Target


@dataclass(repr=False)
class GenerationOutput:
    """What `generate` returns, row by row in the order of the prompts.

    Attributes:
        tokens: new token ids, an end-of-sequence token included.
        texts: the same as text after the prompt's, special tokens left out; None without a tokenizer.
        prompts: token ids of the prompts.
        finish_reasons: `eos`, `length` (max_new_tokens), `stop` (a stop string), `context` (the model's limit),
            or `error`.
        errors: for every row why it could not go on, where it ended so; the others went on.
        accepted: for every new token, whether a drafter had guessed it.
        statistics: of all rows together.
        row_statistics: of each row.
        seconds: wall-clock time of the whole call.
        exactness: with `exact=True`, by what the tokens are those of plain decoding; None without.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    prompts: list[list[int]]
    finish_reasons: list[str]
    accepted: list[list[bool]]
    statistics: Statistics
    row_statistics: list[Statistics]
    seconds: float
    exactness: Exactness | None = None
    errors: list[str | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of a single prompt's answer."""
        if self.texts is None or len(self.texts) != 1:
            raise UserError("`text` is for one prompt and a model with a tokenizer; use `texts` or `tokens`")
        return self.texts[0]

    @property
    def sequences(self) -> Tensor:
        """`(rows, tokens)` prompt and answer, right-padded with 0, as Hugging Face returns them."""
        return pad([prompt + new for prompt, new in zip(self.prompts, self.tokens, strict=True)], 0)

    @property
    def tau(self) -> float:
        """Tokens a target forward, the bonus token included."""
        return self.statistics.tau

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the wall-clock time, prefill included."""
        return sum(len(row) for row in self.tokens) / self.seconds

    def __repr__(self) -> str:
        return shown_output(self)


@dataclass
class Piece:
    """A bit of streamed text: one decided token's worth."""

    row: int
    token: int
    text: str
    accepted: bool
    """Whether a drafter had guessed the token."""
    finish_reason: str | None


def load(
    model: Any,
    draft_model: Any = None,
    *,
    method: str | None = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
    generation_config: str = "auto",
    **unknown: Any,
) -> SpeculativeModel:
    """A target and its drafter, ready to generate.

    Args:
        model: folder, GGUF file, hub id, an adapter's folder, a loaded `transformers` model (also in torch.compile or
            PEFT), `smollm2` for SmolLM2-135M-Instruct, or `reference` for the small one that is shipped.
        draft_model: a drafter's folder (ours, official FSPAD or EAGLE, EAGLE-3), a smaller language model, `reference`
            or `smollm2` for the drafters that ship for these, or None.
        method: `fspad`, `eagle`, `eagle3`, `prompt-lookup`, `draft-model` or `none`; by default what `draft_model` is,
            and `prompt-lookup`, which needs no training, without one.
        tokenizer: where the model's folder has none.
        dtype: `bfloat16`, `float32`, ...; by default what the device is fastest in.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one.
        backend: `eager`, `packed`, `compiled` or `graphs`; by default `packed` on a CPU and `graphs` on a GPU.
        trust_remote_code: run code from the model's repository.
        generation_config: `auto` keeps the sampling settings and bans of the model's generation config where none are
            given; `vllm` ignores them, as in vLLM.
        **unknown: refused, with the name that was meant.

    Raises:
        UserError: something cannot be loaded or does not fit together.
    """
    for name in unknown:
        known = list(inspect.signature(load).parameters)[:-1]
        raise UserError(f"unknown argument '{name}'{meant(name, known) or '; known are ' + ', '.join(known)}")
    if draft_model is None and method is None:
        method = "prompt-lookup"
    target = load_target(
        model, tokenizer, dtype=dtype, device=device, backend=backend, trust_remote_code=trust_remote_code
    )
    if generation_config not in ("auto", "vllm"):
        raise UserError(f"generation_config must be auto or vllm, not {generation_config!r}")
    target.ignores_generation_config = generation_config == "vllm"
    drafter = load_drafter_for(target, draft_model, method=method, backend=backend, trust_remote_code=trust_remote_code)
    return SpeculativeModel(target, drafter)


class SpeculativeModel:
    """A target with a drafter. `generate` answers as the target alone would, faster."""

    def __init__(self, target: Target, drafter: Drafter | None = None):
        self.target, self.drafter = target, drafter
        self._pacers: dict[Any, Pacer | None] = {}
        self._said = False  # that the model's own settings are in effect

    def __repr__(self) -> str:
        return shown_model(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.target.tokenizer

    @property
    def method(self) -> str:
        return self.drafter.method if self.drafter is not None else "none"

    @property
    def plain_seconds(self) -> float | None:
        """Of a token without drafting, where a controller has measured that lately; None where nobody has."""
        known = (pacer.costs for pacer in self._pacers.values() if pacer is not None)
        return next((costs.plain() for costs in known if not costs.plain_is_due()), None)

    def with_drafter(self, drafter: Drafter | None) -> SpeculativeModel:
        """The same target with another drafter, or with none: plain decoding."""
        other = SpeculativeModel(self.target, drafter)
        other._said = self._said
        return other

    def generate(self, prompts: Any, **settings: Any) -> GenerationOutput:
        """Answer one prompt or several at once.

        Args:
            prompts: a text, a conversation, token ids (a list, array or tensor), or a list of any of these.
            **settings: `max_new_tokens` (256), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `bad_words_ids`,
                `min_new_tokens` and the other fields of `SamplingSettings`; `eos_token_id`, `stop_strings`, `seed`,
                `logits_processor`, `streamer`; `response_format`, which every answer's text then follows (JSON, a
                schema, ...: docs/guides/guided.md); `chat_template_kwargs`, which the chat template itself is told;
                `tree_depth`, `tree_top_k`, `tree_size`, `candidates`, or `num_speculative_tokens` for chains;
                `controller`: `fixed` drafts to that shape, `confidence`, `beta`, `calibrated` and `ucb` decide how
                far, that shape being the most (or `ControlSettings`, or a `Pacer` of one's own). By default it is
                `calibrated`, drafts as long as they pay, on a CPU where no shape is asked for; else `fixed`.
                `tree_size="auto"` drafts whichever shape brings the most tokens a second here, for all rows alike.
                What they learn serves later calls. Greedy unless `do_sample` or a `temperature` is given,
                or the model's own generation config samples: its settings apply where none are given.
                `coupling`: how chance comes in with a temperature. `noise` (default) shares the noise of
                `torch.multinomial` between drafter and target, so that a prompt's text is that which stock `generate`
                samples for it after `torch.manual_seed(seed + its place)`, whatever drafts, however far and in
                whichever company (docs/seeds.md). `dice` accepts a candidate x with probability min(1, p(x)/q(x)); so
                do candidates that are drawn (`candidates`).
                `prompt_lookup_min` (4): where so many tokens at the text's end stood in it before, what followed is
                drafted in the drafter's place, 0 never; `prompt_lookup_num_tokens` (20) of it at most.
                `exact` (False): the tokens of greedy decoding are those that each prompt alone gets without a drafter
                on this machine, even where rounding would part them; slower (docs/exact.md).

        Raises:
            UserError: an unknown or impossible setting, or a prompt beyond the context; or in every row logits that are
                no numbers or a processor that fails. One such row in company ends alone, with a warning.
        """
        streamer = settings.pop("streamer", None)
        start = time.perf_counter()
        target = self._target(settings)
        rows, shape, costs = self._rows(prompts, settings)
        if streamer is not None:
            if len(rows) > 1:
                raise UserError("a streamer takes one prompt; use .stream() for several")
            streamer.put(torch.tensor([rows[0].prompt]))
        streamed = 0
        for _ in decode(target, self.drafter, rows, shape, costs):
            if streamer is not None:
                for token in rows[0].tokens[streamed:]:
                    streamer.put(torch.tensor([token]))
                streamed = len(rows[0].tokens)
        if streamer is not None:
            streamer.end()
        say_failures(rows)
        tokenizer = self.tokenizer
        return GenerationOutput(
            [row.tokens for row in rows],
            [answer_text(tokenizer, row.prompt, row.tokens) for row in rows] if tokenizer else None,
            [row.prompt for row in rows],
            [str(row.finish_reason) for row in rows],
            [row.accepted for row in rows],
            Statistics.sum((row.statistics for row in rows), together=True),
            [row.statistics for row in rows],
            time.perf_counter() - start,
            replace(target.exactness) if isinstance(target, ExactTarget) else None,
            [row.error for row in rows],
        )

    def stream(self, prompts: Any, **settings: Any) -> Iterator[Piece]:
        """The same as `generate`, token by token as they are decided."""
        target = self._target(settings)
        rows, shape, costs = self._rows(prompts, settings)
        if self.tokenizer is None:
            raise UserError("streaming text needs a tokenizer; use generate for token ids")
        texts = [Detokenizer(self.tokenizer, prompt=row.prompt) for row in rows]
        for _ in decode(target, self.drafter, rows, shape, costs):
            for i, row in enumerate(rows):
                for place in range(len(texts[i].tokens), len(row.tokens)):
                    reason = row.finish_reason if place + 1 == len(row.tokens) else None
                    text = texts[i].add(row.tokens[place])
                    if reason is not None:
                        text += texts[i].finish()
                    yield Piece(i, row.tokens[place], text, row.accepted[place], reason)
        say_failures(rows)

    def _target(self, settings: dict[str, Any]) -> Target:
        return exactly(self.target) if settings.get("exact") else self.target

    def _rows(self, prompts: Any, settings: dict[str, Any]) -> tuple[list[Row], TreeShape, Costs | None]:
        """Settings checked and turned into rows, before anything runs."""
        settings = dict(settings)
        for name, reason in LOSSY.items():
            if settings.pop(name, None) not in (None, 1, 1.0):
                raise UserError(reason)
        tree = {name: settings.pop(name) for name in TREE_SETTINGS if name in settings}
        lookup = {name: settings.pop(name, None) for name in LOOKUP_SETTINGS}
        exact = settings.pop("exact", False)
        controller, coupling = settings.pop("controller", None), settings.pop("coupling", None)
        if coupling is None:  # candidates that are drawn need dice
            coupling = "noise" if tree.get("candidates") in (None, "top-k") else "dice"
        if coupling not in ("dice", "noise"):
            raise UserError(f"coupling must be dice or noise, not {coupling!r}")
        if coupling == "noise" and tree.get("candidates") not in (None, "top-k"):
            raise UserError("candidates that are drawn need coupling='dice'; leave one of the two out")
        chat = settings.pop("chat_template_kwargs", None)
        encoded, _ = encode_prompts(plain_prompts(prompts), self.tokenizer, chat)
        max_new_tokens = whole("max_new_tokens", settings.pop("max_new_tokens", 256))
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        eos = settings.pop("eos_token_id", None)
        ends = self.target.eos_token_ids
        if eos is not None:
            ends = [whole("eos_token_id", token) for token in whole_numbers(eos)]
        guided = guides(settings.pop("response_format", None), encoded, self.tokenizer, ends, self.target.eos_token_ids)
        strings = settings.pop("stop_strings", None) or []
        strings = [strings] if isinstance(strings, str) else list(strings)
        if strings and self.tokenizer is None:
            raise UserError("stop_strings need a tokenizer; use eos_token_id")
        seed = settings.pop("seed", None)
        seed = None if seed is None else whole("seed", seed)
        extra: Sequence[LogitsProcessor] = settings.pop("logits_processor", None) or []
        own = model_settings(self.target)
        if exact and settings.get("temperature") is None:
            settings.setdefault("do_sample", False)
        sampling = sampling_settings(settings, own)
        self._say(in_effect(own, settings))
        if exact and sampling.temperature > 0:
            raise UserError("exact=True is for greedy decoding; leave it out, or temperature and do_sample")
        if exact and all(value is None for value in tree.values()):
            tree = dict(EXACT_TREE)
        drawing = sampling.temperature > 0
        if controller is None:
            seeded = drawing and seed is not None and coupling == "dice"  # else a text does not depend on its drafts
            controller = default_controller(self.drafter, self.target.device, tree, seeded)
        pacer = self._pacer(controller_of(controller, tree))
        controlled = pacer is not None
        thrown = drawing and coupling == "dice"
        shape = tree_shape(self.drafter, self.target.device, tree, thrown, controlled, len(encoded))
        repeats = repeats_of(self.drafter, lookup, shape if exact else None)
        rows = []
        for i, ids in enumerate(encoded):
            check_prompt(ids, self.target)
            processors = [*extra, *guided[i]]
            warper = Warper(sampling, len(ids), self.target.vocab_size, ends, processors, self.target.device)
            own_seed = None if seed is None else seed + i
            dice = Dice(own_seed)
            should_stop = stops_at(strings, self.tokenizer, ids) if strings and self.tokenizer else None
            row = Row(ids, warper, dice, max_new_tokens, frozenset(ends), should_stop, repeats=repeats)
            if drawing and not thrown:
                row.chance = chance_of(warper, self.target.vocab_size, self.target.device, own_seed, row.tokens)
            if pacer is not None:
                row.controller = pacer.controller(shape.depth + 1, own_seed)
            rows.append(row)
        return rows, shape, pacer.costs if pacer is not None else None

    def _say(self, own: dict[str, Any]) -> None:
        """That the model's own settings decide, once."""
        if own and not self._said:
            what = ", ".join(f"{name}={value}"[:80] for name, value in own.items())
            warnings.warn(
                f"the model's generation config sets {what}; give others, or ignore it (generation_config='vllm')",
                stacklevel=4,
            )
        self._said = self._said or bool(own)

    def _pacer(self, controller: Any) -> Pacer | None:
        """The same one for the same settings, so that what was learned and measured is kept."""
        if self.drafter is None or controller is None or isinstance(controller, Pacer):
            return pacer_of(controller) if self.drafter is not None else None
        key = astuple(controller) if isinstance(controller, ControlSettings) else controller
        if key not in self._pacers:
            self._pacers[key] = pacer_of(controller)
        return self._pacers[key]


def say_failures(rows: Sequence[Row]) -> None:
    """Raise UserError if no row could be decoded to its end; warn of some that could not."""
    failed = {place: row.error for place, row in enumerate(rows) if row.error is not None}
    for place, error in failed.items():
        if len(failed) == len(rows):
            raise UserError(error)
        warnings.warn(f"row {place} has ended early: {error}", stacklevel=3)


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """`(rows, longest)`, right-padded."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence) + [value] * (longest - len(sequence)) for sequence in sequences])
