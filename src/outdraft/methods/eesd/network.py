"""EESD's network (arXiv 2406.03853, section 3.1): one trained layer on a hidden state of the target, then its head.

The layer is of the family's own kind and begins as a copy of the target's last one. Everything else (the first layers
below it, embedding, final norm, head unless it has its own) belongs to the target. One class trains and decodes.

Its folder is read without the target or with it, and exported as an ordinary model of the target's family: the target's
first N layers, the exit layer as the last one, and an untied head. vLLM runs it as method `draft_model`, and
`transformers` as `assistant_model`. There the first layers are copies with a KV cache of their own; only outdraft
shares them with the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from outdraft.drafting.folder import CONFIG, find_folder, is_own, read_config, some
from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import (
    TARGET_FACTS,
    Network,
    OwnFolder,
    assembled,
    read_own,
    refuse_another,
    target_facts,
)
from outdraft.methods.registry import ExportTarget, Written
from outdraft.methods.vllm_folder import COMPARED_TOKENS
from outdraft.target.backends.packed import plain_weights
from outdraft.target.target import Target
from outdraft.target.views import Reads, exit_view, layers_of


@dataclass(frozen=True)
class ExitLayerConfig:
    """The settings of an exit layer, beside the target that it belongs to."""

    exit_layer: int
    """The number of the target's layers that run before the exit layer, at least 1."""
    own_head: bool = False
    """True if the drafter has its own output layer; else it uses the target's."""


class ExitLayer(Network):
    """A layer on the hidden states after the target's first `config.exit_layer` layers.

    Args:
        layer: a layer of the target's family.
        head: its own output layer, if `config.own_head`.
    """

    method, needs = "eesd", TARGET_FACTS

    def __init__(self, config: ExitLayerConfig, layer: nn.Module, head: nn.Module | None = None):
        super().__init__()
        self.config, self.layer, self.head = config, layer, head

    @classmethod
    def beginning(cls, model: PreTrainedModel, config: ExitLayerConfig) -> ExitLayer:
        """Build the layer that training starts from: float32 copies of the model's last layer and, for `own_head`, its
        head.

        Raises:
            UserError: the model has no such layer to exit after, or its weights cannot be trained.
        """
        exit_layer = empty(model, config)
        originals = {"layer": layers_of(model)[-1], "head": model.get_output_embeddings()}
        weights = {
            f"{part}.{name}": weight.to(torch.float32, copy=True)
            for part, own in exit_layer._modules.items()
            if own is not None
            for name, weight in plain_weights(originals[part], own.state_dict()).items()
        }
        if weights.keys() != exit_layer.state_dict().keys():
            raise UserError(
                "the target's last layer has weights of another form than its family's; load it unquantised"
            )
        exit_layer.load_state_dict(weights, assign=True)
        return exit_layer.requires_grad_(True)

    @property
    def fits(self) -> dict[str, int]:
        return {}  # the facts that it needs say it

    def bind(self, target: Target) -> BoundExit:
        """Bind the layer to the parts of its target that it borrows."""
        return BoundExit(self, target)


def empty(model: PreTrainedModel, config: ExitLayerConfig) -> ExitLayer:
    """Build an exit layer of the model's family without weights (`load_state_dict(assign=True)` loads them)."""
    count = len(layers_of(model))
    if not 1 <= config.exit_layer < count:
        raise UserError(f"the exit layer must be between 1 and {count - 1} for this model, not {config.exit_layer}")
    try:
        with torch.device("meta"):
            pattern = type(model)(model.config)
    except Exception as error:  # a model's own code may do anything
        raise UserError(
            f"{type(model).__name__} cannot be built again from its config ({first_line(error)})"
        ) from error
    layer = layers_of(pattern)[-1]
    _lend_buffers(layer, layers_of(model)[-1])
    head = copy.copy(pattern.get_output_embeddings()) if config.own_head else None
    return ExitLayer(config, layer, head).eval()


def _lend_buffers(layer: nn.Module, original: nn.Module) -> None:
    """Lend constants that no checkpoint holds (masks, frequencies) from the model's own layer; a backend's additions
    are left out."""
    for name, buffer in original._buffers.items():
        if name in layer._buffers:
            layer._buffers[name] = buffer
    for name, child in original._modules.items():
        if child is not None and layer._modules.get(name) is not None:
            _lend_buffers(layer._modules[name], child)  # type: ignore[arg-type]


