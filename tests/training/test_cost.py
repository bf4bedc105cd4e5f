"""Training does not pay for logits of all positions, for the target's probabilities twice, or for padding; and it pays
the same attention to every token all the same."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.errors import UserError
from outdraft.losses.cross_entropy import Guess, HardLabels, soft_cross_entropies, soft_cross_entropy
from outdraft.losses.objective import Objective, Reading, TrainingExamples, collate
from outdraft.target.target import Target
from outdraft.training import feature_store, trainer
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import FeatureStore
from outdraft.training.preparation import objective_for
from outdraft.training.trainer import GROUPS, ObjectiveTrainer, groups_of_like_length, training_arguments

from .live_memory import LiveMemory
from .test_train import assert_same_bits, quiet, settings
from .tiny import tiny_target, write_chats

V, D = 4096, 8

METHODS: dict[str, dict[str, Any]] = {
    "fspad": {"method": "fspad"},
    "fspad unrolled": {"method": "fspad", "unroll_steps": 3},
    "eesd": {"method": "eesd", "exit_layer": 1},
    "eesd own head mixed": {"method": "eesd", "exit_layer": 1, "own_head": True, "loss": "mixed"},
    "medusa": {"method": "medusa", "medusa_num_heads": 3},
    "medusa own heads hard": {"method": "medusa", "medusa_num_heads": 2, "own_head": True, "loss": "hard"},
}


def some_examples(lengths: list[int]) -> ExampleSet:
    rng = random.Random(1)
    ids = [torch.tensor(rng.choices(range(260), k=n), dtype=torch.int32) for n in lengths]
    return ExampleSet([Example(x, torch.arange(len(x)) % 5 > 0) for x in ids])


def objective_in_float64(folder: Path, **values: Any) -> Objective:
    target = tiny_target(torch.float64)
    config = DrafterConfig(**settings(folder, folder / "run", batch_size=6, gradient_accumulation_steps=1, **values))
    objective = objective_for(target, config)
    objective.drafter.double()
    return objective


def sums_and_gradients(objective: Objective, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Of all batches together, in step 3."""
    found: list[list[Tensor]] = []
    total: Any = 0
    for batch in batches:
        features = objective.reading(batch["input_ids"], batch["lengths"])
        sums = objective.loss(*objective.arguments(batch, features, 3))
        total = total + objective.total(sums, 0.5)
        found.append([part.detach().double() for part in sums])
    parameters = [weight for weight in objective.drafter.parameters() if weight.requires_grad]
    return [torch.stack(parts).sum() for parts in zip(*found, strict=True)], list(
        torch.autograd.grad(total, parameters)
    )


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_a_batch_give_the_sums_and_gradients_of_the_padded_batch(method: str, tmp_path: Path) -> None:
    objective = objective_in_float64(tmp_path, **METHODS[method])
    data = TrainingExamples(some_examples([40, 9, 38, 11, 3, 40]))
    items = [data[i] for i in range(6)]
    groups = groups_of_like_length([len(data.examples[i]) for i in range(6)], cost=4)
    assert len(groups) == 3
    padded = sums_and_gradients(objective, [collate(items)])
    grouped = sums_and_gradients(objective, [collate([items[i] for i in group]) for group in groups])
    assert padded[0][-1] > 60
    for one, other in zip(itertools.chain(*padded), itertools.chain(*grouped), strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


def test_groups_cost_the_least_of_all_divisions() -> None:
    def cost_of(groups: list[list[int]], lengths: list[int], cost: int) -> int:
        return sum(cost + len(group) * max(lengths[i] for i in group) for group in groups)

    def divisions(rows: list[int]) -> list[list[list[int]]]:
        if not rows:
            return [[]]
        first, rest = rows[0], rows[1:]
        found = []
        for taken in itertools.chain.from_iterable(itertools.combinations(rest, n) for n in range(len(rest) + 1)):
            others = [row for row in rest if row not in taken]
            found += [[[first, *taken], *more] for more in divisions(others)]
        return found

    rng = random.Random(3)
    for cost in (0, 3, 10, 100):
        for _ in range(8):
            lengths = [rng.randint(1, 30) for _ in range(6)]
            groups = groups_of_like_length(lengths, cost)
            assert sorted(itertools.chain(*groups)) == list(range(6))
            least = min(cost_of(division, lengths, cost) for division in divisions(list(range(6))))
            assert cost_of(groups, lengths, cost) == least
            tops = [lengths[group[0]] for group in groups]
            assert tops == sorted(tops, reverse=True)


def test_the_trainer_computes_in_groups_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trainer.GROUP_COST, "cpu", 0)
    data = write_chats(tmp_path / "chats.jsonl", 26)
    seen: list[tuple[int, int]] = []
    compute = ObjectiveTrainer.compute_loss

    def watching(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        seen.append((int(inputs["lengths"].sum()), inputs["input_ids"].numel()))
        if len(seen) == stop_at:
            raise RuntimeError("breaks")
        return compute(self, model, inputs, *args, **more)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", watching)
    stop_at = -1
    quiet(tiny_target(), settings(data, tmp_path / "whole", max_steps=8))
    assert all(real == computed for real, computed in seen)  # groups that cost nothing leave no padding
    assert len(seen) > 15  # more of them than pieces
    stop_at = len(seen) + len(seen) // 2
    with pytest.raises(RuntimeError, match="breaks"):
        quiet(tiny_target(), settings(data, tmp_path / "run", max_steps=8))
    quiet(tiny_target(), settings(data, tmp_path / "run", max_steps=8), resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    seen.clear()
    quiet(tiny_target(), settings(data, tmp_path / "padded", max_steps=8, length_groups=False))
    assert len(seen) == 15 and any(real < computed for real, computed in seen)
    with pytest.raises(UserError, match="length_groups was True in this run and is False now"):
        quiet(tiny_target(), settings(data, tmp_path / "whole", max_steps=8, length_groups=False), resume=True)


def test_what_is_kept_is_read_in_batches_of_like_length(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(feature_store.BATCH_TOKENS, "cpu", 80)
    examples = some_examples([40, 9, 38, 11, 3, 90])
    forward, shapes = target.features, []

    def watching(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, mask)

    target.features = watching  # type: ignore[method-assign,assignment]
    store = FeatureStore(tmp_path, target, Reading(target), 4)
    store.build(examples)
    assert shapes == [(3, 11), (2, 40), (1, 90)]
    for example in examples.examples:
        alone = forward(example.input_ids.long()[None])[0]
        torch.testing.assert_close(store[example][0], alone.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("own", [False, True])
def test_guesses_that_share_their_goals_are_as_good_as_alone(hard_weight: float, own: bool) -> None:
    torch.manual_seed(4)
    n, vocabulary = 11, 13
    weight, goal = torch.randn(vocabulary, D).double(), torch.randn(n, D).double()
    labels = HardLabels(torch.randint(vocabulary, (n,)), hard_weight) if hard_weight else None
    heads = [torch.nn.Linear(D, vocabulary).double() if own else None for _ in range(3)]
    ps = [torch.randn(n, D).double().requires_grad_() for _ in range(3)]
    counted = [None, torch.rand(n) > 0.3, torch.rand(n) > 0.6]
    leaves = [*ps, *(weight for head in heads if head is not None for weight in head.parameters())]

    def head(x: Tensor) -> Tensor:
        return x @ weight.T

    def plainly(p: Tensor, own_head: Any, here: Tensor | None) -> Tensor:
        log_guess = (head(p) if own_head is None else own_head(p)).log_softmax(-1)
        losses = -(1 - hard_weight) * (head(goal).softmax(-1) * log_guess).sum(-1)
        if labels is not None:
            losses = losses - hard_weight * log_guess[torch.arange(n), labels.tokens]
        return losses.sum() if here is None else losses[here].sum()

    guesses = [Guess(p, here, own_head) for p, here, own_head in zip(ps, counted, heads, strict=True)]
    shares = torch.tensor([1.0, 0.5, 2.0]).double()
    totals, agreed = soft_cross_entropies(guesses, goal, head, 4, labels=labels)
    expected = torch.stack([plainly(*parts) for parts in zip(ps, heads, counted, strict=True)])
    torch.testing.assert_close(totals, expected, atol=1e-12, rtol=1e-12)
    for one, other in zip(
        torch.autograd.grad((totals * shares).sum(), leaves),
        torch.autograd.grad((expected * shares).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    for count, p, own_head, here in zip(agreed, ps, heads, counted, strict=True):
        same = (head(p) if own_head is None else own_head(p)).argmax(-1) == head(goal).argmax(-1)
        assert count == (same if here is None else same[here]).sum()


def test_the_targets_probabilities_are_made_once_for_all_draft_steps(tmp_path: Path) -> None:
    for (values, guesses), top_k in itertools.product(
        ((METHODS["fspad unrolled"], 3), (METHODS["medusa"], 3)), (0, 64)
    ):
        objective: Any = objective_in_float64(tmp_path, **values, teacher_top_k=top_k)
        batch = collate([TrainingExamples(some_examples([40]))[0]])
        features = objective.reading(batch["input_ids"], batch["lengths"])
        rows: list[int] = []
        own = objective.loss
        places = [(objective.target, "head"), *([(own, "_head")] if hasattr(own, "_head") else [])]
        for (place, name), head in [(place, getattr(*place)) for place in places]:
            setattr(place, name, lambda x, head=head, rows=rows: (rows.append(len(x)), head(x))[1])
        sums = own(*objective.arguments(batch, features, 0))
        assert sum(rows) == (1 + guesses) * int(sums.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_at_most_four_tensors_of_a_chunk_are_held(dtype: torch.dtype, own: bool) -> None:
    n, chunk = 400, 128
    weight, goal = torch.randn(V, D, dtype=dtype), torch.randn(n, D, dtype=dtype)
    own_head = torch.nn.Linear(D, V, bias=False) if own else None
    guesses = [Guess(torch.randn(n, D, requires_grad=True), None, own_head) for _ in range(2)]
    of_a_chunk, of_own = 4 * chunk * V, 4 * V * D * own
    with LiveMemory() as memory:
        totals, _ = soft_cross_entropies(guesses, goal, lambda x: x @ weight.T, chunk)
        totals.sum().backward()
    assert memory.largest == of_a_chunk
    # Law, logits, slope; a slope in the logits' precision. An own head has a gradient for every guess, and a new one.
    assert memory.peak < 4 * of_a_chunk + 4 * of_own + 20 * n * D * 4


@pytest.mark.parametrize("method", METHODS)
def test_no_method_holds_the_logits_of_all_positions(method: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    target = Target(LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape)).eval().requires_grad_(False))
    values = settings(tmp_path, tmp_path / "run", **METHODS[method], loss_chunk_size=8)
    objective = objective_for(target, DrafterConfig(**values))
    batch = collate([TrainingExamples(some_examples([200, 200]))[i] for i in range(2)])
    features = objective.reading(batch["input_ids"], batch["lengths"])
    with LiveMemory() as memory:
        sums = objective.loss(*objective.arguments(batch, features, 0))
        objective.total(sums, 0.0).backward()
    all_logits = 4 * int(sums.positions) * V
    assert memory.largest < all_logits / 4 and memory.peak < all_logits


def test_a_single_guess_without_gradients_is_measured_alike() -> None:
    p, goal, weight = torch.randn(9, D), torch.randn(9, D), torch.randn(V, D)
    total, agreed = soft_cross_entropy(p, goal, lambda x: x @ weight.T, 4)
    again, likewise = soft_cross_entropy(p.clone().requires_grad_(), goal, lambda x: x @ weight.T, 4)
    assert not total.requires_grad and total == again and agreed == likewise


def test_batches_come_in_groups_with_their_own_padding(target: Target, tmp_path: Path) -> None:
    config = DrafterConfig(**settings(tmp_path, tmp_path / "run"))
    args = training_arguments(config, target.device, 1)
    data = TrainingExamples(some_examples([100, 3, 100, 4]))
    batch = ObjectiveTrainer(objective_for(target, config), config, data, args)._in_groups([data[i] for i in range(4)])
    assert [tuple(group["input_ids"].shape) for group in batch[GROUPS]] == [(2, 100), (2, 4)]
    assert [group["index"].tolist() for group in batch[GROUPS]] == [[0, 2], [3, 1]]
