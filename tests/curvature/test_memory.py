"""What an estimate holds in memory at once, beside a plain Hessian-vector product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.cases import resnet
from lwkd import hessian_trace
from tests.meters.test_jacobian_memory import Peak
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize(
    ("estimator", "most"),
    [("gauss_newton", 0.6), ("block", 1.1), ("auto", 1.1), ("hutchinson", 1.2)],
)
def test_an_estimate_holds_no_more_than_one_product(estimator: str, most: float) -> None:
    """However many probes: the first-order graph, and one second backward pass that keeps it."""
    torch.manual_seed(0)
    net = resnet((1, 1, 1, 1), bottleneck=False, width=16, classes=10).eval()
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    params = list(net.parameters())
    with Peak(net) as product:
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
        signs = [torch.ones_like(p) for p in params]
        torch.autograd.grad(grads, params, signs, retain_graph=True)
    peaks = []
    for probes in (1, 4):
        with Peak(net) as peak:
            hessian_trace(net, F.cross_entropy, (x, y), estimator=estimator, probes=probes)
        peaks.append(peak.bytes / product.bytes)
    assert peaks[1] <= most, peaks
    assert peaks[1] <= 1.01 * peaks[0], peaks
