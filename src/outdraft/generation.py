"""The public ways in: `load`, `.generate`, `.stream`, and `custom_generate` for a stock model's own `generate`.

Argument names are Hugging Face's. Turns settings into rows for `decoding.py` and what comes back into an output that
carries all statistics. Knows nothing of trees or verification.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput

from outdraft.decoding import Row, decode
from outdraft.drafters.base import Drafter, TreeShape
from outdraft.errors import UserError
from outdraft.loading import load_drafter_for, load_target
from outdraft.sampling import Dice, SamplingSettings, Warper, whole
from outdraft.statistics import Statistics
from outdraft.target import Target
from outdraft.text import Detokenizer, decode_text, encode_prompts, stops_at

LOSSY = {
    "num_beams": "beam search is not speculative sampling; leave num_beams out",
    "penalty_alpha": "contrastive search is not supported; leave penalty_alpha out",
    "guidance_scale": "classifier-free guidance runs a second model; leave guidance_scale out",
    "watermarking_config": "watermarking keeps state of its own, which a tree breaks; leave it out",
}
"""Settings of Hugging Face's `generate` that are refused, with the reason."""


TREE_SETTINGS = ("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens", "candidates")


@dataclass
class GenerationOutput:
    """What `generate` returns, row by row in the order of the prompts.

    Attributes:
        tokens: new token ids, an end-of-sequence token included.
        texts: the same as text, special tokens left out; None without a tokenizer.
        prompts: token ids of the prompts.
        finish_reasons: `eos`, `length` (max_new_tokens), `stop` (a stop string) or `context` (the model's limit).
        accepted: for every new token, whether a drafter had guessed it.
        statistics: of all rows together.
        row_statistics: of each row.
        seconds: wall-clock time of the whole call.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    prompts: list[list[int]]
    finish_reasons: list[str]
    accepted: list[list[bool]]
    statistics: Statistics
    row_statistics: list[Statistics]
    seconds: float

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
) -> SpeculativeModel:
    """A target and its drafter, ready to generate.

    Args:
        model: folder, hub id, a loaded `transformers` model, or `reference` for the small one that is shipped.
        draft_model: a drafter's folder (ours, official FSPAD or EAGLE), a smaller language model, `reference`, or None.
        method: `fspad`, `eagle`, `prompt-lookup`, `draft-model` or `none`; by default what `draft_model` is.
        tokenizer: where the model's folder has none.
        dtype: `bfloat16`, `float32`, ...; by default what the device is fastest in.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one.
        backend: `eager` or `packed`; by default `packed` on a CPU.
        trust_remote_code: run code from the model's repository.

    Raises:
        UserError: something cannot be loaded or does not fit together.
    """
    target = load_target(
        model, tokenizer, dtype=dtype, device=device, backend=backend, trust_remote_code=trust_remote_code
    )
    drafter = load_drafter_for(target, draft_model, method=method, backend=backend, trust_remote_code=trust_remote_code)
    return SpeculativeModel(target, drafter)


class SpeculativeModel:
    """A target with a drafter. `generate` answers as the target alone would, faster."""

    def __init__(self, target: Target, drafter: Drafter | None = None):
        self.target, self.drafter = target, drafter

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.target.tokenizer

    @property
    def method(self) -> str:
        return self.drafter.method if self.drafter is not None else "none"

    def with_drafter(self, drafter: Drafter | None) -> SpeculativeModel:
        """The same target with another drafter, or with none: plain decoding."""
        return SpeculativeModel(self.target, drafter)

    def generate(self, prompts: Any, **settings: Any) -> GenerationOutput:
        """Answer one prompt or several at once.

        Args:
            prompts: a text, a conversation, token ids, or a list of any of these.
            **settings: `max_new_tokens` (256), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `bad_words_ids`,
                `min_new_tokens`, `eos_token_id`, `stop_strings`, `seed`, `logits_processor`, `streamer`;
                `tree_depth`, `tree_top_k`, `tree_size`, `candidates`, or `num_speculative_tokens` for chains.
                Greedy unless `do_sample` or a `temperature` is given.

        Raises:
            UserError: an unknown or impossible setting, or a prompt beyond the context.
        """
        streamer = settings.pop("streamer", None)
        start = time.perf_counter()
        rows, shape = self._rows(prompts, settings)
        if streamer is not None:
            if len(rows) > 1:
                raise UserError("a streamer takes one prompt; use .stream() for several")
            streamer.put(torch.tensor([rows[0].prompt]))
        streamed = 0
        for _ in decode(self.target, self.drafter, rows, shape):
            if streamer is not None:
                for token in rows[0].tokens[streamed:]:
                    streamer.put(torch.tensor([token]))
                streamed = len(rows[0].tokens)
        if streamer is not None:
            streamer.end()
        tokenizer = self.tokenizer
        return GenerationOutput(
            [row.tokens for row in rows],
            [decode_text(tokenizer, row.tokens) for row in rows] if tokenizer else None,
            [row.prompt for row in rows],
            [str(row.finish_reason) for row in rows],
            [row.accepted for row in rows],
            Statistics.sum((row.statistics for row in rows), together=True),
            [row.statistics for row in rows],
            time.perf_counter() - start,
        )

    def stream(self, prompts: Any, **settings: Any) -> Iterator[Piece]:
        """The same as `generate`, token by token as they are decided."""
        rows, shape = self._rows(prompts, settings)
        if self.tokenizer is None:
            raise UserError("streaming text needs a tokenizer; use generate for token ids")
        texts = [Detokenizer(self.tokenizer) for _ in rows]
        for _ in decode(self.target, self.drafter, rows, shape):
            for i, row in enumerate(rows):
                for place in range(len(texts[i].tokens), len(row.tokens)):
                    reason = row.finish_reason if place + 1 == len(row.tokens) else None
                    text = texts[i].add(row.tokens[place])
                    if reason is not None:
                        text += texts[i].finish()
                    yield Piece(i, row.tokens[place], text, row.accepted[place], reason)

    def _rows(self, prompts: Any, settings: dict[str, Any]) -> tuple[list[Row], TreeShape]:
        """Settings checked and turned into rows, before anything runs."""
        settings = dict(settings)
        for name, reason in LOSSY.items():
            if settings.pop(name, None) not in (None, 1, 1.0):
                raise UserError(reason)
        tree = {name: settings.pop(name) for name in TREE_SETTINGS if name in settings}
        encoded, _ = encode_prompts(prompts, self.tokenizer)
        max_new_tokens = whole("max_new_tokens", settings.pop("max_new_tokens", 256))
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        eos = settings.pop("eos_token_id", None)
        ends = self.target.eos_token_ids if eos is None else [eos] if isinstance(eos, int) else list(eos)
        strings = settings.pop("stop_strings", None) or []
        strings = [strings] if isinstance(strings, str) else list(strings)
        if strings and self.tokenizer is None:
            raise UserError("stop_strings need a tokenizer; use eos_token_id")
        seed = settings.pop("seed", None)
        seed = None if seed is None else whole("seed", seed)
        extra: Sequence[LogitsProcessor] = settings.pop("logits_processor", None) or []
        sampling = sampling_settings(settings)
        shape = tree_shape(self.drafter, self.target.device, tree, sampling.temperature > 0)
        rows = []
        for i, ids in enumerate(encoded):
            check_prompt(ids, self.target)
            warper = Warper(sampling, len(ids), self.target.vocab_size, ends, extra, self.target.device)
            dice = Dice(None if seed is None else seed + i, self.target.device)
            should_stop = stops_at(strings, self.tokenizer) if strings and self.tokenizer else None
            rows.append(Row(ids, warper, dice, max_new_tokens, frozenset(ends), should_stop))
        return rows, shape


def sampling_settings(settings: dict[str, Any]) -> SamplingSettings:
    """Hugging Face's sampling arguments as ours; greedy unless `do_sample` or a temperature above 0 is given.

    Raises:
        UserError: a name that is not known here.
    """
    known = {field.name for field in fields(SamplingSettings)}
    unknown = sorted(set(settings) - known - {"do_sample"})
    if unknown:
        raise UserError(f"unknown setting '{unknown[0]}'; known are {', '.join(sorted(known))} and do_sample")
    given = {name: settings[name] for name in known if settings.get(name) is not None}
    do_sample = settings.get("do_sample")
    if do_sample is None:
        do_sample = given.get("temperature", 0) != 0
    if not do_sample:
        given["temperature"] = 0.0
    elif given.setdefault("temperature", 1.0) == 0:
        raise UserError("do_sample=True with temperature 0 contradicts itself; leave one of them out")
    return SamplingSettings(**given)


def tree_shape(
    drafter: Drafter | None, device: torch.device, settings: dict[str, Any], sampling: bool = False
) -> TreeShape:
    """The tree asked for, else the one that suits drafter and device.

    Args:
        drafter: None drafts nothing.
        device: of the target.
        settings: some of `TREE_SETTINGS`; None is as good as absent.
        sampling: whether the temperature is above 0. Chains are then sampled from the drafter's law, which the target
            accepts far more often than the most probable tokens; trees that are asked for stay EAGLE-2's.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    if drafter is None:
        return TreeShape(0, 1, 1)
    chain = asked.pop("num_speculative_tokens", None)
    sizes = {name.removeprefix("tree_"): value for name, value in asked.items() if name != "candidates"}
    if chain is not None and sizes:
        raise UserError(
            "num_speculative_tokens is for chains, tree_depth, tree_top_k and tree_size for trees; give one"
        )
    if chain is not None:
        base = TreeShape.chain(chain, candidates="sampled" if sampling and drafter.has_law else "top-k")
    else:
        base = drafter.default_shape(device, sampling and not sizes)
    return replace(base, **sizes, candidates=asked.get("candidates", base.candidates))


