"""The CUDA kernels of the attention kind on a GPU: the ops themselves against float64."""

from __future__ import annotations

import pytest
import torch

import lwkd.ops
from lwkd.ops import backends
from tests.cuda.attention_cases import (
    LAYOUTS,
    NCHW,
    Case,
    call,
    call_backward,
    case,
    check,
    draw,
)

pytestmark = pytest.mark.gpu
OPS = torch.ops.lwkd
REFERENCE = torch.ops.lwkd_reference
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _compiled_kernels_answer():
    assert backends.CUDA.live, backends.CUDA.reason
    yield
    torch.cuda.synchronize()  # an error of this test is not blamed on the next


def some_layers(dtype: torch.dtype = torch.bfloat16, n: int = 8) -> Case:
    """Every path: packs and single elements, rows and planes, pooled, masked, split channels."""
    shapes = [(64, 28, 28), (48, 14, 14), (2048, 7, 7), (96, 9, 5), (16, 8, 8)]
    student = [draw(n, *s, dtype=dtype, device="cuda") for s in shapes]
    teacher = [draw(n, *s, dtype=dtype, device="cuda") for s in shapes]
    teacher[1] = draw(n, 24, 20, 28, dtype=dtype, device="cuda")
    teacher[3] = LAYOUTS["channels_last"](teacher[3])
    student[4] = LAYOUTS["misaligned"](student[4])
    none = torch.empty(0, dtype=torch.bool, device="cuda")
    mask = [none, torch.rand(n, 14, 14, device="cuda") > 0.3, none, none, none]
    return Case(student, teacher, mask, [*NCHW] * 5, [*NCHW] * 5)


def forward_backward(c: Case, weight: torch.Tensor, divergence: int = 0) -> list[torch.Tensor]:
    mean, maps = call(OPS, c, 2.0, divergence, 0.5, True)
    return [mean, maps, *call_backward(OPS, c, maps, weight, 2.0, divergence, 0.5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    place = LAYOUTS[layout]
    for shape in ((3, 16, 7, 8), (2, 24, 5, 5), (1, 512, 7, 7), (5, 33, 14, 14)):
        pair = [draw(*shape, dtype=dtype, device="cuda") for _ in range(2)]
        for p, divergence in ((2.0, 0), (1.0, 1), (2.5, 0)):
            check(OPS, case(place(pair[0]), place(pair[1])), p, divergence, 0.3, depth=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [0, 1])
def test_layers_together(dtype: torch.dtype, divergence: int) -> None:
    check(OPS, some_layers(dtype), 2.0, divergence, 0.3, depth=256)
    many = [draw(4, 8, 6, 6, dtype=dtype, device="cuda") for _ in range(300)]
    check(OPS, Case(many[:150], many[150:], [], [*NCHW] * 150, [*NCHW] * 150), 2.0, divergence)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens(prefix: int) -> None:
    tokens = draw(4, prefix + 49, 384, dtype=torch.bfloat16, device="cuda")
    tokens[:, :prefix] = torch.nan
    c = case(tokens, draw(4, 64, 14, 14, device="cuda"), layout=(2, prefix, 7, 7), t_layout=NCHW)
    each, maps = call(OPS, c, 2.0, 0, 0.5, False)
    grad = call_backward(OPS, c, maps, torch.ones_like(each), 2.0, 0, 0.5)[0]
    assert each.isfinite().all()
    assert grad[:, :prefix].eq(0).all()
    assert grad[:, prefix:].isfinite().all()
    tokens[:, :prefix] = 0
    check(OPS, c, depth=256)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_lane(dtype: torch.dtype, p: float) -> None:
    """Small integers: the maps are the CPU reference's, bit for bit."""
    for layout, place in LAYOUTS.items():
        for shape, other in (((2, 600, 7, 7), (2, 5, 7, 7)), ((3, 128, 56, 56), (3, 16, 28, 28))):
            student, teacher = (torch.randint(-3, 4, s).to(dtype) for s in (shape, other))
            c = case(place(student.cuda()), place(teacher.cuda()))
            _, maps = call(OPS, c, p, 0, 0.5, True)
            _, wanted = call(REFERENCE, case(student, teacher), p, 0, 0.5, True)
            if layout.startswith("one_"):
                _, wanted = call(REFERENCE, case(place(student), place(teacher)), p, 0, 0.5, True)
            assert torch.equal(maps.cpu(), wanted), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [0, 1])
def test_equal_operands(dtype: torch.dtype, divergence: int) -> None:
    """Exactly 0, whatever the compiler fuses."""
    for shape in ((8, 64, 56, 56), (2, 2048, 7, 7), (16, 300, 5, 3)):
        x = draw(*shape, dtype=dtype, device="cuda")
        for place in LAYOUTS.values():
            c = case(place(x), place(x.clone()))
            each, maps = call(OPS, c, 2.0, divergence, 0.3, False)
            assert each.eq(0).all()
            for g in call_backward(OPS, c, maps, torch.ones_like(each), 2.0, divergence, 0.3):
                assert g.eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf(value: float) -> None:
    for divergence in (0, 1):
        c = some_layers()
        for x in c.student[:3:2]:
            x[1, 3, 2, 2] = value
        each, _ = call(OPS, c, 2.0, divergence, 0.5, False)
        bad = torch.zeros(5, 8, dtype=torch.bool, device="cuda")
        bad[:3:2, 1] = True
        assert torch.equal(each.isnan(), bad)


def test_empty() -> None:
    """Fault 9."""
    for shape in ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)):
        x = draw(*shape, device="cuda")
        mean, maps = call(OPS, case(x, x), 2.0, 0, 0.5, True)
        assert mean.tolist() == [0.0]
        (grad, _) = call_backward(OPS, case(x, x), maps, mean, 2.0, 0, 0.5)
        assert grad.shape == x.shape
        torch.cuda.synchronize()


