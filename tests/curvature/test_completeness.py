"""Networks whose factors are not their layers' gradients, and derivatives that are not to be had.

Every one is linear in the layers asked about, so that nothing else keeps "auto" from factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lwkd import hessian_trace
from tests import cases
from tests.curvature.networks import exact

F64 = torch.float64
N, C = 6, 4
X = cases.draw((N, 5), F64, 1)
Y = torch.tensor([2, 0, 3, 1, 1, 2])
EDGES = torch.softmax(cases.draw((N, N), F64, 3), 1)


class Net(nn.Module):
    """Layers a and b, and a forward that is given."""

    def __init__(self, a: nn.Module, b: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self._run = a, b, forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.a, self.b, x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.rand(5, 5)), nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w, x * self.v


class Fuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.w[0] * xs[0] + self.w[1] * xs[1]


class Equalised(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 3 * weight, bias)


def linear(outputs: int = C, inputs: int = 5) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def hooked() -> nn.Linear:
    layer = linear(5)
    layer.register_forward_hook(lambda m, i, out: 3 * out)
    return layer


def patched() -> nn.Linear:
    layer = linear(5)
    layer.forward = lambda x: F.linear(x, 3 * layer.weight, layer.bias)  # type: ignore[method-assign]
    return layer


# name: (a, b, forward, the estimators that auto must find)
BLOCK, FACTORS = "block", "gauss_newton"
CASES: dict[str, Callable[[], tuple[Net, tuple[str, str]]]] = {
    "a graph network": lambda: (
        Net(linear(5), linear(), lambda a, b, x: EDGES @ b((EDGES @ a(x)).relu())), (BLOCK, BLOCK)
    ),
    "centred over the batch": lambda: (
        Net(linear(5), linear(), lambda a, b, x: 3 * (z := b(a(x).relu())) - 3 * z.mean(0)),
        (BLOCK, BLOCK),
    ),
    "prototypes, as many as samples": lambda: (
        Net(linear(5), nn.Linear(3, 5), lambda a, b, x: a(x) @ b(EDGES[:, :3]).T), (FACTORS, BLOCK)
    ),
    "a parameter used outside too": lambda: (
        Net(Scale(), linear(), lambda a, b, x: b(a(x) + (2 * x).flip(1) * a.s)), (BLOCK, FACTORS)
    ),
    "two outputs": lambda: (
        Net(Two(), linear(), lambda a, b, x: b(a(x)[0] + a(x)[1].flip(1))), (BLOCK, FACTORS)
    ),
    "a list of tensors": lambda: (
        Net(Fuse(), linear(), lambda a, b, x: b(a([x, x.flip(1).abs()]))), (BLOCK, FACTORS)
    ),
    "a hook that changes the output": lambda: (
        Net(hooked(), linear(), lambda a, b, x: b(a(x).relu())), (FACTORS, FACTORS)
    ),
    "a forward of its own": lambda: (
        Net(patched(), linear(), lambda a, b, x: b(a(x).relu())), (FACTORS, FACTORS)
    ),
    "a convolution of its own": lambda: (
        Net(Equalised(1, 2, 3), linear(C, 6), lambda a, b, x: b(a(x[:, None]).flatten(1))),
        (FACTORS, FACTORS),
    ),
    "a dictionary": lambda: (
        Net(Scale(), linear(), lambda a, b, x: b(a(x))), (FACTORS, FACTORS)
    ),
    "under no_grad": lambda: (
        Net(linear(5), linear(), lambda a, b, x: b(without_grad(a, x))), (BLOCK, FACTORS)
    ),
}  # fmt: skip


def without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = layer(x)
    return out


def net_of(name: str) -> tuple[Net, tuple[str, str]]:
    torch.manual_seed(0)
    net, want = CASES[name]()
    return net.double(), want


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_factors_only_where_they_are_the_gradient(name: str) -> None:
    net, estimators = net_of(name)
    y = Y if "prototypes" not in name else Y.clone()
    got = hessian_trace(net, F.cross_entropy, (X, y), ["a", "b"], probes=200, seed=5)
    assert got.estimator == estimators, got.reason
    want = exact(net, x=X, y=y, layers=["a", "b"]).trace
    if name == "under no_grad":  # torch.func sees no such thing
        want[0] = 0
    assert ((got.mean - want).abs() <= 4 * got.stderr + 1e-12).all(), (got.mean, want, got.stderr)


@pytest.mark.parametrize("name", [n for n in CASES if BLOCK in net_of(n)[1]])
@pytest.mark.parametrize("options", [{"estimator": "gauss_newton"}, {"estimator": "split"},
                                     {"exact": True}])  # fmt: skip
def test_asked_for_factors_it_raises(name: str, options: dict[str, Any]) -> None:
    net, _ = net_of(name)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=r"\(layer '(a|b)"):
        hessian_trace(net, F.cross_entropy, (X, Y), ["a", "b"], **options)


# --- derivatives that are not to be had ----------------------------------------------------------


class RawGelu(torch.autograd.Function):
    """With a backward that autograd does not record, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(z).sum(), z)
        with torch.no_grad():
            return g * slope


