"""A stock `transformers` causal language model as drafters and verification see it.

It offers one forward over reserved slots of our cache (4-D mask, a position for every token), which returns features
after the final norm. The head and the embedding are separate functions. The model is used as it is: no modeling file is
copied, nothing is patched. Differences between families and between versions of transformers are handled only here.

This module does not depend on trees, on rows that come and go, or on what is accepted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from outdraft.core.tensors import causal, sent
from outdraft.core.tree import attention_mask
from outdraft.errors import UserError, first_line
from outdraft.target.backends import Sight, accelerate, avoid_plans, backend_of, forward_of, is_native
from outdraft.target.buffers import BufferPool
from outdraft.target.cache import SlotCache
from outdraft.target.limits import context_of, windows_of
from outdraft.target.ranks import processes_of, whole_weight
from outdraft.target.runner import PLAIN, ModelRunner
from outdraft.target.spread import beside_embedding
from outdraft.target.views import Reader, Reads, spread_view

MASK_READING = {"sdpa", "eager"}
"""Attention implementations that take a mask of our own."""


class Target:
    """A causal language model with access to its cache, mask and head.

    Args:
        model: a stock model, in evaluation mode; it stays as it is, unless it is `owned`.
        backend: the backend of its forwards (`backends/`).
        windows: sliding windows by kind of layer; by default those of its configuration.
        owned: True if nobody else uses the model: on our CPU kernels its layers then keep no second copy of weights.

    Raises:
        UserError: the family cannot verify trees, with the reason.
    """

    ragged = True
    """True if the head may run over any nodes; False if every row must have the same number."""

    shared = False
    """True if this process holds a part of every layer, and others the rest (`ranks.py`)."""

    gathered_on: torch.device | None = None
    """If the model's layers lie on several devices or on disk, the device of their outputs, on which rounds run."""

    ignores_generation_config = False
    """True ignores the sampling settings and bans of the model's own generation config, but not its end tokens."""

    exact: Any = None
    """The same target in exact mode, once it was asked for (`exact/`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str = "eager",
        windows: dict[str, int | None] | None = None,
        owned: bool = False,
    ):
        refuse_unfit(model)
        if any(weight.device.type == "cuda" for weight in model.parameters()):
            avoid_plans()
        self.shared = processes_of(model) > 1
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model, self.tokenizer = accelerate(model, backend, owned), tokenizer
        self.config = model.config.get_text_config()
        self._inner: Any = self.model.base_model
        self._accelerated = self.model
        run = forward_of(self.model, self._whole, f"{type(model).__name__}'s forward")
        self._run = None if run == self._whole else run
        self.pool = BufferPool() if self.backend == "graphs" else None
        configured = windows_of(self.config)
        self.windows = configured if windows is None else windows
        self._ignored = [window for kind, window in configured.items() if window and not self.windows[kind]]
        self._head, self.gathered_on = _head(self.model)
        self._neighbours: list[int] = []  # for every layer, how many lie on its device; none where they all do
        if self.gathered_on is not None:
            self._inner, self._neighbours = spread_view(self.model)
        self._readers: dict[Reads, Reader] = {}

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of rounds."""
        return self._embedding.weight.device if self.gathered_on is None else self.gathered_on

    @property
    def backend(self) -> str:
        """The backend of its forwards: the one that was asked for, or the one that replaces it."""
        return backend_of(self._accelerated)

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context_length(self) -> int:
        """Largest number of tokens of prompt and answer together."""
        reach = context_of(self.config)
        # If the model's cache has a window and its forward does not, the two agree up to its length.
        return min([reach, *self._ignored])

    @property
    def slot_limit(self) -> int | None:
        """Largest number of cache slots that a forward may read, if the family's attention has a table of that size."""
        return self.context_length if self.config.model_type in ("gpt_neo",) else None

    @property
    def eos_token_ids(self) -> list[int]:
        """End-of-sequence tokens of the model's generation config, else the tokenizer's."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def _embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[return-value]

    # --- parts -------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Embed `(...,)` ids to `(..., hidden)` by the model's own embedding module (Gemma's scales)."""
        embedded = self._embedding(ids)
        return embedded if self.gathered_on is None else embedded.to(self.gathered_on)

    def head(self, features: Tensor) -> Tensor:
        """Map `(..., hidden)` features after the final norm to `(..., vocab)` logits, as the model itself does."""
        return self._head(features)

    @cached_property
    def embedding_rows(self) -> Tensor:
        """The `(vocab, hidden)` rows of the embedding, on the device of rounds."""
        return whole_weight(self._embedding).to(self.device)

    def logits(self, features: Tensor, counts: Sequence[int]) -> Tensor:
        """Return `(rows, nodes, vocab)` logits after the first `counts` nodes of every row; entries of padding are
        undefined.

        The head runs once over all nodes. Verification would otherwise run it once per level.
        """
        rows, nodes, _ = features.shape
        if not self.ragged or sum(counts) == rows * nodes:
            return self.head(features)
        real = [place for row, count in enumerate(counts) for place in range(row * nodes, row * nodes + count)]
        index = sent(real, features.device)
        own = self.head(features.flatten(0, 1)[index])
        return own.new_empty(rows * nodes, own.shape[-1]).index_copy_(0, index, own).view(rows, nodes, -1)

    def head_through(self, output_layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the map from features to logits through another output layer."""
        return output_layer if isinstance(self._head, nn.Module) else _HeadView(self.model, output_layer)

    def features(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `(batch, tokens, hidden)` features of a causal forward without cache; `mask` as in transformers."""
        if mask is None:
            return (self._run or self._whole)(input_ids=input_ids, **self.causal_inputs(*input_ids.shape))[0]
        return self._whole(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]

    def causal_inputs(self, rows: int, tokens: int) -> dict[str, Any]:
        """Return the inner model's inputs, beside tokens, of a causal forward whose cache nobody reads later."""
        if not is_native(self.backend):
            return {"attention_mask": None, "use_cache": False}
        cache = SlotCache(rows, self.num_layers, tokens)  # our kernels run over a cache
        slots = cache.reserve(tokens, self.device)
        return self.inputs(slots, causal(rows, tokens, self.device), slots, cache)

    # --- forwards over the cache -------------------------------------------------------------------------------

    def new_cache(self, rows: int, capacity: int) -> SlotCache:
        return SlotCache(rows, self._neighbours or self.num_layers, capacity, self.pool)

    def runner(self, cache: SlotCache, reads: Reads = PLAIN) -> ModelRunner:
        """Return a runner for the rows of an empty cache; it gives what is read beside the features."""
        return ModelRunner(self, cache, reads)

    def reader(self, reads: Reads) -> Reader:
        """Return a view of the layers that gives what is read; the same one for the same reads.

        Raises:
            UserError: no such layer, or the model's layers cannot be found.
        """
        if reads not in self._readers:
            self._readers[reads] = Reader(self.model, reads, self.gathered_on)
        return self._readers[reads]

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, slots: Tensor, cache: SlotCache) -> Tensor:
        """Run `(rows, tokens)` over reserved slots; the last arguments as in `inputs`.

        Returns:
            `(rows, tokens, hidden)` features.
        """
        run = self._run or self._whole
        return run(input_ids=tokens, **self.inputs(positions, mask, slots, cache))[0]

    def _whole(self, **inputs: Any) -> tuple[Tensor, ...]:
        if self.gathered_on is None:
            return (self._inner(**inputs).last_hidden_state,)
        features = self._inner(**beside_embedding(self.model, inputs)).last_hidden_state
        return (features.to(self.gathered_on),)

    def inputs(self, positions: Tensor, mask: Tensor, slots: Tensor, cache: SlotCache) -> dict[str, Any]:
        """Return the inner model's inputs beside tokens; positions, mask and slots as in `attention_mask`."""
        lengths, extent = cache.lengths, cache.extent

        def masks() -> Any:
            made = {
                kind: self._mask(attention_mask(mask, slots, lengths, extent, positions, window))
                for kind, window in self.windows.items()
            }
            return made if len(made) > 1 else next(iter(made.values()))

        trees = self.backend == "graphs" or is_native(self.backend)
        sight = Sight(mask, slots, positions, lengths, self.windows, masks) if trees else None
        return {
            "attention_mask": sight or masks(),
            "position_ids": positions[:, -mask.shape[1] :],
            "past_key_values": cache,
            "use_cache": True,
        }

    def _mask(self, mask: Tensor) -> Tensor:
        """Convert a mask for the model's attention: boolean for SDPA's fast kernels, additive for `eager`."""
        if self.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)


