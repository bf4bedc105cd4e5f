"""EAGLE-2's dynamic tree against a plain reading of the paper, one path at a time; and the drawn tree's shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext
from outdraft.drafting.draft_cache import RunAhead
from outdraft.drafting.expand import grow, grow_dynamic, grow_sampled
from outdraft.errors import UserError

VOCAB = 7
Path = tuple[int, ...]
Model = Callable[[Path], Tensor]


def table(seed: int) -> Model:
    @cache
    def logits(path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *path)) % (1 << 62))
        return 2 * torch.randn(VOCAB, generator=generator, dtype=torch.float64)

    return logits


def uniform(path: Path) -> Tensor:
    return torch.zeros(VOCAB, dtype=torch.float64)


def certain(path: Path) -> Tensor:
    """One token with all the probability: a child is exactly as probable as its parent."""
    return torch.full((VOCAB,), -math.inf, dtype=torch.float64).index_fill_(0, torch.tensor(len(path) % VOCAB), 0.0)


class Stepper:
    """`step` over a table for every row, which remembers what was expanded."""

    def __init__(self, models: Sequence[Model]):
        self.models = models
        self.paths: list[list[Path]] = [[()] for _ in models]
        self.expanded: list[list[list[Path]]] = []

    @property
    def roots(self) -> Tensor:
        return torch.stack([model(()) for model in self.models])

    def __call__(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self.paths = [
            [(*paths[parent], token) for parent, token in zip(above, new, strict=True)]
            for paths, above, new in zip(self.paths, parents.tolist(), tokens.tolist(), strict=True)
        ]
        self.expanded.append(self.paths)
        return torch.stack(
            [torch.stack([model(path) for path in paths]) for model, paths in zip(self.models, self.paths, strict=True)]
        )


def eagle2(model: Model, shape: TreeShape) -> set[Path]:
    """Section 4 of arXiv 2406.16858, naively: expand the best of a level, rerank all that was ever proposed."""
    value: dict[Path, float] = {(): 0.0}
    k = min(shape.top_k, VOCAB)
    level: list[Path] = [()]
    for _ in range(shape.depth + 1):
        children = {}
        for path in level:
            log_probabilities = model(path).log_softmax(-1)
            for token in sorted(range(VOCAB), key=lambda token: -log_probabilities[token])[:k]:
                children[(*path, token)] = value[path] + log_probabilities[token].item()
        value.update(children)
        level = sorted(children, key=lambda path: -children[path])[:k]
    del value[()]
    return set(sorted(value, key=lambda path: (-value[path], len(path)))[: shape.size - 1])


def paths_of(tree: Tree, row: int = 0) -> list[Path]:
    """Tokens from below the root to every candidate."""
    paths: list[Path] = [()]
    for node in range(1, tree.counts[row]):
        paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return paths[1:]


DYNAMIC = [
    TreeShape(depth, top_k, size)
    for depth in (0, 1, 2, 4)
    for top_k in (1, 2, 4, VOCAB + 3)
    for size in (2, 6, 13, 200)
]


@pytest.mark.parametrize("shape", DYNAMIC, ids=lambda shape: f"{shape.depth}-{shape.top_k}-{shape.size}")
def test_the_dynamic_tree_is_eagle_2s(shape):
    for seed in range(5):
        stepper = Stepper([table(seed)])
        tree = grow_dynamic(torch.tensor([3]), stepper.roots, stepper, shape)
        tree.validate()
        paths = paths_of(tree)
        assert len(paths) == len(set(paths)) == tree.nodes - 1 <= shape.size - 1
        assert set(paths) == eagle2(table(seed), shape)
        assert tree.tokens[0, 0] == 3
        assert tree.candidates == "point"
        # In a chain nothing deeper can take a place in the tree from what is above it.
        steps = shape.depth if shape.top_k > 1 else min(shape.depth, shape.size - 2)
        assert len(stepper.expanded) == steps
        assert all(len(level[0]) <= shape.top_k for level in stepper.expanded)


@pytest.mark.parametrize("model", [uniform, certain], ids=["uniform", "certain"])
@pytest.mark.parametrize("shape", DYNAMIC, ids=lambda shape: f"{shape.depth}-{shape.top_k}-{shape.size}")
def test_ties_never_part_a_node_from_its_parent(shape, model):
    stepper = Stepper([model])
    tree = grow_dynamic(torch.tensor([0]), stepper.roots, stepper, shape)
    tree.validate()
    paths = set(paths_of(tree))
    assert len(paths) == tree.nodes - 1, "no path twice"
    assert all(path[:-1] in paths or len(path) == 1 for path in paths)


def test_children_of_a_node_come_in_the_order_of_their_probability():
    stepper = Stepper([table(0)])
    tree = grow_dynamic(torch.tensor([0]), stepper.roots, stepper, TreeShape(2, 4, 20))
    for node, children in tree.children(0).items():
        logits = table(0)([(), *paths_of(tree)][node])
        found = [logits[tree.tokens[0, child]].item() for child in children]
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("candidates", ["top-k", "sampled", "sampled-with-replacement"])
def test_rows_of_a_batch_grow_as_they_would_alone(candidates):
    models = [table(seed) for seed in range(3)]
    prefixes = [torch.tensor([0, seed]) for seed in range(3)]
    settings = [SamplingSettings(temperature=1, top_k=k, repetition_penalty=1.5) for k in (0, 1, 3)]
    warpers = [Warper(one, 2, VOCAB) for one in settings]
    roots, shape = torch.tensor([0, 1, 2]), TreeShape(2, 2, 7, candidates)

    def grown(rows: Sequence[int]) -> tuple[Tree, Stepper]:
        stepper = Stepper([models[row] for row in rows])
        context = RowContext(
            [prefixes[row] for row in rows], [warpers[row] for row in rows], [Dice(row) for row in rows]
        )
        return grow(roots[list(rows)], stepper.roots, stepper, shape, context), stepper

    together, _ = grown(range(3))
    together.validate()
    for row in range(3):
        alone, _ = grown([row])
        assert paths_of(together, row) == paths_of(alone)
        if alone.draft_probs is not None:
            assert torch.equal(together.draft_probs[row, : alone.nodes], alone.draft_probs[0])
    assert together.counts == ([7, 7, 7] if candidates != "sampled" else [7, 4, 7])


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        (TreeShape(2, 2, 7, "sampled"), [2, 2, 2]),
        (TreeShape(2, 2, 6, "sampled"), [2, 2]),
        (TreeShape(5, 3, 7, "sampled"), [3, 3]),
        (TreeShape(0, 20, 30, "sampled"), [VOCAB]),
        (TreeShape(3, 1, 3, "sampled"), [1, 1]),
        (TreeShape(2, 9, 4, "sampled"), [3]),
    ],
)
def test_the_drawn_trees_shape_does_not_depend_on_what_is_drawn(shape, widths):
    shapes = set()
    for seed in range(10):
        stepper = Stepper([table(1)])
        warper = Warper(SamplingSettings(temperature=1), 1, VOCAB)
        context = RowContext([torch.tensor([0])], [warper], [Dice(seed)])
        tree = grow_sampled(torch.tensor([0]), stepper.roots, stepper, shape, context)
        tree.validate()
        assert tree.depths[0].bincount().tolist() == [1, *widths]
        firsts = [path[0] for path in paths_of(tree) if len(path) == 1]
        assert len(set(firsts)) == len(firsts), "without replacement"
        shapes.add(tuple(tree.parents[0].tolist()))
    assert len(shapes) == 1


def test_declared_laws_are_those_of_the_nodes_own_prefix():
    stepper, prefix = Stepper([table(1)]), torch.tensor([4, 2])
    warper = Warper(SamplingSettings(temperature=0.8, repetition_penalty=1.7), 2, VOCAB)
    context = RowContext([prefix], [warper], [Dice(0)])
    tree = grow_sampled(torch.tensor([2]), stepper.roots, stepper, TreeShape(2, 2, 7, "sampled"), context)
    for node, path in enumerate([(), *paths_of(tree)]):
        if node in tree.children(0):
            expected = warper.probs_after(table(1)(path), torch.cat([prefix, torch.tensor(path, dtype=torch.long)]))
            assert torch.allclose(tree.draft_probs[0, node], expected, atol=1e-15)


def test_greedy_rows_get_the_dynamic_tree_whatever_was_asked_for():
    warper = Warper(SamplingSettings(), 1, VOCAB)
    context = RowContext([torch.tensor([0])], [warper], [Dice(0)])
    stepper = Stepper([table(0)])
    tree = grow(torch.tensor([0]), stepper.roots, stepper, TreeShape(1, 2, 5, "sampled"), context)
    assert tree.candidates == "point" and set(paths_of(tree)) == eagle2(table(0), TreeShape(1, 2, 5))


def test_a_size_of_one_is_a_root():
    context = RowContext([torch.tensor([0])], [Warper(SamplingSettings(), 1, VOCAB)], [Dice(0)])
    stepper = Stepper([table(0)])
    tree = grow(torch.tensor([6]), stepper.roots, stepper, TreeShape(3, 4, 1), context)
    assert tree.tokens.tolist() == [[6]] and not stepper.expanded


def test_half_precision_logits_are_scored_in_float32():
    stepper = Stepper([lambda path: table(0)(path).bfloat16()])
    tree = grow_dynamic(torch.tensor([0]), stepper.roots, stepper, TreeShape(2, 3, 9))
    assert set(paths_of(tree)) == eagle2(lambda path: table(0)(path).bfloat16().float(), TreeShape(2, 3, 9))


def test_running_ahead_each_node_sees_its_own_branch():
    from outdraft.target.cache import SlotCache

    cache_ = SlotCache(2, 1, 8)
    cache_.lengths = [3, 1]
    ahead = RunAhead(cache_, last_position=4)
    ahead.place(torch.tensor([[1, 2], [1, 2]]), torch.zeros(2, 2, dtype=torch.long))
    positions, seen, slots = ahead.place(torch.tensor([[3, 4], [5, 6]]), torch.tensor([[1, 1], [0, 1]]))
    assert slots.tolist() == [[3, 4, 5, 6], [1, 2, 3, 4]]
    assert positions.tolist() == [[3, 3, 4, 4], [1, 1, 2, 2]]
    assert seen[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert seen[1].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    positions, _, _ = ahead.place(torch.tensor([[7], [8]]), torch.tensor([[0], [1]]))
    assert positions[:, -1].tolist() == [4, 3], "positions stop at the last one"


@pytest.mark.parametrize(
    "impossible", [lambda: TreeShape(-1, 1, 2), lambda: TreeShape(0, 0, 2), lambda: TreeShape(0, 1, 0)]
)
def test_impossible_shapes_are_refused(impossible):
    with pytest.raises(UserError, match="must be at least"):
        impossible()


def test_chains_are_shapes_too():
    assert TreeShape.chain(4) == TreeShape(3, 1, 5)
    assert TreeShape(5, 8, 40).at_most(3, 10) == TreeShape(2, 8, 10)
    with pytest.raises(UserError, match="num_speculative_tokens must be at least 1"):
        TreeShape.chain(0)


# --- at a pace -------------------------------------------------------------------------------------------------------


class Levels:
    """A pace that wants so many levels and at most so many candidates of each row, and writes down what it is told."""

    def __init__(self, levels: Sequence[int], sizes: Sequence[int] | None = None):
        self.levels, self.most = list(levels), sizes
        self.level = 0
        self.going = [levels > 0 for levels in self.levels]
        self.told: list[list[float | None]] = []
        self.asked: list[int] = []
        self.gains: list[list[float]] = []
        self.of: list[list[int]] = []

    def wants(self, nodes: int) -> list[bool]:
        self.asked.append(nodes)
        self.going = [going and levels > self.level for going, levels in zip(self.going, self.levels, strict=True)]
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        self.told.append(list(confidences))
        self.level += 1

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        self.gains, self.of = [list(row) for row in gains], [list(row) for row in levels]
        return [min(len(row), most) for row, most in zip(gains, self.most or [99] * len(gains), strict=True)]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_row_s_dynamic_tree_is_as_deep_as_its_pace_wants(top_k):
    models = [table(seed) for seed in range(4)]
    stepper, budget = Stepper(models), Levels([2, 0, 4, 1])
    shape = TreeShape(4, top_k, 200)
    tree = grow_dynamic(torch.arange(4), stepper.roots, stepper, shape, budget)
    tree.validate()
    for row, levels in enumerate(budget.levels):
        expected = eagle2(models[row], TreeShape(levels - 1, top_k, 200)) if levels else set()
        assert set(paths_of(tree, row)) == expected
    assert len(stepper.expanded) == 3, "no step for a level that nobody wants"


def probability_of(model: Model, path: Path) -> float:
    return math.exp(sum(model(path[:i]).log_softmax(-1)[path[i]].item() for i in range(len(path))))


def test_what_a_pace_is_told_of_a_dynamic_tree():
    """Of every level its mass relative to the one above; the gains are whole paths' probabilities."""
    model, budget = table(3), Levels([3])
    stepper = Stepper([model])
    grow_dynamic(torch.tensor([0]), stepper.roots, stepper, TreeShape(2, 2, 200), budget)

    def probability(path: Path) -> float:
        return probability_of(model, path)

    masses, level = [1.0], [()]
    for _ in range(3):
        children = [(*path, token) for path in level for token in model(path).topk(2).indices.tolist()]
        level = sorted(children, key=lambda path: -probability(path))[:2]
        masses.append(sum(probability(path) for path in level))
    assert [told[0] for told in budget.told] == pytest.approx([masses[i + 1] / masses[i] for i in range(3)])
    everything = sorted((probability(path) for path in eagle2(model, TreeShape(2, 2, 200))), reverse=True)
    assert budget.gains[0] == pytest.approx(everything)
    depths = {probability(path): len(path) - 1 for path in eagle2(model, TreeShape(2, 2, 200))}
    assert budget.of[0] == [depths[min(depths, key=lambda p: abs(p - gain))] for gain in budget.gains[0]]


