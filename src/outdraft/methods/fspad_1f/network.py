"""FSPAD-1F's network: a trained FSPAD whose first step is slot 0, and mask rows after it that draft further slots.

Row t of FSPAD holds the pair (x_{t+1}, f_t); the newest row, the anchor's, is slot 0 and predicts as FSPAD's first step
does. Mask row j stands at position t + j. Where FSPAD's second step would have a token's embedding and slot 0's state
r, it has a learned vector m_j and the same r. So feature sampling gates r by slot: W_g m_j says which channels matter
j steps ahead. Mask rows pass a second layer, which begins as a copy of FSPAD's, or FSPAD's own again. They see all rows
up to slot 0 and the mask rows before them, so a block may be cut at any length. Whatever mask rows learn, slot 0 stays
FSPAD's.

The logits of neighbouring slots are joined by a transition between the k most probable tokens of each: a bilinear score
of both tokens' codes, which are projections of the target's own head rows.

Training begins with a trained FSPAD's weights, or new ones (`new_one_forward`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from outdraft.core.tensors import causal
from outdraft.errors import UserError
from outdraft.methods.checkpoint import method_of, refuse_another
from outdraft.methods.fspad.beginning import new_head, scale_of
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import (
    Attention,
    DraftOutput,
    FeatureHead,
    FeatureHeadConfig,
    RMSNorm,
    outputs,
    scaled,
)
from outdraft.target.backends.packed import plain_linear
from outdraft.target.named import named, shipped_drafter
from outdraft.target.target import Target

NAME = "fspad-1f"

MOST_CODES = 256
"""The largest number of principal components of the head's rows that a token's code has."""


@dataclass
class OneForwardConfig(FeatureHeadConfig):
    """The shapes and switches of the drafter: FSPAD's, and those of the block."""

    block_size: int = 8
    """The number B of tokens of a block; B - 1 of them come from mask rows."""
    second_layer: bool = True
    """True for a layer of their own for mask rows; else they pass FSPAD's again."""
    transition_rank: int = 128
    """The rank of the transition between neighbouring slots."""
    slot_candidates: int = 16
    """The number k of most probable tokens of a slot between which the transition is computed."""
    marginal: bool = False
    """True to draft without the transition, from the slots' own distributions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block_size", 2), ("transition_rank", 1), ("slot_candidates", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")


class SecondLayer(nn.Module):
    """The layer of the mask rows; it reads the fused inputs of all rows, as FSPAD's own does."""

    def __init__(self, config: OneForwardConfig):
        super().__init__()
        self.config = config
        d, i = config.hidden_size, config.intermediate_size
        self.self_attn, self.norm = Attention(config, d), RMSNorm(d, config.rms_norm_eps)
        self.gate_proj, self.up_proj = nn.Linear(d, i, bias=False), nn.Linear(d, i, bias=False)
        self.down_proj = nn.Linear(i, 2 * d if config.partial_alignment else d, bias=False)


class Transition(nn.Module):
    """The bilinear score of token b after token a: the product of W_A code(a), W_H r and W_D code(b), summed."""

    def __init__(self, config: OneForwardConfig):
        super().__init__()
        d, rank = config.hidden_size, config.transition_rank
        codes = min(d, MOST_CODES)
        self.register_buffer("basis", torch.zeros(d, codes))
        self.before = nn.Linear(codes, rank, bias=False)
        self.after = nn.Linear(codes, rank, bias=False)
        self.state = nn.Linear(d, rank, bias=False)
        nn.init.zeros_(self.after.weight)

    basis: Tensor
    """`(hidden, codes)` the projection from head rows to codes."""

    def forward(self, before: Tensor, r: Tensor, after: Tensor) -> Tensor:
        """Return `(rows, k)` scores of `(rows, k, codes)` tokens after `(rows, codes)` ones, at `(rows, hidden)` r."""
        asked = self.before(before) * self.state(r)
        return (self.after(after) @ asked[..., None].to(after.dtype))[..., 0]


