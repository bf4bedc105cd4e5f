"""The settings of drafting, by the names that users give them, and the one place where their defaults are decided.

`DraftSettings` is checked without a drafter or a device; `resolve` fills in what a user leaves open. The default shape
is the drafter's own, cut to what pays on the device. `generate`, `custom_generate`, the server, the audit and training
all use this module.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch

from outdraft.control import ControlSettings, Costs
from outdraft.control.settings import Pacer
from outdraft.core.sampling_settings import whole
from outdraft.core.shape import BATCH, BATCH_CHAIN, CPU_TREE, GPU_TREE, GREEDY_CHAIN, CandidateKind, TreeShape, gpu_tree
from outdraft.drafting.base import Drafter
from outdraft.drafting.ngrams import NgramSettings
from outdraft.errors import UserError

AUTO = "auto"
"""The `tree_size` that autotunes: every round has the shape that brings the most tokens per second on this machine."""

Coupling = Literal["noise", "dice"]


@dataclass
class DraftSettings:
    """Settings of drafting. A setting that is None follows from the drafter, the device and the sampling settings."""

    tree_depth: int | None = None
    """Depth of the draft tree below its first level: a path has at most depth + 1 drafted tokens."""
    tree_top_k: int | None = None
    """Branching of the draft tree: tokens of a level that are expanded, and continuations of each; 1 drafts a chain."""
    tree_size: int | Literal["auto"] | None = None
    """Nodes that the target verifies, the root included. `auto` chooses depth, width and size by their measured cost on
    this machine."""
    num_speculative_tokens: int | None = None
    """Draft a chain of this many tokens instead of a tree."""
    candidates: CandidateKind | None = None
    """`top-k` drafts the most probable candidates in EAGLE-2's dynamic tree; `sampled` and `sampled-with-replacement`
    draft `tree_top_k` chains sampled from the drafter's probabilities; `spine` one such chain, and beside it the most
    probable candidates of a drafter that has all levels at once."""
    prompt_lookup_min: int | None = None
    """N-gram drafts: where the last tokens, at least this many, stand in the text before, draft what followed them
    there; 0 is off.  [4]"""
    prompt_lookup_num_tokens: int | None = None
    """Most tokens of an n-gram draft, which also has at most twice as many as tokens matched; with a temperature at
    most as many as other drafts.  [20]"""
    controller: str | ControlSettings | Pacer | None = None
    """What decides how long drafts are: `fixed` drafts to the limit; `confidence` while the drafter is confident;
    `beta` and `calibrated` learn by Thompson sampling what pays, the second from the drafter's confidence too; `auto`
    chooses whole shapes. Options follow: `calibrated,discount=0.95`. By default calibrated on a CPU unless a shape is
    given, else fixed."""
    coupling: Coupling | None = None
    """How tokens are sampled above temperature 0: `noise` (a seed gives the tokens of transformers' generate) or `dice`
    (accept with probability min(1, p/q)).  [noise]"""
    exact: bool = False
    """Make greedy text equal to plain decoding's even where two tokens are nearly tied: at no cost on backend native,
    slower on others."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not (name == "tree_size" and value == AUTO):
                setattr(self, name, whole(name, value))
        if self.num_speculative_tokens is not None and self.asked("tree_depth", "tree_top_k", "tree_size"):
            raise UserError(
                "num_speculative_tokens is for chains, tree_depth, tree_top_k and tree_size for trees; give one"
            )
        if self.coupling not in (None, "dice", "noise"):
            raise UserError(f"coupling must be dice or noise, not {self.coupling!r}")
        if self.coupling == "noise" and self.drawn:
            raise UserError("candidates that are drawn need coupling='dice'; leave one of the two out")

    @classmethod
    def taken(cls, settings: dict[str, Any], beside: DraftSettings | None = None) -> DraftSettings:
        """Take the settings of drafting out of `settings`.

        Args:
            settings: keywords as `generate` takes them; None counts as absent.
            beside: settings that hold where the keywords say nothing.
        """
        if beside is not None and not isinstance(beside, cls):
            raise UserError(f"draft must be DraftSettings, not {beside!r}")
        found = {field.name: settings.pop(field.name, None) for field in fields(cls)}
        return replace(beside or cls(), **{name: value for name, value in found.items() if value is not None})

    def asked(self, *names: str) -> bool:
        """Return True if any of these settings was given."""
        return any(getattr(self, name) is not None for name in names)

    @property
    def shaped(self) -> bool:
        """True if any setting of the shape of drafts was given."""
        return self.asked("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens", "candidates")

    @property
    def drawn(self) -> bool:
        """True if candidates are drawn from the drafter's probabilities."""
        return self.candidates not in (None, "top-k")


NUMBERS = (
    *("tree_depth", "tree_top_k", "tree_size", "num_speculative_tokens"),
    *("prompt_lookup_min", "prompt_lookup_num_tokens"),
)


class DraftKeywords(TypedDict, total=False):
    """The fields of `DraftSettings` as keywords of `generate`."""

    tree_depth: int | None
    tree_top_k: int | None
    tree_size: int | Literal["auto"] | None
    num_speculative_tokens: int | None
    candidates: CandidateKind | None
    prompt_lookup_min: int | None
    prompt_lookup_num_tokens: int | None
    controller: str | ControlSettings | Pacer | None
    coupling: Coupling | None
    exact: bool | None


ADAPTIVE = "calibrated"
"""The default controller if measured time decides how far to draft."""

EXACT_CHAIN = DraftSettings(num_speculative_tokens=3)
"""The default shape of exact mode: its attention costs by the node, so short chains win."""

Pacers = MutableMapping[Any, Pacer]
"""Pacers by their settings, so that a later call continues with what an earlier one learned and measured."""


@dataclass(frozen=True)
class ResolvedDraft:
    """The complete settings of drafting that decoding needs."""

    shape: TreeShape
    """Largest shape of the trees."""
    ngrams: NgramSettings | None
    """When n-gram drafts override the drafter; None for never."""
    pacer: Pacer | None
    """Makes a controller for every row; None drafts as far as the shape goes."""
    dice: bool
    """True if sampled rows use dice for drafts and verification; otherwise they share noise with the target."""
    exact: bool

    @property
    def controller(self) -> str:
        """The name of the controller."""
        return "fixed" if self.pacer is None else self.pacer.settings.name

    @property
    def costs(self) -> Costs | None:
        """The measured costs of rounds; None without a pacer."""
        return None if self.pacer is None else self.pacer.costs


def resolve(
    settings: DraftSettings,
    drafter: Drafter | None,
    device: torch.device,
    *,
    sampling: bool = False,
    rows: int = 1,
    seeded: bool = False,
    served: bool = False,
    pacers: Pacers | None = None,
) -> ResolvedDraft:
    """Decide what the settings leave open.

    Args:
        drafter: the drafter; None drafts nothing.
        sampling: True if the temperature is above 0. With dice, default chains are then sampled from the drafter's
            probabilities: the target accepts them far more often than the most probable tokens.
        rows: number of rows decoded together. Only greedy shapes depend on it: a seed's text does not.
        seeded: True if the rows' randomness has a seed.
        served: True if other rows come and go meanwhile, as in a server; where rows throw dice, measured time then
            decides only on request, so that a seed's text does not depend on them.
        pacers: pacers of earlier calls; new ones are added.

    Raises:
        UserError: settings that contradict each other or that this drafter cannot do.
    """
    if settings.exact and sampling:
        raise UserError("exact=True is for greedy decoding; leave it out, or temperature and do_sample")
    asked = EXACT_CHAIN if settings.exact and not settings.shaped else settings
    dice = settings.coupling == "dice" or (settings.coupling is None and settings.drawn)
    wanted = _controller(settings, asked, drafter, device, timed=not (dice and (served or (sampling and seeded))))
    pacer = None if drafter is None else _pacer(wanted, asked.tree_size == AUTO, {} if pacers is None else pacers)
    shape = _shape(asked, drafter, device, sampling and dice, pacer is not None, rows)
    return ResolvedDraft(shape, _ngrams(settings, drafter, shape), pacer, dice, settings.exact)


def _controller(
    settings: DraftSettings, asked: DraftSettings, drafter: Drafter | None, device: torch.device, timed: bool
) -> ControlSettings | Pacer:
    """Return the controller that was given, else the default.

    On a CPU a draft step costs so much of a pass that a fixed length loses with a weak drafter, so drafts are only as
    long as they pay. If a shape was asked for, or drafts and texts share dice that must repeat, measured time does not
    decide. On a GPU whole drafts of a fixed shape are recorded.
    """
    given = settings.controller
    if given is None:
        adapts = drafter is not None and timed and not asked.shaped and device.type == "cpu"
        given = ADAPTIVE if adapts else "fixed"
    found = given if isinstance(given, ControlSettings | Pacer) else ControlSettings.parse(str(given))
    name = found.settings.name if isinstance(found, Pacer) else found.name
    if asked.tree_size == AUTO and name not in ("fixed", AUTO):
        raise UserError(
            f"tree_size auto chooses whole trees, before controller {name} could stop one; "
            "leave the controller out, or give tree_size a number"
        )
    return found


def _pacer(wanted: ControlSettings | Pacer, auto: bool, known: Pacers) -> Pacer | None:
    """Return the pacer of these settings, the same one for the same settings."""
    if isinstance(wanted, Pacer):
        return wanted
    wanted = ControlSettings(AUTO) if auto else wanted
    return None if wanted.name == "fixed" else known.setdefault(astuple(wanted), Pacer(wanted))


def _shape(
    asked: DraftSettings, drafter: Drafter | None, device: torch.device, thrown: bool, controlled: bool, rows: int
) -> TreeShape:
    """Return the shape that was asked for, else the one that suits drafter and device.

    Args:
        asked: settings of the user; with `tree_size` `auto` or a controller the numbers are bounds.
        thrown: True if drafts are drawn by dice; trees that are asked for stay EAGLE-2's.
        controlled: True if the length of drafts varies; a default is then the upper bound.
    """
    if drafter is None:
        return TreeShape(0, 1, 1)
    if asked.num_speculative_tokens is not None:
        candidates = asked.candidates or ("sampled" if thrown and drafter.limits.probs else "top-k")
        return TreeShape.chain(asked.num_speculative_tokens, candidates=candidates)
    auto = asked.tree_size == AUTO
    given = {"depth": asked.tree_depth, "top_k": asked.tree_top_k, "size": None if auto else asked.tree_size}
    sizes: dict[str, Any] = {name: number for name, number in given.items() if number is not None}
    base = drafter.default_shape(device, thrown and not sizes)
    if controlled:
        base = base.doubled()
    elif base == CPU_TREE and drafter.limits.stepwise and not sizes:
        base = BATCH_CHAIN if rows >= BATCH else GREEDY_CHAIN
    elif base.size == GPU_TREE.size and not sizes:
        base = gpu_tree(rows, base)
    shape = replace(base, **sizes, candidates=asked.candidates or base.candidates)
    return shape if drafter.limits.depth is None else shape.at_most(drafter.limits.depth, shape.size)


def _ngrams(settings: DraftSettings, drafter: Drafter | None, shape: TreeShape) -> NgramSettings | None:
    """Return when n-gram drafts override the drafter; None for never."""
    least, most = settings.prompt_lookup_min, settings.prompt_lookup_num_tokens
    if drafter is None or drafter.limits.looks_back:
        if least or most:
            both = "prompt_lookup_min and prompt_lookup_num_tokens"
            if drafter is None:
                raise UserError(f"{both} are for rounds with a drafter; give one (--draft-model)")
            raise UserError(
                f"{both} do nothing beside {drafter.method}, which looks back itself; "
                "num_speculative_tokens is the length of its drafts"
            )
        return None
    if least == 0:
        return None
    given = {name: value for name, value in (("least", least), ("most", most)) if value is not None}
    ngrams = NgramSettings(**given)
    # In exact mode every node costs, so n-gram drafts may be no larger than other drafts.
    return replace(ngrams, most=max(1, min(ngrams.most, shape.size - 1))) if settings.exact else ngrams
