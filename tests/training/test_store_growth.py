"""A store that grows: killed at any time, with more data, and with data whose responses end elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.target.target import Target
from outdraft.training.feature_store import FeatureStore, said_range

from .test_feature_store import store_of
from .tiny import tiny_target


def counted_forwards(target: Target, fail_at: int | None = None) -> list[int]:
    """Rows of every forward of `features` from now on."""
    forward, rows = target.features, []

    def counting(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if len(rows) == fail_at:
            raise KeyboardInterrupt
        rows.append(len(ids))
        return forward(ids, mask)

    target.features = counting  # type: ignore[method-assign,assignment]
    return rows


def assert_equal(one: FeatureStore, other: FeatureStore, examples: ExampleSet) -> None:
    """Up to the rounding of forwards of other batches."""
    for example in examples.examples:
        (rows, said), (others, likewise) = one[example], other[example]
        torch.testing.assert_close(rows, others, atol=1e-5, rtol=1e-4)
        assert torch.equal(said.ids, likewise.ids)
        torch.testing.assert_close(said.probs, likewise.probs, atol=1e-6, rtol=2e-3)


def assert_targets_own(store: FeatureStore, target: Target, example: Example) -> None:
    """Against one forward of the stock model over this example alone."""
    ids = example.input_ids.long()[None]
    with torch.no_grad():
        law = target.model(ids, use_cache=False).logits[0, :-1].softmax(-1)[example.loss_mask[1:]]
    rows, said = store[example]
    torch.testing.assert_close(rows, target.features(ids)[0].detach(), atol=1e-5, rtol=1e-4)
    assert torch.equal(said.ids, law.topk(store.top_k).indices)
    torch.testing.assert_close(said.probs, law.gather(1, said.ids), atol=1e-7, rtol=1e-3)  # kept as float16


def test_a_killed_build_goes_on_where_it_stopped(
    target: Target, examples: ExampleSet, tmp_path: Path, small_batches: None
) -> None:
    rows = counted_forwards(target, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path, target).build(examples)
    done = sum(rows)
    whole = tiny_target()
    again = store_of(tmp_path, whole)
    assert 0 < done < 26 and len(again.missing(examples)) == 26 - done
    rows = counted_forwards(whole)
    told: list[tuple[int, int]] = []
    missing = again.missing(examples)
    again.build(examples, lambda count, tokens: told.append((count, tokens)))
    assert sum(rows) == 26 - done
    assert [sum(part) for part in zip(*told, strict=True)] == [26 - done, sum(map(len, missing))]
    undisturbed = store_of(tmp_path / "other", tiny_target())
    undisturbed.build(examples)
    assert_equal(again, undisturbed, examples)


def test_half_written_lines_and_rows_are_cut_off(
    target: Target, examples: ExampleSet, tmp_path: Path, small_batches: None
) -> None:
    counted_forwards(target, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path, target).build(examples)
    folder = store_of(tmp_path, tiny_target()).folder
    lines = (folder / "index.jsonl").read_text().splitlines(keepends=True)
    (folder / "index.jsonl").write_text("".join(lines[:-1]) + lines[-1][:-9])
    for name in ("features.bin", "teacher_ids.bin", "teacher_probs.bin"):
        with open(folder / name, "ab") as file:
            file.write(b"\xff" * 21)  # of the example that was being written
    again = store_of(tmp_path, tiny_target())
    assert len(again.missing(examples)) == 26 - len(lines) + 1
    again.build(examples)
    reopened = store_of(tmp_path, tiny_target())
    assert reopened.missing(examples) == []
    undisturbed = store_of(tmp_path / "other", tiny_target())
    undisturbed.build(examples)
    assert_equal(reopened, undisturbed, examples)
    for file in undisturbed.folder.glob("*.bin"):
        assert (folder / file.name).stat().st_size == file.stat().st_size


def test_more_data_costs_only_what_is_new(examples: ExampleSet, tmp_path: Path) -> None:
    half = ExampleSet(examples.examples[:13])
    store_of(tmp_path, tiny_target()).build(half)
    target = tiny_target()
    store, rows = store_of(tmp_path, target), counted_forwards(target)
    grown = ExampleSet([*examples.examples[10:], *examples.examples[:3], examples[20]])
    assert len(store.missing(grown)) == 13
    store.build(grown)
    store.build(grown)
    assert sum(rows) == 13
    for example in grown.examples:
        assert_targets_own(store, tiny_target(), example)


def test_what_one_process_writes_another_reads_after_reload(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    waiting = store_of(tmp_path, target)
    store_of(tmp_path, tiny_target()).build(examples)
    assert len(waiting.missing(examples)) == 26
    waiting.reload()
    assert waiting.missing(examples) == []
    assert_targets_own(waiting, target, examples[7])


def shortened(example: Example) -> Example:
    """Without loss on its last response token."""
    mask = example.loss_mask.clone()
    mask[int(mask.nonzero()[-1])] = False
    return Example(example.input_ids, mask)


def test_an_example_is_found_where_its_last_token_carries_no_loss_any_more(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    store = store_of(tmp_path, target)
    store.build(examples)
    fewer = ExampleSet([shortened(example) for example in examples.examples])
    assert store.missing(fewer) == []
    (rows, said), (_, before) = store[fewer[2]], store[examples[2]]
    assert len(rows) == len(examples[2]) and torch.equal(said.ids, before.ids[:-1])
    assert_targets_own(store, target, fewer[2])


def test_gaps_between_responses_are_left_out(target: Target, examples: ExampleSet, tmp_path: Path) -> None:
    mask = examples[0].loss_mask.clone()
    mask[said_range(examples[0]).start + 3] = False
    gapped = ExampleSet([Example(examples[0].input_ids, mask)])
    store = store_of(tmp_path, target)
    store.build(gapped)
    assert_targets_own(store, target, gapped[0])


def test_an_example_whose_loss_reaches_further_than_before_is_read_again(examples: ExampleSet, tmp_path: Path) -> None:
    """And stays whole, wherever the next run is killed."""
    target = tiny_target()
    for first in (shortened(examples[0]), examples[1]):
        store_of(tmp_path, target).build(ExampleSet([first]))
    store = store_of(tmp_path, target)
    assert store.missing(ExampleSet(examples.examples[:2])) == [examples[0]]
    store.build(ExampleSet(examples.examples[:2]))
    killed = tiny_target()
    counted_forwards(killed, fail_at=0)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path, killed).build(ExampleSet(examples.examples[:3]))
    last = store_of(tmp_path, tiny_target())
    last.build(ExampleSet(examples.examples[:3]))
    for example in examples.examples[:3]:
        assert_targets_own(last, target, example)


def test_equal_tokens_with_other_ends_are_read_once_for_both(
    target: Target, examples: ExampleSet, tmp_path: Path
) -> None:
    both = ExampleSet([examples[0], shortened(examples[0]), examples[1]])
    store = store_of(tmp_path, target)
    assert len(store.missing(both)) == 2
    store.build(both)
    for example in both.examples:
        assert_targets_own(store, target, example)


def test_rows_that_the_files_have_lost_are_read_again(examples: ExampleSet, tmp_path: Path) -> None:
    target = tiny_target()
    store = store_of(tmp_path, target)
    store.build(examples)
    file = store.folder / "features.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # a copy that was cut off
    again = store_of(tmp_path, tiny_target())
    lost = again.missing(examples)
    assert 0 < len(lost) < len(examples)
    again.build(examples)
    assert_equal(again, store_of(tmp_path, target), examples)
    for example in examples.examples:
        assert_targets_own(again, target, example)


def test_a_damaged_line_of_the_index_hides_what_follows_and_is_no_error(examples: ExampleSet, tmp_path: Path) -> None:
    store = store_of(tmp_path, tiny_target())
    store.build(examples)
    index = store.folder / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:3], "not json\n", *lines[4:]]))
    assert len(store_of(tmp_path, tiny_target()).missing(examples)) == len(examples) - 3


def test_two_that_build_one_store_wait_for_each_other(examples: ExampleSet, tmp_path: Path) -> None:
    first, second = store_of(tmp_path, tiny_target()), store_of(tmp_path, tiny_target())
    half = ExampleSet(examples.examples[:13])
    first.build(half)
    rows = counted_forwards(second.reading.target)  # it was opened before the first one wrote
    second.build(examples)
    assert sum(rows) == len(examples) - 13
    for example in examples.examples:
        assert_targets_own(second, tiny_target(), example)
