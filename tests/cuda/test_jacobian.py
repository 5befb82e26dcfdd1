"""The CUDA kernels of Jacobian rows, executed on the host against float64 definitions.

As tests/cuda/test_attention.py: the kernels' own sources, compiled for the host.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cuda.emulation import DTYPES, compile_driver
from tests.cuda.emulation.rows import EmulatedRows

WAYS = {"difference": 0, "normalized": 1, "norms": 2}
F64 = torch.float64
ways = pytest.mark.parametrize("way", WAYS)
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


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return cases.draw(shape, dtype, seed)


def distance(s: Tensor, t: Tensor, way: str) -> Tensor:
    """D [N] in float64, from the definition."""
    s, t = s.flatten(1), t.flatten(1)
    ns, nt = (x.norm(dim=1, keepdim=True) for x in (s, t))
    if way == "norms":
        return ((ns - nt) / (ns + nt)).square()[:, 0]
    if way == "difference":
        return (s - t).square().sum(1)
    return (s / ns.clamp_min(1e-12) - t / nt.clamp_min(1e-12)).square().sum(1)


def check(gpu: EmulatedRows, pairs: list[tuple[Tensor, Tensor]], way: str) -> None:
    """Values and gradients of both sides, each sample and the mean."""
    student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
    leaves = [[x.double().detach().requires_grad_() for x in side] for side in (student, teacher)]
    exact = torch.stack([distance(s, t, way) for s, t in zip(*leaves, strict=True)])
    for mean in (False, True):
        d, sums = gpu.jacobian_rows(student, teacher, WAYS[way], mean)
        want = exact.mean(1) if mean else exact
        digits = 1e-12 if d.dtype == F64 else 2e-7
        torch.testing.assert_close(d.double(), want.detach(), rtol=digits, atol=1e-15)
        weight = draw(*want.shape, dtype=F64, seed=9)
        grads = torch.autograd.grad((want * weight).sum(), [*leaves[0], *leaves[1]],
                                    retain_graph=True)  # fmt: skip
        count = len(pairs)
        xs, others = [*student, *teacher], [] if way == "norms" else [*teacher, *student]
        layers, sides = [*range(count)] * 2, [0] * count + [1] * count
        got = gpu.jacobian_rows_backward(weight, xs, others, sums, layers, sides, WAYS[way])
        for g, x, e in zip(got, xs, grads, strict=True):
            unit = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-7}
            bound = unit.get(x.dtype, 1e-12) * (e.abs() + 1e-3 * e.abs().max())
            # What is nothing, but for rounding; float16 has no numbers so small.
            bound = bound + (6e-8 if x.dtype == torch.float16 else 1e-13)
            assert ((g.double() - e).abs() <= bound).all(), (way, mean, x.shape, x.dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2][..., : x.shape[3]],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(gpu: EmulatedRows, layout: str, way: str) -> None:
    place = LAYOUTS[layout]
    for dtype in DTYPES:
        s, t = (draw(3, 4, 6, 8, dtype=dtype, seed=k) for k in (1, 2))
        check(gpu, [(place(s), t), (s, place(t)), (place(s), place(t))], way)


@ways
def test_mixed_dtypes_and_many_layers(gpu: EmulatedRows, way: str) -> None:
    """More layers than a table holds."""
    dtypes = [*DTYPES]
    for chosen in (dtypes, [d for d in dtypes if d != F64]):
        pairs = [
            (draw(2, 3, 4 + i, dtype=chosen[i % len(chosen)], seed=i),
             draw(2, 3, 4 + i, dtype=chosen[i // 2 % len(chosen)], seed=i + 50))
            for i in range(9)
        ]  # fmt: skip
        check(gpu, pairs, way)


@ways
@pytest.mark.parametrize("length", [1, 7, 8, 255, 1024, 1025, 4096, 16384, 16392, 40001])
def test_sizes_around_packs_teams_and_pieces(gpu: EmulatedRows, length: int, way: str) -> None:
    """Fault 11: the tail of a pack, a team or a piece contributes nothing of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        check(gpu, [(draw(2, length, dtype=dtype, seed=1), draw(2, length, dtype=dtype, seed=2))],
              way)  # fmt: skip


def test_more_samples_than_threads(gpu: EmulatedRows) -> None:
    check(gpu, [(draw(300, 5, seed=1), draw(300, 5, seed=2))], "normalized")


def test_norms_of_rows_of_other_lengths(gpu: EmulatedRows) -> None:
    check(gpu, [(draw(3, 20000, seed=1), draw(3, 4, 5, seed=2))], "norms")


def test_equal_rows_dead_rows_and_nan(gpu: EmulatedRows) -> None:
    """Exactly 0; 0, 1 and 1 with gradient 0; NaN of its own sample alone."""
    s = draw(4, 100, seed=1)
    d, sums = gpu.jacobian_rows([s], [s.clone()], 1, False)
    assert d.eq(0).all()
    t = draw(4, 100, seed=2)
    s[0], t[0], s[1], t[2] = 0, 0, 0, 0
    d, sums = gpu.jacobian_rows([s], [t], 1, False)
    assert d[0, :3].tolist() == [0, 1, 1]
    for x, y, side in ((s, t, 0), (t, s, 1)):
        (g,) = gpu.jacobian_rows_backward(torch.ones(1, 4), [x], [y], sums, [0], [side], 1)
        assert g[:3].eq(0).all()
        assert g[3].ne(0).any()
    s[3, 7] = torch.nan
    for way in WAYS.values():
        assert gpu.jacobian_rows([s], [t], way, False)[0].isnan().tolist()[0][2:] == [False, True]


def test_an_empty_batch(gpu: EmulatedRows) -> None:
    s = draw(0, 5)
    (g,) = gpu.jacobian_rows_backward(
        torch.ones(1), [s], [s], torch.empty(1, 0, 3, dtype=F64), [0], [0], 1
    )
    assert g.shape == (0, 5)


def test_no_order_of_blocks_or_threads_changes_a_bit(library: Path) -> None:
    """Fault 13. Barriers are where they have to be: the emulator scrambles everything else."""
    s, t = (
        [draw(3, 40001, seed=1), draw(3, 9, seed=2)],
        [draw(3, 40001, seed=3), draw(3, 9, seed=4)],
    )
    first: list[Tensor] = []
    for seed in range(4):
        gpu = EmulatedRows(library, seed)
        d, sums = gpu.jacobian_rows(s, t, 1, True)
        now = [d, sums, *gpu.jacobian_rows_backward(d, s, t, sums, [0, 1], [0, 0], 1)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


def test_what_cannot_be_cut_is_said(gpu: EmulatedRows) -> None:
    shape = (2, *[3] * 8)
    s = draw(2, *[6] * 8, seed=1)[(slice(None), *[slice(None, None, 2)] * 8)]
    assert s.shape == shape
    with pytest.raises(AssertionError, match="too many dimensions"):
        gpu.jacobian_rows([s], [s], 1, True)
