"""`FeatureDrafter` grows the trees of EAGLE-2's published code, round after round, for batches of ragged rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from drafter_reference import NaiveDrafting, Shape, numbers, official_tensors
from test_feature_head_equations import SWITCHES, torch_head
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft import UserError
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting import draft_cache
from outdraft.drafting.base import RowContext, Update
from outdraft.methods.fspad import drafter as feature_drafter
from outdraft.methods.fspad.drafter import FeatureDrafter, FeatureDraftState
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

SHAPE = Shape(vocab_size=13, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
EMBEDDING, HEAD = numbers((13, 8), 201) * 2, numbers((13, 8), 202) * 0.3
TREES = {
    "chain": TreeShape.chain(4),
    "tree": TreeShape(3, 4, 20),
    "narrow": TreeShape(4, 2, 7),
    "root only": TreeShape(0, 5, 4),
}


def target(hidden_size: int = 8, vocab_size: int = 13) -> Target:
    """A stock model of which only embedding and head are used."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    if (hidden_size, vocab_size) == (8, 13):
        model.get_input_embeddings().weight.data = torch.tensor(EMBEDDING)
        model.get_output_embeddings().weight.data = torch.tensor(HEAD)
    return Target(model)


class Rounds:
    """The library's drafter and a naive one for each row, told the same decisions.

    Args:
        switches: of the head, a name in `SWITCHES`.
        prompt_lengths: of the rows.
        embedding: the drafter's own, where it has one.
    """

    def __init__(self, switches: str, prompt_lengths: Sequence[int], embedding: np.ndarray | None = None):
        self.rng = np.random.default_rng(5)
        w = official_tensors(SHAPE, *SWITCHES[switches])
        head = torch_head(w, SHAPE)
        if embedding is not None:
            head.embed_tokens = torch.nn.Embedding.from_pretrained(torch.tensor(embedding))
        embeddings = EMBEDDING if embedding is None else embedding
        self.naive = [NaiveDrafting(w, SHAPE, embeddings, HEAD) for _ in prompt_lengths]
        prompts = [torch.tensor(self.rng.integers(0, 13, n)) for n in prompt_lengths]
        drafter = FeatureDrafter(head, target())
        self.state: FeatureDraftState = drafter.begin(prompts, ModelRunner(target(), SlotCache(len(prompts), 1, 8)))
        self.decide([[*prompt[1:].tolist(), int(self.rng.integers(13))] for prompt in prompts])

    def decide(self, tokens: list[list[int]]) -> None:
        """Make the next update: these tokens for each row, features at random, rubbish in the padding."""
        longest = max(len(row) for row in tokens)
        padded = torch.tensor([row + [12] * (longest - len(row)) for row in tokens])
        features = torch.full((len(tokens), longest, 8), 99.0, dtype=torch.float64)
        for i, row in enumerate(tokens):
            true = self.rng.normal(size=(len(row), 8))
            features[i, : len(row)] = torch.tensor(true)
            self.naive[i].take_in(row, true)
        self.update = Update(padded, features, [len(row) for row in tokens])

    @torch.inference_mode()
    def check(self, shape: TreeShape) -> Tree:
        """Grow the trees in both ways and compare."""
        rows = len(self.naive)
        warper = Warper(SamplingSettings(), 1, 13)
        context = RowContext([torch.tensor(n.tokens) for n in self.naive], [warper] * rows, [Dice(0)] * rows)
        tree = self.state.propose(self.update, shape, context)
        tree.validate()
        for row, naive in enumerate(self.naive):
            tokens, parents = naive.tree(shape.depth, shape.top_k, shape.size)
            assert tree.tokens[row, : tree.counts[row]].tolist() == tokens
            assert tree.parents[row, : tree.counts[row]].tolist() == parents
        assert tree.candidates == "point"
        return tree

    def accept(self, tree: Tree, lengths: Sequence[int]) -> None:
        """Keep a random path of about so many candidates in each row, and a bonus token."""
        decided = []
        for row, length in enumerate(lengths):
            children, node, tokens = tree.children(row), 0, []
            while len(tokens) < length and node in children:
                node = int(self.rng.choice(children[node]))
                tokens.append(int(tree.tokens[row, node]))
            decided.append([*tokens, int(self.rng.integers(13))])
        self.decide(decided)


