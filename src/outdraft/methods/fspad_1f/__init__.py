"""FSPAD-1F: a whole draft from one forward of a trained FSPAD with mask rows, and trees over a transition table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from outdraft.errors import UserError
from outdraft.methods.fspad import Fspad
from outdraft.methods.registry import Method

if TYPE_CHECKING:
    from outdraft.data.tokenization import ExampleSet

BLOCK = frozenset({"block_size", "second_layer", "transition_rank", "slot_candidates", "anchors", "train_base"})
"""The settings that only this method reads."""

UNREAD = {"token_loss", "token_top_k", "token_top_k_weight", "unroll_steps", "unroll_decay", "unroll_from"}
"""FSPAD's settings that are not read."""


class OneForwardMethod(Fspad):
    """FSPAD-1F, the method of this folder: FSPAD's shapes, settings and folders, and more."""

    name = "fspad-1f"
    summary = "FSPAD's first step and mask rows in one forward"
    drafter = "outdraft.methods.fspad_1f.drafter:OneForward"
    beginning = "outdraft.methods.fspad_1f.network:new_one_forward"
    training = "outdraft.methods.fspad_1f.loss:OneForwardObjective"
    exporter = ""
    network = "outdraft.methods.fspad_1f.network:OneForwardHead"
    settings = (Fspad.settings - UNREAD) | BLOCK
    paper_preset = False
    card = "an FSPAD-1F drafter, which begins with FSPAD ([arXiv 2408.15562](https://arxiv.org/abs/2408.15562))"
    shown: ClassVar = ("block_size", "second_layer", "transition_rank", "marginal")
    no_export = Method.no_export

    def check(self, settings: Any) -> None:
        if settings.teacher_top_k == 0:
            raise UserError("fspad-1f learns from the most probable tokens; give teacher_top_k a number above 0")

    def adapt(self, network: Any, examples: ExampleSet) -> None:
        if not network.keeps_tokens:
            super().adapt(network, examples)


METHODS = (OneForwardMethod(),)
