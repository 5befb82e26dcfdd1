"""channel_importance against zeroing one filter after the other, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.losses import DELTA, channel_importance
from tests.curvature.networks import CNN, LAYERS, NETWORKS, X, Y, network

F64 = torch.float64


def zeroed(net: nn.Module, layer: str, x: Tensor = X, y: Tensor = Y) -> Tensor:
    """How the loss rises, weight by weight set to 0 and put back."""
    module = net.get_submodule(layer)
    rises = []
    with torch.no_grad():
        base = F.cross_entropy(net(x), y)
        for c in range(len(module.weight)):
            kept = module.weight[c].clone()
            module.weight[c] = 0
            rises.append(F.cross_entropy(net(x), y) - base)
            module.weight[c] = kept
    return torch.stack(rises)


def from_the_formula(rise: Tensor) -> Tensor:
    z = (rise - rise.mean()) / rise.var(correction=0).sqrt()
    return (z / 5).exp() / (z / 5).exp().sum()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_it_is_what_zeroing_filters_gives(name: str, chunk: int | None) -> None:
    net = network(name)
    layers = [n for n in LAYERS[name] if n != "attention"]
    before = copy.deepcopy(net.state_dict())
    got = channel_importance(net, [(X, Y)], layers, chunk=chunk)
    for layer in layers:
        want = zeroed(net, layer)
        torch.testing.assert_close(got.rise[layer], want, rtol=1e-9, atol=1e-12)
        weights = from_the_formula(want).float()
        torch.testing.assert_close(got.weights[layer], weights, rtol=1e-5, atol=0)
    assert got.loss == pytest.approx(float(F.cross_entropy(net(X), Y).detach()), rel=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    DELTA(got.weights)


def test_other_modules_lose_their_channel() -> None:
    """A block, a ReLU: the output is 0."""
    net = network("MLP")
    got = channel_importance(net, [(X, Y)], ["2"]).rise["2"]
    with torch.no_grad():
        h = net[2](net[1](net[0](X)))
        base = F.cross_entropy(net[3](h), Y)
        for c in range(5):
            cut = h.clone()
            cut[:, c] = 0
            torch.testing.assert_close(got[c], F.cross_entropy(net[3](cut), Y) - base)


def test_batches_are_one_mean() -> None:
    net = network("CNN, ReLU")
    whole = channel_importance(net, (X, Y), ["c2"])
    parts = [(X[:1], Y[:1]), (X[1:4], Y[1:4]), (X[4:], Y[4:])]
    got = channel_importance(net, iter(parts), ["c2"])
    torch.testing.assert_close(got.rise["c2"], whole.rise["c2"], rtol=1e-9, atol=1e-12)
    first = channel_importance(net, parts, ["c2"], batches=1)
    torch.testing.assert_close(
        first.rise["c2"], channel_importance(net, parts[:1], ["c2"]).rise["c2"]
    )


def test_first_order() -> None:
    """The slope of the loss along every filter's removal, by a difference quotient."""
    net = network("CNN, GELU")
    got = channel_importance(net, [(X, Y)], ["c1", "norm"], method="first_order")
    h = 1e-6
    for layer in ("c1", "norm"):
        module = net.get_submodule(layer)
        for c in range(len(module.weight)):
            losses = []
            for sign in (1, -1):
                kept = module.weight[c].clone()
                with torch.no_grad():
                    module.weight[c] *= 1 - sign * h
                    losses.append(F.cross_entropy(net(X), Y))
                    module.weight[c] = kept
            slope = (losses[0] - losses[1]) / (2 * h)
            torch.testing.assert_close(got.rise[layer][c], slope.detach(), rtol=1e-6, atol=1e-9)


def test_equal_channels_weigh_alike() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)).double()
    x = torch.rand(5, 4, dtype=F64)
    got = channel_importance(net, [(x, None)], ["0"], loss_fn=lambda z, _: z.sum() * 0)
    assert got.weights["0"].tolist() == pytest.approx([1 / 3] * 3)


def test_what_cannot_take_several_at_once() -> None:
    """A network that looks at values runs one channel at a time, says so, and is right."""

    class Looks(CNN):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.c1(x))
            if float(x.sum()) < 0:
                x = -x
            return self.head(self.act(self.norm(self.c2(x))).flatten(1))

    torch.manual_seed(1)
    net = Looks(nn.ReLU()).double().eval()
    with pytest.warns(UserWarning, match=r"layer 'c1'\): one channel at a time"):
        got = channel_importance(net, [(X, Y)], ["c1"]).rise["c1"]
    torch.testing.assert_close(got, zeroed(net, "c1"), rtol=1e-9, atol=1e-12)


def test_everything_is_left_as_it_was() -> None:
    net = CNN(nn.ReLU(True)).double().train()
    net.c1.weight.grad = torch.ones_like(net.c1.weight)
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()

    def same() -> bool:
        hooks = sum(len(m._forward_hooks) for m in net.modules())
        weights = all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
        modes = all(m.training for m in net.modules())
        grads = [p.grad is not None for p in net.parameters()]
        return weights and modes and not hooks and sum(grads) == 1 and grads[0]

    for method in ("ablation", "first_order"):
        channel_importance(net, [(X, Y)], ["c1", "norm"], method=method)
        assert same()
        calls: list[int] = []

        def fails(z: Tensor, y: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) > 1:
                raise KeyError("here")
            return F.cross_entropy(z, y)

        with pytest.raises(KeyError):
            channel_importance(net, [(X, Y)], ["c1"], method=method, loss_fn=fails)
        assert same()
    assert torch.equal(before[1], torch.get_rng_state())


def test_errors() -> None:
    net = network("MLP")

    def call(*args: Any, **options: Any) -> Any:
        return lambda: channel_importance(*args, **options)

    unused = network("MLP")
    unused.extra = nn.Linear(2, 2).double()
    unused.forward = lambda x: net(x)
    for run, kind, text in (
        (call(net, [(X, Y)], ["4"]), ValueError, "layers: expected names of modules"),
        (call(net, [(X, Y)], "1"), TypeError, "layers: expected a list of names"),
        (call(net, [(X, Y)], []), ValueError, "layers: expected one name at least"),
        (call(net, [], ["1"]), ValueError, "loader: expected one batch at least"),
        (call(net, X, ["1"]), TypeError, "batch: expected|loader: expected"),
        (call(net, [(X, Y)], ["1"], method="taylor"), ValueError, "method: expected one of"),
        (call(net, [(X, Y)], ["1"], chunk=0), ValueError, "chunk: expected an int ≥ 1"),
        (call(net, [(X, Y)], ["1"], batches=0), ValueError, "batches: expected an int ≥ 1"),
        (call(net, [(X, Y)], ["1"], temperature=0), ValueError, "temperature"),
        (call(net, [(X, Y)], ["1"], loss_fn=lambda z, y: z), ValueError, "loss_fn: expected a sca"),
        (call(net, [(X * torch.nan, Y)], ["1"]), ValueError, "loss_fn: expected .*finite"),
        (call(net, [(X, Y)], ["2"], channel_dim=5), TypeError, r"layer '2'\): expected a floating"),
        (call(unused, [(X, Y)], ["extra"]), ValueError, r"layer 'extra'\): expected a layer that"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
