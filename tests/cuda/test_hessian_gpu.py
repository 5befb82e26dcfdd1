"""The Hessian kind on a GPU: what tests/ops/test_hessian.py does not ask for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lwkd
from lwkd.ops import backends, philox
from tests import cases
from tests.curvature.networks import LAYERS, X, Y, exact, network

pytestmark = pytest.mark.gpu
each_backend = pytest.mark.parametrize("backend", ["compiled", "triton"])


@pytest.fixture(autouse=True)
def _kernels_answer():
    assert backends.CUDA.live, backends.CUDA.reason
    yield
    torch.cuda.synchronize()  # an error of this test is not blamed on the next


def some_products() -> list[Tensor]:
    """Whole blocks and tails, every dtype, strides, data that is not aligned."""
    out = [cases.draw((k,), dtype, k).cuda()
           for k in (1, 4096, 40_001) for dtype in cases.DTYPES["bf16/f32"]]  # fmt: skip
    weight = cases.draw((64, 32, 3, 3), torch.float32, 1).cuda()
    return [*out, weight.to(memory_format=torch.channels_last), weight.flatten()[1:]]


@each_backend
def test_a_graph_captures_probes(backend: str) -> None:
    hvps = some_products()
    eager = lwkd.ops.probe_dot(hvps, seed=1, backend=backend)  # warm: kernels are loaded
    signs = lwkd.ops.rademacher(hvps[-2], seed=1, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dots = lwkd.ops.probe_dot(hvps, seed=1, backend=backend)
        made = lwkd.ops.rademacher(hvps[-2], seed=1, backend=backend)
    for _ in range(3):
        dots.fill_(torch.nan)
        graph.replay()
        assert torch.equal(dots, eager)
        assert torch.equal(made, signs)


@each_backend
def test_a_large_parameter(backend: str) -> None:
    """25 million elements, as of all of ResNet-50: more blocks than one wave."""
    h = torch.ones(25_557_032, device="cuda")
    got = lwkd.ops.probe_dot([h], seed=3, backend=backend)
    assert float(got) == float(philox.signs(h, 3, 0).sum())


@each_backend
def test_no_host_waits(backend: str) -> None:
    hvps = some_products()
    lwkd.ops.probe_dot(hvps, seed=1, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lwkd.ops.probe_dot(hvps, seed=1, backend=backend)
        lwkd.ops.rademacher(hvps[0], seed=1, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["CNN, ReLU", "transformer"])
def test_traces_are_those_of_the_cpu(name: str) -> None:
    """The same probes: the same samples, but for rounding."""
    net = network(name)
    want = lwkd.hessian_trace(net, F.cross_entropy, (X, Y), LAYERS[name], probes=8)
    got = lwkd.hessian_trace(net.cuda(), F.cross_entropy, (X, Y), LAYERS[name], probes=8)
    assert got.estimator == want.estimator
    torch.testing.assert_close(got.samples.cpu(), want.samples, rtol=1e-8, atol=1e-12)
    if name == "CNN, ReLU":
        whole = lwkd.hessian_trace(net, F.cross_entropy, (X, Y), LAYERS[name], exact=True)
        truth = exact(net.cpu(), layers=LAYERS[name]).trace
        torch.testing.assert_close(whole.mean.cpu(), truth, rtol=1e-9, atol=1e-12)