def test_a_pace_cuts_each_row_s_tree_to_its_size():
    models = [table(seed) for seed in range(3)]
    stepper, budget = Stepper(models), Levels([3, 3, 3], sizes=[4, 0, 50])
    tree = grow_dynamic(torch.arange(3), stepper.roots, stepper, TreeShape(2, 3, 10), budget)
    tree.validate()
    for row, size in enumerate([4, 0, 9]):
        assert tree.counts[row] == 1 + size
        assert set(paths_of(tree, row)) == eagle2(models[row], TreeShape(2, 3, 1 + size))
    assert [len(gains) for gains in budget.gains] == [9, 9, 9], "no more than the shape allows is offered"


@pytest.mark.parametrize("candidates", ["sampled", "sampled-with-replacement"])
@pytest.mark.parametrize("width", [1, 2])
def test_drawn_chains_are_as_long_as_their_pace_wants_and_draw_no_more(candidates, width):
    models = [table(seed) for seed in range(4)]
    levels, prefixes = [2, 0, 4, 1], [torch.tensor([0, seed]) for seed in range(4)]
    warpers = [Warper(SamplingSettings(temperature=1), 2, VOCAB)] * 4
    shape = TreeShape(3, width, 1 + 4 * width, candidates)

    def grown(which: Sequence[int]) -> tuple[Tree, list[Dice]]:
        stepper, dice = Stepper([models[i] for i in which]), [Dice(i) for i in which]
        budget = Levels([levels[i] for i in which])
        context = RowContext([prefixes[i] for i in which], [warpers[i] for i in which], dice, budget)
        return grow_sampled(torch.tensor(which), stepper.roots, stepper, shape, context), dice

    together, dice = grown(range(4))
    together.validate()
    assert together.counts == [1 + width * wanted for wanted in levels]
    for row in range(4):
        alone, own = grown([row])
        assert paths_of(alone) == paths_of(together, row)
        assert dice[row].generator.get_state().equal(own[0].generator.get_state())


def test_confidence_in_a_drawn_chain_is_what_the_law_gave_its_token():
    budget = Levels([3])
    stepper = Stepper([table(1)])
    warper = Warper(SamplingSettings(temperature=0.7), 1, VOCAB)
    context = RowContext([torch.tensor([0])], [warper], [Dice(5)], budget)
    tree = grow_sampled(torch.tensor([0]), stepper.roots, stepper, TreeShape.chain(3, candidates="sampled"), context)
    assert tree.draft_probs is not None
    drawn = [tree.draft_probs[0, node, tree.tokens[0, node + 1]].item() for node in range(3)]
    assert [told[0] for told in budget.told] == pytest.approx(drawn)
