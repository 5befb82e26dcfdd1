"""hessian_trace against exact second derivatives, and what it leaves behind: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwkd
from lwkd import hessian_trace
from lwkd.ops import philox
from tests.curvature.networks import CLASSES, CNN, LAYERS, NETWORKS, X, Y, exact, network
from tests.growth import live_tensors, resident
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
F64 = torch.float64
each_network = pytest.mark.parametrize("name", NETWORKS)
random_estimators = pytest.mark.parametrize("estimator", ["block", "hutchinson"])


def trace(net: nn.Module, name: str, **options: Any) -> lwkd.TraceEstimate:
    return hessian_trace(net, F.cross_entropy, (X, Y), LAYERS[name], **options)


def pooled(net: nn.Module, name: str, estimator: str, seeds: int = 20, probes: int = 64) -> Tensor:
    """Samples [seeds · probes, L]: one seed's probe by probe, the others' all at once."""
    return torch.cat([
        trace(net, name, estimator=estimator, probes=probes, seed=seed,
              chunk=1 if seed == 0 else probes).samples
        for seed in range(seeds)
    ])  # fmt: skip


# --- the estimators ------------------------------------------------------------------------------


@pytest.mark.slow
@random_estimators
@each_network
def test_means_and_variances(name: str, estimator: str) -> None:
    """20 seeds of 64 probes: the mean to 4 standard errors, the variance to 5 of its own."""
    net = network(name)
    want = exact(net, layers=LAYERS[name])
    samples = pooled(net, name, estimator)
    stderr = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - want.trace).abs() <= 4 * stderr).all()
    squares = (samples - want.trace).square()
    variance = want.block if estimator == "block" else want.hutchinson
    noise = squares.std(0) / len(samples) ** 0.5
    assert ((squares.mean(0) - variance).abs() <= 5 * noise).all()
    one = trace(net, name, estimator=estimator, probes=64)
    assert torch.allclose(one.stderr, one.samples.std(0) / 8)
    assert torch.equal(one.mean, one.samples.mean(0))


@pytest.mark.slow
@each_network
def test_split(name: str) -> None:
    """The Gauss–Newton trace's own samples, and block probes of what is left, exactly those."""
    net = network(name)
    every = [exact(net, layers=LAYERS[name])]
    with torch.no_grad():
        slope = (net(X).softmax(1) - F.one_hot(Y, CLASSES)) / len(Y)
    every.append(exact(net, lambda z, _: (z * slope).sum(), layers=LAYERS[name]))
    samples = pooled(net, name, "split")
    rest = samples - pooled(net, name, "gauss_newton")
    for found, want in zip((samples, rest), every, strict=True):
        stderr = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - want.trace).abs() <= 4 * stderr + 1e-12).all()
    squares = (rest - every[1].trace).square()
    noise = squares.std(0) / len(samples) ** 0.5
    assert ((squares.mean(0) - every[1].block).abs() <= 5 * noise + 1e-20).all()


@pytest.mark.slow
@each_network
def test_auto(name: str) -> None:
    """gauss_newton where outputs are linear in the layer, block elsewhere; both unbiased."""
    net = network(name)
    want = exact(net, layers=LAYERS[name])
    samples = pooled(net, name, "auto")
    stderr = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - want.trace).abs() <= 4 * stderr).all()
    chosen = dict(zip(LAYERS[name], trace(net, name, probes=1).estimator, strict=True))
    if name in ("CNN, ReLU", "MLP"):
        assert set(chosen.values()) == {"gauss_newton"}
    else:
        assert chosen.pop("head") == "gauss_newton"
        assert set(chosen.values()) == {"block"}


@pytest.mark.slow
def test_the_standard_error_of_gauss_newton() -> None:
    """Over 300 seeds: what is reported against what the means really do."""
    net = network("CNN, ReLU")
    runs = [trace(net, "CNN, ReLU", estimator="gauss_newton", probes=8, seed=s) for s in range(300)]
    means = torch.stack([r.mean for r in runs])
    reported = torch.stack([r.stderr.square() for r in runs])
    squares = (means - exact(net, layers=LAYERS["CNN, ReLU"]).trace).square()
    noise = (squares.var(0) + reported.var(0)).sqrt() / 300**0.5
    assert ((squares.mean(0) - reported.mean(0)).abs() <= 4 * noise).all()


