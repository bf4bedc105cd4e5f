"""What training knows of a method: an objective, which is a drafter in the making with its loss.

Each method has one beside its loss. Settings are a `DrafterConfig`, of which this folder knows nothing but the names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from outdraft.losses.features import Reading
from outdraft.losses.target_like import TargetLike
from outdraft.losses.teacher import TopProbs, predicting


class Objective(ABC):
    """A drafter in the making, with its loss."""

    parts: ClassVar[dict[str, str]]
    """Logged names of parts of the loss -> the sums that they are means of."""
    reading: Reading
    """What the loss needs of the target."""
    top_k: int
    """The target's most probable tokens that the loss is taken against; 0 for its whole distribution, or none."""
    drafter: Any
    """The network, of its method's class."""
    loss: nn.Module
    """Holds the drafter as `drafter`; gives a tuple of sums, among them `agreed` and `positions`."""
    target: TargetLike
    """What the drafter is for."""
    scale: float = 1.0
    """What embeddings are multiplied by in training alone, until `finished` folds it into the weights."""

    @abstractmethod
    def counted(self, loss_mask: Tensor) -> Tensor:
        """Positions that carry loss in a `(batch, tokens)` mask that is True where a token is of a response."""

    @abstractmethod
    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        """What the loss takes in a step, at this share of the run, from a batch (`collate`) and what was read of the
        target for it."""

    def finished(self) -> Any:
        """The drafter as it decodes and is saved: itself, or a copy into which is folded what only training does."""
        return self.drafter

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor] | None:
        """Where the drafter guesses the target's best token, and where that counts.

        Args:
            batch: as `collate` gives it.
            features: what was read of the target for it.
            steps: draft steps to look at, at most.

        Returns:
            Both `(rows, positions, steps)` booleans; None for a drafter whose guesses are not looked at.
        """
        return None

    @abstractmethod
    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        """The sum to be minimised.

        Args:
            sums: of the loss.
            progress: the share of the run that is done, from 0 to 1.
        """


def stored_teacher(batch: Mapping[str, Tensor], first: int = 0) -> TopProbs | None:
    """The target's most probable tokens of a batch (`collate`) from position `first` on; None where none were kept."""
    if "teacher_ids" not in batch:
        return None
    ids, probs = batch["teacher_ids"], batch["teacher_probs"]
    later = predicting(batch["loss_mask"]).nonzero()[:, 1] >= first
    return TopProbs(ids[later], probs[later])


def teacher_of(config: Any) -> int:
    """The target's tokens that EESD and Medusa learn from at every position; 0 where its distribution is not asked
    for."""
    return 0 if weight_of_tokens(config) == 1 else config.teacher_top_k


def weight_of_tokens(config: Any) -> float:
    """Of the responses' tokens in the cross-entropy; the target's distribution has the rest."""
    return {"soft": 0.0, "hard": 1.0, "mixed": config.hard_weight}[config.loss]