class OneForwardHead(FeatureHead):
    """FSPAD's network with mask rows and a transition."""

    shapes: ClassVar[type[FeatureHeadConfig]] = OneForwardConfig
    methods: ClassVar[tuple[str, ...]] = (NAME,)
    config: OneForwardConfig
    keeps_tokens = False
    """True if training keeps the draft vocabulary, which came with the weights that it began from."""

    def __init__(self, config: OneForwardConfig):
        super().__init__(config)
        self.slots = nn.Parameter(torch.randn(config.block_size - 1, config.hidden_size))
        self.second = SecondLayer(config) if config.second_layer else None
        self.transition = Transition(config)

    @property
    def method(self) -> str:  # type: ignore[override]
        return NAME

    @property
    def learned_embeddings(self) -> tuple[Tensor, ...]:
        return (self.slots,)

    @property
    def base(self) -> list[nn.Parameter]:
        """The parameters of the FSPAD that it begins with."""
        own = ("slots", "second.", "transition.")
        return [weight for name, weight in self.named_parameters() if not name.startswith(own)]

    def masked(self, fused: Tensor, r: Tensor, anchors: Tensor, slots: int) -> DraftOutput:
        """Run the mask rows of several anchors of whole sequences, for training.

        Args:
            fused: `(batch, tokens, hidden)` the fused inputs of FSPAD's rows, at positions 0, 1, ...
            r: `(batch, tokens, hidden)` their states r.
            anchors: `(batch, anchors)` positions of slot 0.
            slots: mask rows of each anchor.

        Returns:
            `(batch, anchors, slots, hidden)` outputs.
        """
        (batch, count), length, device = anchors.shape, fused.shape[1], anchors.device
        own = self.slots[:slots].to(r.dtype).expand(batch, count, -1, -1)
        read = r.gather(1, anchors[..., None].expand(-1, -1, r.shape[-1]))[:, :, None].expand(-1, -1, slots, -1)
        h = self.fusion(own, read).flatten(1, 2)
        order = torch.arange(length, device=device)
        positions = (anchors[..., None] + torch.arange(1, slots + 1, device=device)).flatten(1)
        positions = torch.cat([order.expand(batch, -1), positions], dim=1)
        angles = self.rotary(positions.clamp(max=self.config.max_position_embeddings - 1), h.dtype)
        before = (order <= anchors[..., None])[:, :, None].expand(-1, -1, slots, -1).flatten(1, 2)
        block = torch.block_diag(*[causal(1, slots, device)[0]] * count).bool().expand(batch, -1, -1)
        mask, layer = torch.cat([before, block], dim=2)[:, None], self.second or self
        a = h + layer.self_attn(torch.cat([fused, h], dim=1), angles, mask, None, h.shape[1])
        return DraftOutput(*(part.unflatten(1, (count, slots)) for part in outputs(layer, a)))


def head_rows(model: Any) -> Tensor:
    """Return the `(vocab, hidden)` rows of a model's output layer in float32 at least.

    Raises:
        UserError: the output layer is not a plain linear one.
    """
    output = model.get_output_embeddings()
    if not hasattr(output, "weight"):
        raise UserError(f"the target's output layer is a {type(output).__name__}, from which tokens have no codes")
    weight = plain_linear(output)[0].detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def whitened(rows: Tensor, count: int) -> Tensor:
    """Return the `(hidden, count)` projection to whitened principal components of `(tokens, hidden)` rows."""
    centred = (rows - rows.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    values, vectors = values[-count:], vectors[:, -count:]
    return (vectors / values.clamp(min=1e-9 * float(values[-1])).sqrt()).to(rows.dtype)


BLOCK = ("block_size", "second_layer", "transition_rank", "slot_candidates")
"""The settings of the block."""


def new_one_forward(target: Target, settings: Any) -> OneForwardHead:
    """Build a drafter with initial float32 weights, on the target's device.

    Args:
        settings: a `DrafterConfig` with its preset filled in; `init_from` names an FSPAD, whose shape and weights are
            taken, or a drafter of this method, which is trained on.
    """
    block = {name: getattr(settings, name) for name in BLOCK}
    if settings.init_from is None:
        base = new_head(target, settings.model_copy(update={"method": "fspad"}))
    else:
        base = begun_from(settings.init_from, target)
        scale = settings.embedding_scale
        scaled(base, 1 / (scale_of(target) if scale == "auto" else scale))
    if isinstance(base, OneForwardHead):
        if different := [name for name in BLOCK if getattr(base.config, name) != block[name]]:
            name = different[0]
            own = getattr(base.config, name)
            raise UserError(
                f"the drafter in '{settings.init_from}' has {name} {own}, this run's has {block[name]}; "
                f"set {name} {own}"
            )
        base.keeps_tokens = True
        return base.to(target.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        drafter = OneForwardHead(OneForwardConfig(**asdict(base.config), **block))
    begin_block(drafter, base, target, settings)
    drafter.keeps_tokens = settings.init_from is not None
    return drafter.to(target.device)


def begun_from(source: str, target: Target) -> FeatureHead:
    """Load an FSPAD, EAGLE or FSPAD-1F drafter: a folder, a hub id, or the name of a model that an FSPAD ships for."""
    place = shipped_drafter(source, "fspad") if named(source) is not None else source
    kind: type[FeatureHead] = OneForwardHead if method_of(place).name == NAME else FeatureHead
    base = load_drafter(place, dtype=torch.float32, kind=kind).head
    refuse_another(base.fits, target)
    base.embed_tokens = None
    return base


@torch.no_grad()
def begin_block(drafter: OneForwardHead, base: FeatureHead, target: Target, settings: Any) -> None:
    """Copy the base's weights; begin slots as average embeddings with noise and the second layer as the first."""
    drafter.load_state_dict(base.state_dict(), strict=False)
    scale = scale_of(target) if settings.embedding_scale == "auto" else settings.embedding_scale
    ids = torch.arange(target.vocab_size, device=target.device)
    embeddings = target.embed(ids[None])[0].float().cpu() * scale
    drafter.slots.mul_(embeddings.std(0)).add_(embeddings.mean(0))
    if drafter.second is not None:
        first = {name: weight for name, weight in drafter.state_dict().items() if name in drafter.second.state_dict()}
        drafter.second.load_state_dict(first, strict=False)
    basis = drafter.transition.basis
    basis.copy_(whitened(head_rows(target.model), basis.shape[1]))
