"""FSPAD-1F: a whole draft from one forward of a trained FSPAD with mask rows, and trees over a transition table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.errors import UserError
from outdraft.methods.registry import DrafterFacts, Method

if TYPE_CHECKING:
    import torch

    from outdraft.data.tokenization import ExampleSet
    from outdraft.losses.target_like import TargetLike
    from outdraft.methods.fspad_1f.drafter import OneForward
    from outdraft.methods.fspad_1f.loss import OneForwardObjective
    from outdraft.methods.fspad_1f.network import OneForwardHead
    from outdraft.target.target import Target

BLOCK = frozenset({"block_size", "second_layer", "transition_rank", "slot_candidates", "anchors", "train_base"})
"""The settings that only this method reads."""


class OneForwardMethod(Method):
    """FSPAD-1F, the method of this folder."""

    name = "fspad-1f"
    summary = "FSPAD's first step and mask rows in one forward"
    trained = True
    settings = BLOCK | {
        "intermediate_size",
        "feature_sampling",
        "partial_alignment",
        "tap_layers",
        "state_norm",
        "draft_vocab_size",
        "init_from",
        "embedding_scale",
        "w_reg",
        "w_reg_schedule",
        "w_cls",
        "feature_noise",
        "patience",
    }
    presets: ClassVar = {"small": {"unroll_steps": 1}}
    card = "an FSPAD-1F drafter, which begins with FSPAD ([arXiv 2408.15562](https://arxiv.org/abs/2408.15562))"

    def load(
        self, source: str | Path, target: Target, dtype: torch.dtype | None, device: torch.device | str
    ) -> OneForwardHead:
        from outdraft.methods.fspad.folder import load_drafter
        from outdraft.methods.fspad_1f.network import OneForwardHead

        head: Any = load_drafter(source, dtype=dtype, device=device, kind=OneForwardHead).head.eval()
        return head

    def bind(self, network: Any, target: Target) -> OneForward:
        from outdraft.methods.fspad_1f.drafter import OneForward

        return OneForward(network, target)

    def describe(self, folder: Path) -> DrafterFacts:
        from outdraft.methods.checkpoint import count
        from outdraft.methods.fspad.folder import load_drafter
        from outdraft.methods.fspad_1f.network import OneForwardHead

        loaded = load_drafter(folder, kind=OneForwardHead)
        config: Any = loaded.head.config
        more = {
            "block_size": config.block_size,
            "layers": 1 + config.second_layer,
            "tree": "marginal" if config.marginal else f"transition, rank {config.transition_rank}",
            "context": config.max_position_embeddings,
            "draft_vocab_size": config.draft_vocab_size or None,
        }
        parameters = count(loaded.head.parameters())
        return DrafterFacts(
            self.name, loaded.layout, parameters, loaded.target_id, loaded.head.fits, loaded.training, more
        )

    def check(self, settings: Any) -> None:
        if settings.teacher_top_k == 0:
            raise UserError(
                "fspad-1f learns from the target's most probable tokens; give teacher_top_k a number above 0"
            )

    def new_network(self, target: TargetLike, settings: Any) -> OneForwardHead:
        from outdraft.methods.fspad_1f.beginning import new_one_forward

        return new_one_forward(target, settings)

    def adapt(self, network: Any, examples: ExampleSet) -> None:
        from outdraft.methods.fspad.beginning import keep_frequent

        if not network.keeps_tokens:
            keep_frequent(network, examples)

    def objective(self, target: TargetLike, settings: Any, network: Any) -> OneForwardObjective:
        from outdraft.methods.fspad_1f.loss import OneForwardObjective

        return OneForwardObjective(target, settings, network)


METHODS = (OneForwardMethod(),)
