"""The CUDA kernels of Jacobian rows on a GPU: what tests/ops/test_jacobian.py does not ask for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lwkd.ops
from lwkd.ops import backends
from tests.cuda.jacobian_cases import (
    B16,
    DTYPES,
    F32,
    F64,
    WAYS,
    Pairs,
    alignments,
    check,
    deep,
    draw,
    gradients,
    pair,
    ways,
)

pytestmark = pytest.mark.gpu
OPS = torch.ops.lwkd


@pytest.fixture(autouse=True)
def _compiled_kernels_answer():
    assert backends.CUDA.live, backends.CUDA.reason
    yield
    torch.cuda.synchronize()  # an error of this test is not blamed on the next


def some_pairs() -> Pairs:
    """Every path: warps and blocks, packs and single elements, pieces, strides, mixed dtypes."""
    gpu = "cuda"
    return [
        pair(2, 150528, dtype=B16, device=gpu), pair(2, 40001, device=gpu),
        pair(2, 33, device=gpu), pair(2, 5000, dtype=B16, other=F32, device=gpu),
        (deep(1, device=gpu), deep(2, B16, device=gpu)),
        (draw(2, 30, 50, device=gpu).mT, draw(2, 50, 30, device=gpu)),
    ]  # fmt: skip


def forward_backward(pairs: Pairs, way: str = "normalized") -> list[Tensor]:
    d, sums = OPS.jacobian_rows([s for s, _ in pairs], [t for _, t in pairs], WAYS[way], True)
    return [d, sums, *gradients(OPS, pairs, sums, d, way)[1]]


@ways
@pytest.mark.parametrize("length", [1, 255, 1024, 1025, 8193, 16392, 150528])
def test_sizes(length: int, way: str) -> None:
    for n in (1, 5):
        check(OPS, [pair(n, length, dtype=dtype, device="cuda") for dtype in DTYPES], way)


@ways
def test_dtypes_and_alignments(way: str) -> None:
    for dtype, other in itertools.product(DTYPES, DTYPES):
        check(OPS, alignments(dtype, other, "cuda"), way)
        check(OPS, [pair(3, 5001, dtype=dtype, other=other, device="cuda")], way)


@ways
def test_layers_together(way: str) -> None:
    """Every path in one call, then more layers than a table holds."""
    check(OPS, some_pairs(), way)
    check(OPS, [pair(2, 3 + i, device="cuda") for i in range(300)], way)


def test_norms_of_rows_of_other_lengths() -> None:
    check(OPS, [(draw(3, 20000, device="cuda"), draw(3, 4, 5, device="cuda"))], "norms")


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows(dtype: torch.dtype, way: str) -> None:
    """Exactly 0, whatever the compiler fuses: the distance, and the gradient too."""
    for scale, shape in itertools.product((1.0, 1e-14), ((8, 1000), (3, 40001), (5, 7, 11))):
        s = (draw(*shape, dtype=F64, device="cuda") * scale).to(dtype)
        d, sums = OPS.jacobian_rows([s], [s.clone()], WAYS[way], False)
        assert d.eq(0).all()
        grad = torch.full_like(d, 0.1)
        assert all(g.eq(0).all() for g in gradients(OPS, [(s, s.clone())], sums, grad, way)[1])


@ways
def test_empty(way: str) -> None:
    """Fault 9."""
    for shape in ((0, 5), (3, 0)):
        x = draw(*shape, device="cuda")
        d, *_, gradient = forward_backward([(x, x)], way)
        assert d.tolist() == [0.0]
        assert gradient.shape == shape
        torch.cuda.synchronize()


def test_public_function_trains() -> None:
    s, t = pair(6, 3, 64, device="cuda")
    grads = []
    for device, backend in (("cuda", "compiled"), ("cpu", "reference")):
        x = s.to(device).requires_grad_()
        d = lwkd.ops.layer_discrepancy([x], [t.to(device)], kind="jacobian", backend=backend)
        grads.append(torch.autograd.grad(d.sum(), x)[0].cpu())
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@ways
def test_a_graph_captures_both_passes(way: str) -> None:
    """Fault 26: captured once, replayed on new data, equal to the plain call bit for bit."""
    pairs = some_pairs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(pairs, way)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(pairs, way)
    for _ in range(20):
        for x in itertools.chain(*pairs):
            x.normal_()
        graph.replay()
        plain = forward_backward(pairs, way)
        assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))


def test_side_stream_behind_a_slow_producer() -> None:
    """Fault 7: on the wrong stream the kernels would read before the data is there."""
    pairs = some_pairs()
    fresh = [(torch.randn_like(s), torch.randn_like(t)) for s, t in pairs]
    wanted = [x.clone() for x in forward_backward(fresh)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for old, new in zip(itertools.chain(*pairs), itertools.chain(*fresh), strict=True):
            old.copy_(new, non_blocking=True)
        got = forward_backward(pairs)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_no_host_synchronisation() -> None:
    pairs = some_pairs()
    forward_backward(pairs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for way in WAYS:
            forward_backward(pairs, way)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layers", [1, 64])
def test_one_launch_a_pass(layers: int) -> None:
    pairs = [pair(8, 40, device="cuda")] * layers
    forward_backward(pairs)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        forward_backward(pairs)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "_kernel" in e.name and "lwkd" in e.name]
    for name in ("sums_kernel", "distance_kernel", "mean_kernel", "mix_kernel"):
        assert sum(name in k for k in kernels) == 1, kernels


def test_a_thousand_repeats_are_the_same_bits() -> None:
    """Fault 13, with another stream contending for the chip."""
    pairs, names = some_pairs(), [*WAYS]
    first = {way: [x.clone() for x in forward_backward(pairs, way)] for way in names}
    noise = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(side):
                noise = (noise @ noise).tanh()
        way = names[i % 3]
        for a, b in zip(first[way], forward_backward(pairs, way), strict=True):
            same &= (a == b).all()
    assert bool(same)


@ways
def test_batch_beyond_a_grid_dimension(way: str) -> None:
    """Fault 5."""
    check(OPS, [pair(70_001, 5, dtype=B16, device="cuda")], way)


def test_more_than_two_to_the_31_elements() -> None:
    """Fault 4: in the batch, and in one row; read and written."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.fail("needs 30 GiB of free GPU memory")
    for shape, turned in (((2, 2**30 + 16), 0), ((1, 2**31 + 16), 0), ((1, 2**30 + 16, 2), 1)):
        x = torch.ones(shape, dtype=B16, device="cuda")
        y = x.clone()
        y.view(-1)[-1] = 3
        if turned:  # two rows that are not walked side by side
            x, y = x.mT, y.mT.contiguous()
        d, sums = OPS.jacobian_rows([x], [y], WAYS["difference"], False)
        assert d.tolist() == [[0.0] * (shape[0] - 1) + [4.0]]
        (g,) = OPS.jacobian_rows_backward(torch.ones_like(d), [x], [y], sums, [0], [0], 0)
        assert g[(-1,) * g.dim()] == -4
        assert g.count_nonzero() == 1


def test_memory_does_not_grow() -> None:
    """Fault 18."""
    pairs = some_pairs()
    forward_backward(pairs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(500):
        forward_backward(pairs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.two_gpus
def test_second_device() -> None:
    """Fault 8: tensors on cuda:1 while cuda:0 is current."""
    assert torch.cuda.current_device() == 0
    check(OPS, [pair(4, 3000, device="cuda:1")], "normalized")
    assert torch.cuda.current_device() == 0