def check_prompt(ids: Sequence[int], target: Target) -> None:
    """Raise UserError for a prompt that the model cannot continue."""
    if len(ids) >= target.context_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {target.context_length}; shorten the prompt"
        )
    if max(ids) >= target.vocab_size or min(ids) < 0:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"the prompt holds token {wrong}, the vocabulary ends at {target.vocab_size - 1}")


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """`(rows, longest)`, right-padded."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence) + [value] * (longest - len(sequence)) for sequence in sequences])


def custom_generate(draft_model: Any, *, method: str | None = None, backend: str = "eager", **tree: Any) -> Callable:
    """What a stock model's `generate(..., custom_generate=...)` takes, to decode with a drafter.

    Processors and stopping criteria are those that `transformers` has prepared, applied node by node. The seed comes
    from torch's global generator, so `torch.manual_seed` works as always. transformers 5 hands neither a tokenizer nor
    a streamer on to a custom generate: for stop strings give `stopping_criteria=[StopStringCriteria(tokenizer,
    strings)]`, to stream use `load(...).stream(...)`.

    Args:
        draft_model: as in `load`.
        method: likewise.
        backend: likewise; `packed` keeps a second copy of the linear layers.
        **tree: `tree_depth`, `tree_top_k`, `tree_size`, `candidates` or `num_speculative_tokens`.
    """
    bound: dict[int, tuple[Any, Target, Drafter | None]] = {}

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        _refuse_lossy(generation_config, logits_processor or [], input_ids)
        if id(model) not in bound:
            target = load_target(model, backend=backend)
            bound[id(model)] = (model, target, load_drafter_for(target, draft_model, method=method, backend=backend))
        _, target, drafter = bound[id(model)]
        mask = model_kwargs.get("attention_mask")
        settings = SamplingSettings(temperature=1.0 if generation_config.do_sample else 0.0)
        shape = tree_shape(drafter, target.device, tree, generation_config.do_sample)
        rows = []
        for i, ids in enumerate(input_ids):
            prompt = (ids if mask is None else ids[mask[i].bool()]).tolist()
            check_prompt(prompt, target)
            dice = Dice(int(torch.randint(2**62, ())), target.device)
            processors = list(logits_processor or [])
            if processors and len(prompt) < len(ids):
                processors = [_WithPadding(processors, ids.to(target.device), len(prompt))]
            warper = Warper(settings, len(prompt), target.vocab_size, (), processors, target.device)
            stop = _criteria(ids.tolist(), stopping_criteria, input_ids)
            rows.append(Row(prompt, warper, dice, generation_config.max_length - len(ids), frozenset(), stop))
        for _ in decode(target, drafter, rows, shape):
            pass
        filler = generation_config.pad_token_id
        filler = filler if filler is not None else (target.eos_token_ids or [0])[0]
        new = pad([row.tokens for row in rows], filler).to(input_ids.device)
        sequences = torch.cat([input_ids, new], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    return generate


def _refuse_lossy(config: Any, processors: Sequence[LogitsProcessor], input_ids: Tensor) -> None:
    """Raise UserError for what cannot be kept, or not be returned, when a tree is decoded."""
    if config.num_beams > 1:
        raise UserError(LOSSY["num_beams"])
    if not input_ids.shape[1]:
        raise UserError("a prompt of inputs_embeds cannot be drafted for; give input_ids")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise UserError(f"{name} is not kept when drafting; leave it out")
    for processor in processors:
        name = type(processor).__name__
        if "Watermark" in name or "Guidance" in name:
            raise UserError(f"{name} keeps state of its own, which a tree breaks; leave it out")
        if len(input_ids) > 1 and name.startswith(("PrefixConstrained", "Encoder")):
            raise UserError(f"{name} tells rows apart by their place in the batch; generate one prompt at a time")


class _WithPadding(LogitsProcessor):
    """transformers' processors on a row as transformers has it: with its padding, which some of them count.

    Args:
        processors: as prepared for the padded batch.
        given: `(padded tokens,)` the row's prompt with its padding.
        prompt_length: tokens of the prompt without it.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], given: Tensor, prompt_length: int):
        self.processors = LogitsProcessorList(processors)
        self.given, self.prompt_length = given[None], prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        whole: Any = torch.cat([self.given, input_ids[:, self.prompt_length :]], dim=1)
        return self.processors(whole, scores)  # type: ignore[arg-type]


def _criteria(before: list[int], criteria: Any, like: Tensor) -> Callable[[list[int]], bool] | None:
    """transformers' stopping criteria as a test after every token; `before` is the prompt with its padding."""
    if not criteria:
        return None

    def completed(tokens: list[int]) -> bool:
        ids = torch.tensor([before + tokens], device=like.device)
        return bool(criteria(ids, None)[0])

    return completed
