"""The drafter folders of every method: saving, uploading, and recognising them.

A folder holds `config.json` and weights and is written whole or not at all (`drafting/folder.py`). Each method reads
its own folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

import outdraft
from outdraft.drafting.folder import CONFIG, WEIGHTS, find_folder, is_own, local_folder, read_config, write_folder
from outdraft.errors import UserError, first_line
from outdraft.methods.registry import FALLBACK, Method, methods
from outdraft.target.target import Target

UNFOLDED = "embedding_scale_to_fold"
"""The key of a checkpoint's training record with the factor that its weights expect embeddings to be scaled by."""


TARGET_FACTS = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
"""The facts about the target that a folder stores beside its name."""


class Network(nn.Module):
    """The weights of a drafter, as they are loaded, trained and saved."""

    method: str
    """The name of the drafter's method."""
    config: Any
    """A dataclass of shapes and switches, which an outdraft folder stores beside the weights."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The facts about the target (`target_facts`) without which the folder cannot be read."""

    @property
    def own_heads(self) -> list[Tensor]:
        """Return the `(draft vocabulary, hidden)` weights of output layers that training makes the drafter's own."""
        return []

    @property
    def fits(self) -> dict[str, int]:
        """Return the sizes that the target must have, by name."""
        return {"hidden_size": self.config.hidden_size, "vocab_size": self.config.vocab_size}


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
        training: a record that is stored with it, any JSON value.
        target: further facts about the target, such as `target_facts` gives; an exit layer needs them.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = {**head.fits, **(target or {})}
    if missing := [name for name in head.needs if name not in facts]:
        raise ValueError(f"an {head.method} drafter is saved with target_facts(model), which has {', '.join(missing)}")
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


def target_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return the facts about a target that a drafter's folder stores beside its name."""
    config = model.config.get_text_config()
    return {name: getattr(config, name) for name in TARGET_FACTS}


# --- reading ---------------------------------------------------------------------------------------------------


def method_of(folder_or_hub_id: str | Path, revision: str | None = None) -> Method:
    """Return the method that a drafter's folder names, else the method that recognises the folder, else FSPAD.

    Raises:
        UserError: the path is no drafter's folder at all.
    """
    config = read_config(find_folder(folder_or_hub_id, revision))
    known = methods()
    if is_own(config):
        return known.get(str(config["method"]), known[FALLBACK])
    return recognised(config) or known[FALLBACK]


def recognised(config: Mapping[str, Any]) -> Method | None:
    """Return the method that recognises a foreign config.json; None for outdraft's own, and where no method does."""
    if "outdraft_version" in config:
        return None
    return next((method for method in methods().values() if method.recognises(config)), None)


def other_layers(read: tuple[int, ...], usual: tuple[int, ...], layers: int) -> list[tuple[int, ...]]:
    """Return the layers that a drafter may have been trained on instead of those that are read: each one further or one
    nearer, as conventions of counting differ, or its method's usual ones.

    Args:
        read, usual: layers counted from 1.
        layers: number of layers of the target, whose last one cannot be read.
    """
    near = [tuple(layer + step for layer in read) for step in (-1, 1)]
    return [found for found in dict.fromkeys([*near, usual]) if found != read and 0 < min(found) <= max(found) < layers]


def other_ropes(read: Mapping[str, Any], target: Target) -> list[dict[str, Any]]:
    """Return rotary settings that a drafter may have been trained with instead of those that are read: the target's,
    the read ones without their scaling, and the default of `transformers`."""
    own = getattr(target.model.config.get_text_config(), "rope_parameters", None) or {}
    theta = read.get("rope_theta", 10000.0)
    found = [dict(own)] if "rope_type" in own else []
    found += [{"rope_type": "default", "rope_theta": value} for value in (theta, 10000.0)]
    return [one for place, one in enumerate(found) if one != dict(read) and one not in found[:place]]


def count(weights: Iterable[Tensor]) -> int:
    """Count the elements of these weights."""
    return sum(weight.numel() for weight in weights)