@pytest.mark.parametrize("name", ["CNN, ReLU", "MLP"])
def test_exact_equals_the_exact_trace(name: str) -> None:
    net = network(name)
    want = exact(net, layers=LAYERS[name]).trace
    got = trace(net, name, exact=True)
    torch.testing.assert_close(got.mean, want, rtol=1e-10, atol=1e-13)
    assert got.stderr.tolist() == [0.0] * len(want)
    single = hessian_trace(
        net.float(), F.cross_entropy, (X.float(), Y), LAYERS[name], exact=True
    ).mean  # fmt: skip
    torch.testing.assert_close(single, want, rtol=1e-5, atol=1e-8)


@random_estimators
def test_a_diagonal_hessian_takes_one_probe(estimator: str) -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(5))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.a.square()).sum() + self.b.pow(4).sum()

    net, x = Quadratic().double(), torch.rand(3, 4, dtype=F64)
    got = hessian_trace(net, lambda out, _: out, (x, None), ["a", "b"], estimator=estimator,
                        probes=1)  # fmt: skip
    want = [2 * x.sum(), 12 * net.b.detach().square().sum()]
    torch.testing.assert_close(got.mean, torch.stack(want), rtol=1e-12, atol=0)
    assert got.stderr.isnan().all()


def test_gauss_newton_says_what_it_is() -> None:
    got = trace(network("CNN, GELU"), "CNN, GELU", estimator="gauss_newton", probes=2)
    assert all("only where the outputs are linear" in reason for reason in got.reason)


# --- which estimator -----------------------------------------------------------------------------


