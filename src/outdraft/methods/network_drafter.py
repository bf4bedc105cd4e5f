"""How a drafter with weights of its own binds to its target: sizes, the layers that it reads, and what it may draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter
from outdraft.drafting.expand import grow
from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.methods.checkpoint import refuse_another
from outdraft.target.backends import count_parameters
from outdraft.target.target import Target
from outdraft.target.views import Reads


class NetworkDrafter(Drafter):
    """A trained network bound to its target.

    Args:
        network: a `Network` on the target's device and in its precision.
        target: the model it was trained for.
        reads: what it reads of the target.

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
