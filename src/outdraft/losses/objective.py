"""The training objective of a method: a drafter in training together with its loss.

Each method defines its objective beside its loss. Settings are a `DrafterConfig`, of which this folder uses only names.
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
    """A drafter in training, with its loss."""

    parts: ClassVar[dict[str, str]]
    """The logged names of parts of the loss, mapped to the sums that they are means of."""
    reading: Reading
    """The reading of the target that the loss needs."""
    top_k: int
    """The number of most probable target tokens that the loss uses; 0 for the whole distribution, or none."""
    drafter: Any
    """The network, an instance of its method's class."""
    loss: nn.Module
    """The loss, which holds the drafter as `drafter` and gives a tuple of sums, among them `agreed` and `positions`."""
    target: TargetLike
    """The target that the drafter is trained for."""
    scale: float = 1.0
    """The factor on embeddings in training only, until `finished` folds it into the weights."""

    @abstractmethod
    def counted(self, loss_mask: Tensor) -> Tensor:
        """Return the mask of positions that carry loss, from a `(batch, tokens)` mask of response tokens."""

    @abstractmethod
    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        """Return the loss's arguments in a step at this share of the run, for a batch (`collate`) and its features."""

    def finished(self) -> Any:
        """Return the drafter for decoding and saving: itself, or a copy with training's scaling folded in."""
        return self.drafter

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor] | None:
        """Mark where the drafter guesses the target's best token, and where a guess counts.

        Args:
            batch: a batch of `collate`.
            features: the batch's features.
            steps: the most draft steps to compare.

        Returns:
            Two `(rows, positions, steps)` masks; None for a drafter whose guesses are not compared.
        """
        return None

    @abstractmethod
    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        """Return the sum to be minimised.

        Args:
            sums: sums that the loss gave.
            progress: the share of the run that is done, from 0 to 1.
        """


def stored_teacher(batch: Mapping[str, Tensor], first: int = 0) -> TopProbs | None:
    """Return a batch's most probable target tokens (`collate`) from position `first` on; None where none were kept."""
    if "teacher_ids" not in batch:
        return None
    ids, probs = batch["teacher_ids"], batch["teacher_probs"]
    later = predicting(batch["loss_mask"]).nonzero()[:, 1] >= first
    return TopProbs(ids[later], probs[later])


def teacher_of(config: Any) -> int:
    """Return the number of target tokens that EESD and Medusa learn from a position; 0 where only hard labels count."""
    return 0 if weight_of_tokens(config) == 1 else config.teacher_top_k


def weight_of_tokens(config: Any) -> float:
    """Return the weight of the responses' tokens in the cross-entropy; the target's distribution has the rest."""
    return {"soft": 0.0, "hard": 1.0, "mixed": config.hard_weight}[config.loss]
