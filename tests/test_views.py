"""What is read of a target is the same whole and in two parts, for every combination of layers and split."""

from __future__ import annotations

import pytest
import torch

from models import tiny
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.target.exact.target import ExactTarget, exactly
from outdraft.target.runner import Output
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
COMBINATIONS = [
    Reads(),
    Reads(layers=(1, 3)),
    Reads(layers=(3, 1, 3)),
    Reads(features=False, layers=(2,), split=2),
    Reads(layers=(3, 1, 2), split=2),
    Reads(features=False, layers=(1, 3), split=2),
    Reads(features=False, layers=(1,), split=3),
]


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma2", "qwen2-sliding"])
@pytest.mark.parametrize("reads", COMBINATIONS, ids=str)
@torch.inference_mode()
def test_states_are_the_model_s_hidden_states(family: str, reads: Reads) -> None:
    model = tiny(family, num_hidden_layers=4)
    stock = model.base_model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    expected = [stock.last_hidden_state] * reads.features + [stock.hidden_states[layer] for layer in reads.layers]
    features, states = Reader(model, reads)(input_ids=IDS, use_cache=False)
    assert torch.equal(features, stock.last_hidden_state)
    assert torch.equal(states, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("reads", [reads for reads in COMBINATIONS if reads.split], ids=str)
@pytest.mark.parametrize("exact", [False, True])
@torch.inference_mode()
def test_what_ran_ahead_is_verified_as_if_it_had_not(reads: Reads, exact: bool) -> None:
    """A root and one of two children run ahead through the first layers; the tree has both, in another order."""
    target = Target(tiny("llama-gqa", num_hidden_layers=4, dtype=torch.float32))
    target = exactly(target) if exact else target
    tree = Tree(torch.tensor([[7, 8, 9]]), torch.tensor([[-1, 0, 0]]), [3])
    given = []
    for ahead in (False, True):
        run = target.runner(target.new_cache(1, 16), reads)
        run.prefill([IDS[0]])
        if ahead:
            roots, none = torch.tensor([[7]]), torch.tensor([[0]])
            lengths = torch.tensor([[6]])
            run.ahead(roots, none, lengths, torch.ones(1, 1, 1, dtype=torch.bool), run.cache.reserve(1, target.device))
            slots = torch.cat([torch.tensor([[6]]), run.cache.reserve(1, target.device)], dim=1)
            seen = torch.ones(1, 1, 2, dtype=torch.bool)
            run.ahead(torch.tensor([[9]]), none, torch.tensor([[6, 7]]), seen, slots)
        given.append(run.tree(tree))
    for one, other in zip(*given, strict=True):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-5)
    assert isinstance(given[0], Output) and isinstance(target, ExactTarget) == exact


@pytest.mark.parametrize("reads", [Reads(layers=(4,)), Reads(layers=(0,)), Reads(split=4, layers=(1,))])
def test_layers_that_are_none_are_refused(reads: Reads) -> None:
    with pytest.raises(UserError, match="between 1 and 3 for this model"):
        Reader(tiny("llama-gqa", num_hidden_layers=4), reads)