# --- what differs between families -----------------------------------------------------------------------------


def refuse_unfit(model: PreTrainedModel) -> None:
    """Raise UserError with the reason if the model cannot verify trees."""
    config, name = model.config.get_text_config(), type(model).__name__
    recurrent = {"linear_attention", "mamba", "conv", "recurrent"} & set(getattr(config, "layer_types", None) or [])
    if recurrent or getattr(model, "_is_stateful", False):
        raise UserError(f"{name} has recurrent layers, whose state cannot be rolled back; use a pure attention model")
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UserError(f"{name} is not a causal language model with a head; load an AutoModelForCausalLM")
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"{name} takes no position_ids (ALiBi?), so a tree cannot be placed; choose another family")
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), Tensor):
        raise UserError(
            f"the embedding of {name} is quantised, so its rows cannot be read; leave it out of quantisation"
        )
    if len({parameter.device for parameter in model.parameters()}) > 1 and not hasattr(model, "hf_device_map"):
        raise UserError(f"{name} was moved to several devices by hand; load it with device_map='auto'")
    if config._attn_implementation not in MASK_READING:
        raise UserError(
            f"attention '{config._attn_implementation}' takes no mask of its own; load with attn_implementation='sdpa'"
        )
    local = config.model_type == "gpt_neo" and "local" in config.attention_layers
    if local and config.window_size < config.max_position_embeddings:
        raise UserError(
            f"{name} measures its local window of {config.window_size} in cache slots, which a tree breaks; "
            "only GPT-Neo models whose window covers the context can be verified"
        )
    if getattr(config, "attention_chunk_size", None) and "chunked_attention" in (config.layer_types or []):
        raise UserError(f"{name} attends in chunks of positions, which is not supported; choose another family")


