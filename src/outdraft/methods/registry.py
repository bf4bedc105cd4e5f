"""The registry of drafting methods: what the package asks about a method, and where methods are found.

A method is a folder of `methods/` whose `__init__.py` lists its `METHODS`; an installed package adds one through the
entry-point group `outdraft.methods`. Help texts read the registry, so neither this file nor such an `__init__.py`
imports torch: what a record needs is imported by its functions when they are called.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from outdraft.errors import UserError, first_line, meant

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from outdraft.data.tokenization import ExampleSet
    from outdraft.drafting.base import Drafter
    from outdraft.losses.objective import Objective
    from outdraft.methods.checkpoint import Checkpoint, Network
    from outdraft.target.target import Target

GROUP = "outdraft.methods"
"""The entry-point group for installed methods; its entries name a `Method`, or several."""

NONE = "none"
"""The name that selects plain decoding in a method's place."""

FALLBACK = "fspad"
"""The method whose loader is given a folder that no method recognises: it tells official FSPAD and EAGLE folders by
their tensors, and names the error of any other folder."""


@dataclass
class DrafterFacts:
    """The facts in a drafter's folder, for `outdraft info`."""

    method: str
    layout: str
    """The name of the folder's layout; `outdraft` for the package's own."""
    parameters: int
    trained_for: str | None
    """The target's name, where the folder has it."""
    fits: Mapping[str, Any]
    """The sizes that the target must have, by name."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The record of the training."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """The facts that only this method has."""


@dataclass(frozen=True)
class Reading:
    """A reading of a drafter's folder other than the one that was loaded."""

    setting: Mapping[str, Any]
    """What its config.json must say to be read so."""
    changes: Mapping[str, Any]
    """The fields of the network's `config` that are other then."""


class ExportTarget(Protocol):
    """The target that a drafter is exported for."""

    @property
    def config(self) -> Any:
        """The target's text config."""

    def load(self, dtype: torch.dtype | None) -> Target:
        """Load the target, eager on the CPU; a `dtype` of None takes the precision of its config."""


@dataclass
class Written:
    """The content of an exported folder."""

    method: str
    architecture: str
    """The architecture as which the engine runs it."""
    compared: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Pairs of the drafter's outputs and the written files', which must be equal but for rounding."""
    vllm_method: str
    """The method's name in vLLM."""
    plugin: bool
    """True if vLLM needs outdraft installed beside it."""


class MeasuredSetting(Protocol):
    """A training setting that was measured on the data; a dataclass, whose fields are kept in the run's record."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The values of the `DrafterConfig` settings that it decides."""

    def show(self, console: Console) -> None:
        """Print the measurements and the reason."""


