"""FSPAD-1F's loss: what the mask rows of sampled anchors say, against the target's distribution at every slot.

Slot 0 of the anchor at t predicts x_{t+2}, as FSPAD's row t does. Mask row j of it predicts x_{t+2+j}, of which
f_{t+1+j} gives the distribution; the token before it is x_{t+1+j}. Slots count up to the first label that is no
response token.

    L = sum_j w_j [ CE(P_j, softmax l_j) + lambda (0.1 CE + 0.9 L1)(P~_j, softmax S_j) ] / sum_j w_j

The first term's minimiser is the marginal over what comes between, which recall and trees need. The second trains the
transition on the k most probable tokens and the label, with P renormalised to them; its L1 half is the probability that
a drawn candidate is rejected.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from outdraft.losses.cross_entropy import Head
from outdraft.losses.teacher import TopProbs, places, predicting
from outdraft.methods.fspad.loss import DrafterLoss, FeatureObjective, noise_seed
from outdraft.methods.fspad.network import DraftOutput
from outdraft.methods.fspad_1f.network import OneForwardHead, head_rows
from outdraft.target.target import Target

GAMMA = 4.0
"""The slots over which a slot's weight falls by e."""

HARD_SHARE = 0.1
"""The share of cross-entropy in the transition's loss; L1 has the rest."""

LEAST_MASS = 1e-4
"""The least probability of a slot's candidates from which the transition learns."""

TRANSITION_FROM = 1 / 3
"""The share of the run over which the transition's weight rises to 1."""

MARKS = ("recall_1", "recall_8", "recall_16", "top1_moved")
"""What is logged of every slot: how often the target's best token is among the most probable 1, 8 and 16, and how often
it is the best by the transition after the true token."""


class MaskRows(NamedTuple):
    """The mask rows that count, `(rows,)` each."""

    batch: Tensor
    anchor: Tensor
    """Indices of the anchors."""
    at: Tensor
    """Positions t of the anchors."""
    slot: Tensor
    """Numbers from 1."""
    weight: Tensor


class Compared(NamedTuple):
    """The outcome of the mask rows that count, summed with their weights."""

    unary: Tensor
    moved: Tensor
    marks: Tensor
    """`(rows, 4)` True as `MARKS` say, unweighted."""


