"""FSPAD-1F: slot 0 is FSPAD's first step, decoding's slots are those of training, and trees are the best there are."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import outdraft
from models import VOCAB, tiny
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext, Update
from outdraft.methods.fspad import drafter as feature_drafter
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import DraftOutput, FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.drafter import OneForward, Slots
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead, head_rows
from outdraft.methods.fspad_1f.tree import Tables, best_at_once, best_first
from outdraft.target.backends import accelerate, why_not_native
from outdraft.target.target import Target
from test_losslessness import one_forward_drafter

TEXTS = [[5, 9, 9, 3, 5, 9, 2, 8], [1, 2, 3, 4, 1, 2]]


def made(**switches: Any) -> OneForward:
    return one_forward_drafter(Target(tiny("llama-gqa")), **switches)


def drafted_slots(drafter: OneForward, state: Any, update: Update) -> torch.Tensor:
    """The logits of all slots after an update."""
    first, more = state._take_in(update), drafter.head.config.block_size - 1
    return drafter.logits(drafter.outputs(first, more, partial(state._causal, more, first.p.device)).p)


def state_of(drafter: OneForward, texts: list[list[int]]) -> Any:
    run = drafter.target.runner(drafter.target.new_cache(len(texts), 32))
    return drafter.begin([torch.tensor(text) for text in texts], run)


def slots_of(drafter: OneForward, texts: list[list[int]], first: int) -> torch.Tensor:
    """The slots' logits after all but the last tokens of the texts, in a batch that takes `first` pairs in before."""
    state = state_of(drafter, texts)
    features = [drafter.target.features(torch.tensor([text]))[0, :-1] for text in texts]
    tokens = [torch.tensor(text[1:]) for text in texts]

    def update(piece: slice) -> Update:
        parts = [pad_sequence([row[piece] for row in whole], batch_first=True) for whole in (tokens, features)]
        return Update(parts[0], parts[1], [len(row[piece]) for row in tokens])

    if first:
        state.propose(update(slice(first)), TreeShape(0, 1, 1), RowContext([], [], []))
    return drafted_slots(drafter, state, update(slice(first, None)))


def trained_slots(drafter: OneForward, text: list[int], anchors: list[int]) -> torch.Tensor:
    """The logits of all slots of these anchors, by the forward of training."""
    head, target = drafter.head, drafter.target
    embedded = target.embed(torch.tensor([text]))[:, 1:]
    features = target.features(torch.tensor([text]))[:, :-1]
    rows, fused = head(embedded, features), head.fusion(embedded, features)
    out = head.masked(fused, rows.r, torch.tensor([anchors]), head.config.block_size - 1)
    return drafter.logits(torch.cat([rows.p[0, anchors][:, None], out.p[0]], dim=1))


