"""EAGLE-3 folders: outdraft's own, the authors' layout, SpecForge's, AngelSlim's and speculators'.

Layers whose outputs are read are named by three conventions:

- not at all: `hidden_states` 2, L // 2 and L - 3 of L layers, which is what the authors' code reads;
- `eagle_aux_hidden_state_layer_ids` inside `eagle_config` (SpecForge, SGLang, ModelOpt): the *output* of layer id,
  counted from 0;
- the same key at the top (speculators, vLLM): the *input* of layer id.

Heads that were trained here are exported for vLLM's method `eagle3` in the authors' layout. vLLM reads layers in rising
order, whatever the order in the config. The target's embedding is shared; the output layer, the offsets `d2t` and the
bitmap `t2d` are the drafter's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.drafting.folder import CONFIG, check_value, find_folder, is_own, read_config, read_weights
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, assembled, read_own
from outdraft.methods.eagle3 import is_eagle3
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.registry import ExportTarget, Written
from outdraft.methods.tapped import BESIDE, draft_tokens_of, layer_section, layer_settings, tap_ids, verifier_of
from outdraft.methods.vllm_folder import (
    COMPARED_TOKENS,
    Files,
    layer_shapes,
    llama_config,
    refuse_target,
    written_and_read,
)

TAP_IDS = "eagle_aux_hidden_state_layer_ids"


def load_eagle3(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint[Eagle3Head]:
    """Load an EAGLE-3 drafter from a folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`.

    Returns:
        The drafter. Its layout is `outdraft`, `eagle3` (the authors'), `specforge`, `angelslim` or `speculators`.
    """
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if is_own(config) and config["method"] == Eagle3Head.method:
        return read_own(folder, config, Eagle3Config).checkpoint(Eagle3Head, dtype, device)
    if not is_eagle3(config):
        raise UserError(f"'{folder}' holds no EAGLE-3 drafter; leave --method out")
    file, tensors = read_weights(folder)
    layout = _layout(config)
    names = {_ours(name): name for name in tensors}
    if more := [name for name in names if re.match(r"layers\.[1-9]", name)]:
        raise UserError(f"{file} holds {names[more[0]]}; only EAGLE-3 drafters of one layer load")
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    settings = _settings(config, found, folder)
    kept = draft_tokens_of(config, found, settings.vocab_size, file)
    settings.draft_vocab_size = 0 if kept is None else len(kept)
    layer = "layers.0." if layout == "speculators" else "midlayer."
    head = assembled(
        lambda: Eagle3Head(settings),
        found,
        file,
        kept=kept,
        dtype=dtype,
        device=device,
        names=names,
        shown=lambda name: official_name(name, layer),
        beside=BESIDE,
    )
    return Checkpoint(head, layout, {} if (target := verifier_of(config)) is None else {"id": target})


def _layout(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures") or []
    if "speculators_model_type" in config:
        return "speculators"
    if "target_model_type" in config or "Eagle3LlamaForCausalLM" in classes:
        return "angelslim"
    return "specforge" if any("Eagle3" in str(name) for name in classes) or "eagle_config" in config else "eagle3"


# --- settings --------------------------------------------------------------------------------------------------


def _settings(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Eagle3Config:
    eagle = config.get("eagle_config") or {}
    flags = {name: config.get(name, eagle.get(name)) or False for name in ("fc_norm", "norm_before_fc", "norm_output")}
    flags["norm_before_residual"] = _norm_before_residual(config, eagle, folder)
    for name, value in flags.items():
        check_value(name, value, (bool,), folder)
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(f"'{folder}' reads no layers of its target (use_aux_hidden_state); choose an EAGLE-3 drafter")
    if (layer_section(config).get("layer_types") or [])[:1] == ["sliding_attention"]:
        raise UserError(f"'{folder}' looks back over a window only, which is not supported; choose another drafter")
    found = Eagle3Config(
        **layer_settings(config, tensors, folder, "self_attn."),
        fc_bias="fc.bias" in tensors,
        tap_norms=flags["fc_norm"] or "fc_norm.0.weight" in tensors,
        norm_before_fc=flags["norm_before_fc"] or "input_norm.weight" in tensors,
        norm_before_residual=flags["norm_before_residual"],
        norm_output=flags["norm_output"],
    )
    if ids := config.get(TAP_IDS) or eagle.get(TAP_IDS):
        found.tap_ids = tap_ids(ids, TAP_IDS, folder)
        found.tap_unit = "input" if config.get(TAP_IDS) else "output"
    return found


def _norm_before_residual(config: Mapping[str, Any], eagle: Mapping[str, Any], folder: Path) -> Any:
    """Read `norm_before_residual`, False by default; speculators' layout must set it, as its readers disagree."""
    found = config.get("norm_before_residual", eagle.get("norm_before_residual"))
    if found is None and "speculators_model_type" in config:
        warnings.warn(
            f"'{folder / CONFIG}' says nothing of norm_before_residual, which is taken for false as speculators does "
            "(vLLM: true); if drafts are poor, write it there",
            stacklevel=4,
        )
    return found or False


# --- names -----------------------------------------------------------------------------------------------------


def _ours(theirs: str) -> str:
    """Translate a file's tensor name to that in `Eagle3Head`."""
    return re.sub(r"^(midlayer|layers\.0)\.(mlp\.)?", "", theirs.removeprefix("model."))


def official_name(ours: str, layer: str = "midlayer.") -> str:
    """Translate a tensor name of `Eagle3Head` to that in others' files."""
    if ours.startswith(("gate_proj", "up_proj", "down_proj")):
        return f"{layer}mlp.{ours}"
    inside = ours.startswith(("self_attn", "input_layernorm", "hidden_norm", "post_attention_layernorm"))
    return layer + ours if inside else ours


ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER = "midlayer."


def export_eagle3(
    source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
) -> Written:
    """Write the drafter's folder for vLLM; arguments as in `Method.export`."""
    if engine == "hf":
        raise UserError("transformers' assistant_model takes whole language models, no EAGLE-3 head; use --engine vllm")
    checkpoint = load_eagle3(source)
    head = checkpoint.network
    if checkpoint.layout != "outdraft":
        raise UserError(f"'{source}' is an EAGLE-3 folder already, which engines read as it is (vLLM: method eagle3)")
    taps = head.config.taps(target.config.num_hidden_layers)
    _refuse_unexportable(head.config, taps)
    refuse_target(head.config, target.config)
    if dtype is not None:
        head.to(dtype)
    config = engine_config(head.config, target.config, taps, head.fc.weight.dtype)
    written, read = written_and_read(folder, checkpoint, config, _tensors(head), _shapes)
    return Written(head.method, ARCHITECTURE, _both(head, written, read), "eagle3", False)


def _refuse_unexportable(config: Eagle3Config, taps: tuple[int, ...]) -> None:
    for name, what in (
        ("fc_bias", "a bias in its fusion layer"),
        ("attention_bias", "biases in its attention"),
        ("head_norms", "norms on its query and key heads"),
    ):
        if getattr(config, name):
            raise UserError(f"the drafter has {what} ({name}), which vLLM cannot run; train one without")
    if list(taps) != sorted(set(taps)):
        raise UserError(
            f"the drafter reads layers {list(taps)}, vLLM only layers in rising order; train one with these"
        )


def engine_config(config: Eagle3Config, target: Any, taps: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Make the folder's config.json: a Llama config of one layer, the layers to read and the drafter's switches."""
    return {
        **llama_config(config, target, dtype, ARCHITECTURE, config.rope),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        TAP_IDS: list(taps),
        "num_aux_hidden_states": len(taps),
        "fc_norm": config.tap_norms,
        "norm_before_fc": config.norm_before_fc,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
    }


def _tensors(head: Eagle3Head) -> dict[str, Tensor]:
    """Return the drafter's tensors under their official names, its draft vocabulary as offsets and bitmap."""
    state = head.state_dict()
    ids = state.pop("draft_tokens", None)
    named = {official_name(name, LAYER): tensor for name, tensor in state.items()}
    if ids is None:
        return named
    bitmap = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    bitmap[ids] = True
    return {**named, "d2t": ids - torch.arange(len(ids)), "t2d": bitmap}


def _shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """List the tensors that vLLM's loader asks for, from the folder's config alone; an embedding where there is one."""
    d, taps, width = config["hidden_size"], config["num_aux_hidden_states"], config["target_hidden_size"]
    kept, vocab = config["draft_vocab_size"], config["vocab_size"]
    shapes = {
        "fc.weight": (d, taps * width),
        **layer_shapes(config, LAYER, 2 * d),
        f"{LAYER}input_layernorm.weight": (d,),
        f"{LAYER}hidden_norm.weight": (d,),
        "norm.weight": (d,),
        "lm_head.weight": (kept, d),
    }
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{tap}.weight": (width,) for tap in range(taps)}
    if config["norm_before_fc"]:
        shapes["input_norm.weight"] = (taps * width,)
    if kept != vocab:
        shapes |= {"d2t": (kept,), "t2d": (vocab,)}
    if "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (vocab, d)
    return shapes


@torch.inference_mode()
def _both(head: Eagle3Head, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Run the drafter's own forward and the written files' on random inputs, and compare the drafted tokens' ids."""
    head = head.float()
    noise, taps, width = torch.Generator().manual_seed(0), head.config.num_taps, head.config.target_hidden_size
    tokens = min(COMPARED_TOKENS, head.config.max_position_embeddings)
    embeddings = torch.randn(tokens, head.config.hidden_size, generator=noise)
    features = torch.randn(tokens, (1 + taps) * width, generator=noise)
    normed, fed_back = (out[0] for out in head(embeddings[None], features[None]))
    files = Files(config, tensors, head.frequencies())
    parts = list(features[:, width:].split(width, dim=-1))
    if config["fc_norm"]:
        parts = [files.norm(part, f"fc_norm.{tap}.") for tap, part in enumerate(parts)]
    read = torch.cat(parts, dim=-1)
    if config["norm_before_fc"]:
        read = files.norm(read, "input_norm.")
    g = read @ files.weights["fc.weight"].T
    state = files.norm(g, f"{LAYER}hidden_norm.")
    x = torch.cat([files.norm(embeddings, f"{LAYER}input_layernorm."), state], dim=-1)
    a = (state if config["norm_before_residual"] else g) + files.attention(x, f"{LAYER}self_attn.")
    u = files.norm(a, f"{LAYER}post_attention_layernorm.")
    out = a + files.gated(u, u, f"{LAYER}mlp.")
    theirs = files.norm(out, "norm.")
    assert head.lm_head is not None
    pairs = [(fed_back, theirs if config["norm_output"] else out)]
    pairs.append((head.lm_head(normed), theirs @ files.weights["lm_head.weight"].T))
    if head.draft_tokens is not None:
        pairs.append((head.draft_tokens.float(), files.weights["d2t"] + torch.arange(len(head.draft_tokens))))
    return pairs