class OneForwardLoss(nn.Module):
    """The drafter together with its loss, the module that is trained.

    Args:
        drafter: its trainable parameters are trained.
        base: the loss of FSPAD's own rows with the function to the sum to be minimised; None where FSPAD is frozen.
        head: the target's frozen head over the draft vocabulary.
        codes: `(draft vocab, codes)` of the tokens of the draft vocabulary.
    """

    def __init__(
        self,
        drafter: OneForwardHead,
        base: tuple[DrafterLoss, Callable[[Any], Tensor]] | None,
        head: Head,
        codes: Tensor,
        precision: torch.dtype,
        chunk_size: int,
    ):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.slots = chunk_size, drafter.config.block_size - 1
        self._base, self._head, self._codes, self._precision = base, head, codes, precision
        self.shown = [f"{mark}_slot_{j}" for j in range(1, self.slots + 1) for mark in MARKS]
        names = ["loss", "unary", "moved", "agreed", "positions", *self.shown]
        self._sums: Any = namedtuple("OneForwardSums", names)  # type: ignore[misc]

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        loss_mask: Tensor,
        tokens: Tensor,
        said: TopProbs,
        anchors: Tensor,
        moving: float,
        noise: Tensor | None = None,
    ) -> Any:
        """Compute the sums over the counted positions, for which the anchors stand.

        Args:
            embeddings, features, loss_mask, noise: as in `DrafterLoss`; noise is read by FSPAD's own loss alone.
            tokens: `(batch, tokens)` x in ids of the draft vocabulary, -1 outside of it.
            said: the target's most probable tokens at all predicting positions, in ids of the draft vocabulary.
            anchors: `(batch, anchors)` positions t, -1 for none.
            moving: the weight lambda of the transition's loss.
        """
        _, rows, found = self.compared(embeddings, features, loss_mask, tokens, said, anchors)
        counted = predicting(loss_mask, 2)
        positions, loss = counted.sum(), found.unary + moving * found.moved
        marks = [found.marks[rows.slot == j].float().sum(0) for j in range(1, self.slots + 1)]
        shares = [own * positions / (rows.slot == j).sum().clamp(min=1) for j, own in enumerate(marks, start=1)]
        if self._base is not None:
            module, weigh = self._base
            first = TopProbs(*(part[places(loss_mask)[:, 1:][counted]] for part in said))
            loss = loss + weigh(module(embeddings, features, loss_mask, noise, first, 1))
        shown = torch.stack(shares).flatten()
        return self._sums(loss, found.unary.detach(), found.moved.detach(), shown[0], positions, *shown)

    def compared(
        self, embeddings: Tensor, features: Tensor, loss_mask: Tensor, tokens: Tensor, said: TopProbs, anchors: Tensor
    ) -> tuple[DraftOutput, MaskRows, Compared]:
        """Run FSPAD's rows and the anchors' mask rows; return the outputs of the former, and how the latter did."""
        dtype = self.drafter.norm.weight.dtype
        embedded, read = embeddings[:, 1:-1].to(dtype), features[:, :-2].to(dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._base is not None):
            own, fused = self.drafter(embedded, read), self.drafter.fusion(embedded, read)
        out = self.drafter.masked(fused, own.r, anchors.clamp(min=0), self.slots)
        rows = mask_rows(anchors, loss_mask, self.slots)
        there = rows.at + 1 + rows.slot
        teacher = TopProbs(*(part[places(loss_mask)[rows.batch, there]] for part in said))
        p, r = (part[rows.batch, rows.anchor, rows.slot - 1] for part in out)
        given = [p, r, *teacher, tokens[rows.batch, there + 1], tokens[rows.batch, there], rows.weight]
        pieces = list(zip(*(part.split(self.chunk_size) for part in given), strict=True))
        # Logits live for one chunk only: where there are several, they are computed again for the gradients.
        again = len(pieces) > 1 and torch.is_grad_enabled()
        found = [
            checkpoint(self._piece, *piece, use_reentrant=False) if again else self._piece(*piece) for piece in pieces
        ]
        unary, moved, marks = zip(*found, strict=True)
        return own, rows, Compared(sum(unary), sum(moved), torch.cat(marks))

    def _piece(
        self, p: Tensor, r: Tensor, ids: Tensor, probs: Tensor, label: Tensor, before: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `Compared` of some rows: outputs, the teacher's tokens, the label and the token before."""
        probs, best, k = probs.to(p.dtype), ids[:, :1], self.drafter.config.slot_candidates
        with torch.autocast(p.device.type, enabled=False):
            logits = self._head(p.to(self._precision)).to(p.dtype)
        unary = -(probs * logits.log_softmax(-1).gather(1, ids.clamp(min=0))).sum(-1)
        likely = logits.detach().topk(min(max(k, 16), logits.shape[1])).indices
        own, label = likely[:, :k], label[:, None]
        among = torch.cat([own, label.clamp(min=0)], dim=1)
        gone = F.pad((own == label).any(1, keepdim=True) | (label < 0), (own.shape[1], 0))
        move = self.drafter.transition(self._codes[before.clamp(min=0)], r, self._codes[among])
        scores = (logits.gather(1, among) + move.to(logits.dtype)).masked_fill(gone, -torch.inf)
        goal = ((among[..., None] == ids[:, None]) * probs[:, None]).sum(-1).masked_fill(gone, 0.0)
        mass = goal.sum(-1)
        goal, log_q = goal / mass.clamp(min=LEAST_MASS)[:, None], scores.log_softmax(-1)
        cross = -(goal * log_q.masked_fill(gone, 0.0)).sum(-1)
        moved = HARD_SHARE * cross + (1 - HARD_SHARE) * (goal - log_q.exp()).abs().sum(-1)
        learns = (mass > LEAST_MASS) & (before >= 0)
        first = own.gather(1, scores.detach()[:, :-1].argmax(1, keepdim=True))
        marks = [(some == best).any(1) for some in (likely[:, :1], likely[:, :8], likely[:, :16], first)]
        return (unary * weight).sum(), (moved * weight * learns).sum(), torch.stack(marks, dim=1)


def drawn_anchors(loss_mask: Tensor, most: int, seeds: Sequence[int]) -> Tensor:
    """Draw at most `most` anchors of every row, without replacement: positions t where x_{t+2} and x_{t+3} count.

    Every row has its own generator, so that a resumed run, or one with other batches, draws the same.

    Returns:
        `(rows, anchors)` positions, -1 for none.
    """
    wanted = predicting(loss_mask, 2) & F.pad(loss_mask[:, 3:].bool(), (0, 1))
    drawn = [torch.rand(wanted.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    order = torch.stack(drawn).to(wanted.device).masked_fill(~wanted, -1.0)
    keys, positions = order.topk(min(most, wanted.shape[1]), dim=1)
    count = max(1, int((keys >= 0).sum(1).max()))
    return positions.masked_fill(keys < 0, -1)[:, :count]


def mask_rows(anchors: Tensor, loss_mask: Tensor, slots: int) -> MaskRows:
    """Return the mask rows that count; the weights of a row's anchors stand for its counted positions."""
    batch, anchor, place = guesses_counted(anchors, loss_mask, 2, slots + 1)[..., 1:].nonzero(as_tuple=True)
    falling = torch.exp(-torch.arange(slots, device=anchors.device) / GAMMA)
    share = predicting(loss_mask, 2).sum(1) / (anchors >= 0).sum(1).clamp(min=1)
    weight = (falling / falling.sum())[place] * share[batch]
    return MaskRows(batch, anchor, anchors[batch, anchor], place + 1, weight)


def guesses_counted(anchors: Tensor, loss_mask: Tensor, first: int, count: int) -> Tensor:
    """Return the `(rows, anchors, count)` mask of the tokens from `first` after the anchors on: they count up to the
    first that is no response token, and those of an anchor of -1 not at all."""
    at = anchors[..., None] + first + torch.arange(count, device=anchors.device)
    inside = (at < loss_mask.shape[1]) & (anchors[..., None] >= 0)
    rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
    return (loss_mask[rows, at.clamp(0, loss_mask.shape[1] - 1)].bool() & inside).cumprod(-1)


class OneForwardObjective(FeatureObjective):
    """FSPAD-1F's objective: stage 1 trains the block beside a frozen FSPAD, stage 2 (`train_base`) both."""

    def __init__(self, target: Target, config: Any, drafter: OneForwardHead):
        super().__init__(target, config, drafter)
        train_base = config.init_from is None if config.train_base is None else config.train_base
        for weight in drafter.base:
            weight.requires_grad_(train_base)
        base: Any = (self.loss, super().total) if train_base else None
        rows = head_rows(target.model)
        kept = rows if drafter.draft_tokens is None else rows[drafter.draft_tokens.to(rows.device)]
        codes = (kept @ drafter.transition.basis.to(kept)).to(target.device)
        self.loss = OneForwardLoss(drafter, base, self.head, codes, target.dtype, config.loss_chunk_size)
        shown = {name: name for name in self.loss.shown}
        self.parts = {"loss_unary": "unary", "loss_transition": "moved", **shown}  # type: ignore[misc]

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        embeddings, _, loss_mask, noise, _, _ = super().arguments(batch, features, step, progress)
        said, tokens = self.teacher(batch, features), batch["input_ids"]
        assert said is not None  # the method asks for a teacher
        if self._places is not None:
            tokens = self._places[tokens]
        seeds = [noise_seed(self.config.seed + 1, step, int(i)) for i in batch["index"]]
        anchors = drawn_anchors(loss_mask, self.config.anchors, seeds)
        moving = min(1.0, progress / TRANSITION_FROM)
        return embeddings, features, loss_mask, tokens, self._known(said), anchors, moving, noise

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Mark slot 0's hits, and later slots' by the transition after the true token, at a draw of anchors."""
        loss: Any = self.loss
        *given, said, anchors, _, _ = self.arguments(batch, features, 0)
        own, rows, found = loss.compared(*given, said, anchors)
        right = torch.zeros(*own.p.shape[:2], max(steps, loss.slots + 1), dtype=torch.bool, device=own.p.device)
        spoken = right.clone()
        right[rows.batch, rows.at + rows.slot, rows.slot] = found.marks[:, -1]
        spoken[rows.batch, rows.at + rows.slot, rows.slot] = True
        batch_, anchor = (anchors >= 0).nonzero(as_tuple=True)
        at = anchors[batch_, anchor]
        first = self.head(own.p[batch_, at].to(self.target.dtype)).argmax(-1)
        right[batch_, at, 0] = first == said.ids[places(batch["loss_mask"])[batch_, at + 1], 0]
        spoken[batch_, at, 0] = True
        return right[..., :steps], spoken[..., :steps]

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.loss
