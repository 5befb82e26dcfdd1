"""The CUDA kernels of the attention kind, executed on the host against float64 definitions.

tests/cuda/emulation compiles the kernels' own sources for the host: blocks, threads, barriers,
shuffles and the host side that cuts tensors into blocks are those of the GPU. With -mfma and
contraction, products and sums fuse as nvcc fuses them.
"""

from __future__ import annotations

import mmap
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lwkd.ops  # noqa: F401  (registers the reference)
from tests.cuda.attention_cases import (
    LAYOUTS,
    NCHW,
    Case,
    answer,
    call,
    call_backward,
    case,
    check,
    draw,
)
from tests.cuda.compiler import compiles_and_links
from tests.cuda.emulation import DTYPES, ROOT, Emulated, Library, Program, compile_driver

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SOURCES = sorted((ROOT / "csrc/cuda").iterdir())
REFERENCE = torch.ops.lwkd_reference
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    fused = "fma" in Path("/proc/cpuinfo").read_text().split()
    flags = ["-march=x86-64-v3", "-ffp-contract=fast"] if fused else []
    out = tmp_path_factory.mktemp("emulation") / "emulation.so"
    return Library(compile_driver(out, "-O2", "-shared", "-fPIC", *flags))


@pytest.fixture(scope="module")
def gpu(library: Library) -> Emulated:
    return Emulated(library, seed=1)


# --- dtypes, layouts, options ---------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(gpu: Emulated, layout: str, dtype: torch.dtype) -> None:
    """Faults 2 and 6: strided and misaligned operands; odd sizes have odd row alignment."""
    place = LAYOUTS[layout]
    for shape, p, divergence in (((3, 16, 7, 8), 2.0, 0), ((2, 24, 5, 5), 1.0, 1)):
        student, teacher = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        check(gpu, case(place(student), place(teacher)), p, divergence, 0.3)
        check(gpu, case(place(student), teacher), 2.5, divergence)


@needs_gxx
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("divergence", [0, 1])
def test_powers_and_divergences(gpu: Emulated, p: float, divergence: int) -> None:
    c = case(draw(4, 12, 6, 5), draw(4, 20, 6, 5))
    for beta in (0.1, 0.5, 0.9):
        check(gpu, c, p, divergence, beta)
    check(gpu, case(*(x.double() for x in c.tensors)), p, divergence, 0.7)


@needs_gxx
def test_mixed_dtypes_and_many_layers(gpu: Emulated) -> None:
    """More layers than a table holds; dtypes differ layer by layer and side by side."""
    dtypes = [*DTYPES]
    for chosen in (dtypes, [d for d in dtypes if d != torch.float64]):
        student = [draw(2, 4 + i, 3 + i, 4, dtype=chosen[i % len(chosen)]) for i in range(8)]
        teacher = [
            LAYOUTS["channels_last"](draw(2, 8, 4, 4, dtype=chosen[i // 2 % len(chosen)]))
            for i in range(8)
        ]
        check(gpu, Case(student, teacher, [], [*NCHW] * 8, [*NCHW] * 8))


@needs_gxx
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 31, 32, 33, 300])
@pytest.mark.parametrize("space", [(1, 1), (1, 7), (7, 7), (8, 8), (3, 11)])
def test_sizes_around_the_packs(gpu: Emulated, channels: int, space: tuple[int, int]) -> None:
    """Fault 11: the tail of a pack, a row, a tile or a team contributes nothing of its own."""
    for place in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        for dtype in (torch.float32, torch.bfloat16):
            pair = [place(draw(3, channels, *space, dtype=dtype)) for _ in range(2)]
            check(gpu, case(*pair), depth=max(64, channels))


@needs_gxx
@pytest.mark.parametrize("shape", [(1, 4096, 3, 3), (2, 2048, 7, 7), (1, 3000, 1, 1), (1, 1, 9000)])
@pytest.mark.parametrize("last", [False, True])
def test_few_samples_of_many_channels(gpu: Emulated, shape: tuple[int, ...], last: bool) -> None:
    """Channels are split over blocks, and their parts added in one order."""
    for dtype in (torch.float32, torch.bfloat16):
        pair = [draw(*shape, dtype=dtype) for _ in range(2)]
        if last:
            pair = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in pair]
        check(gpu, case(*pair), depth=256)


