"""The drafter folders of every method: saving, uploading, and recognising them.

A folder holds `config.json` and weights and is written whole or not at all (`drafting/folder.py`). Each method reads
its own folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import outdraft
from outdraft.drafting.folder import (
    CONFIG,
    WEIGHTS,
    find_folder,
    fitting,
    is_own,
    local_folder,
    read_config,
    read_settings,
    read_weights,
    section,
    some,
    warn_of_unknown,
    write_folder,
)
from outdraft.errors import UserError, first_line
from outdraft.methods.registry import FALLBACK, DrafterFacts, Method, methods
from outdraft.target.target import Target

UNFOLDED = "embedding_scale_to_fold"
"""The key of a checkpoint's training record with the factor that its weights expect embeddings to be scaled by."""

KEPT = "draft_tokens"
"""The name of the tensor of a reduced draft vocabulary."""

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

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings and the tensors that a folder of this network holds."""
        return asdict(self.config), self.state_dict()

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights from the tensors that `stored` has given."""
        self.load_state_dict(tensors)

    @property
    def own_heads(self) -> list[Tensor]:
        """Return the `(draft vocabulary, hidden)` weights of output layers that training makes the drafter's own."""
        return []

    @property
    def fits(self) -> dict[str, int]:
        """Return the sizes that the target must have, by name."""
        own = self.config
        return getattr(own, "fits", None) or {"hidden_size": own.hidden_size, "vocab_size": own.vocab_size}


AnyNetwork = TypeVar("AnyNetwork", bound=Network)


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
    settings, tensors = head.stored()
    config = {
        "method": head.method,
        "outdraft_version": outdraft.__version__,
        **settings,
        "target": {"id": target_id, **facts},
        "training": dict(training or {}),
    }
    return write_folder(folder, config, tensors)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
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
            commit_message=f"Drafter written by outdraft {outdraft.__version__}",
        )
    except Exception as error:  # the Hub client has exceptions of many libraries; the user needs their first line
        raise UserError(f"cannot upload to '{repo_id}' ({first_line(error)}); log in with `hf auth login`") from error
    return str(commit.commit_url)


def target_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return the facts about a target that a drafter's folder stores beside its name."""
    config = model.config.get_text_config()
    return {name: getattr(config, name) for name in TARGET_FACTS}


# --- reading ---------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint(Generic[AnyNetwork]):
    """A loaded drafter and what its folder says about it."""

    network: AnyNetwork
    layout: str = "outdraft"
    """The folder's layout: `outdraft`, or the name of whose it is."""
    target: dict[str, Any] = field(default_factory=dict)
    """Facts about the target: id, hidden_size, vocab_size and whatever else was saved; others' folders name few."""
    training: dict[str, Any] = field(default_factory=dict)
    """The training's own record: settings, data, metrics."""

    @property
    def head(self) -> AnyNetwork:
        """The network, by its older name."""
        return self.network

    @property
    def target_id(self) -> str | None:
        """The target that the drafter was trained for, where the folder names it."""
        return self.target.get("id")

    def facts(self, more: Mapping[str, Any]) -> DrafterFacts:
        """Describe the drafter for `outdraft info`; `more` are the facts that only its method has."""
        network, weights = self.network, count(self.network.parameters())
        return DrafterFacts(network.method, self.layout, weights, self.target_id, network.fits, self.training, more)


class OwnFolder(NamedTuple):
    """The content of a folder of outdraft's own layout."""

    config: Any
    """The network's settings."""
    tensors: dict[str, Tensor]
    file: str
    """The file of the tensors, for messages."""
    target: dict[str, Any]
    training: dict[str, Any]

    def assembled(
        self, network: Callable[[Any], AnyNetwork], dtype: torch.dtype | None, device: torch.device | str
    ) -> AnyNetwork:
        """Build the network of these settings with these tensors, its draft vocabulary included."""
        kept = None
        if size := getattr(self.config, "draft_vocab_size", 0):
            if (kept := self.tensors.get(KEPT)) is None:
                raise UserError(f"{self.file} lacks {KEPT}; it is incomplete, copy or train it again")
            if kept.is_floating_point() or not names_tokens(kept, size, self.config.vocab_size):
                raise UserError(
                    f"{self.file}: {KEPT} must be {size} different token ids below {self.config.vocab_size}, as its "
                    "config.json says; copy or train it again"
                )
            kept = kept.long()
        build = partial(network, self.config)
        return assembled(build, self.tensors, self.file, dtype=dtype, device=device, kept=kept)


