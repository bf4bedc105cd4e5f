"""The baselines: `generate` of transformers on the same model in the same precision, timed and counted like outdraft.
It runs plain, with prompt lookup, with an assistant model, or with an early exit of the target itself.

The tokens of a round are read off its streamer, which is called once per target forward. The library does not tell the
number of its candidates, so a baseline has no acceptance rate.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from outdraft.api.settings import model_settings
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError, first_line
from outdraft.evaluation.bench.measure import Answer, Contender
from outdraft.target.target import Target

STOCK = "transformers generate"
"""The name of the baseline that decodes plainly."""

LOOKUP_TOKENS = 10
"""The number of candidates of the stock prompt lookup, its own default."""

SHAPES = "generate, prompt-lookup, prompt-lookup=N, assistant, assistant=PATH, early-exit=N"


def peers(asked: Sequence[str], target: Target, assistants: Sequence[Target], backend: str | None) -> list[Contender]:
    """Build the requested baselines.

    Args:
        asked: names of baselines, each of one of `SHAPES`.
        target: the model, with the modules that the baselines run on.
        assistants: loaded small models; `assistant` without a path takes the first. They may be packed, which favours
            the baseline.
        backend: backend of an assistant that is loaded here.

    Raises:
        UserError: the baseline is unknown, has no assistant, or the model has no early exit.
    """
    found = []
    for text in dict.fromkeys(asked):
        kind, _, value = text.partition("=")
        if kind == "generate" and not value:
            found.append(stock(target))
        elif kind == "prompt-lookup":
            extra = {"prompt_lookup_num_tokens": _count(text, value) if value else LOOKUP_TOKENS}
            found.append(stock(target, "transformers prompt-lookup", "prompt-lookup", extra))
        elif kind == "assistant":
            found.append(_assisted(target, value, assistants, backend))
        elif kind == "early-exit" and value:
            found.append(_early_exit(target, _count(text, value)))
        else:
            raise UserError(f"unknown peer '{text}' in --peers; choose from {SHAPES}")
    names = [contender.name for contender in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--peers names '{name}' twice; leave one of them out")
    return found


def stock(
    target: Target, name: str = STOCK, method: str = "none", extra: dict[str, Any] | None = None, parameters: int = 0
) -> Contender:
    """Make a contender of transformers' `generate` on the target's model object, with `extra` arguments."""
    model: Any = target.model
    ends = target.eos_token_ids

    def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
        ids = torch.tensor([prompt], device=target.device)
        temperature = settings.get("temperature", 0)
        # what the model's own generation config says holds for both; transformers' own defaults for neither
        own = {"top_k": 0, "top_p": 1.0} | model_settings(target)
        sampling = own | {"do_sample": True, "temperature": temperature} if temperature else {}
        most = min(settings["max_new_tokens"], target.context_length - len(prompt))
        with _config_kept(model), torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(settings.get("seed", 0))
            rounds = _Rounds()
            start = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                streamer=rounds,
                tokenizer=target.tokenizer,  # for stop strings of the generation config
                **({"do_sample": False} | sampling),
                **(extra or {}),
            )
            tokens = output[0, len(prompt) :].tolist()
            seconds = time.perf_counter() - start
        return Answer(tokens, seconds, *counted(rounds.emitted, len(tokens), rounds.first - start, seconds))

    return Contender(name, decode, method, parameters)


class _Rounds(BaseStreamer):
    """A streamer that counts the tokens of every target forward and records the time of the first."""

    def __init__(self) -> None:
        self.emitted: list[int] = []
        self.first = 0.0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # `generate` streams the prompt itself first
            self._prompt_seen = True
            return
        if not self.emitted:
            self.first = time.perf_counter()
        self.emitted.append(value.numel())

    def end(self) -> None:
        """Do nothing, as no tokens are held back."""


def counted(emitted: Sequence[int], tokens: int, prefill: float, seconds: float) -> tuple[Statistics, list[bool]]:
    """Make outdraft's statistics of a decoding of which only the tokens of each target forward are known.

    Seconds after the first token are not split; they all count as `rest_seconds`.

    Args:
        emitted: tokens of every target forward, the prompt's first; the last may reach past the answer's end.
        prefill: seconds to the first token.

    Returns:
        The statistics, whose rounds are the forwards after the one over the prompt; and for every token whether it was
        a candidate: all of a round but its last.
    """
    rounds = [*emitted[:-1], min(emitted[-1], tokens - sum(emitted[:-1]))][1:]
    statistics = Statistics(
        rounds=len(rounds),
        emitted=sum(rounds),
        accepted=sum(rounds) - len(rounds),
        lengths=[count - 1 for count in rounds],
        prefill_seconds=prefill,
        rest_seconds=seconds - prefill,
    )
    return statistics, [place < count - 1 for count in emitted for place in range(count)][:tokens]


def _assisted(target: Target, path: str, assistants: Sequence[Target], backend: str | None) -> Contender:
    from outdraft.api.loading import load_target

    if path:
        assistant = load_target(path, dtype=target.dtype, device=target.device, backend=backend)
    elif assistants:
        assistant = assistants[0]
    else:
        raise UserError("the peer 'assistant' needs a small model; give its folder, --peers assistant=PATH")
    if assistant.vocab_size != target.vocab_size:
        raise UserError(
            f"the assistant '{path}' has {assistant.vocab_size} tokens, the target {target.vocab_size}; "
            "choose one with the target's tokenizer"
        )
    extra = {"assistant_model": assistant.model}
    return stock(target, "transformers assistant", "draft-model", extra, assistant.num_parameters)


def _early_exit(target: Target, layers: int) -> Contender:
    """Make a contender that drafts with the target's first layers."""
    model: Any = target.model
    if not 1 <= layers < target.num_layers:
        raise UserError(f"--peers early-exit={layers}: the target has {target.num_layers} layers; give 1 to one less")
    with _config_kept(model):
        try:
            inner = getattr(model, model.base_model_prefix)
            whole = inner(torch.tensor([[0, 1]], device=target.device)).last_hidden_state
            inner.config.num_hidden_layers = layers
            short = inner(torch.tensor([[0, 1]], device=target.device)).last_hidden_state
        except Exception as error:  # a family without such an inner model fails in its own way
            raise UserError(f"--peers early-exit: this model has no early exit ({first_line(error)})") from error
        if torch.equal(whole, short):
            raise UserError("--peers early-exit: this model runs all of its layers whatever its config says")
    return stock(target, f"transformers early-exit {layers}", "early-exit", {"assistant_early_exit": layers})


@contextmanager
def _config_kept(model: Any) -> Iterator[None]:
    """Restore the model's config, which the stock early exit changes while drafting and leaves so if interrupted."""
    config = getattr(getattr(model, model.base_model_prefix, model), "config", model.config)
    layers, kept = getattr(config, "num_hidden_layers", None), model.generation_config
    model.generation_config = copy.deepcopy(kept)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.generation_config = kept
        if layers is not None:
            config.num_hidden_layers = layers


def _count(text: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--peers {text}: '{value}' must be a whole number of at least 1")
    return int(value)
