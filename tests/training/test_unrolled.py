"""The attention of unrolled draft steps: in bands, as on a CPU, and with one mask, as elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from outdraft.methods.fspad.unrolled import banded, masked

Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


def result(attention: Attention, heads: int, kv_heads: int, length: int, steps: int) -> list[Tensor]:
    """The last step's attention from the first position that counts on, and the gradients of all that it reads."""
    torch.manual_seed(3)
    q = torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True)
    keys, values = (
        [torch.randn(2, kv_heads, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(steps + 1)]
        for _ in range(2)
    )
    out = attention(q, keys, values)[:, :, steps:]
    out.backward(torch.randn(out.shape, dtype=torch.float64))
    return [out.detach(), *(tensor.grad for tensor in (q, *keys, *values) if tensor.grad is not None)]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 9), (6, 2, 33), (9, 3, 130)])
def test_bands_are_the_masked_attention(heads: int, kv_heads: int, length: int, steps: int) -> None:
    found = result(banded, heads, kv_heads, length, steps)
    wanted = result(masked, heads, kv_heads, length, steps)
    assert len(found) == len(wanted) == 2 * steps + 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_sequence_shorter_than_the_steps_has_nothing_to_attend_to() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    assert not banded(q, [k] * 4, [k] * 4).any()