class BoundExit:
    """An exit layer with the final norm and the head of its target; it holds views, no weights."""

    def __init__(self, exit_layer: ExitLayer, target: Target):
        self.view = exit_view(target.model, exit_layer.layer, target.gathered_on)
        self.head: Callable[[Tensor], Tensor] = (
            target.head if exit_layer.head is None else target.head_through(exit_layer.head)
        )

    def features(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """Map `(rows, tokens, hidden)` hidden states to the head's input; other inputs are those of the inner model."""
        return self.view(hidden, **inputs)[0]


def read_exit_folder(folder_or_hub_id: str | Path) -> OwnFolder:
    """Read settings and tensors of an exit layer, without its target."""
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if not is_own(config) or config["method"] != ExitLayer.method:
        raise UserError(f"'{folder}' holds no exit layer; choose a folder that `outdraft train --method eesd` made")
    own = read_own(folder, config, ExitLayerConfig)
    if missing := [name for name in TARGET_FACTS if name not in own.target]:
        raise UserError(f"'{folder / CONFIG}' says nothing of its target's {some(missing)}; copy or train it again")
    return own


def load_exit_layer(
    folder_or_hub_id: str | Path,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExitLayer:
    """Load an exit layer from an outdraft folder or the Hugging Face Hub.

    Args:
        model: the target that it was trained for, whose family the layer belongs to.
        dtype: precision of the weights; as stored when None.
        device: device of the weights; the model's when None.
    """
    found = read_exit_folder(folder_or_hub_id)
    facts = target_facts(model)
    refuse_another({name: found.target[name] for name in facts}, facts)
    place: Any = model.get_input_embeddings().weight.device if device is None else device
    return assembled(
        lambda: empty(model, found.config),
        found.tensors,
        found.file,
        dtype=dtype,
        device=place,
        asked_by="this target",
        fix="choose its own drafter or train one (outdraft train)",
    )


def export_exit(
    source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
) -> Written:
    """Write the drafter as a model's folder, the same for every engine; arguments as in `Method.export`."""
    stored = getattr(target.config, "dtype", None)
    precision = dtype or stored or torch.float32
    loaded = target.load(precision)
    exit_layer = load_exit_layer(source, loaded.model, dtype=precision).eval()
    small = exit_model(exit_layer, loaded.model)
    small.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return Written(exit_layer.method, type(small).__name__, _both(exit_layer, loaded, folder), "draft_model", False)


@torch.inference_mode()
def _both(exit_layer: ExitLayer, target: Target, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return logits of the written model, read back by transformers, beside those of outdraft's own forward."""
    target.model.float()
    exit_layer.float()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # every library under here has exceptions of its own
        raise UserError(f"the exported model cannot be read ({first_line(error)}); use `outdraft serve`") from error
    read, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise UserError(
                f"the exported model has {what.replace('_', ' ')} {some(map(str, report[what]))}; report it"
            )
    tokens = min(COMPARED_TOKENS, target.context_length)
    ids = torch.randint(target.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]
    inputs: dict[str, Any] = {"position_ids": positions, "attention_mask": None, "use_cache": False}
    split = exit_layer.config.exit_layer
    hidden = target.reader(Reads(False, (split,), split)).lower(input_ids=ids, **inputs)
    bound = exit_layer.bind(target)
    ours = bound.head(bound.features(hidden, **inputs))
    return [(ours, read.eval()(input_ids=ids, use_cache=False).logits)]


def exit_model(exit_layer: ExitLayer, model: PreTrainedModel) -> PreTrainedModel:
    """Build a stand-alone model that shares the weights of both (`save_pretrained` copies them).

    Args:
        exit_layer: the trained layer, in the model's precision.
    """
    count = exit_layer.config.exit_layer
    config = _shorter(model.config, count)
    try:
        with torch.device("meta"):
            small = type(model)(config)
    except Exception as error:  # a model's own code may do anything
        raise UserError(
            f"{type(model).__name__} cannot be built with {count + 1} layers ({first_line(error)}); "
            "serve this drafter with `outdraft serve`"
        ) from error
    small.load_state_dict(_weights(exit_layer, model, small), assign=True)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _shorter(config: Any, count: int) -> Any:
    """Return the config for the first `count` layers and one more, which is like the last."""
    text = config.get_text_config()
    if text is not config:
        raise UserError(
            "the target is part of a larger model (images, sound), which cannot be cut; export nothing of it"
        )
    total, values = config.num_hidden_layers, config.to_dict()
    for name, value in values.items():  # whatever says one thing for every layer
        if isinstance(value, list) and len(value) == total:
            values[name] = [*value[:count], value[-1]]
    layers = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values)
    return type(config).from_dict({**values, layers: count + 1, "tie_word_embeddings": False})


def _weights(exit_layer: ExitLayer, model: PreTrainedModel, small: PreTrainedModel) -> dict[str, Tensor]:
    """Collect the small model's weights: first layers, then the exit layer, and all else from the target by name."""
    modules = [*layers_of(model)[: exit_layer.config.exit_layer], exit_layer.layer]
    prefix = next(name for name, module in small.named_modules() if module is layers_of(small))
    inside = {
        f"{prefix}.{place}.{name}": weight
        for place, (module, like) in enumerate(zip(modules, layers_of(small), strict=True))
        for name, weight in plain_weights(module, like.state_dict()).items()
    }
    output: Any = small.get_output_embeddings()
    at = next(name for name, module in small.named_modules() if module is output)
    source: Any = exit_layer.head if exit_layer.head is not None else model.get_output_embeddings()
    outside = {
        **{name: weight for name, weight in model.state_dict().items() if not name.startswith(f"{prefix}.")},
        **{f"{at}.{name}": weight for name, weight in plain_weights(source, output.state_dict()).items()},
    }
    found = {name: weight.detach().clone() for name, weight in {**outside, **inside}.items()}
    if missing := sorted(set(small.state_dict()) - set(found)):
        raise UserError(f"the target lacks {missing[0]}, so its first layers are no model; serve with `outdraft serve`")
    return {name: found[name] for name in small.state_dict()}
