"""Medusa's heads: what they compute, the tree they make, their folder. Losslessness is tested with all drafters'."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from enumeration import distance
from models import tiny
from outdraft.api.loading import load_drafter_for
from outdraft.console.facts import describe
from outdraft.control import CONTROLLERS
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import RowContext, Update
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.medusa.drafter import Medusa, MedusaConfig, MedusaHeads, load_medusa
from outdraft.target.target import Target
from test_control_of_decoding import PROMPT, controlled, law_and_statistics
from test_control_of_decoding import finish as controlled_finish
from test_losslessness import (
    DRAFTERS,
    EXACT,
    NARROW,
    PLAIN,
    PROMPTS,
    SHAPED,
    Recorded,
    expected_law,
    finish,
    medusa_drafter,
    pair,
    rows_of,
    small,
)


def features_of(target: Target, rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, target.hidden_size, generator=torch.Generator().manual_seed(1), dtype=target.dtype)


def context(target: Target, settings: SamplingSettings, rows: int) -> RowContext:
    prefix = torch.tensor([1, 2, 3])
    warpers = [Warper(settings, 3, target.vocab_size) for _ in range(rows)]
    return RowContext([prefix] * rows, warpers, [Dice(row) for row in range(rows)])


def update(target: Target, counts: list[int]) -> Update:
    return Update(torch.tensor([[4, 5, 6]] * len(counts)), features_of(target, len(counts)), counts)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "granite"])
def test_untrained_heads_all_say_what_the_target_says_next(family: str, own_head: bool) -> None:
    """Scaled and soft-capped logits, too."""
    target = Target(tiny(family))
    config = MedusaConfig(target.hidden_size, target.vocab_size, 3, 2, own_head)
    drafter = Medusa(MedusaHeads.beginning(target.model, config).double(), target)
    features = features_of(target, 2)[:, 0]
    torch.testing.assert_close(
        drafter.logits(features, 3), target.head(features)[:, None].expand(-1, 3, -1), rtol=1e-6, atol=1e-6
    )


@torch.inference_mode()
def test_a_head_is_the_paper_s_equation() -> None:
    """softmax(W2 (f + SiLU(W1 f))), two blocks deep."""
    target = Target(tiny("llama-gqa"))
    heads = MedusaHeads(MedusaConfig(target.hidden_size, target.vocab_size, 2, 2)).double()
    for weight in heads.parameters():
        weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    features = features_of(target, 2)[:, 0]
    for k, found in enumerate(Medusa(heads, target).logits(features, 2).unbind(1)):
        x = features
        for block in heads.heads[k]:
            z = x @ block.linear.weight.T
            x = x + z / (1 + torch.exp(-z))
        torch.testing.assert_close(found, x @ target.model.lm_head.weight.T)


@torch.inference_mode()
def test_the_tree_is_the_best_of_the_heads_product() -> None:
    """Every path's worth is the product of its tokens' probabilities; wide enough, none better is left out."""
    target = Target(tiny("llama-gqa", vocab_size=5))
    drafter = medusa_drafter(target)
    given, shape = update(target, [3, 2]), TreeShape(2, 5, 20)
    tree = drafter.begin([], None).propose(given, shape, context(target, SamplingSettings(), 2))  # type: ignore[arg-type]
    tree.validate()
    for row, last in enumerate((2, 1)):
        laws = drafter.logits(given.taps[row : row + 1, last], 3)[0].softmax(-1)
        worth = {}
        for length in (1, 2, 3):
            for path in itertools.product(range(5), repeat=length):
                worth[path] = float(torch.stack([laws[k, x] for k, x in enumerate(path)]).prod())
        best = sorted(worth.values(), reverse=True)[:19]
        paths: list[tuple[int, ...]] = [()]
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            paths.append((*paths[parent], token))
        assert tokens[0] == (6 if last == 2 else 5) and len(set(paths)) == 20
        # Five nodes of a level are expanded, so the very least of the best may be a near one.
        found = sorted((worth[path] for path in paths[1:]), reverse=True)
        assert found[:15] == pytest.approx(best[:15])


@pytest.mark.parametrize("candidates", ["top-k", "sampled"])
def test_no_path_is_longer_than_there_are_heads(candidates: str) -> None:
    target = Target(pair("llama-gqa")[0])
    recorded = Recorded(medusa_drafter(target))
    finish(
        target,
        recorded,
        rows_of(target, PROMPTS, PLAIN, 12, [Dice(i) for i in range(4)]),
        TreeShape(7, 2, 30, candidates),
    )
    depths = {int(tree.depths[0, : tree.counts[0]].max()) for _, tree in recorded.proposed}
    assert max(depths) == 3


@torch.inference_mode()
def test_it_reads_the_feature_before_the_root() -> None:
    """Round after round, in a ragged batch: what it would guess with the stock model's own hidden state."""
    model = pair("llama-gqa")[0]
    target = Target(model)
    drafter = DRAFTERS["medusa"](target, model)
    assert isinstance(drafter, Medusa)
    recorded = Recorded(drafter)
    finish(
        target,
        recorded,
        rows_of(target, PROMPTS, SamplingSettings(), 12, [Dice(i) for i in range(4)]),
        TreeShape.chain(3),
    )
    assert len(recorded.proposed) > 12
    for prefix, tree in recorded.proposed:
        hidden = model.model(torch.tensor([prefix[:-1]]), use_cache=False).last_hidden_state[:, -1]
        guesses = drafter.logits(hidden, 3)[0].argmax(-1).tolist()
        assert tree.tokens[0].tolist() == [prefix[-1], *guesses]


