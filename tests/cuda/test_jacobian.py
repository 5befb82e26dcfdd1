"""The CUDA kernels of Jacobian rows, executed on the host against float64 definitions.

As tests/cuda/test_attention.py: the kernels' own sources, compiled for the host.
"""

from __future__ import annotations

import itertools
import mmap
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cuda.compiler import compiles_and_links
from tests.cuda.emulation import compile_driver
from tests.cuda.emulation.rows import EmulatedRows
from tests.cuda.jacobian_cases import (
    B16,
    DTYPES,
    F16,
    F32,
    F64,
    LENGTHS,
    WAYS,
    alignments,
    check,
    deep,
    draw,
    gradients,
    pair,
    strided_gradients,
    ways,
)
from tests.ops import test_jacobian as battery
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fused = "fma" in Path("/proc/cpuinfo").read_text().split()
    flags = ["-march=x86-64-v3", "-ffp-contract=fast"] if fused else []
    out = tmp_path_factory.mktemp("emulation") / "rows.so"
    return compile_driver(out, "-O2", "-shared", "-fPIC", *flags, driver="jacobian.cpp")


@pytest.fixture(scope="module")
def gpu(library: Path) -> EmulatedRows:
    return EmulatedRows(library, seed=1)


# --- dtypes, layouts, sizes -----------------------------------------------------------------------


@ways
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_layout_and_dtype(gpu: EmulatedRows, dtype: str, layout: str, way: str) -> None:
    """Faults 2 and 6: what surrounds a row, or lies between its elements, is NaN."""
    check(gpu, list(zip(*battery.draw(dtype, layout, "cpu"), strict=True)), way)


@ways
@pytest.mark.parametrize("length", LENGTHS)
def test_sizes_around_packs_teams_and_pieces(gpu: EmulatedRows, length: int, way: str) -> None:
    """Fault 11: what lies before the first pack, behind the last, and between pieces."""
    check(gpu, [pair(3, length, dtype=d) for d in DTYPES], way)


@ways
def test_mixed_dtypes(gpu: EmulatedRows, way: str) -> None:
    """Packs of one type beside one, two or four of the other; more layers than a table holds."""
    for length in (40, 41, 3000):
        both = itertools.product(DTYPES, DTYPES)
        check(gpu, [pair(3, length, dtype=a, other=b) for a, b in both], way)


@ways
def test_alignments(gpu: EmulatedRows, way: str) -> None:
    """Fault 6: packs begin where those of both rows, and of the gradient, do; or nowhere."""
    for dtype, other in ((F32, F32), (B16, B16), (B16, F32), (F64, F64)):
        check(gpu, alignments(dtype, other), way)


@ways
def test_more_dimensions_than_a_kernel_walks(gpu: EmulatedRows, way: str) -> None:
    check(gpu, [(deep(1), deep(2)), (deep(3), deep(4, B16).contiguous()), pair(2, 5)], way)


@ways
def test_more_rows_than_warps(gpu: EmulatedRows, way: str) -> None:
    check(gpu, [pair(300, 5), pair(300, 2, 3, dtype=B16)], way)


def test_a_warp_a_row_where_there_are_many(gpu: EmulatedRows) -> None:
    check(gpu, [pair(4099, 1027, dtype=B16)], "normalized")


@ways
def test_few_long_rows(gpu: EmulatedRows, way: str) -> None:
    """More pieces than the threads that add them up."""
    check(gpu, [pair(1, 300_001, dtype=B16)], way)


def test_norms_of_rows_of_other_lengths(gpu: EmulatedRows) -> None:
    check(gpu, [(draw(3, 20000, seed=1), draw(3, 4, 5, dtype=B16, seed=2)), pair(3, 9)], "norms")


@ways
def test_empty(gpu: EmulatedRows, way: str) -> None:
    """Fault 9: no rows, or rows of nothing beside others: 0."""
    for shapes in (((0, 5),), ((3, 0), (3, 4), (3, 4, 0))):
        pairs = [pair(*shape) for shape in shapes]
        student, teacher = map(list, zip(*pairs, strict=True))
        means, _ = gpu.jacobian_rows(student, teacher, WAYS[way], True)
        each, sums = gpu.jacobian_rows(student, teacher, WAYS[way], False)
        assert means[0] == 0
        assert each[0].eq(0).all()
        for x, g in zip(*gradients(gpu, pairs, sums, torch.ones(len(pairs)), way), strict=True):
            assert g.shape == x.shape
            assert g.isfinite().all()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ways
