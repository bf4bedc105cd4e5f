"""What `DraftSettings` come to for a drafter on a device: the one place where defaults of drafting are decided.

The default shape is the drafter's own, cut to what pays on the device; the default controller and coupling stand in
`_controller` and `resolve`. `generate`, `custom_generate`, the server, the audit and training ask here alone.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from outdraft.api.draft_settings import AUTO, DraftSettings
from outdraft.control import ControlSettings, Costs
from outdraft.control.pacer import Pacer
from outdraft.core.shape import BATCH, BATCH_CHAIN, CPU_TREE, GPU_TREE, GREEDY_CHAIN, TreeShape, gpu_tree
from outdraft.drafting.base import Drafter
from outdraft.drafting.repeats import Repeats
from outdraft.errors import UserError

ADAPTIVE = "calibrated"
"""The default controller where the clock decides how far to draft."""

EXACT_CHAIN = DraftSettings(num_speculative_tokens=3)
"""The default shape of exact mode: its attention costs by the node, so short chains win."""

Pacers = MutableMapping[Any, Pacer]
"""Pacers by their settings, so that a later call goes on with what an earlier one has learned and measured."""


@dataclass(frozen=True)
class ResolvedDraft:
    """Everything that decoding is told about drafting."""

    shape: TreeShape
    """Of the trees, at most."""
    repeats: Repeats | None
    """When n-grams of the text are drafted in the drafter's place; None never."""
    pacer: Pacer | None
    """Makes a controller for every row; None drafts as far as the shape goes."""
    dice: bool
    """Whether rows that sample throw dice for drafts and verification; otherwise they share noise with the target."""
    exact: bool

    @property
    def controller(self) -> str:
        """The name of the controller."""
        return "fixed" if self.pacer is None else self.pacer.settings.name

    @property
    def costs(self) -> Costs | None:
        """What the rounds cost, where anybody wants to know."""
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
        settings: of the user.
        drafter: None drafts nothing.
        device: of the target.
        sampling: whether the temperature is above 0. With dice, default chains are then sampled from the drafter's
            probabilities: the target accepts them far more often than the most probable tokens.
        rows: that are decoded together. Only greedy shapes depend on them: a seed's text does not.
        seeded: whether the rows' randomness has a seed.
        served: whether other rows come and go meanwhile, as in a server; no clock decides there unless asked to.
        pacers: looked up and added to.

    Raises:
        UserError: settings that contradict each other or that this drafter cannot do.
    """
    if settings.exact and sampling:
        raise UserError("exact=True is for greedy decoding; leave it out, or temperature and do_sample")
    asked = EXACT_CHAIN if settings.exact and not settings.shaped else settings
    dice = settings.coupling == "dice" or (settings.coupling is None and settings.drawn)
    wanted = _controller(settings, asked, drafter, device, timed=not (served or (sampling and dice and seeded)))
    pacer = None if drafter is None else _pacer(wanted, asked.tree_size == AUTO, {} if pacers is None else pacers)
    shape = _shape(asked, drafter, device, sampling and dice, pacer is not None, rows)
    return ResolvedDraft(shape, _repeats(settings, drafter, shape), pacer, dice, settings.exact)


def _controller(
    settings: DraftSettings, asked: DraftSettings, drafter: Drafter | None, device: torch.device, timed: bool
) -> ControlSettings | Pacer:
    """The controller that was given, else the default.

    On a CPU a draft step costs so much of a pass that a fixed length loses where a drafter is weak, so drafts are as
    long as they pay, and none is drafted that does not. Where somebody asks for a shape, or drafts and texts share
    dice that must fall the same way again, no clock decides. On a GPU whole drafts are recorded, of a fixed shape.
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
    """The same one for the same settings."""
    if isinstance(wanted, Pacer):
        return wanted
    wanted = ControlSettings(AUTO) if auto else wanted
    return None if wanted.name == "fixed" else known.setdefault(astuple(wanted), Pacer(wanted))


def _shape(
    asked: DraftSettings, drafter: Drafter | None, device: torch.device, thrown: bool, controlled: bool, rows: int
) -> TreeShape:
    """The shape that was asked for, else the one that suits drafter and device.

    Args:
        asked: with `tree_size` `auto` or a controller the numbers are bounds.
        drafter: None drafts nothing.
        device: of the target.
        thrown: whether drafts are drawn by dice; trees that are asked for stay EAGLE-2's.
        controlled: whether the length of drafts varies; a default is then the most that it may be.
        rows: decoded together.
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


def _repeats(settings: DraftSettings, drafter: Drafter | None, shape: TreeShape) -> Repeats | None:
    """When rows draft what their texts repeat in the drafter's place; None for never.

    Raises:
        UserError: impossible numbers, or a drafter that leaves no place: one that looks back itself, or none.
    """
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
    repeats = Repeats(Repeats.least if least is None else least, Repeats.most if most is None else most)
    # In exact mode every node costs, so repetitions may be no larger than other drafts.
    return replace(repeats, most=max(1, min(repeats.most, shape.size - 1))) if settings.exact else repeats
