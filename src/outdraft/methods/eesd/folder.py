"""The folder of an exit layer: read without its target or with it, and exported as an ordinary model.

The exported model is of the target's own family, with the target's first N layers, the exit layer as the last one, and
an untied head. vLLM runs it as method `draft_model`, and `transformers` as `assistant_model`. There the first layers
are copies with a KV cache of their own; only outdraft shares them with the target.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from outdraft.drafting.folder import CONFIG, find_folder, is_own, read_config, some
from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import TARGET_FACTS, OwnFolder, assembled, read_own, refuse_another, target_facts
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, empty
from outdraft.methods.registry import ExportTarget, Written
from outdraft.methods.vllm_folder import COMPARED_TOKENS
from outdraft.target.backends.packed import plain_weights
from outdraft.target.target import Target
from outdraft.target.views import Reads, layers_of


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
        model: its target.
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
