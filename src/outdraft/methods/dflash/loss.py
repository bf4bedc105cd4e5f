"""The training of a DFlash or DSpark drafter that is there (arXiv 2602.06036, 2607.05147), on its target's own answers.

The block of an anchor x_t, which is it and B - 1 mask tokens at positions t .. t+B-1, sees the context rows of the
tokens before t, and itself. Embeddings, rotary angles and logits are made by the drafter that decodes. Proposal i = 0,
1, ... is the guess of x_{t+1+i}, of which the target's feature at t + i gives the distribution P_{t+i}.

    L = sum_i w_i CE(P_{t+i}, softmax l_i) / sum_i w_i,    w_i = exp(-i / gamma)

Proposals count up to the first that is no response token. DSpark's Markov head adds the bias that the true x_{t+i}
sets. The embedding and the output layer are the target's, or copies in the checkpoint, and stay as they are.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.drafting.vocabulary import indices_in
from outdraft.errors import UserError
from outdraft.losses.cross_entropy import TokenLoss, soft_cross_entropy
from outdraft.losses.objective import Objective, Reading, reader_of
from outdraft.losses.teacher import TopProbs, places, predicting, within
from outdraft.methods.checkpoint import refuse_another
from outdraft.methods.dflash.drafter import DFlash
from outdraft.methods.dflash.folder import load_dflash
from outdraft.methods.dflash.network import DFlashNetwork
from outdraft.methods.fspad.loss import noise_seed
from outdraft.methods.fspad_1f.loss import drawn_anchors, guesses_counted
from outdraft.target.target import Target

GAMMA = (4.0, 7.0)
"""The proposals over which their weight falls by e, in blocks of up to 8 rows and in larger ones (the papers')."""


def begun_from(target: Target, settings: Any) -> DFlashNetwork:
    """Load the drafter to go on with, in float32 and on the target's device; arguments as in `Method.new_network`."""
    with torch.device("cpu"):  # its config is read by its tensors' values, also where a dry run loads no target
        network = load_dflash(settings.init_from, dtype=torch.float32).network
    if network.method != settings.method:
        raise UserError(f"'{settings.init_from}' is a '{network.method}' drafter; give --method {network.method}")
    refuse_another(network.fits, target)
    if network.lm_head is not None:
        network.lm_head.requires_grad_(False)
    return network.to(target.device)


class ContextRows:
    """The context rows' keys and values of whole sequences, in place of decoding's cache; gradients pass."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keep a layer's context rows, which come first; put them before the blocks' rows, which come after."""
        if layer not in self._layers:
            self._layers[layer] = keys, values
            return keys, values
        context = self._layers[layer]
        return torch.cat([context[0], keys], dim=2), torch.cat([context[1], values], dim=2)


class Slot(NamedTuple):
    """The proposals i of all anchors that count."""

    batch: Tensor
    """`(n,)` rows of the batch."""
    before: Tensor
    """`(n,)` positions t + i: that of the token before, whose feature is the teacher's."""
    p: Tensor
    """`(n, width)` normed states, and the Markov head's state of the token before where there is one."""
    goal: TopProbs


class BlockLoss(nn.Module):
    """The drafter together with its loss, the module that is trained.

    Args:
        decoder: the drafter as it decodes; its network is trained.
        chunk_size: proposals whose logits are held at once.
        token_loss: the loss between the drafter's and the target's distributions.
    """

    def __init__(self, decoder: DFlash, chunk_size: int, token_loss: TokenLoss):
        super().__init__()
        self.drafter, config = decoder.network, decoder.network.config
        self.chunk_size, self.token_loss, self._decoder = chunk_size, token_loss, decoder
        gamma = GAMMA[config.block_size > 8]
        self.weights = torch.softmax(-torch.arange(config.proposals) / gamma, dim=0).tolist()
        self.shown = [f"top1_slot_{i}" for i in range(1, config.proposals + 1)]
        self._sums: Any = namedtuple("BlockSums", ["loss", "agreed", "positions", *self.shown])  # type: ignore[misc]

    def forward(self, taps: Tensor, tokens: Tensor, loss_mask: Tensor, said: TopProbs, anchors: Tensor) -> Any:
        """Compute the sums over the anchors, which are the positions; arguments as in `slots`."""
        markov, positions = self.drafter.markov_head, (anchors >= 0).sum()
        own = nn.ModuleList([] if markov is None else [markov.markov_w2])
        total, shares = torch.zeros((), device=taps.device), []
        for weight, slot in zip(self.weights, self.slots(taps, tokens, loss_mask, said, anchors), strict=True):
            loss, agreed = soft_cross_entropy(
                slot.p,
                slot.goal,
                self.logits,
                self.chunk_size,
                own_head=own,
                through=self.logits,
                token_loss=self.token_loss,
            )
            total = total + weight * loss
            shares.append(agreed * positions / max(1, len(slot.p)))
        return self._sums(total, shares[0], positions, *shares)

    def slots(self, taps: Tensor, tokens: Tensor, loss_mask: Tensor, said: TopProbs, anchors: Tensor) -> Iterator[Slot]:
        """Run the anchors' blocks, and yield their proposals one after the other.

        Args:
            taps: `(batch, tokens, taps * target width)` what the drafter reads of the target.
            tokens, loss_mask: `(batch, tokens)`.
            said: the target's most probable tokens at all predicting positions, in ids of the draft vocabulary.
            anchors: `(batch, anchors)` positions t, -1 for none.
        """
        states, markov = self.states(taps, tokens, anchors), self.drafter.markov_head
        counts, index = guesses_counted(anchors, loss_mask, 1, len(self.weights)), places(loss_mask)
        for i in range(len(self.weights)):
            batch, anchor = counts[..., i].nonzero(as_tuple=True)
            p, before = states[batch, anchor, i], anchors[batch, anchor] + i
            if markov is not None:
                p = torch.cat([p, markov.markov_w1(tokens[batch, before]).to(p.dtype)], dim=-1)
            yield Slot(batch, before, p, TopProbs(*(part[index[batch, before]] for part in said)))

    def states(self, taps: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Return the `(batch, anchors, proposals, d)` normed states of the anchors' blocks."""
        config, network, decoder = self.drafter.config, self.drafter, self._decoder
        size, length, cache = config.block_size, taps.shape[1], cast(Any, ContextRows())
        first = anchors.clamp(min=0)
        block = F.pad(tokens.gather(1, first)[..., None], (0, size - 1), value=config.mask_token_id).flatten(1)
        positions = (first[..., None] + torch.arange(size, device=first.device)).flatten(1)
        context = torch.arange(length, device=first.device).expand(len(first), -1)
        network.take_in(taps, decoder.angles(context), cache)
        embedded = decoder.embed(block).to(network.norm.weight.dtype)
        masks = {sight: block_mask(sight, positions, size, context) for sight in set(config.sights)}
        states = network(embedded, decoder.angles(positions), [masks[sight] for sight in config.sights], cache)
        return states.unflatten(1, (-1, size))[:, :, size - config.proposals :]

    def logits(self, p: Tensor) -> Tensor:
        """Map `Slot.p` to `(n, draft vocab)` logits."""
        width, markov = self.drafter.config.hidden_size, self.drafter.markov_head
        own = self.drafter.lm_head is not None
        with nullcontext() if own else torch.autocast(p.device.type, enabled=False):  # as the target's head decodes
            logits = self._decoder.logits(p[:, :width])
        return logits if markov is None else logits + markov.markov_w2(p[:, width:])


def block_mask(sight: tuple[bool, int], positions: Tensor, size: int, context: Tensor) -> Tensor:
    """Return what the rows of blocks see: `(batch, 1, rows, tokens + rows)` over context rows, then the blocks' own.

    Args:
        sight: a layer's causal flag and window.
        positions: `(batch, rows)` of the rows of all blocks, `size` of each.
        context: `(batch, tokens)` positions of the context rows.
    """
    (causal, window), block = sight, torch.arange(positions.shape[1], device=positions.device) // size
    anchors = positions[:, ::size].repeat_interleave(size, dim=1)
    own = (block[:, None] == block).expand(len(positions), -1, -1)
    seen = torch.cat([context[:, None] < anchors[..., None], own], dim=-1)
    back = positions[..., None] - torch.cat([context, positions], dim=1)[:, None]
    if causal:
        seen = seen & (back >= 0)
    return (seen & (back < window) if window else seen)[:, None]


class BlockObjective(Objective):
    """The objective of DFlash and DSpark: blocks of anchors that are drawn anew from the responses in every step."""

    def __init__(self, target: Target, config: Any, drafter: DFlashNetwork):
        self.target, self.config, self.drafter = target, config, drafter
        self.top_k, self.rows = config.teacher_top_k, config.loss_chunk_size
        decoder, kept = DFlash(drafter, target), drafter.draft_tokens
        self.reading = Reading(reader_of(target), decoder.reads.layers)
        token_loss = TokenLoss(config.token_loss, config.token_top_k, config.token_top_k_weight)
        self.loss = BlockLoss(decoder, config.loss_chunk_size, token_loss)
        self.parts = {name: name for name in self.loss.shown}  # type: ignore[misc]
        self._places = None if kept is None else indices_in(kept, target.vocab_size)

    def counted(self, loss_mask: Tensor) -> Tensor:
        """Return a mask of as many positions as anchors are drawn: those whose own and next token are a response's."""
        wanted = loss_mask[:, :-1].bool() & predicting(loss_mask)
        return wanted & (wanted.cumsum(1) <= self.config.anchors)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        loss_mask, size, said = batch["loss_mask"], self.target.hidden_size, self.teacher(batch, features)
        assert said is not None  # the methods ask for a teacher
        if self._places is not None:
            said = within(said, self._places)
        seeds = [noise_seed(self.config.seed, step, int(i)) for i in batch["index"]]
        # FSPAD's position t stands for the token at t + 1 and guesses that at t + 2.
        anchors = drawn_anchors(F.pad(loss_mask, (2, 0)), self.config.anchors, seeds)
        return features[..., size:], batch["input_ids"], loss_mask, said, anchors

    @torch.no_grad()
    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Mark the hits of all of a block's proposals, more than `steps` too, at one draw of anchors."""
        loss = cast(BlockLoss, self.loss)
        rows, tokens = batch["input_ids"].shape
        right = torch.zeros(rows, tokens, len(loss.weights), dtype=torch.bool, device=features.device)
        spoken = right.clone()
        for i, slot in enumerate(loss.slots(*self.arguments(batch, features, 0))):
            spoken[slot.batch, slot.before, i] = True
            for part in torch.arange(len(slot.p), device=features.device).split(loss.chunk_size):
                best = loss.logits(slot.p[part]).argmax(-1)
                right[slot.batch[part], slot.before[part], i] = best == slot.goal.ids[part, 0]
        return right, spoken

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.loss