def test_equal_rows(gpu: EmulatedRows, layout: str, dtype: torch.dtype, way: str) -> None:
    """Distance and gradient are exactly 0, below eps too, whatever is fused or rounded."""
    for scale, shape in itertools.product((1.0, 1e-14), ((3, 4, 2, 3), (2, 3, 41, 7))):
        s = cases.LAYOUTS[layout]((draw(*shape, dtype=F64, seed=3) * scale).to(dtype))
        # Of norms, that are summed each for itself, rows of one layout; aligned or not.
        t = s if way == "norms" and layout != "offset" else s.clone()
        d, sums = gpu.jacobian_rows([s], [t], WAYS[way], False)
        assert d.eq(0).all()
        for grad in (torch.tensor([0.1]), torch.full((1, len(s)), 0.7, dtype=F64)):
            _, got = gradients(gpu, [(s, t)], sums, grad, way)
            assert all(g.eq(0).all() for g in got), (scale, shape)


def test_exact_lane(gpu: EmulatedRows) -> None:
    """Fault 12: integers give the sums, and the gradients, of integers."""
    for dtype, shape in itertools.product(DTYPES, ((3, 600), (2, 9001), (3, 5, 7))):
        s, t = (cases.draw(shape, dtype, k, "integer") for k in (1, 2))
        whole, other = s.double().flatten(1), t.double().flatten(1)
        d, sums = gpu.jacobian_rows([s], [t], WAYS["difference"], False)
        assert torch.equal(d[0].double(), (whole - other).square().sum(1))
        grad = torch.tensor([[1.0, 2.0, 4.0][: len(s)]])
        for x, y, side in ((s, t, 0), (t, s, 1)):
            (g,) = gpu.jacobian_rows_backward(grad, [x], [y], sums, [0], [side], 0)
            scale = 2 * grad.double().view(-1, *[1] * (x.dim() - 1))
            assert torch.equal(g.double(), scale * (x.double() - y.double()))
        _, sums = gpu.jacobian_rows([s], [t], WAYS["normalized"], False)
        want = [(whole * whole).sum(1), (other * other).sum(1), (whole * other).sum(1)]
        assert torch.equal(sums[0], torch.stack(want, 1))


def test_nearly_equal_rows_keep_their_digits(gpu: EmulatedRows) -> None:
    """The contract: differences down to 1e-6 of a row, whatever its scale."""
    for (apart, allowed), scale in itertools.product(battery.APART.items(), battery.SCALES):
        s = draw(3, 2000, dtype=F64, seed=1)
        t = (scale * (s + apart * draw(3, 2000, dtype=F64, seed=2))).float()
        s = s.float()
        d, sums = gpu.jacobian_rows([s], [t], WAYS["normalized"], False)
        wide = [x.double().requires_grad_() for x in (s, t)]
        want = battery.distances([wide[0]], [wide[1]], "normalized")
        assert ((d.double() - want).abs() <= allowed * want).all(), (apart, scale)
        exact = torch.autograd.grad(want.sum(), wide)
        _, got = gradients(gpu, [(s, t)], sums, torch.ones(1, 3), "normalized")
        for g, e in zip(got, exact, strict=True):
            assert (g.double() - e).norm() <= allowed * e.norm(), (apart, scale)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_rows_without_a_norm(gpu: EmulatedRows, dtype: torch.dtype) -> None:
    """Both zero: 0. One zero: 1. Their gradient is 0 whatever the other row holds."""
    s, t = pair(5, 100, dtype=dtype)
    s[0], t[0], s[1], t[2], s[4] = 0, 0, 0, 0, 1e-14
    d, sums = gpu.jacobian_rows([s], [t], WAYS["normalized"], False)
    assert d[0, 0] == 0
    assert ((d[0, 1:3] - 1).abs() <= 1e-15).all()
    assert abs(d[0, 4].item() - 1.0) <= 0.21  # (1e-14·√100/1e-12)² + 1, less the product
    t[1, 7] = torch.inf  # came in behind the sums
    for g in gradients(gpu, [(s, t)], sums, torch.ones(1, 5), "normalized")[1]:
        assert g[[0, 1, 2, 4]].eq(0).all()
        assert g[3].ne(0).any()
    s, t = pair(3, 5, dtype=dtype)
    s[0], t[0], s[1] = 0, 0, 0
    d, sums = gpu.jacobian_rows([s], [t], WAYS["norms"], False)
    assert d[0, :2].tolist() == [0, 1]
    got = gradients(gpu, [(s, t)], sums, torch.ones(1, 3), "norms")[1]
    assert all(g.isfinite().all() for g in got)
    assert got[0][:2].eq(0).all()