def _head(model: PreTrainedModel) -> tuple[nn.Module | _HeadView, torch.device | None]:
    """Return the output layer if the model does nothing more to its logits, else the model's own path to them.

    The second value is `Target.gathered_on`.
    """
    head, view = model.get_output_embeddings(), _HeadView(model)
    weight: Any = model.get_input_embeddings().weight
    probe = torch.linspace(-3, 3, model.config.get_text_config().hidden_size, dtype=weight.dtype)[None, None]
    devices = {parameter.device for parameter in model.parameters()}
    spread = hasattr(model, "hf_device_map") and (len(devices) > 1 or weight.is_meta)
    if not spread:
        probe = probe.to(weight.device)
    with torch.inference_mode():
        try:
            through = view(probe)
            device = through.device if spread else None
            probe = probe.to(through.device)
        except Exception as error:  # families raise what they like
            raise UserError(
                f"{type(model).__name__} makes its logits of something else than its last features "
                f"({first_line(error)}); choose a model of another family"
            ) from error
        try:
            return (head if torch.equal(head(probe), through) else view), device
        except RuntimeError:  # features pass through more than this layer
            return view, device


class _HeadView:
    """The model's own path from final features to logits (scaling, soft capping and all).

    It is a shallow copy of the model whose inner model returns its input. Every weight is shared, except another output
    layer if one is given.
    """

    def __init__(self, model: PreTrainedModel, output_layer: nn.Module | None = None):
        own = model.get_output_embeddings()
        self.view = copy.copy(model)
        self.view.__dict__.pop("forward", None)  # accelerate's hooks put one there that runs the original model
        self.view._modules = {
            name: output_layer if output_layer is not None and child is own else child
            for name, child in model._modules.items()
        }
        self.view._modules[model.base_model_prefix] = _HandBack()

    def __call__(self, features: Tensor) -> Tensor:
        flat = features.reshape(1, -1, features.shape[-1])
        return self.view(inputs_embeds=flat, use_cache=False).logits.view(*features.shape[:-1], -1)


class _HandBack(nn.Module):
    @property
    def decoder(self) -> _HandBack:
        """Return itself: OPT's language model calls the part inside its inner model."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _FeaturesOnly:
        return _FeaturesOnly(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


class _FeaturesOnly(BaseModelOutputWithPast):
    """An output with features only; whatever else a family looks up (cross attentions, router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