@pytest.mark.parametrize("estimator", ["auto", "split", "block", "hutchinson"])
def test_a_backward_without_a_graph_is_refused(estimator: str) -> None:
    torch.manual_seed(0)
    net = Net(linear(5), linear(), lambda a, b, x: b(RawGelu.apply(a(x)))).double()
    with pytest.raises(RuntimeError, match="model: expected operations that can be differentiated"):
        hessian_trace(net, F.cross_entropy, (X, Y), ["a", "b"], estimator=estimator)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "split", "block", "hutchinson"])
@pytest.mark.parametrize("layers", [["a"], ["a", "b"]])
def test_a_reentrant_checkpoint_is_refused(estimator: str, layers: list[str]) -> None:
    torch.manual_seed(0)
    stem = nn.Linear(5, 5).double()
    net = Net(linear(5), linear(), lambda a, b, x: b(
        checkpoint(lambda z: a(z).relu(), stem(x), use_reentrant=True)
    )).double()  # fmt: skip
    with pytest.raises(RuntimeError, match=r"(use_reentrant=False|under no_grad or checkpointed)"):
        hessian_trace(net, F.cross_entropy, (X, Y), layers, estimator=estimator)


def test_a_gradient_that_is_constant_is_no_error() -> None:
    """Of a rounding, say: 0, and without a graph."""
    torch.manual_seed(0)
    net = Net(linear(5), linear(), lambda a, b, x: b(x) + a(x).floor()[:, :C]).double()
    got = hessian_trace(net, F.cross_entropy, (X, Y), ["a", "b"], estimator="block", probes=50)
    assert got.mean[0] == 0
    assert got.mean[1] > 0


def test_sparse_gradients_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Embedding(10, 5, sparse=True), nn.Flatten(), nn.Linear(10, C)).double()
    x = torch.randint(10, (N, 2))
    with pytest.raises(RuntimeError, match="sparse=True"):
        hessian_trace(net, F.cross_entropy, (x, Y), estimator="block")
    got = hessian_trace(net, F.cross_entropy, (x, Y), exact=True)
    dense = nn.Sequential(nn.Embedding(10, 5), nn.Flatten(), net[2]).double()
    dense[0].weight = nn.Parameter(net[0].weight.detach())
    want = hessian_trace(dense, F.cross_entropy, (x, Y), exact=True)
    torch.testing.assert_close(got.mean, want.mean)


