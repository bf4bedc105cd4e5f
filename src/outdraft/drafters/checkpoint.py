"""Drafter folders: our own, and the official FSPAD and EAGLE-1/2 ones as they are.

A folder is `config.json` and weights. Our own is written whole or not at all; official ones are recognised from the
names and shapes of their tensors. It knows how a `FeatureHead`'s tensors are called in each layout, and nothing of
targets, decoding or training beyond the record that it carries along.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import outdraft
from outdraft.drafters.feature_head import FeatureHead, FeatureHeadConfig
from outdraft.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights may lie, best first."""

Layout = Literal["outdraft", "fspad", "eagle"]

OFFICIAL_NAMES = {
    "embed_tokens.": "embed_tokens.",
    "fc.post_attention_layernorm.": "fusion.norm.",
    "fc.mlp.": "fusion.",
    "fc.fc.": "fusion.fc.",
    "fc.": "fusion.fc.",
    "layers.0.self_attn.": "self_attn.",
    "layers.0.mlp.": "",
    "layers.0.post_attention_layernorm.": "norm.",
}
"""Beginnings of official tensor names -> ours; the first that fits counts."""

REMADE = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers in old checkpoints that follow from the config."""


@dataclass
class DrafterCheckpoint:
    """A loaded drafter and what its folder says about it."""

    head: FeatureHead
    target_id: str | None
    """The target it was trained for; official folders do not say."""
    training: dict[str, Any] = field(default_factory=dict)
    """The training's own record: settings, data, metrics."""
    layout: Layout = "outdraft"
    target: dict[str, Any] = field(default_factory=dict)
    """Facts about the target: id, hidden_size, vocab_size and whatever else was saved."""


# --- writing ---------------------------------------------------------------------------------------------------


def save_drafter(
    folder: str | Path,
    head: FeatureHead,
    *,
    target_id: str,
    training: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
) -> Path:
    """Write a drafter's folder; each file is written beside and renamed, a new folder as a whole.

    Args:
        folder: made when absent; other files in it stay.
        head: the drafter, in the precision in which it shall be stored.
        target_id: hub name or folder of its target.
        training: a record that is kept with it, anything that JSON can say.
        target: further facts about the target, `num_hidden_layers` for one.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    config = {
        "method": head.method,
        "outdraft_version": outdraft.__version__,
        **asdict(head.config),
        "target": {
            "id": target_id,
            "hidden_size": head.config.hidden_size,
            "vocab_size": head.config.vocab_size,
            **(target or {}),
        },
        "training": dict(training or {}),
    }
    text = json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = (folder if folder.exists() else folder.parent) / f".{folder.name}.{os.getpid()}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            (beside / CONFIG).write_text(text, encoding="utf-8")
            # safetensors makes files that only their owner can read, which breaks folders that are shared.
            (beside / WEIGHTS).chmod(stat.S_IMODE((beside / CONFIG).stat().st_mode))
            if folder.exists():
                for name in (WEIGHTS, CONFIG):
                    os.replace(beside / name, folder / name)
            else:
                os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write a drafter to '{folder}' ({_line(error)}); choose another folder") from error
    return folder


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a drafter's folder to the Hugging Face Hub, creating the repository when absent.

    Returns:
        The address of the commit.

    Raises:
        UserError: not a drafter's folder, or the Hub refuses.
    """
    import huggingface_hub

    folder = _local_folder(Path(folder).expanduser())
    _read_config(folder)
    try:
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            allow_patterns=[CONFIG, WEIGHTS, "README.md", "LICENSE*", "provenance.json"],
            commit_message=message or f"Drafter written by outdraft {outdraft.__version__}",
        )
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(f"cannot upload to '{repo_id}' ({_line(error)}); log in with `hf auth login`") from error
    return str(commit.commit_url)


# --- reading ---------------------------------------------------------------------------------------------------


