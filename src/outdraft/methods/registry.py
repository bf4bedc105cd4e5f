"""The registry of drafting methods: what the package asks about a method, and where methods are found.

A method is a folder of `methods/` whose `__init__.py` lists its `METHODS`; an installed package adds one through the
entry-point group `outdraft.methods`. Help texts read the registry, so neither this file nor such an `__init__.py`
imports torch: what a record needs is imported by its functions when they are called.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from outdraft.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

    from outdraft.data.tokenization import ExampleSet
    from outdraft.drafting.base import Drafter
    from outdraft.losses.objective import Objective
    from outdraft.losses.target_like import TargetLike
    from outdraft.methods.checkpoint import Network
    from outdraft.target.target import Target

GROUP = "outdraft.methods"
"""The entry-point group; its entries name a `Method`, or several."""

NONE = "none"
"""What stands in a method's place for plain decoding."""

FALLBACK = "fspad"
"""The method whose loader is given a folder that no method recognises: official FSPAD and EAGLE folders are told by
their tensors, and that loader says what is wrong with any other folder."""

COMPARED_TOKENS = 48
"""Tokens on which an export is compared with the drafter's own forward."""


@dataclass
class DrafterFacts:
    """What a drafter's folder says, for `outdraft info`."""

    method: str
    layout: str
    """Whose folder layout it is; `outdraft` for our own."""
    parameters: int
    trained_for: str | None
    """The target's name, where the folder says it."""
    fits: Mapping[str, Any]
    """What its target must have, by name."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The training's own record."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What only this method says."""


class ExportTarget(Protocol):
    """The target that a drafter is exported for."""

    @property
    def config(self) -> Any:
        """Its text config."""

    def load(self, dtype: torch.dtype | None) -> Target:
        """The target itself, eager on the CPU; in the precision of its config when None."""


@dataclass
class Written:
    """What an export has written into its folder."""

    method: str
    architecture: str
    """What the engine runs it as."""
    compared: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """What the drafter computes, and what the written files do, which must be the same but for rounding."""
    vllm_method: str
    """vLLM's name for it."""
    plugin: bool
    """Whether vLLM needs outdraft installed beside it."""


class Method:
    """A drafting method. Subclasses fill in what applies to them."""

    name: str
    """Its name on the command line and in reports."""
    summary: str
    """What it is in a few words, for help texts and lists."""
    needs_model = True
    """Whether there is something to be loaded for it with `--draft-model`."""

    # --- folders and decoding

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json that outdraft did not write is of a drafter of this method."""
        return False

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> Network:
        """The network in a drafter's folder or hub repository.

        Args:
            source: where it lies.
            target: what it drafts for.
            dtype: of the weights; as stored when None.
            device: where they go.

        Raises:
            UserError: no drafter of this method there, or a damaged one.
        """
        raise UserError(f"'{source}': method '{self.name}' loads no folders")

    def bind(self, network: Any, target: Target) -> Drafter:
        """The drafter for this target.

        Args:
            network: what `load` gave, on the backend it runs on; None for a method that needs no model.
            target: what it drafts for.

        Raises:
            UserError: it is another target's.
        """
        raise NotImplementedError

    def describe(self, folder: Path) -> DrafterFacts:
        """What a drafter's folder says of it, without its target.

        Raises:
            UserError: it cannot be read.
        """
        raise UserError(f"'{folder}' holds a drafter of method '{self.name}', which says nothing of its folders")

    # --- training

    trained = False
    """Whether `outdraft train` trains it, with `new_network` and `objective`."""
    settings: frozenset[str] = frozenset()
    """The settings of `DrafterConfig` that it reads of those that not every method reads."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By the name of a preset, the settings in which its recipe differs from the common one."""
    paper_preset = False
    """Whether preset `paper` is a recipe for it."""
    card = ""
    """What the model card of a trained drafter calls it; Markdown."""

    def check(self, settings: Any) -> None:
        """Raise UserError where a `DrafterConfig` cannot be for this method."""

    def new_network(self, target: TargetLike, settings: Any) -> Network:
        """A network with its first float32 weights, on the target's device.

        Args:
            target: what it will draft for.
            settings: a `DrafterConfig` with its preset filled in.

        Raises:
            UserError: the target cannot have such a drafter.
        """
        raise NotImplementedError

    def adapt(self, network: Network, examples: ExampleSet) -> None:
        """Set in a new network what depends on the training data, such as a reduced vocabulary."""

    def objective(self, target: TargetLike, settings: Any, network: Network) -> Objective:
        """What the network trains on, and its loss; arguments as in `new_network`."""
        raise NotImplementedError

    # --- export

    no_export: str | None = "{method} drafters have no export; serve them with `outdraft serve`"
    """Why no engine takes it, with `{method}` and `{folder}` filled in; None where `export` is there."""

    def export(
        self, source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
    ) -> Written:
        """Write the drafter for an engine.

        Args:
            source: the drafter's folder or hub repository.
            target: what it drafts for.
            folder: an empty one.
            engine: `vllm` or `hf`.
            dtype: of the written weights; as stored when None.

        Raises:
            UserError: the engine cannot run it as it runs here.
        """
        raise NotImplementedError


_registered: dict[str, Method] = {}
"""Those that a program has registered itself."""


def register(method: Method) -> None:
    """Make a method known to this process; again, it changes nothing.

    Raises:
        UserError: another one has its name.
    """
    if methods().get(method.name) is not method:
        _add(_registered, method, methods())


def methods() -> dict[str, Method]:
    """Every method that is known, by its name: the package's own, installed ones, then those of `register`."""
    return {**_installed(), **_registered}


def method_called(name: str) -> Method:
    """The method of this name.

    Raises:
        UserError: there is none.
    """
    if name not in (known := methods()):
        raise UserError(f"unknown method '{name}'; choose one of {', '.join((*known, NONE))}")
    return known[name]


def names() -> tuple[str, ...]:
    """What `--method` takes."""
    return (*methods(), NONE)


def trained() -> dict[str, Method]:
    """The methods that `outdraft train` trains."""
    return {name: method for name, method in methods().items() if method.trained}


def without_model() -> tuple[str, ...]:
    """Names of the methods that draft without a drafter to be loaded."""
    return tuple(name for name, method in methods().items() if not method.needs_model)


def readers(setting: str) -> tuple[str, ...]:
    """Names of the methods that read a setting of `DrafterConfig`; of none where every method does."""
    return tuple(name for name, method in methods().items() if setting in method.settings)


@cache
def _installed() -> dict[str, Method]:
    found: dict[str, Method] = {}
    package = import_module("outdraft.methods")
    for module in pkgutil.iter_modules(package.__path__, "outdraft.methods."):
        if module.ispkg:
            for method in import_module(module.name).METHODS:
                _add(found, method, found)
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:  # a package outside may raise anything, and must not stop every other method
            warnings.warn(f"the drafting method '{entry.name}' cannot be loaded ({first_line(error)})", stacklevel=2)
            continue
        for method in loaded if isinstance(loaded, Sequence) else (loaded,):
            _add(found, method, found)
    return found


def _add(into: dict[str, Method], method: Method, known: Mapping[str, Method]) -> None:
    if method.name in known or method.name == NONE:
        raise UserError(f"two drafting methods are called '{method.name}'; give one of them another name")
    into[method.name] = method
