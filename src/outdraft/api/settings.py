"""The keywords of `generate`, with Hugging Face's names for sampling, checked before anything runs.

The settings of drafting are in `draft_settings.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict

from outdraft.api.draft_settings import DraftKeywords, DraftSettings
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.errors import UserError, meant

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from outdraft.target.target import Target

LOSSY = {
    "num_beams": "beam search is not speculative sampling; leave num_beams out",
    "penalty_alpha": "contrastive search is not supported; leave penalty_alpha out",
    "guidance_scale": "classifier-free guidance runs a second model; leave guidance_scale out",
    "watermarking_config": "watermarking keeps state of its own, which a tree breaks; leave it out",
}
"""Settings of Hugging Face's `generate` that are refused, with the reason."""


class SamplingKeywords(TypedDict, total=False):
    """`do_sample` and the fields of `SamplingSettings`, which document their meaning."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    min_new_tokens: int | None
    min_length: int | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    no_repeat_ngram_size: int | None
    sequence_bias: Any
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None


class GenerateSettings(SamplingKeywords, DraftKeywords, total=False):
    """Every keyword of `generate` and `stream`: stopping, sampling, drafting."""

    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    seed: int | None
    logits_processor: Sequence[LogitsProcessor] | None
    response_format: Mapping[str, Any] | None
    chat_template_kwargs: Mapping[str, Any] | None
    draft: DraftSettings | None


KEPT = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
)
"""Settings of a model's own generation config that apply wherever none are given, as in transformers."""

NOT_KEPT = {
    **{"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "guidance_scale": 1, "watermarking_config": None},
    **{"encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0, "constraints": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None},
    **{"remove_invalid_values": False, "top_h": None, "dola_layers": None, "force_words_ids": None},
    **{"max_time": None, "token_healing": False},
}
"""Settings of a model's generation config that are refused, with the value that asks for nothing."""


def model_settings(target: Target) -> dict[str, Any]:
    """Return the sampling settings and bans of the model's own generation config, if it has any.

    Raises:
        UserError: a setting that drafting cannot keep.
    """
    config = target.model.generation_config
    if target.ignores_generation_config or config is None:
        return {}
    for name, nothing in NOT_KEPT.items():
        if getattr(config, name, None) not in (None, nothing):
            raise UserError(
                f"the model's generation config sets {name}, which is not kept here; take it out, or ignore that file "
                "with generation_config='vllm' (--generation-config vllm)"
            )
    neutral = SamplingSettings(temperature=1.0)
    own = {name: getattr(config, name, None) for name in KEPT}
    for name in ("suppress_tokens", "begin_suppress_tokens"):  # as in transformers, what the model lacks is not banned
        if isinstance(banned := own[name], list):
            own[name] = [token for token in banned if 0 <= token < target.vocab_size]
    own = {name: value for name, value in own.items() if value not in (None, getattr(neutral, name, False))}
    return {name: value for name, value in own.items() if value or name != "temperature"}


def model_stops(target: Target) -> list[str]:
    """Return the stop strings of the model's own generation config, which hold where none are given."""
    config = target.model.generation_config
    given = None if target.ignores_generation_config else getattr(config, "stop_strings", None)
    return [given] if isinstance(given, str) else list(given or [])


def in_effect(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the model's own settings that have an effect beside what was given."""
    drawn = sampling_settings(dict(given), own).temperature > 0
    filters = () if drawn else KEPT[1:8]
    return {
        name: value
        for name, value in own.items()
        if name != "do_sample" and given.get(name) is None and name not in filters
    }


def sampling_settings(settings: dict[str, Any], own: Mapping[str, Any] | None = None) -> SamplingSettings:
    """Convert Hugging Face's sampling arguments; greedy unless `do_sample` or a temperature above 0 is given.

    Args:
        settings: keywords as `generate` takes them.
        own: settings of the model (`model_settings`), used where `settings` says nothing.

    Raises:
        UserError: an unknown name.
    """
    known = [field.name for field in fields(SamplingSettings)]
    refuse_unknown(
        set(settings) - {"do_sample", *known}, (*GenerateSettings.__annotations__, "max_new_tokens", "streamer")
    )
    given = {name: settings[name] for name in known if settings.get(name) is not None}
    own = dict(own or {})
    do_sample, drawn_by_itself = settings.get("do_sample"), own.pop("do_sample", False)
    if do_sample is None:
        do_sample = given["temperature"] != 0 if "temperature" in given else drawn_by_itself
    given = own | given
    if not do_sample:
        given["temperature"] = 0.0
    elif given.setdefault("temperature", 1.0) == 0:
        raise UserError("do_sample=True with temperature 0 contradicts itself; leave one of them out")
    return SamplingSettings(**given)


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for an unknown name, with the one that was meant."""
    known = sorted(known)
    for name in sorted(names):
        said = meant(name, known) or f"; known are {', '.join(known)}"
        raise UserError(f"unknown setting '{name}'{said}")
