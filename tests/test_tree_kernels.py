"""Triton's kernels compute what `tree_attention.py` says, under Triton's interpreter, which needs no GPU.

Whether a kernel is interpreted is settled when it is made, so all of this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.backends import tree_attention
from outdraft.backends.tree_attention import Pending, has_triton, rotated_and_stored

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")

NOWHERE = float("nan")
"""Lies in all slots that nobody may read."""


@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_kernels_do_under_the_interpreter_what_they_are_to_do() -> None:
    if not has_triton():
        pytest.skip("triton is not installed")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    if " passed" not in done.stdout:
        pytest.skip("\n".join(line for line in done.stdout.splitlines() if line.startswith("SKIPPED")))


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The module of kernels, where the interpreter works with the other packages that are installed."""
    from outdraft.backends import tree_kernels

    try:
        assert tree_kernels.triton.runtime.interpreter is not None
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


CASES = {
    "one token": dict(rows=2, heads=4, kv_heads=2, tokens=1, pending=1, width=16, capacity=300),
    "the last of some, padded width": dict(rows=2, heads=6, kv_heads=2, tokens=5, pending=9, width=96, capacity=300),
    "a window": dict(rows=1, heads=8, kv_heads=2, tokens=20, pending=20, width=32, capacity=300, window=50),
    "an empty row": dict(rows=3, heads=4, kv_heads=4, tokens=3, pending=3, width=16, capacity=300, window=7),
    "shares of the keys": dict(rows=2, heads=4, kv_heads=1, tokens=40, pending=40, width=16, capacity=1100),
    "shares and a window": dict(rows=1, heads=2, kv_heads=2, tokens=4, pending=4, width=16, capacity=1100, window=9),
    "wide heads": dict(rows=1, heads=2, kv_heads=1, tokens=3, pending=3, width=256, capacity=200),
}


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_plain_operations(kernels: Any, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window": None, **CASES[case]}
    rows, tokens, pending, width, capacity = (
        sizes[name] for name in ("rows", "tokens", "pending", "width", "capacity")
    )
    query = torch.randn(rows, tokens, sizes["heads"], width).to(dtype).transpose(1, 2)
    keys, values = held(rows, sizes["kv_heads"], capacity, width, dtype)
    lengths = torch.tensor([capacity - pending - 21 * row for row in range(rows)], dtype=torch.int32)
    if case == "an empty row":
        lengths[2] = 0
    seen = (torch.rand(rows, tokens + 1, pending + 1) < 0.4)[:, 1:, 1:]
    seen[:, range(tokens), range(pending - tokens, pending)] = True
    positions = lengths[:, None].long() + torch.randint(0, 3, (rows, pending))
    scale, window = width**-0.5, sizes["window"]
    expected = tree_attention.tree_attention(
        query.double(), keys.double(), values.double(), lengths, seen, positions, scale, window
    )
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + pending :] = values[row, :, length + pending :] = NOWHERE
    found = kernels.attend(query, keys, values, lengths, seen, positions, scale, window)
    assert found.shape == (rows, tokens, sizes["heads"] * width) and found.dtype == dtype
    exact = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found.double(), expected, atol=exact, rtol=exact)


@inside
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


@inside
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


@inside
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