def load_drafter(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> DrafterCheckpoint:
    """A drafter from our own folder or an official FSPAD or EAGLE-1/2 one, here or on the Hugging Face Hub.

    Args:
        folder_or_hub_id: a folder, else a hub id.
        dtype: precision of the weights; as stored when None.
        device: where they go.
        revision: of a hub repository.

    Raises:
        UserError: nothing there, no drafter, or a damaged one, with the fix.
    """
    folder = _find(folder_or_hub_id, revision)
    config = _read_config(folder)
    file, tensors = _read_weights(folder)
    own = "outdraft_version" in config and "method" in config
    head_config = _own_config(config, folder) if own else _official_config(config, tensors, folder)
    names = {} if own else {_our_name(name): name for name in tensors if not REMADE.search(name)}
    head = _build(head_config, {name: tensors[names.get(name, name)] for name in names or tensors}, names, file)
    if head.embed_tokens is not None:
        head.embed_tokens.requires_grad_(False)
    head.to(device=device, dtype=dtype or head.fusion.fc.weight.dtype)
    target = config.get("target") if own and isinstance(config.get("target"), dict) else {}
    training = config.get("training") if own and isinstance(config.get("training"), dict) else {}
    layout: Layout = "outdraft" if own else "eagle" if head.method == "eagle" else "fspad"
    return DrafterCheckpoint(head, (target or {}).get("id"), training or {}, layout, target or {})


def _build(config: FeatureHeadConfig, tensors: dict[str, Tensor], names: Mapping[str, str], file: str) -> FeatureHead:
    """A head with these weights, or the error that says which do not fit; `names` are those of the file."""
    with torch.device("meta"):  # no random start, which would be overwritten
        head = FeatureHead(config)
        if "embed_tokens.weight" in tensors:
            head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    wanted = head.state_dict()
    shown = {name: _official_name(name, config) if names else name for name in wanted}
    if missing := [shown[name] for name in wanted if name not in tensors]:
        raise UserError(f"{file} lacks {_some(missing)}; it is incomplete or no drafter, download or train it again")
    for name, place in wanted.items():
        if tensors[name].shape != place.shape:
            raise UserError(
                f"{file}: {shown[name]} is {_shape(tensors[name])} where config.json asks for {_shape(place)}; "
                "put the config.json beside it that belongs to it"
            )
        if not tensors[name].is_floating_point():
            raise UserError(
                f"{file}: {shown[name]} holds {tensors[name].dtype}; only unquantised drafters can be loaded"
            )
    if unknown := [names.get(name, name) for name in tensors if name not in wanted]:
        warnings.warn(
            f"{file} holds {_some(unknown)}, which this drafter has no place for; left out, so drafts may be poor "
            "(what is decoded stays exact)",
            stacklevel=3,
        )
    # Copies: what was read may be mapped from the file, which must be free to change.
    dtype = tensors["fusion.fc.weight"].dtype
    weights = {name: tensors[name].to(dtype, copy=True) for name in wanted}
    head.load_state_dict(weights, assign=True)
    return head


# --- our own layout ----------------------------------------------------------------------------------------------


def _own_config(config: dict[str, Any], folder: Path) -> FeatureHeadConfig:
    method = config.get("method")
    if method not in ("fspad", "eagle"):
        raise UserError(f"'{folder}' holds a drafter of method '{method}', not fspad or eagle; give --method {method}")
    known = {f.name: f for f in fields(FeatureHeadConfig)}
    other = {"method", "outdraft_version", "target", "training"}
    if unknown := sorted(set(config) - set(known) - other):
        version = config["outdraft_version"]
        warnings.warn(
            f"'{folder}' was written by outdraft {version} and has settings unknown here: {_some(unknown)}; ignored",
            stacklevel=3,
        )
    required = [name for name, f in known.items() if f.default is MISSING]
    if missing := [name for name in required if name not in config]:
        raise UserError(f"'{folder / CONFIG}' lacks {_some(missing)}; it is incomplete, copy or train it again")
    values = {name: config[name] for name in known if name in config}
    for name, value in values.items():
        default = known[name].default
        kind = (int,) if default is MISSING else (int, float) if isinstance(default, float) else (type(default),)
        _check(name, value, kind, folder)
    return FeatureHeadConfig(**values)


# --- the official layouts ----------------------------------------------------------------------------------------


def _official_config(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> FeatureHeadConfig:
    """What a Llama config and the tensors beside it say of the head."""
    _refuse_others(config, tensors, folder)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if name not in config:
            raise UserError(f"'{folder / CONFIG}' lacks {name}; it must be the drafter's own Llama config")
    values = {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        **{key: value for key, value in config.items() if value is not None},
    }
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        _check(name, values[name], (int,), folder)
    _check("max_position_embeddings", values["max_position_embeddings"], (int,), folder)
    _check("rms_norm_eps", values["rms_norm_eps"], (int, float), folder)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"'{folder}' has hidden_act '{values['hidden_act']}'; only drafters with silu can be loaded")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    query = tensors.get("layers.0.self_attn.q_proj.weight")
    # The authors' code splits the width whatever the config's head_dim says; where both exist the tensor decides.
    head_dim = values.get("head_dim", width // heads)
    if query is not None and heads * head_dim != width and query.shape[:1] == (width,):
        head_dim = width // heads
    _check("head_dim", head_dim, (int,), folder)
    down = tensors.get("layers.0.mlp.down_proj.weight")
    return FeatureHeadConfig(
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        feature_sampling=any(name.startswith(("fc.fc.", "fc.mlp.")) for name in tensors),
        partial_alignment=down is not None and down.shape[:1] == (2 * width,),
        fc_bias="fc.bias" in tensors or "fc.fc.bias" in tensors,
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=_rope_theta(values, folder),
        max_position_embeddings=values["max_position_embeddings"],
    )


def _refuse_others(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError for folders of something else."""
    fusion = tensors.get("fc.weight")
    three = fusion is not None and fusion.ndim == 2 and fusion.shape[1] == 3 * fusion.shape[0]
    if three or "d2t" in tensors or any(name.startswith("midlayer.") for name in tensors):
        raise UserError(f"'{folder}' holds an EAGLE-3 drafter; choose an FSPAD or EAGLE-1/2 one, or train one")
    if not any(name.startswith("fc.") for name in tensors):
        kind = (
            "a whole language model"
            if any(name.startswith(("lm_head.", "model.layers.")) for name in tensors)
            else _some(sorted(tensors))
        )
        raise UserError(f"'{folder}' holds no drafter (no fc.* weights) but {kind}; give a drafter's folder")
    if config.get("num_hidden_layers", 1) != 1 or any(name.startswith("layers.1.") for name in tensors):
        raise UserError(f"'{folder}' has more than one layer; only one-layer FSPAD and EAGLE-1/2 drafters load")


def _rope_theta(config: dict[str, Any], folder: Path) -> float:
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind not in ("default", None):
        raise UserError(
            f"'{folder}' scales its rotary positions ('{kind}'), which is not supported; train one (outdraft train)"
        )
    theta: Any = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    _check("rope_theta", theta, (int, float), folder)
    return float(theta)


def _our_name(official: str) -> str:
    for theirs, ours in OFFICIAL_NAMES.items():
        if official.startswith(theirs):
            return ours + official[len(theirs) :]
    return official


def _official_name(ours: str, config: FeatureHeadConfig) -> str:
    """The name in an official file, for messages."""
    beginning = max((b for b in OFFICIAL_NAMES.values() if ours.startswith(b)), key=len)
    theirs = next(theirs for theirs, b in OFFICIAL_NAMES.items() if b == beginning)
    if beginning == "fusion.fc." and not config.feature_sampling:
        theirs = "fc."
    return theirs + ours[len(beginning) :]


# --- files -------------------------------------------------------------------------------------------------------


def _find(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or the local copy of a hub repository."""
    path = Path(source).expanduser()
    if path.exists():
        return _local_folder(path)
    text = str(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text):
        raise UserError(f"there is no folder '{source}'; check the path of the drafter")
    import huggingface_hub

    try:
        fetch = huggingface_hub.snapshot_download
        folder = Path(fetch(text, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
            folder = Path(fetch(text, revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(
            f"'{text}' is no folder here and cannot be had from the Hugging Face Hub ({_line(error)}); "
            "check the name and the network, or give a folder"
        ) from error
    return folder


def _local_folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no folder '{path}'; check the path of the drafter")
    if not path.is_dir():
        raise UserError(f"'{path}' is a file; give the folder that holds the drafter's config.json and weights")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"'{folder}' has no config.json, so it is no drafter; give the folder that was trained or saved"
        )
    config = _read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"'{file}' must hold a JSON object; copy or train the drafter again")
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({_line(error)}); copy or train the drafter again") from error


def _read_weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The file that says where the weights are, for messages, and all tensors."""
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"'{folder}' has no weights ({WEIGHTS} or pytorch_model.bin); copy or train the drafter again")
    if not found.endswith(".index.json"):
        return f"'{folder / found}'", _read_tensors(folder / found)
    index = _read_json(folder / found)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"'{folder / found}' has no weight_map; download the drafter again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"'{folder / found}' names '{name}', which is not in the folder; download it again")
        tensors.update(_read_tensors(folder / name))
    return f"'{folder / found}'", tensors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise anything
        raise UserError(
            f"'{file}' is damaged or no file of plain weights ({_line(error)}); copy or download it again"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"'{file}' is no dictionary of tensors; save the drafter's state_dict there")
    return loaded


# --- messages ------------------------------------------------------------------------------------------------------


def _check(name: str, value: Any, kinds: tuple[type, ...], folder: Path) -> None:
    """Raise UserError unless the value has one of these types and, as a number, is positive."""
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not right or (bool not in kinds and value <= 0):
        number = "a positive whole number" if kinds == (int,) else "a positive number"
        kind = "true or false" if bool in kinds else number
        raise UserError(f"'{folder / CONFIG}': {name} must be {kind}, not {value!r}; copy or train the drafter again")


def _some(names: Iterable[str]) -> str:
    """At most four names."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a single number"


def _line(error: BaseException) -> str:
    """The first line of an error of another library."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
