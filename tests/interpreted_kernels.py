"""Triton's kernels compute what `tree_attention.py` says: run by `test_tree_kernels.py`, under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.target.backends import tree_attention
from outdraft.target.backends.tree_attention import Pending, rotated_and_stored

NOWHERE = float("nan")
"""Lies in all slots that nobody may read."""


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The module of kernels, where the interpreter works with the other packages that are installed."""
    from outdraft.target.backends import tree_kernels

    try:
        _probe(tree_kernels.triton)
    except Exception as error:  # of another package's inside, whatever it is
        pytest.skip(f"Triton's interpreter does not work here ({error!r})")
    return tree_kernels


def _probe(triton: Any) -> None:
    import triton.language as tl

    globals()["tl"] = tl

    @triton.jit
    def add(x, out, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        for base in range(0, n, BLOCK):
            tl.store(out + base + at, tl.load(x + base + at) + tl.max(tl.load(x + base + at), 0))

    x, out = torch.ones(32), torch.zeros(32)
    add[(1,)](x, out, 32, BLOCK=16)
    assert out.tolist() == [2.0] * 32


def held(rows: int, kv_heads: int, capacity: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows of a layer, as parts of a buffer that is larger in every direction."""
    buffer = torch.randn(3, 2, rows + 2, kv_heads, capacity, width + 8).to(dtype)
    return buffer[1, 0, :rows, ..., :width], buffer[1, 1, :rows, ..., :width]


CASES: dict[str, tuple[int, int, int, int, int, int, int, int | None]] = {
    "one token": (2, 4, 2, 1, 1, 16, 300, None),
    "the last of some, padded width": (2, 6, 2, 5, 9, 96, 300, None),
    "a window": (1, 8, 2, 20, 20, 32, 300, 50),
    "an empty row": (3, 4, 4, 3, 3, 16, 300, 7),
    "shares of the keys": (2, 4, 1, 40, 40, 16, 1100, None),
    "shares and a window": (1, 2, 2, 4, 4, 16, 1100, 9),
    "wide heads": (1, 2, 1, 3, 3, 256, 200, None),
}
"""Rows, heads, those of keys, tokens, pending tokens, width, capacity, window."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_plain_operations(kernels: Any, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, tokens, pending, width, capacity, window = CASES[case]
    query = torch.randn(rows, tokens, heads, width).to(dtype).transpose(1, 2)
    keys, values = held(rows, kv_heads, capacity, width, dtype)
    lengths = torch.tensor([capacity - pending - 21 * row for row in range(rows)], dtype=torch.int32)
    if case == "an empty row":
        lengths[2] = 0
    seen = (torch.rand(rows, tokens + 1, pending + 1) < 0.4)[:, 1:, 1:]
    seen[:, range(tokens), range(pending - tokens, pending)] = True
    positions = lengths[:, None].long() + torch.randint(0, 3, (rows, pending))
    scale = width**-0.5
    expected = tree_attention.tree_attention(
        query.double(), keys.double(), values.double(), lengths, seen, positions, scale, window
    )
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + pending :] = values[row, :, length + pending :] = NOWHERE
    found = kernels.attend(query, keys, values, lengths, seen, positions, scale, window)
    assert found.shape == (rows, tokens, heads * width) and found.dtype == dtype
    exact = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found.double(), expected, atol=exact, rtol=exact)


def test_the_attention_that_is_compared_with_is_that_of_a_mask(kernels: Any) -> None:
    """The sight of every token written out, for the one case that has everything."""
    torch.manual_seed(1)
    keys, values = held(1, 1, 12, 8, torch.float64)
    query, lengths = torch.randn(1, 1, 2, 8, dtype=torch.float64), torch.tensor([5], dtype=torch.int32)
    seen, positions = torch.tensor([[[True, True, False], [True, False, True]]]), torch.tensor([[5, 6, 6]])
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [4, 5, 6]] = mask[1, [4, 5, 7]] = True
    expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.3)
    found = tree_attention.tree_attention(query, keys, values, lengths, seen, positions, 0.3, 3)
    torch.testing.assert_close(found, expected[:, 0])


class _Held:
    """In place of a cache."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.both = keys, values

    def whole(self, *given: object) -> tuple[Tensor, Tensor]:
        return self.both


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "shared"), [(4, 2, 16, False), (3, 3, 96, True)])
def test_queries_and_keys_are_turned_and_stored(
    kernels: Any, heads: int, kv_heads: int, width: int, shared: bool, dtype: torch.dtype
) -> None:
    """Angles of every row or the same ones for all; the last three of five pending tokens."""
    torch.manual_seed(0)
    rows, tokens, pending = 2, 3, 5
    mixed = torch.randn(rows, tokens, heads + 2 * kv_heads, width).to(dtype)
    cos, sin = torch.rand(2, 1 if shared else rows, tokens, width).to(dtype)
    lengths = torch.tensor([4, 0], dtype=torch.int32)
    keys, values = held(rows, kv_heads, 12, width, dtype)
    before = keys.clone()
    ours, theirs = keys.clone(), values.clone()
    own = Pending(
        lengths, torch.ones(rows, tokens, pending) > 0, torch.zeros(rows, pending), (None,), _Held(ours, theirs)
    )
    expected = rotated_and_stored(mixed, (cos, sin), ours, theirs, own)
    found = kernels.rotate_and_store(mixed, cos, sin, keys, values, lengths, pending)
    exact = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
    for one, other in ((found, expected), (keys, ours), (values, theirs)):
        torch.testing.assert_close(one, other, **exact)
    changed = (keys != before).any(1).any(-1)
    assert changed.nonzero().tolist() == [[0, 6], [0, 7], [0, 8], [1, 2], [1, 3], [1, 4]], "and nothing else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_and_norms_are_those_of_plain_operations(kernels: Any, dtype: torch.dtype) -> None:
    """Widths beyond one block and short of a power of two."""
    torch.manual_seed(0)
    exact = 1e-6 if dtype == torch.float32 else 3e-3
    both = 3 * torch.randn(3, 5, 2 * 1100).to(dtype)
    let, rest = both.double().chunk(2, -1)
    torch.testing.assert_close(kernels.gate(both).double(), F.silu(let) * rest, atol=exact, rtol=exact)
    x, weight = torch.randn(5, 7, 96).to(dtype), torch.rand(96).to(dtype)
    expected = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5).double(), expected, atol=exact, rtol=exact)