@needs_gxx
def test_wide_maps(gpu: Emulated) -> None:
    """More positions than a team has threads, tiles that do not divide the map."""
    check(gpu, case(draw(2, 3, 50, 51), draw(2, 4, 50, 51)), divergence=1)
    check(gpu, case(draw(1, 40, 30, 56), draw(1, 40, 30, 56)))
    half = draw(1, 2, 96, 100, dtype=torch.float16)
    check(gpu, case(half, draw(1, 2, 96, 100, dtype=torch.float16)))


# --- pooling, masks, tokens -----------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((14, 14), (7, 7)), ((7, 7), (14, 14)), ((7, 5), (3, 9)), ((10,), (4,)), ((5,), (5,)),
        ((2, 6, 5), (4, 3, 5)), ((1, 1), (6, 6)), ((9, 9), (8, 8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("divergence", [0, 1])
def test_pooling(gpu: Emulated, student: tuple, teacher: tuple, divergence: int) -> None:
    check(gpu, case(draw(3, 6, *student), draw(3, 5, *teacher)), 2.0, divergence)


@needs_gxx
@pytest.mark.parametrize("divergence", [0, 1])
@pytest.mark.parametrize("pooled", [False, True])
def test_masks(gpu: Emulated, divergence: int, pooled: bool) -> None:
    student, teacher = draw(4, 8, 6, 7), draw(4, 8, 12, 14) if pooled else draw(4, 8, 6, 7)
    keep = torch.rand(4, 6, 7) > 0.4
    keep[1] = False
    keep[2] = True
    strided = keep.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for mask in (keep, strided, keep[:1].expand(4, 6, 7), torch.empty(0, dtype=torch.bool)):
        check(gpu, case(student, teacher, mask), 2.0, divergence, 0.3)
    teacher[:] = 0  # an all-zero map is uniform over the positions kept
    check(gpu, case(student, teacher, keep), 2.0, divergence, 0.3)


@needs_gxx
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_masked_positions_may_hold_anything(gpu: Emulated, value: float, p: float) -> None:
    """They change no bit of the distances, and nothing flows to them."""
    student, teacher = draw(2, 8, 5, 5), draw(2, 8, 5, 5)
    keep = torch.ones(2, 5, 5, dtype=torch.bool)
    keep[:, 2, 3] = False
    clean = call(gpu, case(student, teacher, keep), p, 0, 0.5, False)
    student[:, :, 2, 3] = value
    for layout in (torch.contiguous_format, torch.channels_last):
        c = case(student.contiguous(memory_format=layout), teacher, keep)
        dirty = call(gpu, c, p, 0, 0.5, False)
        if layout is torch.contiguous_format:
            assert torch.equal(clean[0], dirty[0])
            assert torch.equal(clean[1], dirty[1])
        grad = call_backward(gpu, c, dirty[1], torch.ones_like(dirty[0]), p, 0, 0.5)[0]
        assert grad.isfinite().all()
        assert grad[:, :, 2, 3].eq(0).all()


@needs_gxx
@pytest.mark.parametrize("channel", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens(gpu: Emulated, channel: int, dtype: torch.dtype) -> None:
    """Prefix tokens are left out of the map, and their gradient is 0 whatever they hold."""
    shape = (3, 2 + 4 * 6, 16) if channel == 2 else (3, 16, 2 + 4 * 6)
    student = draw(*shape, dtype=dtype)
    teacher = draw(3, 32, 8, 12, dtype=dtype)
    prefix = student[:, :2] if channel == 2 else student[:, :, :2]
    for divergence in (0, 1):
        check(gpu, case(student, teacher, layout=(channel, 2, 4, 6), t_layout=NCHW), 2, divergence)
    prefix[:] = torch.nan
    c = case(student, teacher, layout=(channel, 2, 4, 6), t_layout=NCHW)
    each, maps = call(gpu, c, 2.0, 0, 0.5, False)
    grad = call_backward(gpu, c, maps, torch.ones_like(each), 2.0, 0, 0.5)[0]
    assert each.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[:, :2] if channel == 2 else grad[:, :, :2]).eq(0).all()


# --- the edges ------------------------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
@pytest.mark.parametrize("divergence", [0, 1])
def test_empty(gpu: Emulated, shape: tuple[int, ...], divergence: int) -> None:
    """Fault 9: nothing in, distance 0 out, beside a layer that is not empty."""
    other = (shape[0], 8, 4, 4)
    student, teacher = [draw(*shape), draw(*other)], [draw(*shape), draw(*other)]
    check(gpu, Case(student, teacher, [], [*NCHW] * 2, [*NCHW] * 2), 2.0, divergence)
    each, _ = call(gpu, case(student[0], teacher[0]), 2.0, divergence, 0.5, True)
    assert each.tolist() == [0.0]


@needs_gxx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_nan_inf_and_denormal(gpu: Emulated, value: float, dtype: torch.dtype, layout: str) -> None:
    """Fault 10: NaN or Inf anywhere in a sample gives NaN there, and nowhere else."""
    for divergence in (0, 1):
        for position in ((0, 0, 0), (9, 6, 6), (4, 3, 1)):
            student, teacher = draw(2, 10, 7, 7, dtype=dtype), draw(2, 10, 7, 7, dtype=dtype)
            student[1, position[0], position[1], position[2]] = value
            c = case(LAYOUTS[layout](student), teacher)
            each, maps = call(gpu, c, 2.0, divergence, 0.5, False)
            assert each[0, 0].isfinite()
            assert each[0, 1].isfinite() == (value == 1e-41)
            mean, _ = call(gpu, c, 2.0, divergence, 0.5, True)
            assert mean.isfinite().all() == (value == 1e-41)
            grads = call_backward(gpu, c, maps, torch.ones_like(each), 2.0, divergence, 0.5)
            assert all(g[0].isfinite().all() for g in grads)
            if value != 1e-41:
                assert grads[1][1].isnan().any()


@needs_gxx
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("divergence", [0, 1])
def test_zeros_have_no_gradient(gpu: Emulated, p: float, divergence: int) -> None:
    """x = 0, whole zero maps, and positions where only one side is zero."""
    student, teacher = draw(3, 8, 4, 4), draw(3, 8, 4, 4)
    student[0] = 0
    teacher[1] = 0
    student[2, :, 1] = 0
    teacher[2, :, 2] = 0
    student[2, 3] = 0
    c = case(student, teacher)
    check(gpu, c, p, divergence, 0.3)
    each, maps = call(gpu, c, p, divergence, 0.3, False)
    for x, g in zip(c.tensors, call_backward(gpu, c, maps, each * 0 + 1, p, divergence, 0.3),
                    strict=True):  # fmt: skip
        assert g[x == 0].eq(0).all()


@needs_gxx
@pytest.mark.parametrize("divergence", [0, 1])
def test_large_and_small_values(gpu: Emulated, divergence: int) -> None:
    """Sums over positions neither overflow nor vanish where the maps themselves do not."""
    for scale in (1e18, 1e-9, 1e-16):
        student, teacher = draw(2, 4, 5, 5) * scale, draw(2, 4, 5, 5) * scale
        c = case(student, teacher)
        weight = torch.ones(1, 2)
        wanted = answer(c, 2.0, divergence, 0.5, weight)
        each, _ = call(gpu, c, 2.0, divergence, 0.5, False)
        torch.testing.assert_close(each.double(), wanted.distance, rtol=1e-4, atol=1e-7)


@needs_gxx
@pytest.mark.parametrize("divergence", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_operands(gpu: Emulated, layout: str, dtype: torch.dtype, divergence: int) -> None:
    """Distance and gradient are exactly 0, also where one of the two is misaligned."""
    for shape in ((2, 24, 7, 7), (1, 2048, 2, 4)):
        x = draw(*shape, dtype=dtype)
        y = LAYOUTS[layout](x)
        twin = y.clone() if y.stride() == x.stride() else LAYOUTS[layout](x)
        for p in (2.0, 2.5):
            c = case(y, twin)
            each, maps = call(gpu, c, p, divergence, 0.3, False)
            assert each.eq(0).all()
            for g in call_backward(gpu, c, maps, torch.ones_like(each), p, divergence, 0.3):
                assert g.eq(0).all()


@needs_gxx
@pytest.mark.parametrize("divergence", [0, 1])
def test_nearly_equal_operands_keep_their_digits(gpu: Emulated, divergence: int) -> None:
    for step, allowed in ((1e-2, 2e-4), (1e-3, 2e-3), (1e-4, 2e-2)):
        student = draw(4, 64, 14, 14)
        c = case(student, student + step * draw(4, 64, 14, 14))
        wanted = answer(c, 2.0, divergence, 0.5, torch.ones(1, 4)).distance
        each, _ = call(gpu, c, 2.0, divergence, 0.5, False)
        torch.testing.assert_close(each.double(), wanted, rtol=allowed, atol=0)


# --- bits -----------------------------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_lane(gpu: Emulated, layout: str, dtype: torch.dtype, p: float) -> None:
    """Fault 12 and the exact lane: small integers give the reference's maps bit for bit."""
    for shape, other in (((2, 600, 7, 7), (2, 5, 7, 7)), ((3, 9, 8, 6), (3, 16, 4, 5))):
        student, teacher = (torch.randint(-3, 4, s).to(dtype) for s in (shape, other))
        c = case(LAYOUTS[layout](student), LAYOUTS[layout](teacher))
        _, maps = call(gpu, c, p, 0, 0.5, True)
        _, wanted = call(REFERENCE, c, p, 0, 0.5, True)
        assert torch.equal(maps, wanted)
        alone = gpu.attention_maps(c.tensors, [1, 1], p)
        for got, ref in zip(alone, REFERENCE.attention_maps(c.tensors, [1, 1], p), strict=True):
            assert torch.equal(got, ref)


@needs_gxx
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_maps_alone(gpu: Emulated, dim: int) -> None:
    xs = [draw(2, 6, *(5, 4, 3)[:dim], dtype=t) for t in DTYPES]
    for p in (1.0, 2.0, 3.5):
        for channel in range(1, dim + 2):
            got = gpu.attention_maps(xs, [channel] * len(xs), p)
            for x, m in zip(xs, got, strict=True):
                wanted = x.double().abs().pow(p).sum(channel)
                assert m.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
                torch.testing.assert_close(m.double(), wanted, rtol=1e-5, atol=1e-6)


@needs_gxx
def test_no_result_depends_on_the_order_of_threads_or_blocks(library: Library) -> None:
    """Fault 13: with a barrier missing, a scrambled order would change some bit."""
    runs = []
    keep = torch.rand(5, 7, 7) > 0.2
    c = Case(
        [draw(5, 40, 7, 7), draw(5, 2048, 3, 3), LAYOUTS["channels_last"](draw(5, 24, 8, 40))],
        [draw(5, 16, 14, 14), draw(5, 2048, 3, 3), draw(5, 6, 8, 40)],
        [keep, torch.empty(0, dtype=torch.bool), torch.rand(5, 8, 40) > 0.5],
        [*NCHW] * 3, [*NCHW] * 3,
    )  # fmt: skip
    weight = torch.rand(3, 5)
    for seed in range(6):
        gpu = Emulated(library, seed=seed)
        run = []
        for divergence in (0, 1):
            each, maps = call(gpu, c, 2.0, divergence, 0.3, False)
            mean, _ = call(gpu, c, 2.0, divergence, 0.3, True)
            run += [each, maps, mean, *call_backward(gpu, c, maps, weight, 2.0, divergence, 0.3)]
        runs.append(run)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@needs_gxx
def test_gradient_strides(gpu: Emulated) -> None:
    """Fault 1: the incoming gradient is expanded, transposed, or every other one."""
    c = Case([draw(4, 6, 3, 3)] * 3, [draw(4, 5, 3, 3)] * 3, [], [*NCHW] * 3, [*NCHW] * 3)
    _, maps = call(gpu, c, 2.0, 0, 0.5, False)
    wide = torch.rand(3, 8)
    for grad in (torch.tensor(2.0).expand(3, 4), torch.rand(4, 3).t(), wide[:, ::2],
                 torch.tensor(2.0).expand(3), torch.rand(6)[::2]):  # fmt: skip
        got = call_backward(gpu, c, maps, grad, 2.0, 0, 0.5)
        ref = call_backward(gpu, c, maps, grad.contiguous().clone(), 2.0, 0, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(got, ref, strict=True))
        full = grad / 4 if grad.dim() == 1 else grad
        full = full[:, None].expand(3, 4) if grad.dim() == 1 else full
        wanted = answer(c, 2.0, 0, 0.5, full).gradients
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


# --- far apart ------------------------------------------------------------------------------------


def _sparse(count: int, *shape_and_strides: tuple[int, ...]) -> torch.Tensor:
    """A float16 tensor over `count` elements of memory that exists only where it is touched."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python 3.11 does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * count, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided(*shape_and_strides)


@needs_gxx
@pytest.mark.parametrize("which", ["samples", "channels", "rows", "positions", "channels_last"])
def test_offsets_beyond_32_bits(gpu: Emulated, which: str) -> None:
    """Fault 4: strides of 2^31 elements, in what is read and in what is written."""
    far = 2**31
    shape, strides = {
        "samples": ((2, 4, 2, 4), (far, 8, 4, 1)),
        "channels": ((1, 2, 2, 4), (0, far, 4, 1)),
        "rows": ((1, 4, 2, 4), (0, 4, far, 1)),
        "positions": ((1, 4, 1, 2), (0, 2, 0, far)),
        "channels_last": ((1, 8, 2, 2), (0, 1, far, 8)),
    }[which]
    x, dx = (_sparse(far + 64, shape, strides) for _ in range(2))
    x.copy_(draw(*shape))
    teacher = draw(*shape, dtype=torch.float16)
    c, dense = case(x, teacher), case(x.contiguous(), teacher)
    each, maps = call(gpu, c, 2.0, 0, 0.5, False)
    wanted = answer(dense, 2.0, 0, 0.5, torch.ones(1, shape[0]))
    torch.testing.assert_close(each.double(), wanted.distance, rtol=1e-5, atol=1e-6)
    space = [1, *shape[2:]]
    gpu.attention_backward(
        torch.ones_like(each), [x], [], maps, [0], [0], [*NCHW], space, 2.0, 0, 0.5, out=[dx]
    )
    torch.testing.assert_close(dx.double(), wanted.gradients[0], rtol=1e-3, atol=1e-5)


# --- any shape ------------------------------------------------------------------------------------


@st.composite
def cases(draws: Any) -> tuple[Case, float, int]:
    dim = draws(st.integers(1, 3))
    n = draws(st.integers(1, 5))
    sides: list[list[torch.Tensor]] = [[], []]
    length = draws(st.integers(1, 3))
    torch.manual_seed(draws(st.integers(0, 2**31)))
    for _ in range(length):
        for side in sides:
            shape = [n, draws(st.integers(1, 40)), *(draws(st.integers(1, 9)) for _ in range(dim))]
            order = draws(st.permutations(range(len(shape))))
            x = torch.randn([shape[d] for d in order]).to(draws(st.sampled_from([*DTYPES])))
            side.append(x.permute([order.index(d) for d in range(len(shape))]))
    layouts = [*NCHW] * length
    divergence = draws(st.integers(0, 1))
    return Case(*sides, [], layouts, layouts), draws(st.sampled_from([1.0, 2.0, 2.5])), divergence


@needs_gxx
@settings(max_examples=settings().max_examples // 5)  # the host stands in for a GPU
@given(drawn=cases())
def test_any_shape_and_order_of_dimensions(gpu: Emulated, drawn: tuple[Case, float, int]) -> None:
    c, p, divergence = drawn
    check(gpu, c, p, divergence, 0.4)


# --- under sanitizers -----------------------------------------------------------------------------


@needs_gxx
@pytest.mark.slow
def test_no_sanitizer_has_anything_to_say(tmp_path: Path) -> None:
    """Faults 3, 4, 6 and 11: every buffer stands alone, so that one byte beyond it is an error."""
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    gpu = Emulated(Program(compile_driver(tmp_path / "driver", *flags), tmp_path))
    keep = torch.rand(3, 4, 5) > 0.3
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for layout in ("contiguous", "channels_last", "misaligned", "rows_of_a_larger_map"):
            place = LAYOUTS[layout]
            for shape in ((3, 13, 7, 7), (3, 16, 4, 5), (2, 64, 10, 26)):
                c = case(place(draw(*shape, dtype=dtype)), place(draw(*shape, dtype=dtype)))
                check(gpu, c, 2.0, 0)
            mixed = case(place(draw(3, 7, 9, 5, dtype=dtype)), draw(3, 8, 4, 8), keep)
            check(gpu, mixed, 1.5, 1)
    for dtype in (torch.bfloat16, torch.float32):
        tokens = draw(3, 2 + 12, 16, dtype=dtype)
        check(gpu, case(tokens, draw(3, 8, 3, 4), layout=(2, 2, 3, 4), t_layout=NCHW))
        check(gpu, case(draw(1, 2048, 7, 7, dtype=dtype), draw(1, 2048, 7, 7, dtype=dtype)))
        gpu.attention_maps([draw(2, 5, 3, dtype=dtype), draw(2, 5, 4, dtype=dtype)], [1, 2], 2.0)
    check(gpu, Case([draw(2, 0, 3, 3)], [draw(2, 4, 0, 3)], [], [*NCHW], [*NCHW]))


# --- what can be read off the sources and the compiler ------------------------------------------


def test_launches_and_atomics_are_where_they_belong() -> None:
    """Faults 7, 8 and 13: one guarded place launches, on the current stream; floats are never
    added atomically."""
    text = {path.name: path.read_text() for path in SOURCES if path.is_file()}
    launches = {name: re.findall(r"<<<.*?>>>", t, re.DOTALL) for name, t in text.items()}
    assert {name for name, found in launches.items() if found} == {"launch.cuh"}
    assert all("stream_" in launch for launch in launches["launch.cuh"])
    assert "DeviceGuard guard_" in text["launch.cuh"]
    assert "STD_CUDA_KERNEL_LAUNCH_CHECK" in text["launch.cuh"]
    every = "".join(text.values())
    assert re.findall(r"atomic\w+\(([^,]*),", every) == ["d.done"]
    assert "int32_t* done" in text["attention_distance.cuh"]
    assert not re.findall(
        r"cudaDeviceSynchronize|cudaStreamSynchronize|cudaMemcpy\b|fmaxf?\(", every
    )
    assert not re.findall(r"blockIdx\.[yz]|gridDim\.[yz]", every)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_compiles_and_links(tmp_path: Path) -> None:
    """Fault 27: compiles, and the streaming kernels keep everything in registers."""
    compiles_and_links("attention", tmp_path, kernels=24)
