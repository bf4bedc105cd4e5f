"""FSPAD's partial alignment distillation loss (arXiv 2408.15562), EAGLE's when `p` is `r`, and their objective.

Position t of a sequence reads (e_{t+1}, f_t), and its outputs stand for f_{t+1}, from which the target says x_{t+2}.
A sequence of L tokens therefore has L-2 positions, and position t counts when x_{t+2} is a response token. The result
is sums, which the caller divides.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.drafting.vocabulary import DraftVocabulary, indices_in
from outdraft.losses.cross_entropy import SOFT, Guess, Head, TokenLoss, soft_cross_entropies
from outdraft.losses.objective import Objective, Reading, reader_of, stored_teacher
from outdraft.losses.teacher import TopProbs, most_probable, predicting, within
from outdraft.methods.fspad.beginning import scale_of
from outdraft.methods.fspad.network import DraftNetwork, DraftOutput, FeatureHead, scaled
from outdraft.methods.fspad.unrolled import Unrolled
from outdraft.target.target import Target

NOISE_WIDTH = 0.2
NOISE_LENGTH = 512


class LossSums(NamedTuple):
    """Sums over the counted positions, scalars in float32; divide by `positions` for the means of the paper."""

    regression: Tensor
    """The regression loss SmoothL1(r_t, f_{t+1}), for each position the mean over d; 0 for drafters without it."""
    token: Tensor
    """The token loss - sum_v softmax(head(f_{t+1}))_v log softmax(head(p_t))_v, or another `TokenLoss` of both."""
    agreed: Tensor
    """The number of positions where head(p_t) and head(f_{t+1}) have the same argmax."""
    positions: Tensor
    """The number of counted positions; with several draft steps those of the first, as for `agreed`."""


class DrafterLoss(nn.Module):
    """The drafter together with its loss, the module that is trained (and wrapped for several processes).

    A drafter with an output layer of its own (EAGLE-3) learns tokens alone: what it feeds back is free.

    Args:
        drafter: the only parameters here.
        head: the target's frozen head, `(..., hidden) -> (..., vocab)`, differentiable in its input.
        chunk_size: positions whose logits are held at once.
        unroll_steps: draft steps that are trained; 1 is the paper's loss, more feed the drafter its own r as in
            decoding (HASS, arXiv 2408.15766; EAGLE-3, arXiv 2503.01840), each at the cost of one more forward.
        unroll_decay: step k weighs this to the power of k; the weights are normalised to sum 1.
        token_loss: the loss between the drafter's and the target's distributions.
        teacher: maps `(positions, hidden)` target features to the most probable tokens, in ids of `head`'s output;
            without it `head` gives the whole distribution.
    """

    def __init__(
        self,
        drafter: DraftNetwork,
        head: Head,
        chunk_size: int = 512,
        unroll_steps: int = 1,
        unroll_decay: float = 0.8,
        token_loss: TokenLoss = SOFT,
        teacher: Callable[[Tensor], TopProbs] | None = None,
    ):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.unroll_steps, self.unroll_decay = chunk_size, unroll_steps, unroll_decay
        self.token_loss, self._head, self._teacher = token_loss, head, teacher

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        loss_mask: Tensor,
        noise: Tensor | None = None,
        said: TopProbs | None = None,
        steps: int | None = None,
    ) -> LossSums:
        """Compute the sums of both losses over the counted positions of a right-padded batch.

        Args:
            embeddings: `(batch, tokens, hidden)` the target's input embeddings of x_0 .. x_{L-1}.
            features: `(batch, tokens, tap width)` the target's features f_0 .. f_{L-1}, and the drafter's further taps.
            loss_mask: `(batch, tokens)` True where x is a response token; False on padding.
            noise: `(batch, tokens, hidden)` added to the features that the drafter reads, never to the goals or the
                further taps.
            said: the target's most probable tokens at the counted positions, row by row, if they are known already.
            steps: draft steps to train; all when not given.
        """
        outputs, spoken, goal = self._unrolled(embeddings, features, loss_mask, noise, steps or self.unroll_steps)
        return self._compare(outputs, spoken, goal, said)

    def hits(
        self,
        embeddings: Tensor,
        features: Tensor,
        loss_mask: Tensor,
        steps: int,
        best_of: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Mark where each of the draft steps guesses the target's best token; arguments as in `forward`.

        Args:
            best_of: maps `(positions, hidden)` target features to the best tokens, in ids of the drafter's output.

        Returns:
            Two masks `(batch, tokens - 2, steps)`: True at hits, and True at positions that count.
        """
        outputs, spoken, goal = self._unrolled(embeddings, features, loss_mask, None, steps)
        read: Head = self.drafter.lm_head or (lambda p: self._head(p.to(goal.dtype)))
        counted, right = spoken[0], torch.zeros(*spoken[0].shape, steps, dtype=torch.bool, device=goal.device)
        for rows in counted.nonzero().split(self.chunk_size):
            here = tuple(rows.T)
            with torch.autocast(goal.device.type, enabled=False):
                best = best_of(goal[here])
                for k, out in enumerate(outputs):
                    right[..., k][here] = read(out.p[here]).argmax(-1) == best
        return right, torch.stack(spoken, dim=-1)

    def _unrolled(
        self, embeddings: Tensor, features: Tensor, loss_mask: Tensor, noise: Tensor | None, steps: int
    ) -> tuple[list[DraftOutput], list[Tensor], Tensor]:
        """Return the outputs of every draft step, the masks of counted positions, and the goal features."""
        counted = predicting(loss_mask, 2)
        dtype, beside = self.drafter.norm.weight.dtype, features.shape[-1] - embeddings.shape[-1]
        noisy = features.to(dtype) if noise is None else features.to(dtype) + F.pad(noise, (0, beside)).to(dtype)
        embedded, goal = embeddings[:, 1:-1].to(dtype), features[:, 1:-1, : embeddings.shape[-1]]
        positions = torch.arange(goal.shape[1], device=goal.device)[None]
        seen = Unrolled()
        out = self.drafter(embedded, noisy[:, :-2], positions, None, seen)
        outputs, spoken = [out], [counted]
        for step in range(1, steps):
            own = F.pad(out.r[:, :-1], (0, 0, 1, 0))  # at t, what the step before has made of t - 1
            out = self.drafter(embedded, own, positions, None, seen)
            outputs.append(out)
            spoken.append(counted & (positions >= step))  # at the first places of a sequence nothing was drafted yet
        return outputs, spoken, goal

    def _compare(
        self, outputs: list[DraftOutput], spoken: list[Tensor], features: Tensor, said: TopProbs | None
    ) -> LossSums:
        """Compute weighted sums over the draft steps. Each step counts on its mask in `spoken`, at most where the first
        step does; all share one evaluation of the target."""
        counted = spoken[0]
        goal = features[counted]
        exact, own = torch.promote_types(outputs[0].r.dtype, torch.float32), self.drafter.lm_head
        regressions, guesses = [], []
        for out, here in zip(outputs, spoken, strict=True):
            if own is None:
                distance = F.smooth_l1_loss(out.r[here].to(exact), features[here].to(exact), reduction="none", beta=1.0)
                regressions.append(distance.mean(dim=-1).sum())
            guesses.append(Guess(out.p[counted], None if here is counted else here[counted], own))
        if said is None and self._teacher is not None:
            pieces = [self._teacher(piece) for piece in goal.split(self.chunk_size)]
            said = TopProbs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        tokens, agreed = soft_cross_entropies(
            guesses,
            goal if said is None else said,
            self._head,
            self.chunk_size,
            token_loss=self.token_loss,
            precision=goal.dtype,
        )
        weights = self.unroll_decay ** torch.arange(len(outputs), dtype=exact, device=goal.device)
        weights /= weights.sum()
        regression = (torch.stack(regressions) * weights).sum() if regressions else weights.new_zeros(())
        return LossSums(regression, (tokens * weights).sum(), agreed[0], counted.sum())


