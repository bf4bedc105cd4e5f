"""The objective of FSPAD and EAGLE: the target's features one token behind, its embeddings, and noise."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from outdraft.drafting.vocabulary import DraftVocabulary, indices_in
from outdraft.losses.cross_entropy import Head, TokenLoss
from outdraft.losses.objective import Objective, Reading, reader_of, stored_teacher
from outdraft.losses.teacher import TargetLike, TopProbs, most_probable, within
from outdraft.methods.fspad.beginning import scale_of, text_config
from outdraft.methods.fspad.loss import DrafterLoss, counted_positions, feature_noise
from outdraft.methods.fspad.network import FeatureHead, scaled
from outdraft.target.target import Target


class FeatureObjective(Objective):
    """The objective of FSPAD and EAGLE on the target's features one token behind, and its embeddings."""

    parts: ClassVar = {"loss_reg": "regression", "loss_cls": "token"}

    def __init__(self, target: TargetLike, config: Any, drafter: Any):
        self.target, self.config, self.drafter = target, config, drafter
        self.scale = scale_of(target) if config.embedding_scale == "auto" else config.embedding_scale
        self.top_k, kept = config.teacher_top_k, drafter.draft_tokens
        layers = drafter.layers_read(text_config(target.model.config).num_hidden_layers)
        self.reading = Reading(reader_of(target), layers)
        self._places: Tensor | None = None
        if kept is not None and (drafter.lm_head is not None or (self.top_k and isinstance(target, Target))):
            self._places = indices_in(kept.to(target.device), target.vocab_size)
        self.head = self._head()
        self.loss = DrafterLoss(
            drafter,
            self.head,
            config.loss_chunk_size,
            config.unroll_steps,
            config.unroll_decay,
            TokenLoss(config.token_loss, config.token_top_k, config.token_top_k_weight),
            self._teacher if self.top_k else None,
        )

    def _head(self) -> Head:
        """Return the target's head, over the tokens that the drafter's own output has."""
        if self._places is None:
            return self.target.head
        # Tokens that are never drafted need no logit, and most of a large vocabulary is never drafted.
        return DraftVocabulary(self.drafter.draft_tokens, self.target).head

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
        return loss.hits(self._embed(batch["input_ids"]), features, batch["loss_mask"], steps, self._best)

    def finished(self) -> FeatureHead:
        return self.drafter if self.scale == 1 else scaled(copy.deepcopy(self.drafter), self.scale)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.target.embed(ids) * self.scale

    def _teacher(self, goal: Tensor) -> TopProbs:
        return self._known(most_probable(self.target, goal, self.top_k, self.config.loss_chunk_size))

    def _best(self, goal: Tensor) -> Tensor:
        return self._known(most_probable(self.target, goal, 1, self.config.loss_chunk_size)).ids[:, 0]

    def _known(self, said: TopProbs) -> TopProbs:
        """Translate the tokens to ids of the drafter's head."""
        return said if self._places is None else within(said, self._places)

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        w_reg = self.config.w_reg * left[self.config.w_reg_schedule]
        return w_reg * sums.regression + self.config.w_cls * sums.token


def noise_seed(seed: int, step: int, index: int) -> int:
    """Return the 63-bit seed for the noise of one example in one step."""
    digest = hashlib.sha256(f"{seed} {step} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
