"""The public entry points `load`, `.generate` and `.stream`; `hugging_face.py` is the entry from a stock model.

Argument names are Hugging Face's. This module turns settings into rows for `engine/round.py`, and decoded rows into an
output with all statistics.
"""

from __future__ import annotations

import inspect
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from outdraft.api.draft_settings import DraftSettings, ResolvedDraft, resolve
from outdraft.api.guided import guides
from outdraft.api.loading import load_drafter_for, load_target, quantised_backend
from outdraft.api.output import GenerationOutput, Piece, short
from outdraft.api.prompts import check_prompt, encode_prompts, whole_numbers
from outdraft.api.settings import LOSSY, GenerateSettings, in_effect, model_settings, model_stops, sampling_settings
from outdraft.control.settings import Pacer
from outdraft.core.coupling import chance_of
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import seed_of, whole
from outdraft.core.statistics import Statistics
from outdraft.data.text import Detokenizer, answer_text, stops_at
from outdraft.drafting.base import Drafter
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError, meant
from outdraft.target.backends import is_native
from outdraft.target.exact.target import ExactTarget, exactly
from outdraft.target.ranks import said_by_first
from outdraft.target.target import Target


def load(
    model: Any,
    draft_model: Any = None,
    *,
    method: str | None = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    quantize: str | None = None,
    tp_plan: str | None = None,
    trust_remote_code: bool = False,
    generation_config: str = "auto",
    **unknown: Any,
) -> SpeculativeModel:
    """Load a target and its drafter.

    Args:
        model: folder, GGUF file, hub id, an adapter's folder, a loaded `transformers` model (also in torch.compile or
            PEFT), `smollm2` for SmolLM2-135M-Instruct, or `reference` for the small one that is shipped.
        draft_model: a drafter's folder (ours, official FSPAD or EAGLE, EAGLE-3, DFlash, DSpark), a smaller language
            model, `reference` or `smollm2` for the drafters that ship for these, or None.
        method: a name that `--method` takes, such as `fspad`, `eesd`, `prompt-lookup` or `none`. By default it follows
            from `draft_model`; without one it is `prompt-lookup`, which needs no training.
        tokenizer: tokenizer to use if the model's folder has none.
        dtype: `bfloat16`, `float32`, ...; by default the dtype that is fastest on the device.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one. `auto` spreads the layers over all GPUs,
            and those that have no room there over host memory (`device_map="auto"` of `transformers`).
        backend: `eager`, `packed`, `native` or `graphs`; by default `native` on a CPU and `graphs` on a GPU.
        quantize: `int8` or `int4` gives the target's layers weights of so many bits (its head eight) on a CPU. `gguf`
            takes the quantised weights of its GGUF file: Q4_0, Q4_1 and Q8_0 as they are, Q4_K with scales rounded to
            float16, other kinds rounded to eight bits. What is decoded then has the distribution of the quantised
            model.
        tp_plan: `auto` shares the target's layers among the processes of `torchrun` (tensor parallelism), each of which
            makes the same calls (docs/guides/several-devices.md).
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
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        backend=quantised_backend(backend, quantize),
        tp_plan=tp_plan,
        trust_remote_code=trust_remote_code,
    )
    if generation_config not in ("auto", "vllm"):
        raise UserError(f"generation_config must be auto or vllm, not {generation_config!r}")
    target.ignores_generation_config = generation_config == "vllm"
    drafter = load_drafter_for(target, draft_model, method=method, backend=backend, trust_remote_code=trust_remote_code)
    return SpeculativeModel(target, drafter)


class SpeculativeModel:
    """A target with a drafter. `generate` gives the same answers as the target alone, faster."""

    def __init__(self, target: Target, drafter: Drafter | None = None):
        self.target, self.drafter = target, drafter
        self._pacers: dict[Any, Pacer] = {}  # kept, so that later calls use what they learned
        self._said = False  # True once the user was told of the model's own settings

    def __repr__(self) -> str:
        """Describe target, drafter, device, dtype and backend in one line."""
        target, drafter = self.target, self.drafter
        name = getattr(target.model.config, "_name_or_path", "") or type(target.model).__name__
        drafting = "no drafter" if drafter is None else f"drafter {drafter.method}"
        if drafter is not None and drafter.num_parameters:
            drafting += f" ({short(drafter.num_parameters)} parameters)"
        where = f"{str(target.dtype).removeprefix('torch.')} on {target.device}, {target.backend} backend"
        return f"<SpeculativeModel: {name} ({short(target.num_parameters)} parameters), {drafting}, {where}>"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.target.tokenizer

    @property
    def method(self) -> str:
        return self.drafter.method if self.drafter is not None else "none"

    @property
    def plain_seconds(self) -> float | None:
        """Seconds per token without drafting, as a controller measured them recently; None if none has."""
        known = (pacer.costs for pacer in self._pacers.values())
        return next((costs.plain() for costs in known if not costs.plain_is_due()), None)

    def with_drafter(self, drafter: Drafter | None) -> SpeculativeModel:
        """Return the same target with another drafter, or with none for plain decoding."""
        other = SpeculativeModel(self.target, drafter)
        other._said = self._said
        return other

    def generate(
        self, prompts: Any, *, max_new_tokens: int = 256, streamer: Any = None, **settings: Unpack[GenerateSettings]
    ) -> GenerationOutput:
        """Answer one prompt or several at once.

        Decoding is greedy unless `do_sample` or a `temperature` is given or the model's own generation config samples.
        The settings of that config hold wherever none are given.

        Args:
            prompts: a text, a conversation, token ids (a list, array or tensor), or a list of any of these.
            max_new_tokens: largest number of new tokens per answer.
            streamer: a streamer of `transformers`, which gets every token of a single prompt's answer.
            **settings: sampling: `do_sample` and the fields of `outdraft.core.sampling.SamplingSettings`. Drafting: the
                fields of `outdraft.DraftSettings` one by one, or as `draft`; keywords beside `draft` take precedence.
                None of them changes the distribution of the answers. Stopping: `eos_token_id` and `stop_strings`, in
                place of and beside the model's own ends. `seed`: makes sampling repeatable. Row i of several has the
                text that `seed + i` gives a single prompt. Unless `coupling="dice"`, that is the text of stock
                `generate` after `torch.manual_seed(seed + i)` (docs/guides/seeds.md). `logits_processor`: processors of
                `transformers`, beside those that the settings make. `chat_template_kwargs`: variables of the chat
                template. `response_format`: a grammar that every answer follows, JSON or a schema
                (docs/guides/guided.md).

        Returns:
            Tokens, texts and statistics, row by row in the order of the prompts.

        Raises:
            UserError: an unknown or impossible setting, or a prompt beyond the context; or every row ended with logits
                that are not finite or a processor that failed. If only some rows end so, the others go on, with a
                warning.
        """
        start = time.perf_counter()
        rows, draft = self._rows(prompts, {"max_new_tokens": max_new_tokens, **settings})
        target = exactly(self.target) if draft.exact else self.target
        if streamer is not None:
            if len(rows) > 1:
                raise UserError("a streamer takes one prompt; use .stream() for several")
            streamer.put(torch.tensor([rows[0].prompt]))
        streamed = 0
        for _ in decode(target, self.drafter, rows, draft.shape, draft.costs):
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

    def stream(
        self, prompts: Any, *, max_new_tokens: int = 256, **settings: Unpack[GenerateSettings]
    ) -> Iterator[Piece]:
        """Run `generate` and yield tokens as they are decided."""
        rows, draft = self._rows(prompts, {"max_new_tokens": max_new_tokens, **settings})
        target = exactly(self.target) if draft.exact else self.target
        if self.tokenizer is None:
            raise UserError("streaming text needs a tokenizer; use generate for token ids")
        texts = [Detokenizer(self.tokenizer, prompt=row.prompt) for row in rows]
        for _ in decode(target, self.drafter, rows, draft.shape, draft.costs):
            for i, row in enumerate(rows):
                for place in range(len(texts[i].tokens), len(row.tokens)):
                    reason = row.finish_reason if place + 1 == len(row.tokens) else None
                    text = texts[i].add(row.tokens[place])
                    if reason is not None:
                        text += texts[i].finish()
                    yield Piece(i, row.tokens[place], text, row.accepted[place], reason)
        say_failures(rows)

    def _rows(self, prompts: Any, settings: Mapping[str, Any]) -> tuple[list[Row], ResolvedDraft]:
        """Check settings, and turn them into rows and resolved draft settings before anything runs."""
        settings = dict(settings)
        for name, reason in LOSSY.items():
            if settings.pop(name, None) not in (None, 1, 1.0):
                raise UserError(reason)
        asked = DraftSettings.taken(settings, settings.pop("draft", None))
        chat = settings.pop("chat_template_kwargs", None)
        encoded = encode_prompts(prompts, self.tokenizer, chat)
        max_new_tokens = whole("max_new_tokens", settings.pop("max_new_tokens"))
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        eos = settings.pop("eos_token_id", None)
        ends = self.target.eos_token_ids
        if eos is not None:
            ends = [whole("eos_token_id", token) for token in whole_numbers(eos)]
        guided = guides(settings.pop("response_format", None), encoded, self.tokenizer, ends, self.target.eos_token_ids)
        given, kept = settings.pop("stop_strings", None), model_stops(self.target)
        strings = kept if given is None else [given] if isinstance(given, str) else list(given)
        if strings and self.tokenizer is None:
            raise UserError("stop_strings need a tokenizer; use eos_token_id")
        seed = settings.pop("seed", None)
        seed = None if seed is None else seed_of(seed)
        extra = settings.pop("logits_processor", None) or []
        own = model_settings(self.target)
        if asked.exact and settings.get("temperature") is None:
            settings.setdefault("do_sample", False)
        sampling = sampling_settings(settings, own)
        self._say(in_effect(own, settings) | ({"stop_strings": kept} if kept and given is None else {}))
        drawing, device = sampling.temperature > 0, self.target.device
        # Kernels that give a token the same bits in any company make every shape exact.
        free = asked.exact and is_native(self.target.backend)
        draft = resolve(
            replace(asked, exact=False) if free else asked,
            self.drafter,
            device,
            sampling=drawing,
            rows=len(encoded),
            seeded=seed is not None,
            pacers=self._pacers,
        )
        # Processes that decode together draw the same numbers, whether or not a seed was given.
        first_seed = said_by_first(secrets.randbits(62)) if seed is None and self.target.shared else seed
        rows = []
        for i, ids in enumerate(encoded):
            check_prompt(ids, self.target)
            processors = [*extra, *guided[i]]
            warper = Warper(sampling, len(ids), self.target.vocab_size, ends, processors, device)
            own_seed = None if first_seed is None else first_seed + i
            should_stop = stops_at(strings, self.tokenizer, ids) if strings and self.tokenizer else None
            row = Row(ids, warper, Dice(own_seed), max_new_tokens, frozenset(ends), should_stop, ngrams=draft.ngrams)
            if drawing and not draft.dice:
                row.chance = chance_of(warper, self.target.vocab_size, device, own_seed, row.tokens)
            if draft.pacer is not None:
                row.controller = draft.pacer.controller(draft.shape.depth + 1, own_seed)
            rows.append(row)
        return rows, replace(draft, exact=asked.exact)

    def _say(self, own: dict[str, Any]) -> None:
        """Tell the user once that the model's own settings are in effect."""
        if own and not self._said:
            what = ", ".join(f"{name}={value}"[:80] for name, value in own.items())
            warnings.warn(
                f"the model's generation config sets {what}; give others, or ignore it (generation_config='vllm')",
                stacklevel=4,
            )
        self._said = self._said or bool(own)


def say_failures(rows: Sequence[Row]) -> None:
    """Raise UserError if every row failed; warn if only some did."""
    failed = {place: row.error for place, row in enumerate(rows) if row.error is not None}
    for place, error in failed.items():
        if len(failed) == len(rows):
            raise UserError(error)
        warnings.warn(f"row {place} has ended early: {error}", stacklevel=3)