def test_an_embedding_that_changes_in_the_forward_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(10, 5, max_norm=1.0), nn.Flatten(), nn.Linear(10, C)).double()
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"layer '0'\): expected embeddings without max_norm"):
        hessian_trace(net, F.cross_entropy, (torch.randint(10, (N, 2)), Y), estimator="block")
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("estimator", ["auto", "block", "gauss_newton"])
def test_one_sample_without_a_batch(estimator: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(linear(), nn.ReLU(), linear(C, C)).double()
    x, y = X[0], Y[0]
    if estimator == "gauss_newton":
        with pytest.raises((ValueError, RuntimeError), match=r"\(layer '(0|2)'\)"):
            hessian_trace(net, F.cross_entropy, (x, y), estimator=estimator)
        return
    got = hessian_trace(net, F.cross_entropy, (x, y), estimator=estimator, probes=400)
    want = exact(net, x=x, y=y, layers=["0", "2"]).trace
    assert ((got.mean - want).abs() <= 4 * got.stderr + 1e-12).all(), (got.mean, want)


# --- what else a user's network has ---------------------------------------------------------------


def test_hooks_of_parameters_are_left_out_and_kept() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, C)).double()
    want = hessian_trace(net, F.cross_entropy, (X, Y), estimator="block")
    heard = []
    net[0].weight.register_hook(lambda g: heard.append(1) or 0.5 * g)
    got = hessian_trace(net, F.cross_entropy, (X, Y), estimator="block")
    assert torch.equal(got.samples, want.samples)
    assert not heard
    F.cross_entropy(net(X), Y).backward()
    assert heard == [1]


def test_the_loss_gets_what_the_network_puts_out() -> None:
    class Heads(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.a, self.b, self.kind = linear(), linear(), kind

        def forward(self, x: Tensor) -> Any:
            a, b = self.a(x), self.b(x)
            return (a, b) if self.kind == "tuple" else {"a": a, "b": b}

    torch.manual_seed(0)
    tuples, dicts = Heads("tuple").double(), Heads("dict").double()
    dicts.load_state_dict(tuples.state_dict())

    def loss(out: Any, y: Tensor) -> Tensor:
        a, b = out.values() if isinstance(out, dict) else out
        return F.cross_entropy(a, y) + 0.4 * F.cross_entropy(b, y)

    want = exact(tuples, loss, x=X, y=Y, layers=["a", "b"]).trace
    for net in (tuples, dicts):
        got = hessian_trace(net, loss, (X, Y), ["a", "b"], probes=200)
        assert got.estimator == ("block", "block")
        assert ((got.mean - want).abs() <= 4 * got.stderr).all()
    with pytest.raises(ValueError, match="model: expected a network that puts out a floating"):
        hessian_trace(dicts, F.cross_entropy, (X, Y))


def test_layers_of_their_own_without_a_parameter_twice() -> None:
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.patch = nn.Linear(5, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, C)
            nn.utils.parametrize.register_parametrization(self.head, "weight", nn.Softplus())

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)[:, None]], 1)
            return self.head(self.attention(x, x, x)[0][:, 0])

    torch.manual_seed(0)
    net = ViT().double()
    got = hessian_trace(net, F.cross_entropy, (X, Y), probes=200)
    assert got.layers == ("token", "patch", "attention", "head")
    assert set(got.estimator) == {"block"}
    want = exact(net, x=X, y=Y, layers=got.layers).trace
    assert ((got.mean - want).abs() <= 4 * got.stderr).all(), (got.mean, want)
    again = hessian_trace(net, F.cross_entropy, (X, Y), got.layers, probes=200)
    assert torch.equal(got.samples, again.samples)


def test_a_parameter_beside_modules_leaves_them_their_factors() -> None:
    """A token at the root, in a network that outputs are linear in, layer by layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(5))
            self.a, self.b = linear(5), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + self.token).relu())

    torch.manual_seed(0)
    net = Net().double()
    got = hessian_trace(net, F.cross_entropy, (X, Y), exact=True)
    assert got.layers == ("token", "a", "b")
    want = exact(net, x=X, y=Y, layers=got.layers).trace
    torch.testing.assert_close(got.mean, want, rtol=1e-10, atol=1e-12)


# --- several batches ------------------------------------------------------------------------------


class Routed(nn.Module):
    """One of two experts, by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([linear(5), linear(5)])
        self.head = linear()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.experts[int(x.sum() > 0)](x).relu())
        return out


