"""Jacobian matching and gradient transfer against torch.func, sample by sample, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from lwkd.losses import GradientAttentionTransfer, JacobianMatching

F64 = torch.float64
N, CLASSES = 5, 4


class Net(nn.Module):
    """Two convolutions and a head; ``features`` are what both convolutions put out."""

    def __init__(self, width: int, seed: int, classes: int = CLASSES, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, width, 3, stride)
        self.second = nn.Conv2d(width, 2 * width, 2)
        self.head = nn.LazyLinear(classes)
        self(torch.zeros(1, 2, 6, 6))
        self.double()

    def features(self, x: Tensor) -> list[Tensor]:
        first = self.first(x).tanh()
        return [first, self.second(first).tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[1].flatten(1))


def draw() -> tuple[Net, Net, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, 2, 6, 6, generator=g, dtype=F64).requires_grad_()
    return Net(3, 1), Net(5, 2), x, torch.tensor([0, 3, 1, 1, 2])


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters())


def jacobians(net: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """∂z/∂x of every sample and output, [N, C, K], in one way that shares nothing with ours."""
    one = jacrev(lambda v: functional_call(net, p, (v[None],))[0])
    return vmap(one)(x).flatten(2)


def distance(s: Tensor, t: Tensor, normalize: bool) -> Tensor:
    """[N] of rows [N, K]."""
    if normalize:
        s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
    return (s - t).square().sum(1)


def compare(got: Tensor, want: Tensor, net: nn.Module) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    ps = list(net.parameters())
    both = [torch.autograd.grad(v, ps, retain_graph=True, allow_unused=True) for v in (got, want)]
    for a, b in zip(*both, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("of", ["label", "top", 1, 3])
def test_outputs(of: Any, normalize: bool) -> None:
    student, teacher, x, y = draw()
    z, z_t = student(x), teacher(x)
    loss = JacobianMatching(0.7, alpha=0.3, of=of, normalize=normalize)
    terms = loss(z, z_t, x, y if of == "label" else None)
    assert terms.per_layer is None
    js = jacobians(student, parameters(student), x.detach())
    jt = jacobians(teacher, parameters(teacher), x.detach()).detach()
    k = 1 if isinstance(of, str) else of
    index = y[:, None] if of == "label" else z_t.detach().topk(k, 1).indices
    n = torch.arange(N)
    rows = [distance(js[n, i], jt[n, i], normalize).mean() for i in index.unbind(1)]
    want = 0.3 * (z - z_t.detach()).square().sum(1).mean() + 0.7 * torch.stack(rows).mean()
    compare(terms.total, want, student)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("normalize", [True, False])
def test_maps(normalize: bool) -> None:
    """Other channels, other resolution, other classes: the entry where the teacher's is largest."""
    student, x = draw()[0], draw()[2]
    teacher = Net(4, 7, classes=9, stride=2)
    loss = JacobianMatching(2.0, of="map", normalize=normalize)
    terms = loss(student.features(x), teacher.features(x), x)
    want = []
    for layer in (0, 1):

        def maps(net: Net, p: dict[str, Tensor], v: Tensor, layer: int = layer) -> Tensor:
            first = F.conv2d(v[None], p["first.weight"], p["first.bias"], net.first.stride).tanh()
            second = F.conv2d(first, p["second.weight"], p["second.bias"]).tanh()
            m = (first, second)[layer].square().sum(1)
            size = teacher.features(x.detach()[:1])[layer].shape[2:]
            return F.adaptive_avg_pool2d(m, size).flatten()

        rows = []
        tops = torch.stack([maps(teacher, parameters(teacher), v) for v in x.detach()]).argmax(1)
        for net in (student, teacher):
            jacobian = vmap(jacrev(lambda v, net=net: maps(net, parameters(net), v)))(x.detach())
            rows.append(jacobian[torch.arange(N), tops].flatten(1))
        want.append(distance(rows[0], rows[1].detach(), normalize).mean())
    torch.testing.assert_close(terms.per_layer, torch.stack(want), rtol=1e-10, atol=1e-13)
    compare(terms.total, 2.0 * torch.stack(want).sum(), student)


@pytest.mark.parametrize("channel_dim", [(1, -1), [(1, 3), (1, -1)], (-3, 3)])
def test_channels_of_student_and_teacher(channel_dim: Any) -> None:
    student, x = draw()[0], draw()[2]
    teacher = Net(4, 7)
    last = [a.movedim(1, -1) for a in teacher.features(x)]
    got = JacobianMatching(of="map", channel_dim=channel_dim)(student.features(x), last, x)
    want = JacobianMatching(of="map")(student.features(x), teacher.features(x), x)
    compare(got.total, want.total, student)