def feature_noise(
    lengths: Sequence[int], width: int, tokens: int, seeds: Sequence[int], device: torch.device | str
) -> Tensor:
    """Draw the published recipe's uniform noise (U(0,1) - 0.5) * 0.2 * 512 / L, zero on padding.

    Every row has its own generator, so that it depends neither on its batch nor on the process that computes it. A
    resumed run draws the same noise as an uninterrupted one.

    Args:
        lengths: the rows' true lengths L.
        tokens: padded length.

    Returns:
        `(batch, tokens, hidden)` float32.
    """
    noise = torch.zeros(len(lengths), tokens, width, device=device)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator = torch.Generator(device=device).manual_seed(seed)
        drawn = torch.rand(length, width, generator=generator, device=device)
        noise[row, :length] = (drawn - 0.5) * (NOISE_WIDTH * NOISE_LENGTH / length)
    return noise


class FeatureObjective(Objective):
    """The objective of FSPAD and EAGLE on the target's features one token behind, and its embeddings."""

    parts: ClassVar = {"loss_reg": "regression", "loss_cls": "token"}

    def __init__(self, target: Target, config: Any, drafter: Any):
        self.target, self.config, self.drafter = target, config, drafter
        self.scale = scale_of(target) if config.embedding_scale == "auto" else config.embedding_scale
        self.top_k, self.rows, kept = config.teacher_top_k, config.loss_chunk_size, drafter.draft_tokens
        layers = drafter.layers_read(target.num_layers)
        self.reading = Reading(reader_of(target), layers)
        self._places: Tensor | None = None
        if kept is not None and (drafter.lm_head is not None or self.top_k):
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
        return predicting(loss_mask, 2)

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
        return self._known(most_probable(self.target, goal, self.top_k, self.rows))

    def _best(self, goal: Tensor) -> Tensor:
        return self._known(most_probable(self.target, goal, 1, self.rows)).ids[:, 0]

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