class Parts(nn.Module):
    """What auto must see through: every network has layers a and b."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if kind == "tied":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :6]
        if self.kind == "functional gelu":
            return self.b(F.gelu(self.a(x)))
        if self.kind == "gated":
            return self.a(x) * self.b(x).sigmoid()
        if self.kind == "used twice, once without its module":
            return self.a(x) + F.linear(2 * x, self.a.weight) + self.b(x)
        if self.kind == "without its module":
            return F.linear(x, self.a.weight, self.a.bias) + self.b(x)
        if self.kind == "called twice, in parallel":
            return self.b(self.a(x)) + self.a(2 * x)
        return self.b(self.a(x).relu())  # tied, or plain


PARTS = {
    "plain": ("gauss_newton", "gauss_newton"),
    "functional gelu": ("block", "gauss_newton"),
    "tied": ("block", "block"),
    "gated": ("gauss_newton", "block"),
    "used twice, once without its module": ("block", "gauss_newton"),
    "without its module": ("block", "gauss_newton"),
    "called twice, in parallel": ("gauss_newton", "gauss_newton"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_auto_tests_every_layer(kind: str) -> None:
    torch.manual_seed(0)
    net = Parts(kind).double()
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    got = hessian_trace(net, F.cross_entropy, (X, y), probes=400, seed=3)
    assert got.estimator == PARTS[kind], got.reason
    # What is tied torch.func lists in the first layer that has it.
    layers = ["a", "b"] if kind != "tied" else ["a"]
    want = exact(net, y=y, layers=layers).trace
    off = (got.mean - got.mean.new_tensor([*want, got.mean[-1]][:2])).abs()
    assert (off <= 4 * got.stderr).all(), (got.mean, want)


@pytest.mark.parametrize("form", [
    lambda z: F.softplus(z),
    lambda z: torch.logsumexp(z, 1, keepdim=True),
    lambda z: (z[:, :1] - z[:, 1:2]).square(),
    lambda z: z.sum(1, keepdim=True).square(),
])  # fmt: skip
def test_a_hessian_with_signs_in_its_null_space_is_seen(form: Any) -> None:
    """One direction of ±1 would often be one of these."""
    for seed in range(8):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False), Form(form)).double()
        x = torch.randint(2, (2, 36)).double() * 2 - 1
        got = hessian_trace(net, F.mse_loss, (x, form(torch.zeros(2, 2))), probes=1, seed=seed)
        assert got.estimator == ("block",), (seed, got.reason)


class Form(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


def test_auto_without_a_known_loss_or_samples_of_their_own() -> None:
    net = network("CNN, ReLU")
    got = hessian_trace(net, lambda z, y: F.cross_entropy(z, y), (X, Y), probes=1)
    assert set(got.estimator) == {"block"}
    assert all("the loss is none" in reason for reason in got.reason)
    got = trace(net.train(), "CNN, ReLU", probes=1)
    assert set(got.estimator) == {"block"}
    assert all("'norm'" in reason and "coupled" in reason for reason in got.reason)


def test_frozen_layers_and_names() -> None:
    net = network("MLP")
    full = hessian_trace(net, F.cross_entropy, (X, Y), exact=True)
    assert full.layers == ("1", "3")
    bias = hessian_trace(net, F.cross_entropy, (X, Y), ["3.bias", "1"], exact=True)
    weight = hessian_trace(net, F.cross_entropy, (X, Y), ["3.weight"], exact=True)
    torch.testing.assert_close(bias.mean[0] + weight.mean[0], full.mean[1])
    torch.testing.assert_close(bias.mean[1], full.mean[0])
    net[1].weight.requires_grad_(False)
    half = hessian_trace(net, F.cross_entropy, (X, Y), ["1"], exact=True)
    want = exact(net, layers=["1.bias"]).trace
    torch.testing.assert_close(half.mean, want)
    whole = hessian_trace(net, F.cross_entropy, (X, Y), ["module.3"], exact=True)
    assert whole.layers == ("3",)


# --- batches, probes -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gauss_newton", "split", "block", "hutchinson"])
def test_chunks_and_seeds(estimator: str) -> None:
    """The same probes however many at once; another seed is another estimate."""
    net = network("CNN, ReLU")
    one = trace(net, "CNN, ReLU", estimator=estimator, probes=7, seed=2**63 + 1)
    many = trace(net, "CNN, ReLU", estimator=estimator, probes=7, seed=2**63 + 1, chunk=3)
    torch.testing.assert_close(one.samples, many.samples, rtol=1e-9, atol=1e-13)
    other = trace(net, "CNN, ReLU", estimator=estimator, probes=7)
    assert not torch.allclose(one.samples, other.samples)
    fewer = trace(net, "CNN, ReLU", estimator=estimator, probes=3, seed=2**63 + 1)
    torch.testing.assert_close(one.samples[:3], fewer.samples, rtol=1e-12, atol=0)


@random_estimators
def test_batches_are_one_mean(estimator: str) -> None:
    """Of unequal sizes, from any iterable; the probes are those of the whole."""
    net = network("CNN, ReLU")
    whole = trace(net, "CNN, ReLU", estimator=estimator, probes=3)
    parts = [(X[:1], Y[:1]), (X[1:4], Y[1:4]), (X[4:], Y[4:])]
    for batches in (parts, iter(parts), [list(part) for part in parts]):
        got = hessian_trace(
            net, F.cross_entropy, batches, LAYERS["CNN, ReLU"], estimator=estimator, probes=3
        )
        torch.testing.assert_close(got.samples, whole.samples, rtol=1e-9, atol=1e-13)
    exact_parts = hessian_trace(net, F.cross_entropy, parts, LAYERS["CNN, ReLU"], exact=True)
    torch.testing.assert_close(exact_parts.mean, trace(net, "CNN, ReLU", exact=True).mean)


def test_inputs_of_every_kind() -> None:
    net = network("MLP")
    want = hessian_trace(net, F.cross_entropy, (X, Y), exact=True).mean
    for batch in ([X, Y], ((X,), Y), ({"input": X}, Y)):
        got = hessian_trace(net, F.cross_entropy, batch, exact=True).mean
        torch.testing.assert_close(got, want)


def test_it_stops_when_it_is_sure() -> None:
    net = network("CNN, ReLU")
    got = trace(net, "CNN, ReLU", probes=4, tol=0.05)
    assert (got.stderr <= 0.05 * got.mean.abs()).all()
    assert len(got.samples) % 4 == 0
    sure = (got.samples[:-4].std(0) / (len(got.samples) - 4) ** 0.5
            <= 0.05 * got.samples[:-4].mean(0).abs())  # fmt: skip
    assert not sure.all()
    assert len(trace(net, "CNN, ReLU", probes=4, tol=1e-9, max_probes=10).samples) == 10
    parts = iter([(X[:3], Y[:3]), (X[3:], Y[3:])])
    got = hessian_trace(net, F.cross_entropy, parts, probes=4, tol=0.2, estimator="block")
    assert (got.stderr <= 0.2 * got.mean.abs()).all()


# --- what a network may be -----------------------------------------------------------------------


def test_wrapped_and_compiled_networks() -> None:
    net = network("CNN, ReLU")
    want = trace(net, "CNN, ReLU", exact=True).mean
    for wrapped in (nn.DataParallel(net), torch.optim.swa_utils.AveragedModel(net),
                    torch.compile(net, backend="eager")):  # fmt: skip
        got = trace(wrapped, "CNN, ReLU", exact=True)
        torch.testing.assert_close(got.mean, want)


def test_a_network_under_ddp(ddp: Any) -> None:
    """DDP refuses second derivatives: the network inside is what is measured."""
    net = network("CNN, GELU")
    want = trace(net, "CNN, GELU", probes=2)
    wrapped = ddp(net)
    got = hessian_trace(wrapped, F.cross_entropy, (X, Y), LAYERS["CNN, GELU"], probes=2)
    F.cross_entropy(wrapped(X), Y).backward()  # its reducer works as before
    assert torch.equal(got.samples, want.samples)
    assert all(p.grad is not None for p in net.parameters())


def test_channels_last_and_autocast() -> None:
    net = network("CNN, GELU").float()
    x = X.float()
    want = hessian_trace(net, F.cross_entropy, (x, Y), probes=4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hessian_trace(net, F.cross_entropy, (x, Y), probes=4)
    torch.testing.assert_close(inside.samples, want.samples)
    last = net.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    got = hessian_trace(last, F.cross_entropy, (x, Y), probes=4)
    torch.testing.assert_close(got.samples, want.samples, rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_once_and_given_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    before = torch.get_rng_state()
    got = hessian_trace(net.double().train(), F.cross_entropy, (X, Y), probes=3)
    assert torch.equal(before, torch.get_rng_state())
    again = hessian_trace(net, F.cross_entropy, (X, Y), probes=3)
    assert torch.equal(got.samples, again.samples)


def test_a_layer_that_does_not_run() -> None:
    net = network("MLP")
    net.extra = nn.Linear(2, 2).double()
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    got = hessian_trace(net, F.cross_entropy, (X, Y), ["extra", "3"], probes=2)
    assert got.mean[0] == 0
    assert got.estimator[0] == "block"
    with pytest.raises(RuntimeError, match=r"model \(layer 'extra'\): expected the layer to run"):
        hessian_trace(net, F.cross_entropy, (X, Y), ["extra"], estimator="gauss_newton")


def test_a_recurrent_network() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 3, batch_first=True), nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x[:, 0])[0][:, -1])

    torch.manual_seed(0)
    net = Recurrent().double()
    got = hessian_trace(net, F.cross_entropy, (X, Y), probes=2)
    assert got.estimator == ("block", "gauss_newton")


# --- nothing stays behind ------------------------------------------------------------------------


def everything(net: nn.Module) -> list[Any]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return [hooks, state, modes, grads, torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "split", "block", "hutchinson"])
def test_everything_is_left_as_it_was(estimator: str) -> None:
    net = CNN(nn.ReLU(inplace=True)).double().train()
    if estimator in ("auto", "gauss_newton", "split"):
        net.norm.eval()
    net.c1.weight.grad = torch.ones_like(net.c1.weight)
    before = everything(net)
    hessian_trace(net, F.cross_entropy, (X, Y), estimator=estimator, probes=2)
    assert same(before, everything(net))
    with pytest.raises(IndexError):
        hessian_trace(net, lambda z, y: [][0], (X, Y), estimator="block", probes=2)
    with pytest.raises(ValueError, match="finite trace"):
        hessian_trace(net, F.cross_entropy, (X * torch.nan, Y), estimator=estimator, probes=2)
    assert same(before, everything(net))


def test_memory_does_not_grow() -> None:
    """Of tensors that Python knows, and of the process: graphs live in C++."""
    net = network("MLP")
    tensors, memory = [], []
    for k in range(1000):
        hessian_trace(net, F.cross_entropy, (X, Y), probes=1, estimator=("auto", "block")[k % 2])
        if k in (199, 999):
            tensors.append(live_tensors())
            memory.append(resident())
    assert tensors[1] <= tensors[0]
    # A graph of this network is 4 KiB and more, 800 of them 3 MiB.
    assert memory[1] - memory[0] < 2 * 2**20, memory


# --- bad input -----------------------------------------------------------------------------------


def test_errors() -> None:
    net, trained, ce = network("CNN, ReLU"), network("CNN, ReLU").train(), F.cross_entropy
    nothing = nn.Sequential(nn.ReLU())

    def call(*args: Any, **options: Any) -> Any:
        return lambda: hessian_trace(*args, **options)

    class Own(nn.Module):
        """Without a second derivative."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.square()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, g: Tensor) -> Tensor:
                return g

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(36, CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.Square.apply(self.fc(x.flatten(1)))

    for run, kind, text in (
        (call(net, ce, (X, Y), ["haed"]), ValueError, r"layers: .*'haed'; did you mean 'head'"),
        (call(net, ce, (X, Y), "c1"), TypeError, "layers: expected None or a list"),
        (call(net, ce, (X, Y), ["c1", "c1"]), ValueError, r"layer 'c1'\): expected every layer on"),
        (call(net, ce, (X, Y), ["act"]), ValueError, r"layer 'act'\): expected a layer with train"),
        (call(nothing, ce, (X, Y)), ValueError, "layers: expected a network with trained"),
        (call(net, ce, (X, Y), estimator="best"), ValueError, "estimator: expected one of"),
        (call(net, ce, (X, Y), probes=0), ValueError, "probes: expected an int ≥ 1"),
        (call(net, ce, (X, Y), chunk=0), ValueError, "chunk: expected an int ≥ 1"),
        (call(net, ce, (X, Y), seed=1.5), ValueError, "seed: expected an int of 64 bits"),
        (call(net, ce, (X, Y), tol=0), ValueError, "tol: expected None or a finite number > 0"),
        (call(net, ce, (X, Y), max_probes=9), ValueError, "max_probes: expected None, or with tol"),
        (call(net, ce, (X, Y), exact=1), TypeError, "exact: expected True or False"),
        (call(net, ce, (X, Y), exact=True, estimator="block"), ValueError, "exact: expected False"),
        (call(network("CNN, GELU"), ce, (X, Y), exact=True), ValueError,
         r"exact \(layer 'c1'\): expected layers whose trace .* not linear"),
        (call(net, lambda z, y: z, (X, Y)), ValueError, "loss_fn: expected a scalar"),
        (call(net, lambda z, y: z.detach().sum(), (X, Y)), ValueError, "loss_fn: expected a loss"),
        (call(net, ce, (X, Y + 3)), ValueError, r"target: expected class indices in \[0, 4\)"),
        (call(net, lambda z, y: z.sum(), (X, Y), estimator="gauss_newton"), ValueError,
         "loss_fn: expected cross-entropy, binary cross-entropy or squared error"),
        (call(net, lambda z, y: z.sum(), (X, Y), estimator="split"), ValueError,
         "loss_fn: expected cross-entropy, binary cross-entropy or squared error"),
        (call(trained, ce, (X, Y), estimator="gauss_newton"), ValueError, "'norm'.*coupl"),
        (call(trained, ce, (X, Y), estimator="split"), ValueError, "'norm'.*coupl"),
        (call(net, ce, (X, Y), exact=True, estimator="split"), ValueError, "exact: expected False"),
        (call(net, ce, X), TypeError, r"batch: expected \(inputs, target\)"),
        (call(net, ce, [X]), TypeError, "batch: expected"),
        (call(net, ce, []), ValueError, "batch: expected at least one batch"),
        (call(Own(), ce, (X, Y), estimator="block"), RuntimeError, "differentiated twice"),
        (call(net, ce, (X, Y), chunk=10**12, estimator="block"), RuntimeError,
         "chunk: expected room for"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()


def test_torchs_generator_is_not_used() -> None:
    net = network("CNN, ReLU")
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(trace(net, "CNN, ReLU", probes=2).samples)
    assert torch.equal(*results)
    assert philox.OUTPUTS == 2**32 - 1