def test_every_batch_is_looked_at() -> None:
    """ELU is linear where its input is positive, and an expert may not run."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.ELU(), nn.Linear(5, C)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(5))
    batches = [(X.abs() + 1, Y), (X - 1, Y)]
    for order in (batches, batches[::-1]):
        got = hessian_trace(net, F.cross_entropy, order, probes=300)
        assert got.estimator == ("block", "gauss_newton")
        x, y = (torch.cat(parts) for parts in zip(*order, strict=True))
        want = exact(net, x=x, y=y, layers=["0", "2"]).trace
        assert ((got.mean - want).abs() <= 4 * got.stderr).all(), (got.mean, want)
    routed = Routed().double()
    layers = ["experts.0", "experts.1", "head"]
    batches = [(X.abs(), Y), (-X.abs(), Y)]
    for order in (batches, batches[::-1]):
        got = hessian_trace(routed, F.cross_entropy, order, layers, probes=50)
        alone = [hessian_trace(routed, F.cross_entropy, b, layers[k : k + 1], exact=True).mean
                 for k, b in ((1, batches[0]), (0, batches[1]))]  # fmt: skip
        want = torch.cat([alone[1] / 2, alone[0] / 2])
        assert ((got.mean[:2] - want).abs() <= 4 * got.stderr[:2]).all(), (got.mean, want)


@pytest.mark.parametrize("loss", [
    nn.CrossEntropyLoss(reduction="sum"),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=F64)),
    nn.CrossEntropyLoss(label_smoothing=0.1),
])  # fmt: skip
def test_several_batches_are_one_loss(loss: nn.Module) -> None:
    """Summed, or divided by what counts in all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, C)).double()
    want = hessian_trace(net, loss, (X, Y), exact=True).mean
    parts = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    torch.testing.assert_close(hessian_trace(net, loss, parts, exact=True).mean, want)


def test_squared_errors_that_broadcast() -> None:
    net, y = nn.Sequential(nn.Linear(5, 1)).double(), cases.draw((N, 5), F64, 4)
    loss = nn.MSELoss(reduction="sum")
    with pytest.raises(ValueError, match=r"target: expected \[6, 1\], as the output's, got \[6, 5"):
        hessian_trace(net, loss, (X, y), estimator="gauss_newton")
    got = hessian_trace(net, loss, (X, y), probes=400)
    want = exact(net, loss, x=X, y=y, layers=["0"]).trace
    assert ((got.mean - want).abs() <= 4 * got.stderr).all()


def test_probabilities_out_of_range_are_named() -> None:
    net = nn.Sequential(nn.Linear(5, 1), nn.Sigmoid()).double()
    with pytest.raises(ValueError, match=r"target: expected probabilities in \[0, 1\], got 0 to 2"):
        hessian_trace(net, nn.BCELoss(), (X, torch.tensor([[0.0], [2.0]] * 3, dtype=F64)))


# --- a network that fits -------------------------------------------------------------------------


def test_of_a_network_that_is_sure_the_standard_error_holds() -> None:
    """Random classes would almost all be the network's own, and their vectors nothing."""
    torch.manual_seed(0)
    x = cases.draw((128, 5), F64, 9)
    y = (3 * x[:, :4]).argmax(1)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, C)).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert float(F.cross_entropy(net(x), y)) < 0.02
    want = hessian_trace(net, F.cross_entropy, (x, y), exact=True).mean
    far = 0
    for seed in range(40):
        got = hessian_trace(net, F.cross_entropy, (x, y), probes=16, seed=seed)
        assert set(got.estimator) == {"gauss_newton"}
        assert (got.stderr <= 0.1 * want).all(), (got.stderr, want)
        far += int(((got.mean - want).abs() > 3 * got.stderr).sum())
    assert far <= 4  # of 80; Student's t of 15 degrees has 0.9 % beyond
