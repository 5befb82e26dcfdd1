"""channel_importance against zeroing one filter after the other, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.losses import DELTA, channel_importance
from tests.curvature.networks import CNN, LAYERS, NETWORKS, X, Y, network

F64 = torch.float64


def zeroed(net: nn.Module, layer: str, x: Tensor = X, y: Tensor = Y, dim: int = 0) -> Tensor:
    """How the loss rises, weight by weight set to 0 and put back; dim: where its filters are."""
    module = net.get_submodule(layer)
    rises = []
    with torch.no_grad():
        base = F.cross_entropy(net(x), y)
        for c in range(module.weight.shape[dim]):
            kept = module.weight.select(dim, c).clone()
            module.weight.select(dim, c).zero_()
            rises.append(F.cross_entropy(net(x), y) - base)
            module.weight.select(dim, c).copy_(kept)
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


# --- where the channels are ----------------------------------------------------------------------


class Tokens(nn.Module):
    """[N, 1, 6, 6] -> tokens [N, 6, 6] -> a block -> a norm -> logits."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.block, self.norm = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), norm
        self.head = nn.Linear(6, 4)
        for p in norm.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x[:, 0])).square().mean(1))


@pytest.mark.parametrize("channel_dim", [None, 1])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_norms_of_tokens(norm: Callable[[int], nn.Module], channel_dim: int | None) -> None:
    net = Tokens(norm(6)).double()
    got = channel_importance(net, [(X, Y)], ["norm"], channel_dim=channel_dim).rise["norm"]
    torch.testing.assert_close(got, zeroed(net, "norm"), rtol=1e-9, atol=1e-12)


def test_tokens_must_say_where_their_channels_are() -> None:
    net = Tokens(nn.LayerNorm(6)).double()
    for method in ("ablation", "first_order"):
        text = r"channel_dim \(layer 'block'\): expected an int for three-dim.*got None"
        with pytest.raises(ValueError, match=text):
            channel_importance(net, [(X, Y)], ["block"], method=method)
    got = channel_importance(net, [(X, Y)], ["block"], channel_dim=-1).rise["block"]
    with torch.no_grad():
        h = net.block(X[:, 0])
        for c in range(6):
            cut = h.clone()
            cut[..., c] = 0
            losses = [F.cross_entropy(net.head(net.norm(v).square().mean(1)), Y) for v in (cut, h)]
            torch.testing.assert_close(got[c], losses[0] - losses[1], rtol=1e-9, atol=1e-12)


class LayerNorm2d(nn.LayerNorm):
    """With its channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(1, 3, 2),
        LayerNorm2d(3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 1)),
        nn.Conv2d(1, 3, 1),
    ],
    ids=["transposed", "subclass", "parametrized", "plain"],
)
def test_filters_by_their_type(layer: nn.Module) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(copy.deepcopy(layer), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Linear(12, 4)).double()  # fmt: skip
    plain = isinstance(layer, LayerNorm2d)  # of which no filter is known: its output is 0
    x = X.expand(-1, 3, -1, -1) * torch.arange(1, 4)[:, None, None] if plain else X
    with torch.no_grad():
        net[0].bias.normal_()
    got = channel_importance(net, [(x, Y)], ["0"]).rise["0"]
    with torch.no_grad():
        h = net[0](x)
        for c in range(3):
            cut = h.clone()
            cut[:, c] = 0 if plain else net[0].bias[c]
            want = F.cross_entropy(net[1:](cut), Y) - F.cross_entropy(net[1:](h), Y)
            torch.testing.assert_close(got[c], want, rtol=1e-9, atol=1e-12)
    if isinstance(layer, nn.ConvTranspose2d):
        torch.testing.assert_close(got, zeroed(net, "0", dim=1))


# --- batches, precision, slopes ------------------------------------------------------------------


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


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("method", ["ablation", "first_order"])
def test_a_layer_that_the_loss_does_not_use(method: str, alone: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(36, 4), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x.flatten(1))
            return self.used(x.flatten(1))

    layers = ["unused"] if alone else ["used", "unused"]
    got = channel_importance(Net().double(), [(X, Y)], layers, method=method)
    assert got.rise["unused"].tolist() == [0.0] * 3
    assert got.weights["unused"].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision(dtype: torch.dtype, soft: bool) -> None:
    """The loss of such a network is one of float32: its rises are distinct."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    y = F.one_hot(Y, 4).to(dtype) if soft else Y
    rise = channel_importance(net, [(X.to(dtype), y)], ["1"]).rise["1"]
    assert len(rise.unique()) > 28
    want = zeroed(net.double(), "1")
    assert torch.corrcoef(torch.stack([rise, want]))[0, 1] > 0.9


