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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from outdraft.losses.cross_entropy import Head
from outdraft.losses.objective import stored_teacher
from outdraft.losses.target_like import TargetLike
from outdraft.losses.teacher import TopProbs, most_probable, predicting
from outdraft.methods.fspad.loss import DrafterLoss, Streams, counted_positions
from outdraft.methods.fspad.network import DraftOutput
from outdraft.methods.fspad.objective import FeatureObjective, noise_seed
from outdraft.methods.fspad_1f.network import OneForwardHead, head_rows

GAMMA = 4.0
"""The slots over which a slot's weight falls by e."""

HARD_SHARE = 0.1
"""The share of cross-entropy in the transition's loss; L1 has the rest."""

LEAST_MASS = 1e-4
"""The least probability of a slot's candidates from which the transition learns."""

TRANSITION_FROM = 1 / 3
"""The share of the run over which the transition's weight rises to 1."""

RECALLS = (1, 8, 16)
"""The numbers of candidates whose recall of the target's best token is logged."""


class OneForwardLoss(nn.Module):
    """The drafter together with its loss, the module that is trained.

    Args:
        drafter: its trainable parameters are trained.
        base: the loss of FSPAD's own rows; None where FSPAD is frozen.
        weigh: the sum of that loss to be minimised.
        head: the target's frozen head over the draft vocabulary.
        codes: `(draft vocab, codes)` of the tokens of the draft vocabulary.
        precision: precision of the head.
        chunk_size: mask rows whose logits are held at once.
    """

    def __init__(
        self,
        drafter: OneForwardHead,
        base: DrafterLoss | None,
        weigh: Callable[[Any], Tensor],
        head: Head,
        codes: Tensor,
        precision: torch.dtype,
        chunk_size: int,
    ):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.slots = chunk_size, drafter.config.block_size - 1
        self._base, self._weigh, self._head, self._codes, self._precision = base, weigh, head, codes, precision
        recalls = [f"recall{k}_{j}" for j in range(1, self.slots + 1) for k in (*RECALLS, "t")]
        self._sums: Any = namedtuple("OneForwardSums", ["loss", "unary", "moving", "agreed", "positions", *recalls])

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
            embeddings: `(batch, tokens, hidden)` the target's input embeddings.
            features: `(batch, tokens, tap width)` the target's features and further taps.
            loss_mask: `(batch, tokens)` True where x is a response token.
            tokens: `(batch, tokens)` x in ids of the draft vocabulary, -1 outside of it.
            said: the target's most probable tokens at all predicting positions, in ids of the draft vocabulary.
            anchors: `(batch, anchors)` positions t, -1 for none.
            moving: the weight lambda of the transition's loss.
            noise: added to the features that FSPAD's own rows read in their loss.
        """
        counted = counted_positions(loss_mask)
        out, _ = self.outputs(embeddings, features, anchors)
        batch, anchor, slot, weight = rows_of(anchors, loss_mask, self.slots)
        at = anchors[batch, anchor]
        places = predicting(loss_mask).flatten().cumsum(0).view(len(loss_mask), -1) - 1
        teacher = TopProbs(*(part[places[batch, at + 1 + slot]] for part in said))
        label, before = tokens[batch, at + 2 + slot], tokens[batch, at + 1 + slot]
        p, r = (part[batch, anchor, slot - 1] for part in out)
        parts, marks = self._compare(p, r, teacher, label, before, weight, moving)
        positions = counted.sum()
        found = {"unary": parts[1].detach(), "moving": parts[2].detach(), "positions": positions}
        right = positions * torch.stack([mark.float() for mark in marks], dim=1)
        for j in range(1, self.slots + 1):
            share = right[slot == j].sum(0) / (slot == j).sum().clamp(min=1)
            found |= {f"recall{k}_{j}": part for k, part in zip((*RECALLS, "t"), share.unbind(), strict=True)}
        loss = parts[0]
        if self._base is not None:
            said_here = TopProbs(*(part[places[:, 1:][counted]] for part in said))
            sums = self._base(embeddings, features, loss_mask, noise, said_here, 1)
            loss = loss + self._weigh(sums)
        return self._sums(loss=loss, agreed=found["recall1_1"], **found)

    def outputs(self, embeddings: Tensor, features: Tensor, anchors: Tensor) -> tuple[DraftOutput, DraftOutput]:
        """Return the outputs of the anchors' mask rows and those of FSPAD's own rows."""
        memory, dtype = Streams(), self.drafter.norm.weight.dtype
        embedded, seen = embeddings[:, 1:-1].to(dtype), features[:, :-2].to(dtype)
        at = anchors.clamp(min=0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._base is not None):
            rows = self.drafter(embedded, seen, torch.arange(embedded.shape[1], device=at.device)[None], None, memory)
        contexts = seen.gather(1, at[..., None].expand(-1, -1, seen.shape[-1]))
        return self.drafter.masked(rows, contexts, at, memory, self.slots), rows

    def scores(self, logits: Tensor, r: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """Return the transition's `(rows, k)` scores S of tokens `ids` after the tokens `before`."""
        moved = self.drafter.transition(self._codes[before.clamp(min=0)], r, self._codes[ids])
        return logits.gather(1, ids) + moved.to(logits.dtype)

    def _compare(
        self, p: Tensor, r: Tensor, said: TopProbs, label: Tensor, before: Tensor, weight: Tensor, moving: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, its unary and its transition part, summed; and at every row which candidates were right."""
        marks: list[list[Tensor]] = []

        def piece(chunk: slice, p: Tensor, r: Tensor) -> tuple[Tensor, ...]:
            probs, ids = said.probs[chunk].to(p.dtype), said.ids[chunk].clamp(min=0)
            with torch.autocast(p.device.type, enabled=False):
                logits = self._head(p.to(self._precision)).to(p.dtype)
            unary = -(probs * logits.log_softmax(-1).gather(1, ids)).sum(-1)
            k = min(self.drafter.config.slot_candidates, logits.shape[1])
            best = logits.detach().topk(min(max(k, *RECALLS), logits.shape[1])).indices
            own, labelled = best[:, :k], label[chunk, None]
            among = torch.cat([own, labelled.clamp(min=0)], dim=1)
            gone = F.pad((own == labelled).any(1, keepdim=True) | (labelled < 0), (k, 0))
            scores = self.scores(logits, r, among, before[chunk]).masked_fill(gone, -torch.inf)
            goal = ((among[..., None] == ids[:, None]) * probs[:, None]).sum(-1).masked_fill(gone, 0.0)
            mass = goal.sum(-1, keepdim=True)
            goal, log_q = goal / mass.clamp(min=LEAST_MASS), scores.log_softmax(-1)
            cross = -(goal * log_q.masked_fill(gone, 0.0)).sum(-1)
            moved = HARD_SHARE * cross + (1 - HARD_SHARE) * (goal - log_q.exp()).abs().sum(-1)
            learns = (mass[:, 0] > LEAST_MASS) & (before[chunk] >= 0)
            own_weight = weight[chunk]
            unary, moved = (unary * own_weight).sum(), (moved * own_weight * learns).sum()
            goal_token = said.ids[chunk, :1]
            found = [(best[:, :count] == goal_token).any(1) for count in RECALLS]
            first = own.gather(1, scores.detach()[:, :k].argmax(1, keepdim=True))
            marks.append([*found, (first == goal_token)[:, 0]])
            return unary + moving * moved, unary, moved

        trained = [weight for weight in self.drafter.transition.parameters() if weight.requires_grad]
        sums = _Chunked.apply(piece, self.chunk_size, p, r, *trained)
        return sums, [torch.cat(parts) for parts in zip(*marks, strict=True)]


class _Chunked(torch.autograd.Function):
    """A sum over chunks of rows whose gradients are computed in the forward, so that logits live for one chunk only.

    The function gives several sums of `(rows, hidden)` p and r; only the first one has gradients, in p, r and the
    weights.
    """

    @staticmethod
    def forward(
        ctx: Any, piece: Callable[..., tuple[Tensor, ...]], size: int, p: Tensor, r: Tensor, *weights: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(one) for one in (p, r, *weights)] if wanted else []
        sums = p.new_zeros(3)
        for start in range(0, max(1, len(p)), size):
            chunk = slice(start, start + size)
            leaves = [part[chunk].detach().requires_grad_(wanted) for part in (p, r)]
            with torch.set_grad_enabled(wanted):
                loss, *parts = piece(chunk, *leaves)
            sums += torch.stack([loss, *parts]).detach()
            if wanted:
                for_p, for_r, *others = torch.autograd.grad(loss, (*leaves, *weights), allow_unused=True)
                gradients[0][chunk], gradients[1][chunk] = for_p, 0.0 if for_r is None else for_r
                for sum_of, more in zip(gradients[2:], others, strict=True):
                    sum_of += 0.0 if more is None else more
        ctx.save_for_backward(*gradients)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradient * factors[0].to(gradient.dtype) for gradient in ctx.saved_tensors))


def drawn_anchors(loss_mask: Tensor, most: int, seeds: list[int]) -> Tensor:
    """Draw at most `most` anchors of every row, without replacement: positions t where x_{t+2} and x_{t+3} count.

    Every row has its own generator, so that a resumed run, or one with other batches, draws the same.

    Returns:
        `(rows, anchors)` positions, -1 for none.
    """
    wanted = counted_positions(loss_mask) & F.pad(loss_mask[:, 3:].bool(), (0, 1))
    order = torch.stack(
        [torch.rand(wanted.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(wanted.device)
    keys, places = order.masked_fill(~wanted, -1.0).topk(min(most, wanted.shape[1]), dim=1)
    count = max(1, int((keys >= 0).sum(1).max()))
    return places.masked_fill(keys < 0, -1)[:, :count]


def rows_of(anchors: Tensor, loss_mask: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mask rows that count: batch index, anchor index, slot from 1, and weight, `(rows,)` each.

    The weights of a row's anchors add up to its counted positions, for which the anchors stand.
    """
    steps = torch.arange(slots + 1, device=anchors.device)
    at = anchors[..., None] + 2 + steps
    inside = (at < loss_mask.shape[1]) & (anchors[..., None] >= 0)
    rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
    valid = (loss_mask[rows, at.clamp(0, loss_mask.shape[1] - 1)].bool() & inside).cumprod(-1)[..., 1:].bool()
    batch, anchor, place = valid.nonzero(as_tuple=True)
    falling = torch.exp(-torch.arange(slots, device=anchors.device) / GAMMA)
    share = counted_positions(loss_mask).sum(1) / (anchors >= 0).sum(1).clamp(min=1)
    return batch, anchor, place + 1, (falling / falling.sum())[place] * share[batch]


class OneForwardObjective(FeatureObjective):
    """FSPAD-1F's objective: stage 1 trains the block beside a frozen FSPAD, stage 2 (`train_base`) both."""

    def __init__(self, target: TargetLike, config: Any, drafter: OneForwardHead):
        super().__init__(target, config, drafter)
        train_base = config.train_base if config.train_base is not None else config.init_from is None
        for weight in drafter.base:
            weight.requires_grad_(train_base)
        base: Any = self.loss
        rows = head_rows(target.model)
        kept = rows if drafter.draft_tokens is None else rows[drafter.draft_tokens.to(rows.device)]
        codes = (kept @ drafter.transition.basis.to(kept)).to(target.device)
        self.loss = OneForwardLoss(
            drafter,
            base if train_base else None,
            super().total,
            self.head,
            codes,
            target.dtype,
            config.loss_chunk_size,
        )
        shown = {1: "recall_1", 8: "recall_8", 16: "recall_16", "t": "top1_moved"}
        self.parts = {"loss_unary": "unary", "loss_transition": "moving"} | {  # type: ignore[misc]
            f"{name}_slot_{j}": f"recall{k}_{j}" for j in range(1, self.loss.slots + 1) for k, name in shown.items()
        }

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        embeddings, _, loss_mask, noise, _, _ = super().arguments(batch, features, step, progress)
        said = stored_teacher(batch)
        if said is None:
            goal = features[:, :-1, : self.target.hidden_size][predicting(loss_mask)]
            said = most_probable(self.target, goal, self.top_k, self.config.loss_chunk_size)
        seeds = [noise_seed(self.config.seed + 1, step, int(i)) for i in batch["index"]]
        anchors = drawn_anchors(loss_mask, self.config.anchors, seeds)
        moving = min(1.0, progress / TRANSITION_FROM)
        return embeddings, features, loss_mask, self._tokens(batch), self._known(said), anchors, moving, noise

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Mark slot 0's hits, and later slots' with the true token before them, at a part of the anchors."""
        loss: OneForwardLoss = self.loss  # type: ignore[assignment]
        loss_mask, tokens, width = batch["loss_mask"], self._tokens(batch), self.target.hidden_size
        anchors = drawn_anchors(loss_mask, 2 * self.config.anchors, [int(i) for i in batch["index"]])
        out, rows = loss.outputs(self._embed(batch["input_ids"]), features, anchors)
        right = torch.zeros(*rows.p.shape[:2], steps, dtype=torch.bool, device=rows.p.device)
        spoken = right.clone()
        batch_, anchor, slot, _ = rows_of(anchors, loss_mask, min(steps - 1, loss.slots))
        first = (anchors >= 0).nonzero(as_tuple=True)
        places = [(*first, torch.zeros_like(first[0])), (batch_, anchor, slot)]
        for k, (row, own, ahead) in enumerate(places):
            at = anchors[row, own] + ahead
            goal = features[row, at + 1, :width]
            best = most_probable(self.target, goal, 1, self.config.loss_chunk_size)
            p = out.p[row, own, ahead - 1] if k else rows.p[row, at]
            guess = []
            for chunk in torch.arange(len(at), device=at.device).split(loss.chunk_size):
                logits = self.head(p[chunk].to(self.target.dtype)).to(p.dtype)
                ids = logits.topk(min(self.drafter.config.slot_candidates, logits.shape[1])).indices
                scores = logits.gather(1, ids)
                if k:
                    scores = loss.scores(logits, out.r[row, own, ahead - 1][chunk], ids, tokens[row, at + 1][chunk])
                guess.append(ids.gather(1, scores.argmax(1, keepdim=True))[:, 0])
            if guess:
                right[row, at, ahead] = torch.cat(guess) == self._known(best).ids[:, 0]
                spoken[row, at, ahead] = True
        return right, spoken

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.loss

    def _tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        return ids if self._places is None else self._places[ids]
