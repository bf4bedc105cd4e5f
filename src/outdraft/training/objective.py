"""What a method trains on and what its loss is: the one place where training tells FSPAD, EESD and Medusa apart.

Trainer, plan and cache know an `Objective` only; a further method is one more here. Knows nothing of optimisers, files
or progress.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.losses.cross_entropy import Head
from outdraft.losses.features import Reading, reader_of
from outdraft.losses.target_like import TargetLike
from outdraft.losses.teacher import TopProbs, most_probable, predicting, within
from outdraft.losses.token_loss import TokenLoss
from outdraft.methods.checkpoint import Network
from outdraft.methods.eesd.loss import ExitLoss, next_is_response
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.head_config import feature_head_config
from outdraft.methods.fspad.loss import DrafterLoss, counted_positions, feature_noise
from outdraft.methods.fspad.network import FeatureHead, scaled
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads
from outdraft.methods.medusa.loss import MedusaLoss, reached
from outdraft.target.target import Target
from outdraft.training.beginning import begin_from, scale_of
from outdraft.training.config import DrafterConfig


class Objective(ABC):
    """A drafter in the making, with its loss."""

    parts: ClassVar[dict[str, str]]
    """Logged names of parts of the loss -> the sums that they are means of."""
    reading: Reading
    """What the loss needs of the target."""
    top_k: int
    """The target's most probable tokens that the loss is taken against; 0 for its whole distribution, or none."""
    drafter: Network
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

    def finished(self) -> Network:
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


def objective_for(target: TargetLike, config: DrafterConfig, drafter: Network | None = None) -> Objective:
    """The objective of the configuration's method, with its preset filled in and the exit layer a number.

    Args:
        target: what the drafter is for.
        config: the settings.
        drafter: what to train; a fresh one when not given.

    Raises:
        UserError: the target cannot have such a drafter.
    """
    drafter = drafter or new_drafter(target, config)
    if isinstance(drafter, ExitLayer):
        return ExitObjective(target, config, drafter)
    if isinstance(drafter, MedusaHeads):
        return MedusaObjective(target, config, drafter)
    return FeatureObjective(target, config, drafter)