def test_empty_batches_are_passed_over() -> None:
    net = network("MLP")
    want = channel_importance(net, [(X, Y)], ["1"])
    got = channel_importance(net, [(X[:0], Y[:0]), (X, Y)], ["1"])
    assert torch.equal(got.rise["1"], want.rise["1"])
    assert got.loss == want.loss


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
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
        hooks += sum("forward" in vars(m) for m in net.modules())
        weights = all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
        modes = all(m.training for m in net.modules())
        grads = [p.grad is not None for p in net.parameters()]
        return weights and modes and not hooks and sum(grads) == 1 and grads[0]

    for method in ("ablation", "first_order"):
        channel_importance(net, [(X, Y)], ["c1", "norm"], method=method, chunk=1)
        assert same()
        for good in (1, 2, 3) if method == "ablation" else (1,):  # 3: in the second chunk
            calls: list[int] = []

            def fails(z: Tensor, y: Tensor, calls: list[int] = calls, good: int = good) -> Tensor:
                calls.append(1)
                if len(calls) > good:
                    raise KeyError("here")
                return F.cross_entropy(z, y)

            with pytest.raises(KeyError):
                channel_importance(net, [(X, Y)], ["norm"], method=method, loss_fn=fails, chunk=1)
            assert same()
    assert torch.equal(before[1], torch.get_rng_state())


def test_errors() -> None:
    net = network("MLP")

    def call(*args: Any, **options: Any) -> Any:
        return lambda: channel_importance(*args, **options)

    unused = network("MLP")
    unused.extra = nn.Linear(2, 2).double()
    unused.forward = lambda x: net(x)
    wide = nn.Sequential(
        nn.Identity(), nn.LayerNorm((6, 6)), nn.Flatten(), nn.Linear(36, 4)
    ).double()
    for run, kind, text in (
        (call(net, [(X, Y)], ["4"]), ValueError, "layers: expected names of modules"),
        (call(net, [(X, Y)], "1"), TypeError, "layers: expected a list of names"),
        (call(net, [(X, Y)], []), ValueError, "layers: expected one name at least"),
        (call(net, [], ["1"]), ValueError, "loader: expected one batch at least"),
        (call(net, [(X[:0], Y[:0])], ["1"]), ValueError, "loader: expected one batch at least"),
        (call(net, X, ["1"]), TypeError, "loader: expected"),
        (call(net, [X], ["1"]), TypeError, "loader: expected"),
        (call(net, [(X, Y)], ["1"], method="taylor"), ValueError, "method: expected one of"),
        (call(net, [(X, Y)], ["1"], chunk=0), ValueError, "chunk: expected an int ≥ 1"),
        (call(net, [(X, Y)], ["1"], batches=0), ValueError, "batches: expected an int ≥ 1"),
        (call(net, [(X, Y)], ["1"], temperature=0), ValueError, "temperature"),
        (call(net, [(X, Y)], ["1"], loss_fn=lambda z, y: z), ValueError, "loss_fn: expected a sca"),
        (call(net, [(X * torch.nan, Y)], ["1"]), ValueError, "loss_fn: expected .*finite"),
        (call(net, [(X, Y)], ["2"], channel_dim=5), ValueError, r"'2'\): .* in dimension 5, got"),
        (call(net, [(X, Y)], ["2"], channel_dim=0), ValueError, "channel_dim: expected None or an"),
        (call(wide, [(X, Y)], ["1"]), ValueError, r"'1'\): expected a bias of 6 .* got \[6, 6\]"),
        (call(unused, [(X, Y)], ["extra"]), ValueError, r"layer 'extra'\): expected a layer that"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
