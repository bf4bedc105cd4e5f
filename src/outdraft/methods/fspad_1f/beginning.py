"""The initial state of a `OneForwardHead` in training: a trained FSPAD's weights, or new ones, and its new parts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from outdraft.errors import UserError
from outdraft.losses.teacher import TargetLike
from outdraft.methods.checkpoint import method_of, refuse_another
from outdraft.methods.fspad.beginning import new_head, scale_of
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead, scaled
from outdraft.methods.fspad_1f.network import NAME, OneForwardConfig, OneForwardHead, head_rows, whitened
from outdraft.target.named import named, shipped_drafter

BLOCK = ("block_size", "second_layer", "transition_rank", "slot_candidates")
"""The settings of the block."""


def new_one_forward(target: TargetLike, settings: Any) -> OneForwardHead:
    """Build a drafter with initial float32 weights, on the target's device.

    Args:
        settings: a `DrafterConfig` with its preset filled in; `init_from` names an FSPAD, whose shape and weights are
            taken, or a drafter of this method, which is trained on.
    """
    block = {name: getattr(settings, name) for name in BLOCK}
    if settings.init_from is None:
        base = new_head(target, settings.model_copy(update={"method": "fspad"}))
    else:
        base = begun_from(settings.init_from, target)
        scale = settings.embedding_scale
        scaled(base, 1 / (scale_of(target) if scale == "auto" else scale))
    if isinstance(base, OneForwardHead):
        if different := [name for name in BLOCK if getattr(base.config, name) != block[name]]:
            name = different[0]
            own = getattr(base.config, name)
            raise UserError(
                f"the drafter in '{settings.init_from}' has {name} {own}, this run's has {block[name]}; "
                f"set {name} {own}"
            )
        base.keeps_tokens = True
        return base.to(target.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        drafter = OneForwardHead(OneForwardConfig(**asdict(base.config), **block))
    begin_block(drafter, base, target, settings)
    drafter.keeps_tokens = settings.init_from is not None
    return drafter.to(target.device)


def begun_from(source: str, target: TargetLike) -> FeatureHead:
    """Load an FSPAD, EAGLE or FSPAD-1F drafter: a folder, a hub id, or the name of a model that an FSPAD ships for."""
    place = shipped_drafter(source, "fspad") if named(source) is not None else source
    kind: type[FeatureHead] = OneForwardHead if method_of(place).name == NAME else FeatureHead
    base = load_drafter(place, dtype=torch.float32, kind=kind).head
    refuse_another(base.fits, target)
    base.embed_tokens = None
    return base


@torch.no_grad()
def begin_block(drafter: OneForwardHead, base: FeatureHead, target: TargetLike, settings: Any) -> None:
    """Copy the base's weights; begin slots as average embeddings with noise and the second layer as the first."""
    drafter.load_state_dict(base.state_dict(), strict=False)
    scale = scale_of(target) if settings.embedding_scale == "auto" else settings.embedding_scale
    ids = torch.arange(target.vocab_size, device=target.device)
    embeddings = target.embed(ids[None])[0].float().cpu() * scale
    drafter.slots.mul_(embeddings.std(0)).add_(embeddings.mean(0))
    if drafter.second is not None:
        first = {name: weight for name, weight in drafter.state_dict().items() if name in drafter.second.state_dict()}
        drafter.second.load_state_dict(first, strict=False)
    basis = drafter.transition.basis
    basis.copy_(whitened(head_rows(target.model), basis.shape[1]))
