"""EAGLE-3's training (arXiv 2503.01840, section 3.2): the head that it begins with, and its objective.

The training-time test unrolls the drafter on its own states as it decodes, and every step learns the target's
distribution alone; step i weighs 0.8^i. `fspad/loss.py` unrolls and sums. The target's probabilities of tokens outside
the draft vocabulary carry no loss.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.errors import UserError
from outdraft.losses.cross_entropy import Head
from outdraft.methods.checkpoint import refuse_another
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.eagle3.folder import load_eagle3
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.loss import FeatureObjective
from outdraft.target.backends.packed import is_linear, plain_linear
from outdraft.target.target import Target

COMMON = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
"""The shapes that an EAGLE-3 head has from its target as an EAGLE head does."""

SHAPED = ("intermediate_size", "tap_layers", "draft_vocab_size", "state_norm")
"""The settings that a drafter in `init_from` decides itself."""


def new_head(target: Target, settings: Any) -> Eagle3Head:
    """Build a head to start training from, in float32 and on the target's device; arguments as in `Method.new_network`.

    A new output layer begins as the target's rows of the draft vocabulary (`begin_output`), or at random if the target
    has no plain one.
    """
    if settings.init_from is not None:
        return _begun_from(settings, target)
    shape = feature_head_config(
        target,
        "eagle",
        intermediate_size=settings.intermediate_size,
        tap_layers=settings.tap_layers or "auto",
        draft_vocab_size=settings.draft_vocabulary_for(target.vocab_size),
    )
    if not shape.tap_layers:
        raise UserError(
            "the target has a single layer, whose output is its last; an EAGLE-3 drafter reads earlier ones"
        )
    config = Eagle3Config(
        **{name: getattr(shape, name) for name in COMMON},
        target_hidden_size=target.hidden_size,
        tap_ids=shape.tap_layers,  # an input counted from 0 is the output before it counted from 1
        tap_unit="input",
        num_taps=len(shape.tap_layers),
        rope={"rope_type": "default", "rope_theta": shape.rope_theta},
        tap_norms=settings.state_norm,
        norm_output=settings.state_norm,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = Eagle3Head(config)
    head.fresh = True
    return head.to(target.device)


def _begun_from(settings: Any, target: Target) -> Eagle3Head:
    """Load the drafter to go on with, whoever trained it."""
    head = load_eagle3(settings.init_from, dtype=torch.float32, device=target.device).network
    if given := [name for name in SHAPED if name in settings.model_fields_set]:
        raise UserError(f"{given[0]} is that of the drafter in '{settings.init_from}'; leave it out, or init_from")
    if head.lm_head is None:
        raise UserError(f"the drafter in '{settings.init_from}' has no output layer to train; begin from another")
    refuse_another(head.fits, target)
    if head.config.hidden_size != target.hidden_size:
        raise UserError(f"the drafter in '{settings.init_from}' is not as wide as its target; begin from another")
    return head


@torch.no_grad()
def begin_output(head: Eagle3Head, target: Target) -> None:
    """Copy the target's output rows of the draft vocabulary to a fresh head's output layer, where it is linear."""
    theirs: Any = target.model.get_output_embeddings()
    output, kept = head.lm_head, head.draft_tokens
    if head.fresh and output is not None and is_linear(theirs):
        weight = plain_linear(theirs)[0]
        if weight.shape == (target.vocab_size, output.in_features):
            output.weight.copy_(weight if kept is None else weight[kept])
    head.fresh = False


class Eagle3Objective(FeatureObjective):
    """The objective of EAGLE-3: the target's feature, taps and embeddings, and its next-token distribution."""

    parts: ClassVar = {"loss_cls": "token"}

    def __init__(self, target: Target, config: Any, drafter: Eagle3Head):
        begin_output(drafter, target)
        # Its norms scale what it reads, and it is trained without noise.
        super().__init__(target, config.model_copy(update={"embedding_scale": 1.0, "feature_noise": False}), drafter)

    def _head(self) -> Head:
        kept = self.drafter.draft_tokens
        return self.target.head if kept is None else lambda features: self.target.head(features)[..., kept]

    def _embed(self, ids: Tensor) -> Tensor:
        """Look up bare rows, as `Eagle3Drafter.embed` does."""
        embedding: Any = self.drafter.embed_tokens or self.target.model.get_input_embeddings()
        return F.embedding(ids, embedding.weight)

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.token
