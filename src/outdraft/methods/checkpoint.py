"""The networks of every method: saving, loading and recognising their folders, and binding them to a target.

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
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter
from outdraft.drafting.expand import grow
from outdraft.drafting.folder import (
    find_folder,
    fitting,
    is_own,
    read_config,
    read_settings,
    read_weights,
    section,
    some,
    warn_of_unknown,
    write_folder,
)
from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.errors import UserError
from outdraft.methods.registry import FALLBACK, DrafterFacts, Method, methods
from outdraft.target.backends import count_parameters
from outdraft.target.target import Target
from outdraft.target.views import Reads

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

    def checkpoint(
        self, network: Callable[[Any], AnyNetwork], dtype: torch.dtype | None, device: torch.device | str
    ) -> Checkpoint[AnyNetwork]:
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
        built = assembled(partial(network, self.config), self.tensors, self.file, dtype=dtype, device=device, kept=kept)
        return Checkpoint(built, target=self.target, training=self.training)


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


# --- decoding --------------------------------------------------------------------------------------------------


class NetworkDrafter(Drafter):
    """A trained network bound to its target.

    Args:
        network: a `Network` on the target's device and in its precision.

    Raises:
        UserError: the sizes say that it is another model's drafter, or the target has no such layers.
    """

    def __init__(self, network: Any, target: Target, reads: Reads | None = None):
        refuse_another(network.fits, target)
        self.target, self.method, self.num_weights = target, network.method, count_parameters(network)
        self.reads = reads or Reads()
        target.reader(self.reads)  # a layer that the target lacks is told now
        kept = getattr(network, "draft_tokens", None)
        self.vocabulary = None if kept is None else DraftVocabulary(kept, target, network.lm_head)

    @property
    def num_parameters(self) -> int:
        return self.num_weights

    @property
    def grow(self) -> Callable[..., Tree]:
        """The function `expand.grow`, restricted to the draft vocabulary."""
        return grow if self.vocabulary is None else self.vocabulary.grow


# --- which method ----------------------------------------------------------------------------------------------


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


def count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
