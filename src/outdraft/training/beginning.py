"""First weights of a drafter from another one: published, of an earlier run, or for a sister of the target.

Knows drafter folders and the configuration of heads; nothing of data or of how training goes on.
"""

from __future__ import annotations

from dataclasses import asdict

from outdraft.drafters.checkpoint import load_drafter
from outdraft.drafters.feature_head import FeatureHead
from outdraft.errors import UserError
from outdraft.named import NAMED, shipped_drafter

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
    found = load_drafter(shipped_drafter(source, drafter.method) if source in NAMED else source).head
    there, here = asdict(found.config), asdict(drafter.config)
    if different := [name for name in here if name not in LENIENT and there[name] != here[name]]:
        name = different[0]
        raise UserError(
            f"the drafter in '{source}' has {name} {there[name]}, this run's has {here[name]}; begin from another, or "
            f"change the settings that decide {name}"
        )
    wanted = drafter.state_dict()
    drafter.load_state_dict({name: weight for name, weight in found.state_dict().items() if name in wanted})
