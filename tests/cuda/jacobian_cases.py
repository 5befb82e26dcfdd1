"""Inputs for the CUDA kernels of Jacobian rows, and one call checked against float64, anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.ops.battery import close
from tests.ops.test_jacobian import judge

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, B16)
WAYS = {"difference": 0, "normalized": 1, "norms": 2}
ways = pytest.mark.parametrize("way", WAYS)

Pairs = list[tuple[Tensor, Tensor]]

# Around a pack, the 32 lanes of a warp, its rows, and the pieces of a block; odd rows begin at
# another place of a pack each.
LENGTHS = (1, 7, 8, 9, 33, 255, 256, 257, 1023, 1024, 1025, 4096, 8192, 16383, 16384, 20001, 40001)


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0, device: str = "cpu") -> Tensor:
    return cases.draw(shape, dtype, seed).to(device)


def pair(
    *shape: int, dtype: torch.dtype = F32, other: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Two rows of one shape."""
    other = other or dtype
    return (draw(*shape, dtype=dtype, seed=1, device=device),
            draw(*shape, dtype=other, seed=2, device=device))  # fmt: skip


def alignments(dtype: torch.dtype, other: torch.dtype, device: str = "cpu") -> Pairs:
    """Packs begin at the same element of both rows, after one that stands alone, or never."""
    pairs = []
    for skip_s, skip_t in itertools.product((0, 1, 3), (0, 1, 2, 4)):
        s, t = (draw(k + 2 * 70, dtype=d, seed=k, device=device)[k:].view(2, 70)
                for k, d in ((skip_s, dtype), (skip_t, other)))  # fmt: skip
        pairs.append((s, t))
    return pairs


def deep(seed: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    """Rows of more dimensions than a kernel walks, none of which merges with another."""
    wide = draw(2, 4, 6, 4, 6, 4, 6, dtype=dtype, seed=seed, device=device)
    return wide[:, ::2, ::2, ::2, ::2, ::2, ::2].movedim(1, 4)


def gradients(
    ops: Any, pairs: Pairs, sums: Tensor, grad: Tensor, way: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows, student's and then teacher's, and the gradients of all of them."""
    student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
    count, others = len(pairs), [] if way == "norms" else [*teacher, *student]
    xs, layers, sides = [*student, *teacher], [*range(count)] * 2, [0] * count + [1] * count
    return xs, ops.jacobian_rows_backward(grad, xs, others, sums, layers, sides, WAYS[way])


def check(ops: Any, pairs: Pairs, way: str, grad: Tensor | None = None) -> None:
    """Distances, their means and the gradients of every row, within tolerances.rows."""
    student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
    length, n = len(pairs), len(student[0])
    each, sums = ops.jacobian_rows(student, teacher, WAYS[way], False)
    means, again = ops.jacobian_rows(student, teacher, WAYS[way], True)
    assert torch.equal(sums, again)
    if grad is None:
        grad = torch.linspace(0.5, 2.5, length * n).view(length, n).to(each.dtype)
    full = grad if grad.dim() == 2 else (grad.double() / n)[:, None].expand(length, n)
    want = judge(student, teacher, full, way)
    grad = grad.to(each.device)
    close(each, want.value, want.value_bound, way)
    # A mean adds as many roundings as it has terms, and one to its own dtype.
    unit = 2 * n * 2.0**-53 + (2.0**-24 if means.dtype == F32 else 0)
    mean = want.value.mean(1)
    close(means, mean, want.value_bound.mean(1) + unit * mean, (way, "mean"))
    xs, got = gradients(ops, pairs, sums, grad, way)
    exact, bounds = ([*x[0], *x[1]] for x in (want.gradients, want.gradient_bounds))
    for i, (x, g, e, b) in enumerate(zip(xs, got, exact, bounds, strict=True)):
        assert g.dtype == x.dtype
        close(g, e, b, (way, i, x.dtype, tuple(x.shape), x.stride()))


def strided_gradients(length: int, n: int) -> Sequence[Tensor]:
    """[L, N] and [L], as autograd hands them on."""
    wide = draw(2 * length, 3 * n, seed=7)
    return (
        wide[::2, ::3], wide[:n, :length].t(), wide[:1, :n].expand(length, n),
        wide[:length, :1].expand(length, n), torch.tensor(0.7).expand(length, n),
        wide[:length, :n].double(), wide[:length, 1], torch.tensor(2.0).expand(length),
        wide.double()[:length, 1],
    )  # fmt: skip
