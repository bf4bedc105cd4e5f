"""Memory in huge pages: what lies in it is what was put there, aligned, side by side, as long as it is used."""

from __future__ import annotations

import mmap
import weakref

import pytest
import torch

from outdraft.target import huge_pages
from outdraft.target.huge_pages import CHUNK, LINE, Arena, pages, zeros


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float16, torch.bfloat16])
def test_a_settled_tensor_is_a_contiguous_copy(dtype: torch.dtype) -> None:
    arena = Arena()
    given = [torch.randint(0, 100, (7, count)).to(dtype) for count in (1, 3, 64, 1000)]
    settled = [arena.settled(one.t()) for one in given]
    for before, after in zip(given, settled, strict=True):
        assert torch.equal(after, before.t()) and after.is_contiguous() and after.dtype == dtype
        assert after.data_ptr() % LINE == 0 and after.data_ptr() != before.data_ptr()
    kept = [one.clone() for one in settled]
    settled[1].zero_()
    assert all(torch.equal(settled[i], kept[i]) for i in (0, 2, 3)), "no two overlap"


def test_many_share_a_piece_and_large_ones_have_their_own() -> None:
    arena = Arena()
    small = [arena.settled(torch.ones(1000)) for _ in range(3)]
    assert len({one.untyped_storage().data_ptr() for one in small}) == 1
    large = arena.settled(torch.ones(CHUNK // 4 + 1))
    assert large.sum() == CHUNK // 4 + 1
    assert large.untyped_storage().data_ptr() != small[0].untyped_storage().data_ptr()


def test_a_piece_is_freed_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []

    def counted(size: int) -> torch.Tensor:
        buffer = Buffer(size)
        made.append(weakref.ref(buffer))
        return torch.frombuffer(buffer, dtype=torch.uint8)

    class Buffer(mmap.mmap):
        def __new__(cls, size: int) -> Buffer:
            return super().__new__(cls, -1, size)

    monkeypatch.setattr(huge_pages, "pages", counted)
    arena = Arena()
    one, other = arena.settled(torch.ones(10)), arena.settled(torch.ones(10))
    del arena, one
    assert made[0]() is not None and other.sum() == 10
    del other
    assert made[0]() is None


@pytest.mark.parametrize("able", [True, False])
def test_pages_are_zero_and_may_be_written(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not able:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert pages(0).numel() == 0
    found = zeros((3, 5, 70_000), torch.bfloat16)
    assert found.shape == (3, 5, 70_000) and not found.any()
    found[2, 4] = 1
    assert found.sum(dtype=torch.float32) == 70_000