def new_drafter(target: TargetLike, config: DrafterConfig) -> Network:
    """A drafter with its first float32 weights, on the target's device: of the seed, another drafter or the target."""
    if config.method == "eesd":
        assert isinstance(config.exit_layer, int)
        return ExitLayer.beginning(target.model, ExitLayerConfig(config.exit_layer, config.own_head))
    if config.method == "medusa":
        sizes = (target.hidden_size, target.vocab_size, config.medusa_num_heads, config.medusa_num_layers)
        return MedusaHeads.beginning(target.model, MedusaConfig(*sizes, config.own_head)).to(target.device)
    shape = feature_head_config(
        target,
        config.method,
        intermediate_size=config.intermediate_size,
        feature_sampling=config.feature_sampling,
        partial_alignment=config.partial_alignment,
        tap_layers=config.tap_layers,
        state_norm=config.state_norm,
        draft_vocab_size=config.draft_vocabulary_for(target.vocab_size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        drafter = FeatureHead(shape)
    if config.init_from is not None:
        begin_from(drafter, config.init_from)
        scaled(drafter, 1 / (scale_of(target) if config.embedding_scale == "auto" else config.embedding_scale))
    return drafter.to(target.device)


class FeatureObjective(Objective):
    """FSPAD's and EAGLE's: the target's features one token behind, and its embeddings."""

    parts: ClassVar = {"loss_reg": "regression", "loss_cls": "token"}

    def __init__(self, target: TargetLike, config: DrafterConfig, drafter: FeatureHead):
        self.target, self.config, self.drafter = target, config, drafter
        self.scale = scale_of(target) if config.embedding_scale == "auto" else config.embedding_scale
        self.top_k = config.teacher_top_k
        layers, reader = drafter.config.tap_layers, reader_of(target)
        self.reading = Reading(reader, layers)
        head: Head = target.head
        self._places: Tensor | None = None
        if drafter.draft_tokens is not None and self.top_k and isinstance(target, Target):
            # What is never drafted needs no logit, and most of a large vocabulary is never drafted.
            head = DraftVocabulary(drafter.draft_tokens, target).head
            self._places = torch.full((target.vocab_size,), -1, device=target.device)
            self._places[drafter.draft_tokens] = torch.arange(len(drafter.draft_tokens), device=target.device)
        self.loss = DrafterLoss(
            drafter,
            head,
            config.loss_chunk_size,
            config.unroll_steps,
            config.unroll_decay,
            token_loss_of(config),
            self._teacher if self.top_k else None,
        )

    def counted(self, loss_mask: Tensor) -> Tensor:
        return counted_positions(loss_mask)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        ids, lengths = batch["input_ids"], batch["lengths"]
        with torch.no_grad():
            embeddings = self._embed(ids)
        noise = None
        if self.config.feature_noise:
            seeds = [noise_seed(self.config.seed, step, int(i)) for i in batch["index"]]
            noise = feature_noise(lengths.tolist(), self.target.hidden_size, ids.shape[1], seeds, ids.device)
        said = stored_teacher(batch, first=1)
        known = None if said is None else self._known(said)
        steps = self.config.unroll_steps if progress >= self.config.unroll_from else 1
        return embeddings, features, batch["loss_mask"], noise, known, steps

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        loss: DrafterLoss = self.loss  # type: ignore[assignment]
        return loss.hits(self._embed(batch["input_ids"]), features, batch["loss_mask"], steps)

    def finished(self) -> FeatureHead:
        drafter: FeatureHead = self.drafter  # type: ignore[assignment]
        return drafter if self.scale == 1 else scaled(copy.deepcopy(drafter), self.scale)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.target.embed(ids) * self.scale

    def _teacher(self, goal: Tensor) -> TopProbs:
        return self._known(most_probable(self.target, goal, self.top_k, self.config.loss_chunk_size))

    def _known(self, said: TopProbs) -> TopProbs:
        """In ids of what the drafter's head gives."""
        return said if self._places is None else within(said, self._places)

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        w_reg = self.config.w_reg * left[self.config.w_reg_schedule]
        return w_reg * sums.regression + self.config.w_cls * sums.token


class ExitObjective(Objective):
    """EESD's: the hidden state of an early layer, and the features that say what the target would."""

    parts: ClassVar = {}

    def __init__(self, target: TargetLike, config: DrafterConfig, drafter: ExitLayer):
        self.drafter, self.width = drafter, target.hidden_size
        self.target, self.top_k, self.rows = target, teacher_of(config), config.loss_chunk_size
        self.reading = Reading(reader_of(target), exit_layer=drafter.config.exit_layer)
        self.loss = ExitLoss(drafter, cast(Target, target), config.loss_chunk_size, weight_of_tokens(config))

    def counted(self, loss_mask: Tensor) -> Tensor:
        return next_is_response(loss_mask)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        hidden, last = features.split(self.width, dim=-1)
        said = stored_teacher(batch)
        if said is None and self.top_k:
            goal = last[:, :-1][self.counted(batch["loss_mask"])]
            said = most_probable(self.target, goal, self.top_k, self.rows)
        return hidden, last, batch["input_ids"], batch["loss_mask"], said

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.cross_entropy


class MedusaObjective(Objective):
    """Medusa's: the target's features, as FSPAD's, and what the target says one, two, ... tokens later."""

    parts: ClassVar = {"loss_head1": "first_head"}

    def __init__(self, target: TargetLike, config: DrafterConfig, drafter: MedusaHeads):
        self.drafter, self.target = drafter, target
        self.top_k, self.rows = teacher_of(config), config.loss_chunk_size
        self.reading = Reading(reader_of(target))
        self.loss = MedusaLoss(drafter, cast(Target, target), config.loss_chunk_size, weight_of_tokens(config))

    def counted(self, loss_mask: Tensor) -> Tensor:
        return reached(loss_mask, 1)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        said = stored_teacher(batch, first=1)
        if said is None and self.top_k:
            goal = features[:, 1:-1][self.counted(batch["loss_mask"])]
            said = most_probable(self.target, goal, self.top_k, self.rows)
        return features, batch["input_ids"], batch["loss_mask"], said

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.cross_entropy


def stored_teacher(batch: Mapping[str, Tensor], first: int = 0) -> TopProbs | None:
    """The target's most probable tokens of a batch (`collate`) from position `first` on; None where none were kept."""
    if "teacher_ids" not in batch:
        return None
    ids, probs = batch["teacher_ids"], batch["teacher_probs"]
    later = predicting(batch["loss_mask"]).nonzero()[:, 1] >= first
    return TopProbs(ids[later], probs[later])


def teacher_of(config: DrafterConfig) -> int:
    """The target's tokens that EESD and Medusa learn from at every position; 0 where its law is not asked for."""
    return 0 if weight_of_tokens(config) == 1 else config.teacher_top_k


def token_loss_of(config: DrafterConfig) -> TokenLoss:
    """What the drafter's law is held against the target's by."""
    return TokenLoss(config.token_loss, config.token_top_k, config.token_top_k_weight)


def weight_of_tokens(config: DrafterConfig) -> float:
    """Of the responses' tokens in the cross-entropy; the target's law has the rest."""
    return {"soft": 0.0, "hard": 1.0, "mixed": config.hard_weight}[config.loss]


def noise_seed(seed: int, step: int, index: int) -> int:
    """One 63-bit seed for the noise of one example in one step."""
    digest = hashlib.sha256(f"{seed} {step} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
