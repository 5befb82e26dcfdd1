"""What the tests change of Triton's interpreter: the same results, and no integer overflows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
from lwkd.kernels import common
from triton import language as tl

pytestmark = pytest.mark.skipif(not common.INTERPRET, reason="kernels are compiled here")


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def square_kernel(x_pointer, out_pointer, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_pointer + at)
    tl.store(out_pointer + at, x * x - doubled(tl.sum(x, 0)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float16])
def test_kernels_call_kernels(dtype: torch.dtype) -> None:
    """Twice: the second launch finds the language as the first one left it."""
    x = torch.arange(8).to(dtype)
    for _ in range(2):
        out = torch.zeros_like(x)
        square_kernel[(1,)](x, out, SIZE=8)
        assert torch.equal(out, x * x - 2 * x.sum())


@pytest.mark.parametrize("value", [46341, -46341])
def test_integers_do_not_overflow(value: int) -> None:
    x = torch.full((8,), value, dtype=torch.int32)
    with pytest.raises(Exception, match="mul: int32 holds"):
        square_kernel[(1,)](x, torch.zeros_like(x), SIZE=8)
    wide = x.long()
    square_kernel[(1,)](wide, wide, SIZE=8)
    assert int(wide[0]) == value * value - 16 * value