# --- controllers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("candidates", ["top-k", "sampled", "sampled-with-replacement"])
def test_every_controller_keeps_the_law(candidates: str, name: str) -> None:
    target, shape = Target(small(4)[0]), TreeShape(1, 2, 5, candidates)
    accepted = drafted = 0
    for seed in range(2):
        law, statistics = law_and_statistics(medusa_drafter(target), target, name, NARROW, shape, seed, 2)
        assert distance(law, expected_law(small(4)[0], PROMPT, NARROW, 2)) < EXACT
        accepted, drafted = accepted + statistics.accepted, drafted + statistics.drafted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", ["confidence", "beta", "calibrated"])
@pytest.mark.parametrize("shape", [TreeShape.chain(4), TreeShape(3, 3, 12), TreeShape(2, 2, 7, "sampled")], ids=str)
@pytest.mark.parametrize("kind", ["medusa", "lookahead"])
def test_rows_that_decide_for_themselves_equal_single_rows(kind: str, shape: TreeShape, name: str) -> None:
    """With given costs and the same dice; rows draft to different lengths and leave at different times."""
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    limits = [9, 3, 16, 6]

    def rows(which: list[int]) -> list[Row]:
        made = [row for i in which for row in rows_of(target, [PROMPTS[i]], SHAPED, limits[i], [Dice(100 + i)], [11])]
        for i, row in zip(which, made, strict=True):
            controlled([row], name, shape, seed=i, tuned=False)
        return made

    together = controlled_finish(target, drafter, rows([0, 1, 2, 3]), shape)
    for i, row in enumerate(together):
        (alone,) = controlled_finish(target, drafter, rows([i]), shape)
        assert (row.tokens, row.accepted) == (alone.tokens, alone.accepted)
        assert row.statistics.depths == alone.statistics.depths
    assert sum(row.statistics.drafted for row in together) > 0


# --- folders ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, with_outputs: bool = False, **changes: Any) -> Path:
    """A folder of random heads, its config changed; None takes a key away."""
    model = tiny("llama-gqa")
    heads = medusa_drafter(Target(model), with_outputs).heads
    save_drafter(folder, heads, target_id="some/target", training={"tau": {"tau": 2.5}}, target=target_facts(model))
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("own_head", [False, True])
def test_the_round_trip_is_exact(tmp_path: Path, own_head: bool) -> None:
    before = medusa_drafter(Target(tiny("llama-gqa")), own_head).heads
    loaded = load_medusa(saved(tmp_path / "heads", own_head))
    assert loaded.network.config == before.config and loaded.target["id"] == "some/target"
    wanted, found = before.state_dict(), loaded.network.state_dict()
    assert list(wanted) == list(found) and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("backend", ["eager", "packed"])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_folder_and_a_network_become_the_same_drafter(tmp_path: Path, own_head: bool, backend: str) -> None:
    target = Target(tiny("llama-gqa", dtype=torch.float32), backend=backend)
    drafter = load_drafter_for(target, saved(tmp_path / "heads", own_head), backend=backend)
    heads = load_medusa(tmp_path / "heads").network
    other = load_drafter_for(target, heads, backend=backend)
    assert isinstance(drafter, Medusa) and isinstance(other, Medusa) and drafter.method == "medusa"
    assert drafter.num_parameters == other.num_parameters == sum(weight.numel() for weight in heads.parameters())
    features = features_of(target, 2)[:, 0]
    torch.testing.assert_close(drafter.logits(features, 3), other.logits(features, 3))


def test_info_says_what_it_is(tmp_path: Path) -> None:
    facts = describe(str(saved(tmp_path / "heads")))
    assert (facts["method"], facts["heads"], facts["own_head"]) == ("medusa", 3, False)
    assert facts["parameters"] == 3 * 32 * 32 and facts["tau_at_end_of_training"] == 2.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": None}, "heads.3"),
        ({"num_heads": 0}, "num_heads must be a positive whole number"),
        ({"own_head": True}, "lacks outputs.0.weight"),
        ({"hidden_size": 64}, "32x32 where config.json asks for 64x64"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"method": "eagle"}, "holds no Medusa heads"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        load_medusa(saved(tmp_path / "heads", **changes))
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_another_target_or_method_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "heads")
    with pytest.raises(UserError, match="with vocab_size 32, this one has 40"):
        load_drafter_for(Target(tiny("llama-gqa", vocab_size=40)), folder)
    with pytest.raises(UserError, match="is a 'medusa' drafter"):
        load_drafter_for(Target(tiny("llama-gqa")), folder, method="fspad")
    with pytest.raises(UserError, match="method 'medusa'"):
        load_drafter(folder)