@pytest.mark.parametrize("channel_dim", [None, (None, -1), (1, 2), (None, 1)])
def test_tokens_and_an_image(channel_dim: Any) -> None:
    """The tokens behind a prefix are the teacher's positions, row by row."""
    student, x = draw()[0], draw()[2]
    teacher = Net(4, 7)
    features, folded = student.features(x)[:1], teacher.features(x)[:1]
    tokens = torch.cat([9 * x[:, :1, 0, :4], folded[0].flatten(2).mT], 1)  # one in front
    if channel_dim == (None, 1):
        tokens = tokens.mT
    loss = JacobianMatching(of="map", tokens=(None, (4, 4, 1)), channel_dim=channel_dim)
    want = JacobianMatching(of="map")(features, folded, x)
    compare(loss(features, [tokens], x).total, want.total, student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_of_half_precision(dtype: torch.dtype) -> None:
    """Their squares are beyond float16, and beyond the digits of bfloat16."""
    student, teacher, x, y = draw()
    net = student.float()
    x = x.detach().float().requires_grad_()
    z, z_t = (3000 * net(x)).to(dtype), teacher.float()(x).to(dtype)
    terms = JacobianMatching(0.0, alpha=0.5)(z, z_t, x, y)
    want = 0.5 * (z.double() - z_t.double()).square().sum(1).mean()
    assert want > 65504
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total.double(), want, rtol=1e-6, atol=0)


def test_gradient_transfer() -> None:
    student, teacher, x, y = draw()
    losses = [F.cross_entropy(net(x), y) for net in (student, teacher)]
    terms = GradientAttentionTransfer(3.0)(*losses, x)

    def rows(net: Net) -> Tensor:
        def one(v: Tensor, label: Tensor) -> Tensor:
            z = functional_call(net, parameters(net), (v[None],))
            return F.cross_entropy(z, label[None])

        return vmap(grad(one))(x.detach(), y).flatten(1)

    want = 1.5 * (rows(student) - rows(teacher).detach()).norm(dim=1).mean()
    compare(terms.total, want, student)


def test_a_copy_is_at_zero_with_gradient_zero() -> None:
    student, _, x, y = draw()
    copy = Net(3, 1)
    for terms in (
        JacobianMatching(of="top")(student(x), copy(x), x),
        JacobianMatching(of="map")(student.features(x), copy.features(x), x),
        GradientAttentionTransfer()(F.cross_entropy(student(x), y), F.cross_entropy(copy(x), y), x),
    ):
        assert terms.total.item() == 0.0
        grads = torch.autograd.grad(terms.total, list(student.parameters()), allow_unused=True)
        assert all(g is None or g.abs().max() <= 1e-14 for g in grads)


def test_matching_trains() -> None:
    """The student's Jacobian comes to point where the teacher's does."""
    student, teacher, x, y = draw()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    loss = JacobianMatching(1.0, alpha=0.0)
    first = last = 0.0
    for step in range(60):
        optimizer.zero_grad()
        terms = loss(student(x), teacher(x), x, y)
        terms.total.backward()
        optimizer.step()
        last = terms.total.item()
        first = last if step == 0 else first
    assert last < 0.2 * first


# --- the ground of it: noise on the inputs -------------------------------------------------------


