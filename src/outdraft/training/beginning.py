"""What a drafter's training begins with: weights of another one (published, of an earlier run, or for a sister of the
target), and embeddings as large as the features beside them.
"""

from __future__ import annotations

import math
from dataclasses import asdict

import torch

from outdraft.errors import UserError
from outdraft.losses.target_like import TargetLike
from outdraft.methods.checkpoint import load_drafter
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.named import named, shipped_drafter

LENIENT = {"max_position_embeddings"}
"""What may differ: the length of a table that is computed."""


def begin_from(drafter: FeatureHead, source: str) -> None:
    """Give the drafter the weights of another, in place; its own embedding, if it has one, is left for the target's.

    Args:
        drafter: of the shape that the target and the settings ask for.
        source: folder, hub id, or `reference` or `smollm2` for the drafter of the same method that ships for these;
            FSPAD's and EAGLE's official folders load as our own do.

    Raises:
        UserError: nothing there, or a drafter of another shape.
    """
    found = load_drafter(shipped_drafter(source, drafter.method) if named(source) is not None else source).head
    there, here = asdict(found.config), asdict(drafter.config)
    if different := [name for name in here if name not in LENIENT and there[name] != here[name]]:
        name = different[0]
        raise UserError(
            f"the drafter in '{source}' has {name} {there[name]}, this run's has {here[name]}; begin from another, or "
            f"change the settings that decide {name}"
        )
    wanted = drafter.state_dict()
    drafter.load_state_dict({name: weight for name, weight in found.state_dict().items() if name in wanted})


PROBED_TOKENS = 64


@torch.no_grad()
def scale_of(target: TargetLike) -> float:
    """What brings embeddings near to the size of the target's features; 1 where they are no smaller.

    The largest power of two that does not make them larger: folding it into weights rounds nothing.
    """
    ids = torch.linspace(0, target.vocab_size - 1, PROBED_TOKENS, device=target.device).long()[None]
    ids = ids[:, : target.context_length]
    features, embeddings = target.features(ids).float(), target.embed(ids).float()
    ratio = float(features.square().mean().sqrt() / embeddings.square().mean().sqrt().clamp(min=1e-12))
    return 2.0 ** max(0, math.floor(math.log2(max(ratio, 1.0))))