@pytest.mark.parametrize("long", [16, 1], ids=["", "outputs-of-last-pairs-only"])
@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
@pytest.mark.parametrize("switches", SWITCHES)
def test_trees_of_ragged_rows_are_the_published_ones_round_after_round(
    monkeypatch: pytest.MonkeyPatch, switches: str, shape: TreeShape, long: int
) -> None:
    monkeypatch.setattr(feature_drafter, "LONG", long)
    rounds = Rounds(switches, [5, 2, 9])
    for accepted in ([0, 2, 1], [3, 0, 0], [1, 1, 4]):
        rounds.accept(rounds.check(shape), accepted)
    rounds.check(shape)


def test_one_row_alone_with_the_published_tree() -> None:
    """Depth 5, top-k 10 and 60 nodes, the setting of the papers for 7B targets."""
    rounds = Rounds("fspad", [3])
    tree = rounds.check(TreeShape(5, 10, 60))
    assert tree.counts == [60]
    assert int(tree.depths.max()) > 2


def test_a_round_without_drafting_is_remembered() -> None:
    rounds = Rounds("fspad", [4, 6])
    rounds.accept(rounds.check(TREES["tree"]), [2, 1])
    missed = rounds.update
    rounds.decide([[3], [1]])
    rounds.update = Update.join([missed, rounds.update])
    rounds.check(TREES["tree"])


def test_rows_that_leave_take_their_memory_with_them() -> None:
    rounds = Rounds("fspad", [4, 6, 3])
    rounds.accept(rounds.check(TREES["tree"]), [2, 1, 0])
    with torch.inference_mode():  # as in decoding: the cache moves its rows in place
        rounds.state.select_rows([2, 0])
    rounds.naive = [rounds.naive[2], rounds.naive[0]]
    update = rounds.update
    rounds.update = update.select_rows([2, 0])
    rounds.accept(rounds.check(TREES["tree"]), [1, 1])
    rounds.check(TREES["tree"])


@pytest.mark.parametrize("long", [16, 4], ids=["", "outputs-of-last-pairs-only"])
def test_long_prompts_in_pieces_give_the_same_trees(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(draft_cache, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(feature_drafter, "LONG", long)
    rounds = Rounds("fspad", [11, 3, 8])
    rounds.accept(rounds.check(TREES["narrow"]), [1, 2, 0])
    rounds.check(TREES["narrow"])


def test_a_checkpoint_s_own_embedding_takes_the_place_of_the_target_s() -> None:
    rounds = Rounds("eagle", [5, 2], embedding=EMBEDDING[::-1].copy())
    rounds.accept(rounds.check(TREES["tree"]), [1, 2])
    rounds.check(TREES["tree"])


def test_a_tree_larger_than_its_candidates_keeps_them_all() -> None:
    rounds = Rounds("fspad", [5])
    assert rounds.check(TreeShape(1, 2, 50)).counts == [1 + 2 + 4]


def test_feeding_p_back_would_grow_other_trees() -> None:
    """Guards the comparison: it can tell r from p."""
    rounds = Rounds("fspad", [5])
    right = rounds.naive[0]
    wrong = NaiveDrafting(right.w, SHAPE, EMBEDDING, HEAD, fed_back="p")
    wrong.take_in(right.tokens, np.array(right.features))
    assert wrong.tree(3, 4, 20) != right.tree(3, 4, 20)


@pytest.mark.parametrize("sizes", [{"hidden_size": 16}, {"vocab_size": 14}])
def test_another_target_is_refused_in_one_line(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"trained for a target with .*outdraft train") as error:
        FeatureDrafter(torch_head(official_tensors(SHAPE), SHAPE), target(**sizes))
    assert "\n" not in str(error.value)
