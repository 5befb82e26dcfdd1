"""The CUDA kernels of Jacobian rows on a GPU: what tests/ops/test_jacobian.py does not ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lwkd.ops  # noqa: F401  (registers the ops)
from lwkd.ops import backends
from tests import cases
from tests.cuda.test_jacobian import DTYPES, LAYOUTS, WAYS, check, ways

pytestmark = pytest.mark.gpu
OPS = torch.ops.lwkd


class OnGpu:
    """The ops on copies of CPU tensors that keep strides and alignment; results come back."""

    @staticmethod
    def _there(x: Tensor) -> Tensor:
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    def jacobian_rows(self, student, teacher, how, mean):
        sides = ([self._there(x) for x in side] for side in (student, teacher))
        return tuple(x.cpu() for x in OPS.jacobian_rows(*sides, how, mean))

    def jacobian_rows_backward(self, grad, xs, others, sums, layers, sides, how):
        xs, others = ([self._there(x) for x in side] for side in (xs, others))
        out = OPS.jacobian_rows_backward(
            self._there(grad), xs, others, sums.cuda(), layers, sides, how
        )
        return [x.cpu() for x in out]


@pytest.fixture(autouse=True)
def _compiled_kernels_answer():
    assert backends.CUDA.live, backends.CUDA.reason
    yield
    torch.cuda.synchronize()  # an error of this test is not blamed on the next


@ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout: str, way: str) -> None:
    place = LAYOUTS[layout]
    for dtype in DTYPES:
        s, t = (cases.draw((3, 4, 6, 8), dtype, k) for k in (1, 2))
        check(OnGpu(), [(place(s), t), (s, place(t)), (place(s), place(t))], way)


@ways
@pytest.mark.parametrize("length", [1, 8, 1024, 1025, 16392, 150528])
def test_sizes(length: int, way: str) -> None:
    for dtype in DTYPES:
        pair = tuple(cases.draw((5, length), dtype, k) for k in (1, 2))
        check(OnGpu(), [pair], way)


@ways
def test_many_layers(way: str) -> None:
    """More than one launch of a table."""
    pairs = [tuple(cases.draw((2, 3 + i), torch.float32, 7 * i + k) for k in (1, 2))
             for i in range(150)]  # fmt: skip
    check(OnGpu(), pairs, way)


def test_beyond_the_32_bit_range() -> None:
    """Fault 4."""
    x = torch.ones(2, 2**30 + 16, dtype=torch.bfloat16, device="cuda")
    y = x.clone()
    y[1, -1] = 3
    d, _ = OPS.jacobian_rows([x], [y], WAYS["difference"], False)
    assert d.tolist() == [[0.0, 4.0]]


def test_repeats_bitwise() -> None:
    """Fault 13."""
    s, t = (cases.draw((7, 40001), torch.float32, k).cuda() for k in (1, 2))
    first: list[Tensor] = []
    for _ in range(200):
        d, sums = OPS.jacobian_rows([s], [t], 1, True)
        now = [d, sums, *OPS.jacobian_rows_backward(d, [s], [t], sums, [0], [0], 1)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


def test_a_graph_captures_both_passes() -> None:
    s, t = (cases.draw((4, 3000), torch.float32, k).cuda() for k in (1, 2))

    def step() -> list[Tensor]:
        d, sums = OPS.jacobian_rows([s], [t], 1, True)
        return [d, *OPS.jacobian_rows_backward(d, [s], [t], sums, [0], [0], 1)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    s.mul_(2).add_(1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