def test_noise_on_the_inputs_is_jacobian_matching() -> None:
    """E‖d(x+ξ)‖² = ‖d‖² + σ²Σ_i(‖∇d_i‖² + d_i∇²d_i) + O(σ⁴), d = T − S: halving σ leaves a
    sixteenth of the rest. The expectation is Gauss–Hermite quadrature, exact to rounding here."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in "st"]
    x = torch.tensor([0.3, -0.4], dtype=F64)

    for p in (p for net in nets for p in net.parameters()):
        p.requires_grad_(False)

    def d(v: Tensor) -> Tensor:
        return nets[1](v) - nets[0](v)

    first = jacrev(d)(x)
    second = jacrev(jacrev(d))(x)
    laplace = second.diagonal(dim1=1, dim2=2).sum(1)
    slope = first.square().sum() + (d(x) * laplace).sum()
    nodes, weights = (torch.from_numpy(v) for v in hermite(12))
    rest = []
    for sigma in (0.2, 0.1, 0.05):
        noise = sigma * torch.cartesian_prod(nodes, nodes)
        mass = torch.outer(weights, weights).flatten()
        expected = (mass * d(x + noise).square().sum(1)).sum()
        rest.append(float(expected - d(x).square().sum() - sigma**2 * slope))
    for a, b in pairwise(rest):
        assert 13 < a / b < 19


def hermite(order: int) -> tuple[Any, Any]:
    """Nodes and weights of E over N(0, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return nodes, weights / math.sqrt(2 * math.pi)


# --- bad input -----------------------------------------------------------------------------------

X = torch.rand(3, 4, dtype=F64, requires_grad=True)
Z = X @ torch.ones(4, 5, dtype=F64)
Y = torch.tensor([0, 1, 2])
A, B = (X[:, :, None] * torch.rand(3, 4, k, dtype=F64) for k in (6, 7))  # three dimensions
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "beta": (lambda: JacobianMatching(-1.0), ValueError, "beta: expected a finite number ≥ 0"),
    "of": (lambda: JacobianMatching(of="best"), ValueError, "of: expected one of"),
    "of nothing": (lambda: JacobianMatching(of=0), ValueError, "an int ≥ 1, got 0"),
    "normalize": (lambda: JacobianMatching(normalize=None), TypeError, "True or False"),
    "no target": (lambda: JacobianMatching()(Z, Z, X), ValueError,
                  r"target: expected class indices int64 \[3\], got None"),
    "target": (lambda: JacobianMatching()(Z, Z, X, Y[:2]), ValueError, r"torch.int64 \[2\]"),
    "outputs": (lambda: JacobianMatching()(Z[0], Z, X, Y), ValueError,
                r"student: expected outputs \[3, C\], got shape \[5\]"),
    "heads": (lambda: JacobianMatching()(Z, Z[:, :4], X, Y), ValueError, "over the same classes"),
    "too many": (lambda: JacobianMatching(of=6)(Z, Z, X), ValueError, "at most 5 outputs, got 6"),
    "no gradient": (lambda: JacobianMatching()(Z, Z, X.detach(), Y), RuntimeError,
                    "inputs: expected a tensor that requires a gradient"),
    "a teacher without a graph": (lambda: JacobianMatching()(Z, Z.detach(), X, Y), RuntimeError,
                                  "teacher: expected what was computed from inputs"),
    "another input": (lambda: JacobianMatching()(Z, Z, X.clone(), Y), RuntimeError, "student"),
    "no lists": (lambda: JacobianMatching(of="map")(Z, Z, X), TypeError, "student"),
    "lengths": (lambda: JacobianMatching(of="map")([A], [A, A], X), ValueError,
                r"losses\.JacobianMatching: teacher: expected 1 tensors, as many .* got 2"),
    "an empty list": (lambda: JacobianMatching(of="map")([A], [], X), ValueError,
                      r"losses\.JacobianMatching: teacher: expected at least one tensor"),
    "no tensor": (lambda: JacobianMatching(of="map")([A, A], [A, None], X), TypeError,
                  r"JacobianMatching: teacher \(layer 1\): expected a tensor, got NoneType"),
    "no space": (lambda: JacobianMatching(of="map")([Z], [A], X), ValueError,
                 r"JacobianMatching: student \(layer 0\): expected \[N, C, \*space\].* \[3, 5\]"),
    "channels unsaid": (lambda: JacobianMatching(of="map")([A], [A], X), ValueError,
                        r"losses\.JacobianMatching: channel_dim \(layer 0\): expected an int for"),
    "channels of three": (lambda: JacobianMatching(of="map", channel_dim=(1, 1, 1))([A], [A], X),
                          ValueError, r"channel_dim: expected a \(student, teacher\) pair"),
    "tokens": (lambda: JacobianMatching(of="map", tokens=(2, 2, 0)), ValueError,
               r"losses\.JacobianMatching: tokens: expected None or a \(student, teacher\) pair"),
    "other tokens": (lambda: JacobianMatching(of="map", tokens=((2, 2, 0), (2, 2, 0)))(
                     [A.mT[:, :4]], [B.mT], X), ValueError,
                     r"Matching: teacher \(layer 0\): expected tokens \[N, 4, D\].*\[3, 7, 4"),
    "a target out of range": (lambda: JacobianMatching()(Z, Z, X, Y + 3), ValueError,
                              r"Matching: target: expected class indices in \[0, 5\), got 3 to 5"),
    "an ignored target": (lambda: JacobianMatching()(Z, Z, X, Y - 100), ValueError,
                          r"target: expected class indices in \[0, 5\), got -100 to -98"),
    "a target elsewhere": (lambda: JacobianMatching()(Z, Z, X, Y.to("meta")), ValueError,
                           "target: expected a tensor on cpu, as the outputs, got meta"),
    "a loss of samples": (lambda: GradientAttentionTransfer()(Z.sum(1), Z.sum(), X), ValueError,
                          r"student_loss: expected a scalar.*shape \[3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, exception, text = ERRORS[name]
    with pytest.raises(exception, match=text):
        call()
    assert X.grad is None