def names_tokens(ids: Tensor, count: int, vocab_size: int) -> bool:
    """Return True if these are `count` different ids of tokens."""
    one_each = ids.shape == (count,) and len(ids.unique()) == count
    return one_each and 0 <= int(ids.min()) <= int(ids.max()) < vocab_size


def read_own(folder: Path, config: dict[str, Any], kind: type) -> OwnFolder:
    """Read settings of the dataclass `kind` and tensors from a folder of outdraft's own layout."""
    settings: Any = read_settings(kind, config, folder)
    file, tensors = read_weights(folder)
    return OwnFolder(settings, tensors, file, section(config, "target"), section(config, "training"))


def assembled(
    build: Callable[[], AnyNetwork],
    tensors: Mapping[str, Tensor],
    file: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    kept: Tensor | None = None,
    names: Mapping[str, str] | None = None,
    shown: Callable[[str], str] = str,
    beside: re.Pattern[str] | None = None,
    kind: str | None = None,
    **messages: str,
) -> AnyNetwork:
    """Build a network of the tensors of a file.

    Args:
        build: makes the network; called where new weights take no memory.
        tensors: the file's, under the network's names.
        file: the file, for messages.
        dtype: precision of the weights; as stored when None.
        kept: the ids of a reduced draft vocabulary.
        names: the names in the file of tensors that it has, for messages.
        shown: gives the name in the file of a tensor that it lacks, for messages.
        beside: names of tensors that are no weights.
        kind: what drafters of this kind are called, if tensors without a place are an error; else a warning tells them.
        messages: further arguments of `fitting`.
    """
    with torch.device("meta"):  # no random start, which would be overwritten
        network = build()
        if "embed_tokens.weight" in tensors and getattr(network, "embed_tokens", network) is None:
            network.embed_tokens = nn.Embedding(network.config.vocab_size, network.config.hidden_size)
    wanted = network.state_dict()
    labels = {**{name: shown(name) for name in wanted}, **(names or {})}
    given = {} if kept is None else {KEPT: kept}
    missing = {name: value for name, value in wanted.items() if name not in given}
    weights = fitting(tensors, missing, file, shown=labels, **messages)
    unknown = [
        labels.get(name, name) for name in tensors if name not in wanted and not (beside and beside.search(name))
    ]
    if unknown and kind is not None:
        raise UserError(
            f"{file} holds {some(unknown)}, which {kind} have no place for; choose a drafter of a kind that loads"
        )
    warn_of_unknown(unknown, file)
    network.load_state_dict({**weights, **given}, assign=True)
    if isinstance(embedding := getattr(network, "embed_tokens", None), nn.Module):
        embedding.requires_grad_(False)
    return network.to(device=device, dtype=dtype or next(iter(weights.values())).dtype).eval()


def refuse_another(facts: Mapping[str, Any], target: Any) -> None:
    """Raise UserError where a target differs from the one that a drafter was trained for.

    Args:
        facts: what the drafter's target must be, by name.
        target: has these names.
    """
    for name, own in facts.items():
        others = target[name] if isinstance(target, Mapping) else getattr(target, name)
        if own != others:
            raise UserError(
                f"the drafter was trained for a target with {name} {own}, this one has {others}; "
                "choose its own drafter or train one (outdraft train)"
            )


def method_of(folder_or_hub_id: str | Path) -> Method:
    """Return the method that a drafter's folder names, else the method that recognises the folder, else FSPAD."""
    config = read_config(find_folder(folder_or_hub_id))
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
    return sum(weight.numel() for weight in weights)
