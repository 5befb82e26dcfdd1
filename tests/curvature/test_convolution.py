"""Convolutions of the curvature's graphs, against torch's own second backward pass, float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lwkd import hessian_trace
from lwkd.curvature.convolution import Convolutions
from lwkd.curvature.linear import linearity
from lwkd.curvature.nodes import nodes
from tests import cases
from tests.curvature.networks import X, Y, exact, network

F64 = torch.float64
FORMS = [
    {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for stride, padding, dilation, groups in itertools.product((1, 2), (0, 1), (1, 2), (1, 2))
]


def seconds(
    run: Callable[..., Tensor], tensors: list[Tensor], mode: bool, only: int | None = None
) -> tuple[list[Tensor], list[Tensor | None], set[str]]:
    """First and second derivatives, and the names of the graph's nodes."""
    wanted = set(map(id, tensors))
    with Convolutions(wanted) if mode else nullcontext():
        z = run(*tensors)
    names = {node.name() for node in nodes(z)}
    grads = torch.autograd.grad(z.sin().sum(), tensors, create_graph=True)
    vs = [cases.draw(tuple(g.shape), F64, 9 + i) for i, g in enumerate(grads)]
    if only is not None:
        grads, vs, tensors = grads[only : only + 1], vs[only : only + 1], tensors[only : only + 1]
        wanted.clear()
        wanted.update(map(id, tensors))
    found = torch.autograd.grad(grads, tensors, vs, allow_unused=True, retain_graph=True)
    return list(grads), list(found), names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_second_derivatives(dims: int, bias: bool) -> None:
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    for form, only in itertools.product(FORMS, (None, 0, 1)):
        shapes = [(2, 4, *[6] * dims), (6, 4 // form["groups"], *[3] * dims), (6,)][: 2 + bias]
        tensors = [cases.draw(s, F64, i).requires_grad_() for i, s in enumerate(shapes)]

        def run(*args: Tensor, form: Any = form) -> Tensor:
            return conv(*args, **form)

        first, second, names = seconds(run, tensors, True, only)
        assert "LwkdConvolutionBackward" in names
        with Convolutions(set()):
            z = run(*tensors)
        assert linearity(z, [[x] for x in tensors]) == [True] * len(tensors)
        assert linearity(z, [tensors[:2]]) == [False]
        want_first, want_second, _ = seconds(run, tensors, False, only)
        for got, want in zip(first + second, want_first + want_second, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: F.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x[0], w),
        lambda x, w: F.conv_transpose2d(x, w),
    ],
)
def test_what_is_left_to_torch(run: Callable[..., Tensor]) -> None:
    shapes = [(2, 4, 6, 6), (4, 4, 3, 3)]
    tensors = [cases.draw(s, F64, i).requires_grad_() for i, s in enumerate(shapes)]
    *_, names = seconds(run, tensors, True)
    assert "ConvolutionBackward0" in names


def test_several_probes_at_once() -> None:
    x, w = cases.draw((2, 4, 6, 6), F64, 1), cases.draw((3, 4, 3, 3), F64, 2).requires_grad_()
    with Convolutions({id(w)}):
        z = F.conv2d(x, w)
    (g,) = torch.autograd.grad(z.pow(3).sum(), w, create_graph=True)
    vs = cases.draw((5, 3, 4, 3, 3), F64, 3)
    many = torch.autograd.grad(g, w, vs, is_grads_batched=True, retain_graph=True)[0]
    for v, got in zip(vs, many, strict=True):
        (want,) = torch.autograd.grad(g, w, v, retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("estimator", ["block", "hutchinson", "split", "auto"])
def test_weights_that_are_computed(estimator: str) -> None:
    """A parametrized convolution's weight is no parameter: its gradient leads to one."""

    class Tanh(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.tanh()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 4)).double()
    parametrize.register_parametrization(net[0], "weight", Tanh())
    got = hessian_trace(net, F.cross_entropy, (X, Y), ["0"], estimator=estimator, probes=600)
    want = exact(net, layers=["0"]).trace
    assert ((got.mean - want).abs() <= 4 * got.stderr).all()
    assert float(got.mean) != 0


@pytest.mark.parametrize("estimator", ["auto", "block", "hutchinson", "split"])
def test_a_network_that_recomputes(estimator: str) -> None:
    """Activation checkpointing runs a part again, outside the mode."""

    class Checkpointed(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda z: F.gelu(self.net.c1(z)), x, use_reentrant=False)
            x = checkpoint(lambda z: F.gelu(self.net.c2(z)), x, use_reentrant=False)
            return self.net.head(x.flatten(1))

    net = network("CNN, GELU")
    net.norm = nn.Identity()
    layers = ["c1", "c2", "head"]
    want = hessian_trace(net, F.cross_entropy, (X, Y), layers, estimator=estimator, probes=2)
    layers = [f"net.{n}" for n in layers]
    got = hessian_trace(
        Checkpointed(net), F.cross_entropy, (X, Y), layers, estimator=estimator, probes=2
    )
    assert got.estimator == want.estimator
    torch.testing.assert_close(got.samples, want.samples, rtol=1e-9, atol=1e-12)