class Method:
    """A drafting method; subclasses name their parts, or override the functions that use them.

    Parts are named as `module:name` and imported when they are called, since importing them takes torch.
    """

    name: str
    """The method's name on the command line and in reports."""
    summary: str
    """A few words on the method, for help texts and lists."""
    needs_model = True
    """True if the method needs a drafter from `--draft-model`."""

    loader = ""
    """A function from a drafter's folder or hub repository, with `dtype` and `device`, to a `Checkpoint`."""
    drafter = ""
    """The `Drafter`, made of a network and its target."""
    beginning = ""
    """A function from a target and a `DrafterConfig` to a network with initial weights."""
    training = ""
    """The `Objective`, made of a target, a `DrafterConfig` and a network."""
    exporter = ""
    """A function that writes the drafter for an engine; arguments as in `export`."""

    # --- folders and decoding

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return True if a config.json that outdraft did not write is of a drafter of this method."""
        return False

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> Network:
        """Load the network in a drafter's folder or hub repository.

        Args:
            dtype: precision of the weights; as stored when None.

        Raises:
            UserError: no drafter of this method is there, or it is damaged.
        """
        return self.checkpoint(source, dtype=dtype, device=device).network

    def checkpoint(self, source: str | Path, **where: Any) -> Checkpoint[Any]:
        """Load a folder with all that it says about the drafter; arguments as in `loader`."""
        if not self.loader:
            raise UserError(f"'{source}': method '{self.name}' loads no folders")
        found: Checkpoint[Any] = resolve_name(self.loader)(source, **where)
        return found

    def bind(self, network: Any, target: Target) -> Drafter:
        """Bind a network to its target.

        Args:
            network: the result of `load`, on its backend; None for a method that needs no model.

        Raises:
            UserError: the network is another target's.
        """
        drafter: Drafter = resolve_name(self.drafter)(network, target)
        return drafter

    def describe(self, folder: Path) -> DrafterFacts:
        """Describe a drafter from its folder, without its target.

        Raises:
            UserError: the folder cannot be read.
        """
        loaded = self.checkpoint(folder)
        return loaded.facts(self.more_facts(loaded))

    def more_facts(self, loaded: Any) -> Mapping[str, Any]:
        """Return the facts about a loaded drafter that only this method has."""
        return {}

    def readings(self, network: Any, target: Target) -> Iterable[Reading]:
        """Yield other readings of a folder, for `outdraft doctor`: those that its files cannot tell from the right one.

        Args:
            network: the result of `load`.
        """
        return ()

    # --- training

    trained = False
    """True if `outdraft train` trains the method, with `new_network` and `objective`."""
    settings: frozenset[str] = frozenset()
    """The settings of `DrafterConfig` that the method reads, beyond those that every method reads."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """For each preset, the settings in which the method's recipe differs from the common one."""
    paper_preset = False
    """True if preset `paper` has a recipe for the method."""
    card = ""
    """The method's name in the model card of a trained drafter; Markdown."""

    def check(self, settings: Any) -> None:
        """Raise UserError where a `DrafterConfig` cannot be for this method."""

    measured = ""
    """The name under which a run's record keeps what `measure` decided."""

    def measure(
        self, target: Target, settings: Any, examples: ExampleSet, record: Mapping[str, Any]
    ) -> MeasuredSetting | None:
        """Measure a setting that is left open (`auto`) on the data; None where none is.

        Args:
            settings: a `DrafterConfig` with its preset filled in.
            record: the record of an interrupted run, whose own choice holds; empty for a new run.
        """
        return None

    def new_network(self, target: Target, settings: Any) -> Network:
        """Build a network with initial float32 weights, on the target's device.

        Args:
            settings: a `DrafterConfig` with its preset filled in.

        Raises:
            UserError: the target cannot have such a drafter.
        """
        network: Network = resolve_name(self.beginning)(target, settings)
        return network

    def adapt(self, network: Network, examples: ExampleSet) -> None:
        """Adapt a new network to the training data, such as by a reduced vocabulary."""

    def objective(self, target: Target, settings: Any, network: Network) -> Objective:
        """Return the training objective with its loss; arguments as in `new_network`."""
        objective: Objective = resolve_name(self.training)(target, settings, network)
        return objective

    # --- export

    no_export: str | None = "{method} drafters have no export; serve them with `outdraft serve`"
    """The reason why no engine takes it, a format of `{method}` and `{folder}`; None where `export` exists."""

    def export(
        self, source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
    ) -> Written:
        """Write the drafter for an engine.

        Args:
            source: the drafter's folder or hub repository.
            folder: an empty folder to write into.
            engine: `vllm` or `hf`.
            dtype: precision of the written weights; as stored when None.

        Raises:
            UserError: the engine cannot run the drafter as outdraft does.
        """
        written: Written = resolve_name(self.exporter)(source, target, folder, engine, dtype)
        return written


_registered: dict[str, Method] = {}
"""The methods that `register` has added."""


def register(method: Method) -> None:
    """Register a method in this process; a second call for it changes nothing.

    Raises:
        UserError: another method has its name.
    """
    if methods().get(method.name) is not method:
        _add(_registered, method, methods())


def methods() -> dict[str, Method]:
    """Return all methods by name: the package's own, installed ones, then those of `register`."""
    return {**_installed(), **_registered}


def method_called(name: str) -> Method:
    """Return the method of this name.

    Raises:
        UserError: no method has this name.
    """
    if name not in (known := methods()):
        there_are = f"; choose one of {', '.join((*known, NONE))}"
        raise UserError(f"unknown method '{name}'{meant(name, known, {}) or there_are}")
    return known[name]


def names() -> tuple[str, ...]:
    """Return the names that `--method` takes."""
    return (*methods(), NONE)


def trained() -> dict[str, Method]:
    """Return the methods that `outdraft train` trains."""
    return {name: method for name, method in methods().items() if method.trained}


def without_model() -> tuple[str, ...]:
    """Return the names of the methods that need no drafter to be loaded."""
    return tuple(name for name, method in methods().items() if not method.needs_model)


def readers(setting: str) -> tuple[str, ...]:
    """Return the names of the methods that read a setting of `DrafterConfig`; empty where every method does."""
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
