"""FSPAD-1F: slot 0 is FSPAD's first step, decoding's slots are those of training, and trees are the best there are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from models import tiny
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import RowContext, Update
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.loss import Streams
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f import drafter as drafting
from outdraft.methods.fspad_1f.drafter import OneForward
from outdraft.methods.fspad_1f.network import OneForwardHead
from outdraft.target.target import Target
from test_losslessness import one_forward_drafter

TEXTS = [[5, 9, 9, 3, 5, 9, 2, 8], [1, 2, 3, 4, 1, 2]]


def made(**switches: Any) -> OneForward:
    return one_forward_drafter(Target(tiny("llama-gqa")), **switches)


def slots_of(drafter: OneForward, texts: list[list[int]], first: int) -> torch.Tensor:
    """The slots' logits after all but the last tokens of the texts, in a batch that takes `first` pairs in before."""
    run = drafter.target.runner(drafter.target.new_cache(len(texts), 32))
    state = drafter.begin([torch.tensor(text) for text in texts], run)
    features = [drafter.target.features(torch.tensor([text]))[0] for text in texts]
    rows = RowContext([], [], [])
    found = None
    for start, end in ((0, first), (first, None)) if first else ((0, None),):
        pairs = [list(range(len(text) - 1))[start:end] for text in texts]
        counts = [len(own) for own in pairs]
        tokens, taps = torch.zeros(len(texts), max(counts), dtype=torch.long), features[0].new_zeros(len(texts), max(counts), features[0].shape[1])
        for row, own in enumerate(pairs):
            tokens[row, : len(own)] = torch.tensor([texts[row][t + 1] for t in own])
            taps[row, : len(own)] = features[row][own]
        update = Update(tokens, taps, counts)
        if end is not None:
            state.propose(update, TreeShape(0, 1, 1), rows)
        else:
            if max(counts) > drafting.MOST_BESIDE:
                update = state._shortened(update)
            found = drafter.slots_of(state._block(update, drafter.head.config.block_size - 1)).logits
    assert found is not None
    return found


def trained_slots(drafter: OneForward, text: list[int], anchors: list[int]) -> torch.Tensor:
    """The logits of all slots of these anchors, by the forward of training."""
    head, target = drafter.head, drafter.target
    embedded = target.embed(torch.tensor([text]))[:, 1:]
    features = target.features(torch.tensor([text]))[:, :-1]
    memory, at = Streams(), torch.tensor([anchors])
    rows = head(embedded, features, None, None, memory)
    out = head.masked(rows, features[:, anchors], at, memory, head.config.block_size - 1)
    p = torch.cat([rows.p[0, anchors][:, None], out.p[0]], dim=1)
    return drafter.logits(p)


@pytest.mark.parametrize("most_beside", [64, 2])
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("second_layer", [True, False])
@torch.inference_mode()
def test_decoding_drafts_what_training_trains(monkeypatch, second_layer, first, most_beside):
    monkeypatch.setattr(drafting, "MOST_BESIDE", most_beside)
    drafter = made(second_layer=second_layer)
    found = slots_of(drafter, TEXTS, first)
    for row, text in enumerate(TEXTS):
        alone = trained_slots(drafter, text, [1, len(text) - 2, 3])
        torch.testing.assert_close(found[row], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(slots_of(drafter, [text], 0)[0], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(trained_slots(drafter, text[:5], [3])[0], alone[2], rtol=0, atol=1e-12)