@pytest.mark.parametrize("long", [16, 1], ids=["", "outputs-of-last-pairs-only"])
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("second_layer", [True, False])
@torch.inference_mode()
def test_decoding_drafts_what_training_trains(
    monkeypatch: pytest.MonkeyPatch, second_layer: bool, first: int, long: int
) -> None:
    monkeypatch.setattr(feature_drafter, "LONG", long)
    drafter = made(second_layer=second_layer)
    found = slots_of(drafter, TEXTS, first)
    for row, text in enumerate(TEXTS):
        alone = trained_slots(drafter, text, [1, len(text) - 2, 3])
        torch.testing.assert_close(found[row], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(slots_of(drafter, [text], 0)[0], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(trained_slots(drafter, text[:5], [3])[0], alone[2], rtol=0, atol=1e-12)


@pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
@pytest.mark.parametrize("head_dim", [16, 8], ids=["one-call", "mask"])
@pytest.mark.parametrize("second_layer", [True, False])
@torch.inference_mode()
def test_slots_on_our_kernels_are_those_of_training_in_any_company(second_layer: bool, head_dim: int) -> None:
    model = tiny("llama-gqa", dtype=torch.float32, head_dim=16, hidden_size=48, intermediate_size=80)
    shapes = OneForwardConfig(48, 80, 4, 2, head_dim, VOCAB, block_size=4, second_layer=second_layer)
    torch.manual_seed(3)
    head = OneForwardHead(shapes).eval()
    stock, target = OneForward(head, Target(model)), Target(model, backend="native")
    drafter = OneForward(accelerate(head, "native"), target)
    assert (drafter.step.native is not None) == (head_dim == 16)
    for first in (0, 4):
        found = slots_of(drafter, TEXTS, first)
        for row, text in enumerate(TEXTS):
            trained = trained_slots(stock, text, [len(text) - 2])[0]
            torch.testing.assert_close(found[row], trained, rtol=1e-4, atol=1e-4)
            if head_dim == 16:
                assert torch.equal(found[row], slots_of(drafter, [text], 0)[0])


@torch.inference_mode()
def test_slot_0_is_fspads_first_step_bit_for_bit_whatever_the_block_has_learned() -> None:
    drafter, text = made(), TEXTS[0]
    shapes = {field.name: getattr(drafter.head.config, field.name) for field in fields(FeatureHeadConfig)}
    alone = FeatureHead(FeatureHeadConfig(**shapes)).double().eval()
    alone.load_state_dict({name: drafter.head.state_dict()[name] for name in alone.state_dict()})
    taps, tokens = drafter.target.features(torch.tensor([text]))[:, :-1], torch.tensor([text[1:]])
    update, run = Update(tokens, taps, [len(text) - 1]), drafter.target.runner(drafter.target.new_cache(1, 32))
    said = FeatureDrafter(alone, drafter.target).begin([torch.tensor(text)], run)._take_in(update)
    assert torch.equal(state_of(drafter, [text])._take_in(update).p, said.p)
    before = slots_of(drafter, [text], 0)[0]
    for name, weight in drafter.head.named_parameters():
        if name.startswith(("slots", "second", "transition")):
            weight.normal_()
    after = slots_of(OneForward(drafter.head, drafter.target), [text], 0)[0]
    assert torch.equal(after[0], before[0]) and not torch.allclose(before[1:], after[1:])
    torch.testing.assert_close(before[0], drafter.logits(said.p)[0, 0], rtol=0, atol=1e-12)


def test_a_shorter_block_drafts_the_same_slots():
    drafter = made()
    with torch.inference_mode():
        whole = trained_slots(drafter, TEXTS[0], [4])
        drafter.head.config.block_size = 2
        torch.testing.assert_close(trained_slots(drafter, TEXTS[0], [4]), whole[:, :2], rtol=0, atol=1e-12)
        torch.testing.assert_close(slots_of(drafter, [TEXTS[0][:6]], 0), whole[:, :2], rtol=0, atol=1e-12)


# --- tables and trees ------------------------------------------------------------------------------------------------


def some_slots(drafter: OneForward, rows: int = 2, slots: int = 4) -> Slots:
    torch.manual_seed(5)
    head, width = drafter.head, drafter.target.hidden_size
    head.config.slot_candidates = 5
    p, r = torch.randn(2, rows, slots, width, dtype=torch.float64)
    return drafter.slots_of(DraftOutput(p, r))


@pytest.mark.parametrize("kept", [False, True])
@torch.inference_mode()
def test_tables_and_steps_hold_the_transitions_of_the_equation(kept: bool) -> None:
    drafter = made(kept=kept)
    slots = some_slots(drafter)
    tables, block, move = drafter.tables(slots), drafter.block(slots), drafter.head.transition
    rows = head_rows(drafter.target.model)
    unary = slots.logits.log_softmax(-1)
    torch.testing.assert_close(tables.first, unary[:, 0].gather(1, slots.ids[:, 0]))
    index = list(range(rows.shape[0])) if drafter.head.draft_tokens is None else drafter.head.draft_tokens.tolist()
    assert torch.equal(tables.ids, torch.tensor(index)[slots.ids])
    for level in range(1, 4):
        tokens = tables.ids[:, level - 1]
        steps = block(tokens, torch.zeros_like(tokens)).softmax(-1)
        for row, place in itertools.product(range(2), range(5)):
            code = rows[tokens[row, place]] @ move.basis
            asked = move.before(code) * slots.states[row, level]
            own = [
                slots.logits[row, level, b] + move.after(rows[index[b]] @ move.basis) @ asked
                for b in slots.ids[row, level]
            ]
            law = torch.stack(own).softmax(0)
            mass = unary[row, level].exp()[slots.ids[row, level]].sum()
            torch.testing.assert_close(tables.later[row, level - 1, place].exp(), law * mass)
            torch.testing.assert_close(steps[row, place][slots.ids[row, level]], law)
            assert abs(float(steps[row, place].sum()) - 1) < 1e-12


@torch.inference_mode()
def test_the_marginal_tables_are_the_slots_own_distributions() -> None:
    drafter = made()
    drafter.marginal = True
    slots = some_slots(drafter)
    unary = slots.logits.log_softmax(-1)
    expected = unary[:, 1:].gather(2, slots.ids[:, 1:])[:, :, None].expand(-1, -1, 5, -1)
    torch.testing.assert_close(drafter.tables(slots).later, expected)


def some_tables(seed: int, rows: int = 2, slots: int = 4, k: int = 4) -> Tables:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, k + 2, generator=generator, dtype=torch.float64).log_softmax(-1)[..., :k]

    ids = torch.stack(
        [torch.stack([torch.randperm(20, generator=generator)[:k] for _ in range(slots)]) for _ in range(rows)]
    )
    return Tables(ids, drawn(rows).sort(-1, descending=True).values, drawn(rows, slots - 1, k))


def all_paths(tables: Tables, row: int, width: int, depth: int) -> dict[tuple[int, ...], float]:
    """Every path of at most `width` children of each node and so many levels, with its score."""
    found: dict[tuple[int, ...], float] = {}

    def down(path: tuple[int, ...], places: list[int], score: float) -> None:
        level = len(path)
        if level > depth:
            return
        scores = tables.first[row] if not level else tables.later[row, level - 1, places[-1]]
        for place in scores.argsort(descending=True)[:width].tolist():
            further = (*path, int(tables.ids[row, level, place]))
            found[further] = score + float(scores[place])
            down(further, [*places, place], found[further])

    down((), [], 0.0)
    return found


def paths_of(tree: Tree, row: int) -> list[tuple[int, ...]]:
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.counts[row]):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


