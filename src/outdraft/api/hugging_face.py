"""Drafting inside a stock model's own `generate`: `model.generate(..., custom_generate=custom_generate(drafter))`.

It takes the processors, stopping criteria and settings that `transformers` has prepared, padding included, and hands
rows to `engine/round.py`. Requests whose results cannot be returned faithfully are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from typing_extensions import Unpack

from outdraft.api.draft_settings import DraftKeywords, DraftSettings, resolve
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.output import pad
from outdraft.api.prompts import check_prompt
from outdraft.api.settings import LOSSY, refuse_unknown
from outdraft.control.settings import Pacer
from outdraft.core.coupling import Coupled, Noise, default_generator, leave_generator
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.drafting.base import Drafter
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.target.ranks import said_by_first
from outdraft.target.target import Target


def custom_generate(
    draft_model: Any,
    *,
    method: str | None = None,
    backend: str | None = None,
    draft: DraftSettings | None = None,
    **settings: Unpack[DraftKeywords],
) -> Callable:
    """Make the callable that a stock model's `generate(..., custom_generate=...)` takes, to decode with a drafter.

    Processors and stopping criteria are those that `transformers` has prepared, applied node by node. Randomness comes
    from torch's global generator. With `torch.manual_seed` a sampled text is that of the stock model token for token
    (in 16 bits up to near-ties). transformers 5 hands neither a tokenizer nor a streamer on to a custom generate. For
    stop strings give `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`; to stream use
    `load(...).stream(...)`.

    Args:
        draft_model: as in `load`.
        method: as in `load`.
        backend: as in `load`; `native` and `packed`, the defaults on a CPU, keep a second copy of linear layers.
        draft: settings of drafting.
        **settings: the fields of `DraftSettings`, which take precedence over those of `draft`; all but `exact`.

    Raises:
        UserError: an unknown or impossible setting.
    """
    given: dict[str, Any] = dict(settings)
    asked = DraftSettings.taken(given, draft)
    refuse_unknown(given, DraftKeywords.__annotations__)
    if asked.exact:
        raise UserError("exact=True is not for custom_generate; use load(model, drafter).generate(..., exact=True)")
    bound: dict[Any, tuple[Any, Target, Drafter | None, dict[Any, Pacer]]] = {}

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        _refuse_lossy(generation_config, logits_processor or [], input_ids)
        key = (id(model), model.device, model.dtype)  # if the model is moved, a new drafter is loaded there
        if key not in bound:
            target = load_target(model, backend=backend)
            loaded = load_drafter_for(target, draft_model, method=method, backend=backend)
            bound[key] = (model, target, loaded, {})
        _, target, drafter, pacers = bound[key]
        mask = model_kwargs.get("attention_mask")
        draws = bool(generation_config.do_sample)
        sampling = SamplingSettings(temperature=1.0 if draws else 0.0)
        if target.shared:  # every process goes on from the first one's generator
            own = default_generator(target.device)
            own.set_state(said_by_first(own.get_state()))
        chosen = resolve(asked, drafter, target.device, sampling=draws, rows=len(input_ids), seeded=True, pacers=pacers)
        pacer, coupled = chosen.pacer, draws and not chosen.dice
        noise = Noise(len(input_ids), target.vocab_size, target.device) if coupled else None
        rows = []
        for i, ids in enumerate(input_ids):
            prompt = (ids if mask is None else ids[mask[i].bool()]).tolist()
            check_prompt(prompt, target)
            seed = 0 if coupled else int(torch.randint(2**62, ()))
            seed = said_by_first(seed) if target.shared else seed
            dice = Dice(seed)
            processors = list(logits_processor or [])
            if processors and len(prompt) < len(ids):
                processors = [_WithPadding(processors, ids.to(target.device), len(prompt))]
            warper = Warper(sampling, len(prompt), target.vocab_size, (), processors, target.device)
            stop = partial(_ended, ids.tolist(), stopping_criteria, input_ids.device) if stopping_criteria else None
            row = Row(
                prompt, warper, dice, generation_config.max_length - len(ids), frozenset(), stop, ngrams=chosen.ngrams
            )
            if noise is not None:
                row.chance = Coupled(noise, i, row.tokens)
            if pacer is not None:
                row.controller = pacer.controller(chosen.shape.depth + 1, seed)
            rows.append(row)
        for _ in decode(target, drafter, rows, chosen.shape, chosen.costs):
            pass
        for row in rows:
            if row.error is not None:
                raise UserError(row.error)
        leave_generator([row.chance for row in rows], [row.tokens for row in rows])
        filler = generation_config.pad_token_id
        filler = filler if filler is not None else (target.eos_token_ids or [0])[0]
        new = pad([row.tokens for row in rows], filler).to(input_ids.device)
        sequences = torch.cat([input_ids, new], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    return generate


def _refuse_lossy(config: Any, processors: Sequence[LogitsProcessor], input_ids: Tensor) -> None:
    """Raise UserError for requests that cannot be kept, or not be returned, when a tree is decoded."""
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
    """Applies transformers' processors to a row with its padding, which some of them count.

    Args:
        processors: processors prepared for the padded batch.
        given: `(padded tokens,)` the row's prompt with its padding.
        prompt_length: tokens of the prompt without padding.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], given: Tensor, prompt_length: int):
        self.processors = LogitsProcessorList(processors)
        self.given, self.prompt_length = given[None], prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        whole: Any = torch.cat([self.given, input_ids[:, self.prompt_length :]], dim=1)
        return self.processors(whole, scores)  # type: ignore[arg-type]


def _ended(before: list[int], criteria: Any, device: torch.device, tokens: list[int]) -> bool:
    """Ask transformers' stopping criteria after a token; `before` is the prompt with its padding."""
    return bool(criteria(torch.tensor([before + tokens], device=device), None)[0])