def test_public_function_trains() -> None:
    student = [x.requires_grad_() for x in some_layers().student[:1]]
    teacher = some_layers().teacher[:1]
    d = lwkd.ops.layer_discrepancy(student, teacher, backend="compiled")
    d.sum().backward()
    cpu = [x.detach().cpu().requires_grad_() for x in student]
    lwkd.ops.layer_discrepancy(
        cpu, [t.cpu() for t in teacher], backend="reference"
    ).sum().backward()
    torch.testing.assert_close(student[0].grad.cpu(), cpu[0].grad, rtol=2e-2, atol=1e-6)


def test_graph_capture() -> None:
    """Fault 26: captured once, replayed on new data, equal to the plain call bit for bit."""
    c, weight = some_layers(), torch.rand(5, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(c, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(c, weight)
    for _ in range(100):
        for x in c.tensors:
            x.normal_()
        graph.replay()
        plain = forward_backward(c, weight)
        assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))


def test_side_stream_behind_a_slow_producer() -> None:
    """Fault 7: on the wrong stream the kernels would read before the data is there."""
    c, weight = some_layers(), torch.rand(5, device="cuda")
    fresh = [torch.randn_like(x) for x in c.tensors]
    wanted = [t.clone() for t in forward_backward(Case(fresh[:5], fresh[5:], *c[2:]), weight)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for x, f in zip(c.tensors, fresh, strict=True):
            x.copy_(f, non_blocking=True)
        got = forward_backward(c, weight)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_no_host_synchronisation() -> None:
    c, weight = some_layers(), torch.rand(5, device="cuda")
    forward_backward(c, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(c, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layers", [1, 64])
def test_two_launches_each_way(layers: int) -> None:
    x = [draw(8, 16, 8, 8, device="cuda") for _ in range(2 * layers)]
    c = Case(x[:layers], x[layers:], [], [*NCHW] * layers, [*NCHW] * layers)
    weight = torch.rand(layers, device="cuda")
    forward_backward(c, weight)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        forward_backward(c, weight)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "_kernel" in e.name and "lwkd" in e.name]
    for name in ("maps_kernel", "distance_kernel", "slope_kernel", "spread_kernel"):
        assert sum(name in k for k in kernels) == 1, kernels


def test_a_thousand_repeats_are_the_same_bits() -> None:
    """Fault 13, with another stream contending for the chip."""
    c, weight = some_layers(), torch.rand(5, device="cuda")
    first = {d: [t.clone() for t in forward_backward(c, weight, d)] for d in (0, 1)}
    noise = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(side):
                noise = (noise @ noise).tanh()
        for a, b in zip(first[i % 2], forward_backward(c, weight, i % 2), strict=True):
            same &= (a == b).all()
    assert bool(same)


@pytest.mark.parametrize("shape", [(65_536, 8, 2, 2), (70_001, 3, 1, 3), (65_536, 16, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_batch_beyond_a_grid_dimension(shape: tuple[int, ...], last: bool) -> None:
    """Fault 5."""
    pair = [draw(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    if last:
        pair = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in pair]
    check(OPS, case(*pair), depth=1024)


@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_elements(last: bool) -> None:
    """Fault 4: real tensors of 2^31 elements and more, forward and backward."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.fail("needs 40 GiB of free GPU memory")
    shape = (2, 33, 5728, 5728)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    if last:
        x = torch.empty(2, 5728, 5728, 33, dtype=torch.bfloat16, device="cuda").normal_()
        x = x.permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    c = case(x, draw(2, 3, 5728, 5728, dtype=torch.bfloat16, device="cuda"))
    each, maps = call(OPS, c, 2.0, 0, 0.5, False)
    wanted = torch.zeros(2, 5728, 5728, dtype=torch.float64, device="cuda")
    for channel in range(33):
        wanted += x[:, channel].double().square()
    assert ((maps[: wanted.numel()] - wanted.flatten()).abs() <= 1e-5 * wanted.flatten()).all()
    assert each.isfinite().all()
    dx = call_backward(OPS, c, maps, torch.ones_like(each), 2.0, 0, 0.5)[0]
    q = maps.double().view(2, 2, -1)
    norm = q.norm(dim=2, keepdim=True)
    unit = q / norm
    g = 2 * (unit[0] - unit[1])
    coefficient = (g - unit[0] * (unit[0] * g).sum(1, keepdim=True)) / norm[0]
    coefficient = coefficient.view(2, 5728, 5728)
    for channel in (0, 16, 32):
        ref = 2 * coefficient * x[:, channel].double()
        bound = 1e-2 * ref.abs() + 1e-4 * ref.abs().max()
        assert ((dx[:, channel].double() - ref).abs() <= bound).all()


def test_memory_does_not_grow() -> None:
    """Fault 18."""
    c, weight = some_layers(), torch.rand(5, device="cuda")
    forward_backward(c, weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        forward_backward(c, weight)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.two_gpus
def test_second_device() -> None:
    """Fault 8: tensors on cuda:1 while cuda:0 is current."""
    pair = [draw(4, 32, 7, 7, device="cuda:1") for _ in range(2)]
    assert torch.cuda.current_device() == 0
    check(OPS, case(*pair))
    assert torch.cuda.current_device() == 0