@pytest.mark.parametrize(
    ("width", "depth", "size"), [(4, 3, 20), (2, 3, 12), (1, 3, 9), (4, 0, 9), (3, 1, 13), (4, 3, 500)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_tree_has_the_best_nodes_of_all(seed: int, width: int, depth: int, size: int) -> None:
    tables, roots, shape = some_tables(seed), torch.tensor([7, 3]), TreeShape(depth, width, size)
    tree, at_once = best_first(roots, tables, shape, None), best_at_once(roots, tables, shape)
    for made in (tree, at_once):
        made.validate()
        assert torch.equal(made.tokens[:, 0], roots)
    for row in range(2):
        every = all_paths(tables, row, width, depth)
        best = sorted(every, key=lambda path: -every[path])[: size - 1]
        assert paths_of(tree, row) == best
        assert sorted(paths_of(at_once, row)) == sorted(best)
        assert tree.deepest[row] == at_once.deepest[row] == max(map(len, best))


@pytest.mark.parametrize("size", range(2, 14))
def test_nodes_as_good_as_their_parents_do_not_lose_them(size: int) -> None:
    tables, depth = some_tables(0), 3
    tables.later[:, :, :, 1], tables.later[:, :, :, 2:] = 1e-9, -torch.inf  # one child is certain, but for rounding
    tables.later[:, :, :, 0] = -2.0
    tree = best_at_once(torch.tensor([7, 3]), tables, TreeShape(depth, 4, size))
    tree.validate()
    for row in range(2):
        every = all_paths(tables, row, 4, depth)
        found = paths_of(tree, row)
        assert len(set(found)) == size - 1 and set(found) <= set(every)
        best = sorted(every.values(), reverse=True)[: size - 1]
        assert sorted((every[path] for path in found), reverse=True) == pytest.approx(best, abs=1e-6)


class Wanting:
    """A budget that wants so many levels and nodes of each row."""

    def __init__(self, levels: list[int], sizes: list[int]):
        self.levels, self.most, self.level = levels, sizes, 0
        self.confidences: list[list[float | None]] = []

    @property
    def going(self) -> list[bool]:
        return [self.level < most for most in self.levels]

    def wants(self, nodes: int) -> list[bool]:
        assert nodes == 0
        return self.going

    def drafted(self, confidences: list[float | None]) -> None:
        self.level += 1
        self.confidences.append(confidences)

    def sizes(self, gains: list[list[float]], levels: list[list[int]]) -> list[int]:
        for row, own in enumerate(gains):
            assert own == sorted(own, reverse=True) and max(levels[row], default=-1) < self.levels[row]
        return [min(most, len(own)) for most, own in zip(self.most, gains, strict=True)]


@pytest.mark.parametrize(("levels", "sizes"), [([4, 2], [9, 3]), ([1, 0], [2, 5]), ([0, 0], [1, 1]), ([3, 3], [99, 0])])
def test_a_budget_cuts_levels_and_nodes(levels: list[int], sizes: list[int]) -> None:
    tables, budget, roots = some_tables(1), Wanting(levels, sizes), torch.tensor([7, 3])
    tree = best_first(roots, tables, TreeShape(3, 4, 40), budget)  # type: ignore[arg-type]
    tree.validate()
    free = best_first(roots, tables, TreeShape(3, 4, 40), None)
    for row in range(2):
        assert paths_of(tree, row) == [path for path in paths_of(free, row) if len(path) <= levels[row]][: sizes[row]]
    first = [sum(math.exp(score) for score in tables.first[row].tolist()) for row in range(2)]
    if budget.confidences:
        told = [sure for sure, most in zip(budget.confidences[0], levels, strict=True) if most]
        assert told == pytest.approx([mass for mass, most in zip(first, levels, strict=True) if most])


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3, "candidates": "spine"}]
)
def test_rows_of_a_batch_and_recording_backends_say_what_a_row_says_alone(settings: dict[str, Any]) -> None:
    model, drafter = tiny("llama-gqa"), made(kept=True)
    alone = outdraft.load(model, drafter.head, backend="eager")
    prompts = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8], [9]]
    given = {"max_new_tokens": 12, "controller": "fixed", "tree_size": 8, "prompt_lookup_min": 0, **settings}
    each = [alone.generate([prompt], **given).tokens[0] for prompt in prompts]
    if not settings:
        assert each == [outdraft.load(model, method="none").generate([p], max_new_tokens=12).tokens[0] for p in prompts]
    for backend in ("eager", "graphs"):
        together = outdraft.load(model, drafter.head, backend=backend).generate(prompts, **given)
        assert together.statistics.accepted > 0
        if "seed" not in settings:
            assert together.tokens == each
        else:
            assert together.tokens[0] == each[0]