@ways
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(gpu: EmulatedRows, value: float, way: str) -> None:
    """Fault 10: they come out of their own sample, and of no other."""
    for dtype, at, side in itertools.product((F32, B16, F64), (0, 19, 20, 36), (0, 1)):
        rows = pair(3, 37, dtype=dtype)
        rows[side][1, at] = value
        d, sums = gpu.jacobian_rows([rows[0]], [rows[1]], WAYS[way], False)
        assert d[0].isfinite().tolist() == [True, False, True]
        if way != "difference" or value != value:
            assert d[0, 1].isnan()
        for g in gradients(gpu, [rows], sums, torch.ones(1), way)[1]:
            assert g[[0, 2]].isfinite().all()
        if way == "normalized":
            assert gradients(gpu, [rows], sums, torch.ones(1), way)[1][0][1].isnan().all()


@ways
def test_gradient_strides(gpu: EmulatedRows, way: str) -> None:
    """Fault 1: incoming gradients that are expanded, transposed, sliced; of either dtype."""
    pairs = [pair(4, 6), pair(4, 3, 5, dtype=F16), pair(4, 1)]
    for grad in strided_gradients(3, 4):
        check(gpu, pairs, way, grad)


# --- bits, offsets --------------------------------------------------------------------------------


@ways
def test_no_order_of_blocks_or_threads_changes_a_bit(library: Path, way: str) -> None:
    """Fault 13. Barriers are where they have to be: the emulator scrambles everything else."""
    pairs = [pair(2, 40001), pair(2, 9), pair(2, 5000, dtype=B16), (deep(1), deep(2))]
    first: list[Tensor] = []
    for seed in range(5):
        gpu = EmulatedRows(library, seed)
        d, sums = gpu.jacobian_rows([s for s, _ in pairs], [t for _, t in pairs], WAYS[way], True)
        now = [d, sums, *gradients(gpu, pairs, sums, d, way)[1]]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


def test_a_layer_is_the_same_whatever_stands_beside_it(gpu: EmulatedRows) -> None:
    one = pair(2, 20001)
    alone, _ = gpu.jacobian_rows([one[0]], [one[1]], 1, False)
    both, _ = gpu.jacobian_rows([one[0], draw(2, 3)], [one[1], draw(2, 3, seed=1)], 1, False)
    assert torch.equal(alone[0], both[0])


def _sparse(count: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A float16 tensor over `count` elements of memory that exists only where it is touched."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python 3.11 does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * count, flags=flags)
    return torch.frombuffer(memory, dtype=F16).as_strided(shape, strides)


@pytest.mark.parametrize("strides", [(2**31, 3, 1), (2**31, 5, 1), (5, 2**31, 1), (5, 1, 2**31)])
def test_offsets_beyond_32_bits(gpu: EmulatedRows, strides: tuple[int, ...]) -> None:
    """Fault 4: strides of 2³¹ elements, in what is read and in what is written."""
    x, dx = (_sparse(2**32 + 64, (2, 2, 3), strides) for _ in range(2))
    x.copy_(draw(2, 2, 3, dtype=F16))
    y = draw(2, 2, 3, dtype=F16, seed=1)
    check(gpu, [(x, y), (y, x)], "normalized")
    _, sums = gpu.jacobian_rows([x], [y], 1, False)
    grad = torch.ones(1, 2)
    gpu.jacobian_rows_backward(grad, [x], [y], sums, [0], [0], 1, out=[dx])
    (dense,) = gpu.jacobian_rows_backward(grad, [x.clone()], [y], sums, [0], [0], 1)
    assert torch.equal(dx, dense)


# --- what the compiler says -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_compiles_and_links(tmp_path: Path) -> None:
    """Fault 27: compiles and links, and every kernel keeps everything in registers."""
    compiles_and_links("jacobian", tmp_path, kernels=16)
