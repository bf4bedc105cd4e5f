"""Trees: what is above a node, how deep it lies, what its token may look at; against plain walks up the parents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outdraft.core.tree import Tree, attention_mask


@st.composite
def trees(draw, rows: int = 3, nodes: int = 12) -> Tree:
    """Random trees of different sizes, padded to one."""
    counts = [draw(st.integers(1, nodes)) for _ in range(rows)]
    parents = [
        [-1] + [draw(st.integers(0, node - 1)) if node < count else 0 for node in range(1, max(counts))]
        for count in counts
    ]
    tokens = torch.arange(rows * max(counts)).view(rows, -1)
    return Tree(tokens, torch.tensor(parents), counts)


def way_up(tree: Tree, row: int, node: int) -> list[int]:
    """The node, its parent, and so on to the root."""
    way = [node]
    while tree.parents[row, way[-1]] >= 0:
        way.append(int(tree.parents[row, way[-1]]))
    return way


@settings(max_examples=100, deadline=None)
@given(trees())
def test_ancestors_and_depths_are_those_of_a_walk_to_the_root(tree):
    tree.validate()
    for row in range(tree.rows):
        for node in range(tree.nodes):
            way = way_up(tree, row, node)
            assert tree.ancestors[row, node].nonzero()[:, 0].tolist() == sorted(way)
            assert tree.depths[row, node] == len(way) - 1


@settings(max_examples=50, deadline=None)
@given(trees())
def test_children_come_in_order_and_without_padding(tree):
    for row in range(tree.rows):
        expected = {
            node: [c for c in range(1, tree.counts[row]) if tree.parents[row, c] == node] for node in range(tree.nodes)
        }
        assert tree.children(row) == {node: children for node, children in expected.items() if children}


@settings(max_examples=100, deadline=None)
@given(trees(), st.lists(st.integers(0, 9), min_size=3, max_size=3), st.sampled_from([None, 1, 2, 4, 100]))
def test_a_token_sees_the_committed_ones_and_its_ancestors_within_the_window(tree, lengths, window):
    extent = max(lengths) + tree.nodes
    slots = torch.tensor(lengths)[:, None] + torch.arange(tree.nodes)
    positions = torch.tensor(lengths)[:, None] + tree.depths
    mask = attention_mask(tree.ancestors, slots, lengths, extent, positions, window)
    assert mask.shape == (3, 1, tree.nodes, extent) and mask.dtype == torch.bool
    for row, length in enumerate(lengths):
        for node in range(tree.nodes):
            own = length + len(way_up(tree, row, node)) - 1  # its position
            seen = [(slot, slot) for slot in range(length)]
            seen += [(length + above, length + len(way_up(tree, row, above)) - 1) for above in way_up(tree, row, node)]
            expected = sorted(slot for slot, position in seen if window is None or own - position < window)
            assert mask[row, 0, node].nonzero()[:, 0].tolist() == expected


def test_new_tokens_see_pending_ones_of_earlier_forwards():
    """Two levels of a run-ahead: the second sees what of the first it descends from."""
    seen = torch.tensor([[[True, False, True, False], [False, True, False, True]]])
    slots, positions = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 3, 4, 4]])
    mask = attention_mask(seen, slots, [3], 7, positions)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1]]
    near = attention_mask(seen, slots, [3], 7, positions, window=2)
    assert near[0, 0].int().tolist() == [[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(trees())
def test_the_deepest_node_is_the_same_on_the_host_and_on_the_device(tree):
    expected = [max(len(way_up(tree, row, node)) - 1 for node in range(tree.counts[row])) for row in range(3)]
    on_host = Tree(tree.tokens, tree.parents, tree.counts)
    assert on_host.lists[1] == tree.parents.tolist()
    assert tree.deepest == on_host.deepest == expected
    assert "depths" not in on_host.__dict__, "nothing was asked of the device"


def test_roots_are_trees_of_one_node():
    tree = Tree.roots(torch.tensor([5, 7]))
    tree.validate()
    assert (tree.rows, tree.nodes, tree.counts) == (2, 1, [1, 1])
    assert tree.children(0) == {} and tree.depths.tolist() == [[0], [0]]
    assert tree.ancestors.tolist() == [[[True]], [[True]]]


@pytest.mark.parametrize(
    ("parents", "counts", "reason"),
    [
        ([[-1, 1]], [2], "parent"),
        ([[-1, -1]], [2], "parent"),
        ([[-1, 0, 3, 0]], [4], "parent"),
        ([[0, 0]], [2], "root"),
        ([[-1, 0]], [3], "root"),
        ([[-1, 0]], [0], "root"),
    ],
)
def test_a_broken_tree_is_named(parents, counts, reason):
    parents = torch.tensor(parents)
    with pytest.raises(ValueError, match=reason):
        Tree(torch.zeros_like(parents), parents, counts).validate()


def test_sampled_candidates_and_laws_come_together():
    tokens, parents = torch.tensor([[0, 1]]), torch.tensor([[-1, 0]])
    with pytest.raises(ValueError, match="distributions"):
        Tree(tokens, parents, [2], "with_replacement")
    with pytest.raises(ValueError, match="distributions"):
        Tree(tokens, parents, [2], "point", torch.ones(1, 2, 3))
