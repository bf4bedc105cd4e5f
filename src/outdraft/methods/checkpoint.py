"""Drafter folders: our own, and the official FSPAD and EAGLE-1/2 ones as they are.

A folder is `config.json` and weights. Our own is written whole or not at all (`own_layout.py`); official ones are
recognised from the names and shapes of their tensors (`official.py`). It saves every kind of drafter and knows how a
`FeatureHead` is put together from tensors; the other kinds are read in `exit_folder.py` and `medusa_folder.py`. Nothing
of decoding, and of training no more than the record that it carries along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import outdraft
from outdraft.drafting.folder import CONFIG, WEIGHTS, find_folder, is_eagle3, local_folder, read_config, read_weights
from outdraft.drafting.own_layout import fitting, is_own, read_settings, section, warn_of_unknown, write_folder
from outdraft.errors import UserError, first_line
from outdraft.methods.eagle3.network import Eagle3Head
from outdraft.methods.eesd.folder import TARGET_FACTS
from outdraft.methods.eesd.network import ExitLayer
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig, scaled
from outdraft.methods.fspad.official import REMADE, official_config, official_name, our_name
from outdraft.methods.medusa.drafter import MedusaHeads

Layout = Literal["outdraft", "fspad", "eagle"]

Network = FeatureHead | ExitLayer | MedusaHeads
"""Whatever is trained and saved."""

KEPT = "draft_tokens"
"""The tensor of a reduced draft vocabulary."""

UNFOLDED = "embedding_scale_to_fold"
"""In the training record of a checkpoint: what its weights expect embeddings to be multiplied by."""


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
    head: Network,
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
        target: further facts about the target, such as `target_facts` gives; an exit layer needs them.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = dict(target or {})
    if not isinstance(head, ExitLayer):
        facts = {"hidden_size": head.config.hidden_size, "vocab_size": head.config.vocab_size, **facts}
    elif missing := [name for name in TARGET_FACTS if name not in facts]:
        raise ValueError(f"an exit layer is saved with target_facts(model), which has {', '.join(missing)}")
    config = {
        "method": head.method,
        "outdraft_version": outdraft.__version__,
        **asdict(head.config),
        "target": {"id": target_id, **facts},
        "training": dict(training or {}),
    }
    return write_folder(folder, config, head.state_dict())


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

    folder = local_folder(Path(folder).expanduser())
    read_config(folder)
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
        raise UserError(f"cannot upload to '{repo_id}' ({first_line(error)}); log in with `hf auth login`") from error
    return str(commit.commit_url)


# --- reading ---------------------------------------------------------------------------------------------------


def own_method(folder_or_hub_id: str | Path, revision: str | None = None) -> str | None:
    """The method that a folder of our own names, or `eagle3` for one of those layouts; None for FSPAD's and EAGLE's.

    Raises:
        UserError: there is no drafter's folder at all.
    """
    config = read_config(find_folder(folder_or_hub_id, revision))
    if is_eagle3(config):
        return Eagle3Head.method
    return str(config["method"]) if is_own(config) else None


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
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    file, tensors = read_weights(folder)
    own = is_own(config)
    head_config = _own_config(config, folder) if own else official_config(config, tensors, folder)
    names = {} if own else {our_name(name): name for name in tensors if not REMADE.search(name)}
    head = _build(head_config, {name: tensors[names.get(name, name)] for name in names or tensors}, names, file)
    if head.embed_tokens is not None:
        head.embed_tokens.requires_grad_(False)
    head.to(device=device, dtype=dtype or head.fusion.fc.weight.dtype)
    layout: Layout = "outdraft" if own else "eagle" if head.method == "eagle" else "fspad"
    target, training = section(config, "target"), section(config, "training")
    return DrafterCheckpoint(scaled(head, training.get(UNFOLDED, 1.0)), target.get("id"), training, layout, target)


def _own_config(config: dict[str, Any], folder: Path) -> FeatureHeadConfig:
    method = config.get("method")
    if method == ExitLayer.method:
        raise UserError(f"'{folder}' holds an exit layer (eesd), which loads only together with its target")
    if method not in ("fspad", "eagle"):
        raise UserError(f"'{folder}' holds a drafter of method '{method}', not fspad or eagle; give --method {method}")
    return read_settings(FeatureHeadConfig, config, folder)


def _build(config: FeatureHeadConfig, tensors: dict[str, Tensor], names: Mapping[str, str], file: str) -> FeatureHead:
    """A head with these weights, or the error that says which do not fit; `names` are those of the file."""
    with torch.device("meta"):  # no random start, which would be overwritten
        head = FeatureHead(config)
        if "embed_tokens.weight" in tensors:
            head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    wanted = head.state_dict()
    kept = {KEPT: _draft_tokens(tensors, config, file)} if KEPT in wanted else {}
    weights = {name: place for name, place in wanted.items() if name not in kept}
    shown = {name: official_name(name, config) for name in weights} if names else None
    head.load_state_dict({**fitting(tensors, weights, file, shown=shown), **kept}, assign=True)
    warn_of_unknown([names.get(name, name) for name in tensors if name not in wanted], file)
    return head


def _draft_tokens(tensors: Mapping[str, Tensor], config: FeatureHeadConfig, file: str) -> Tensor:
    """The ids of the tokens that may be drafted."""
    found = tensors.get(KEPT)
    if found is None:
        raise UserError(f"{file} lacks {KEPT}; it is incomplete, copy or train it again")
    ids = found.tolist() if not found.is_floating_point() and found.dim() == 1 else []
    if (
        len(ids) != config.draft_vocab_size
        or len(set(ids)) != len(ids)
        or not all(0 <= token < config.vocab_size for token in ids)
    ):
        raise UserError(
            f"{file}: {KEPT} must be {config.draft_vocab_size} different token ids below {config.vocab_size}, as its "
            "config.json says; copy or train it again"
        )
    return torch.tensor(ids)
