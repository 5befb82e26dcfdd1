"""JacobianMeter against Jacobians that torch.func builds, and what it leaves behind: nothing."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import lwkd
from lwkd import JacobianMeter, pair_layers
from lwkd.factoring import flat
from lwkd.ops.philox import OUTPUTS, signs
from tests import cases
from tests.growth import live_tensors
from tests.ops.test_factors import distance
from tests.test_factoring import Encoder, Residual, Transformer

F64 = torch.float64
N, CLASSES = 3, 4
LAYERS = {
    Residual: ["stem", "norm", "conv", "down", "head"],
    Transformer: ["patch", "norm1", "qkv", "out", "up", "down", "head"],
    Encoder: ["patch", "first", "mix", "head"],
}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return cases.draw(shape, F64, seed)


X = draw(N, 2, 6, 6)
Y = torch.tensor([2, 0, 3])


def networks(kind: Callable[[int], nn.Module] = Residual, widths: tuple[int, int] = (6, 6)) -> Any:
    torch.manual_seed(0)
    return [kind(w).double().eval() for w in widths]


def meter(nets: Any, layers: Any = None, **options: Any) -> JacobianMeter:
    return JacobianMeter(pair_layers(*nets, layers or LAYERS[type(nets[0])]), **options)


def vectors(projection: str, nets: Any, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The scalar of one sample, from its output and its number, as the definition has it."""
    outputs = nets[1](x).detach()
    v = signs(outputs, 0, OUTPUTS)

    def scalar(out: Tensor, n: Tensor) -> Tensor:
        if projection == "rademacher":
            return (out * v.index_select(0, n[None])[0]).sum()
        if projection == "loss":
            return F.cross_entropy(out[None], y.gather(0, n[None]))
        index = y if projection == "label" else outputs.argmax(1)
        return out.gather(0, index.gather(0, n[None]))[0]

    return scalar


def gradients(net: nn.Module, scalar: Any, x: Tensor) -> dict[str, Tensor]:
    """Of every parameter, sample by sample."""
    params = {n: p.detach() for n, p in net.named_parameters()}

    def one(p: dict[str, Tensor], v: Tensor, n: Tensor) -> Tensor:
        return scalar(functional_call(net, p, (v[None],))[0], n)

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, torch.arange(len(x)))


def layer(grads: dict[str, Tensor], name: str, only: Any = None) -> Tensor:
    parts = [g.flatten(1) for n, g in grads.items()
             if n.startswith(f"{name}.") and (only is None or n in only)]  # fmt: skip
    return torch.cat(parts, 1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projection", ["rademacher", "label", "top", "loss"])
@pytest.mark.parametrize("kind", LAYERS)
def test_by_parameters(kind: Any, projection: str, normalize: bool) -> None:
    nets = networks(kind)
    m = meter(nets, projection=projection, normalize=normalize)
    target = Y if projection in ("label", "loss") else None
    loss_fn = (
        (lambda z, y: F.cross_entropy(z, y, reduction="sum")) if projection == "loss" else None
    )
    got = m.measure(X, target, loss_fn)
    scalar = vectors(projection, nets, X, Y)
    both = [gradients(net, scalar, X) for net in nets]
    way = "normalized" if normalize else "difference"
    want = [distance(*(layer(g, name) for g in both), way).mean() for name in LAYERS[kind]]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)
    assert not got.requires_grad


def test_layers_of_several_modules() -> None:
    """A block's parameters are all that are inside it."""

    class Blocks(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(True), nn.Conv2d(width, 3, 1))
            self.two = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Linear(width, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    nets = networks(Blocks)
    got = meter(nets, ["one", "two"]).measure(X)
    both = [gradients(net, vectors("rademacher", nets, X, Y), X) for net in nets]
    want = [distance(*(layer(g, n) for g in both), "normalized").mean() for n in ("one", "two")]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)


class Block(nn.Module):
    """One module twice, one weight in two modules, in-place changes in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.first, self.second = nn.Linear(72, 72), nn.Linear(72, 72)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh_()
        x = self.conv(x).flatten(1)
        x = x + self.first(x).relu_()
        x += 1
        return self.second(x).relu_()


class Shared(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def test_weights_that_are_used_twice() -> None:
    nets = networks(Shared)
    got = meter(nets, ["block", "head"]).measure(X)
    both = [gradients(net, vectors("rademacher", nets, X, Y), X) for net in nets]
    want = [distance(*(layer(g, n) for g in both), "normalized").mean() for n in ("block", "head")]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("frozen", ["teacher", "weights", "beginning", "student's others"])
def test_frozen_parameters(frozen: str) -> None:
    """A frozen teacher is measured all the same; what is frozen in the student does not count."""
    nets = networks()
    layers, only = LAYERS[Residual], None
    if frozen == "teacher":
        nets[1].requires_grad_(False)
    elif frozen == "weights":
        for name in layers:
            getattr(nets[0], name).weight.requires_grad_(False)
        layers = ["stem", "norm", "down", "head"]
        only = [f"{name}.bias" for name in layers]
    elif frozen == "beginning":
        for net in nets:
            net.stem.requires_grad_(False)
            net.norm.requires_grad_(False)
        layers = ["conv", "down", "head"]
    else:
        nets[0].requires_grad_(False)
        nets[0].down.requires_grad_(True)
        layers = ["down"]
    got = meter(nets, layers).measure(X)
    both = [gradients(net, vectors("rademacher", nets, X, Y), X) for net in nets]
    want = [distance(*(layer(g, n, only) for g in both), "normalized").mean() for n in layers]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)


def test_a_frozen_encoder() -> None:
    """Nothing in it asks for a gradient, and torch would take a way without hooks."""
    nets = networks(Encoder)
    want = meter(nets).measure(X)
    nets[1].requires_grad_(False)
    torch.testing.assert_close(meter(nets).measure(X), want, rtol=1e-10, atol=1e-14)


def test_what_is_excluded_does_not_count() -> None:
    """By the student's names or the teacher's, a module or a parameter, also inside attention."""
    torch.manual_seed(0)
    student, teacher = networks(Encoder)
    nets = [student, nn.Sequential(OrderedDict(body=teacher))]
    pairs = pair_layers(*nets, {"first": "body.first", "head": "body.head"})
    left_out = ["first.linear1", "body.first.norm2.weight", "first.self_attn.out_proj", "head.bias"]
    got = JacobianMeter(pairs, exclude=left_out).measure(X)
    both = [gradients(net, vectors("rademacher", nets, X, Y), X) for net in (student, teacher)]
    gone = ("first.linear1.", "first.norm2.weight", "first.self_attn.out_proj.", "head.bias")
    only = [n for n, _ in student.named_parameters() if not n.startswith(gone)]
    assert len(only) < len(list(student.parameters())) - 5
    want = [distance(*(layer(g, n, only) for g in both), "normalized").mean()
            for n in ("first", "head")]  # fmt: skip
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)
    one_side = JacobianMeter(pairs, exclude=["body.first.linear1"], compare="norms")
    owned = [[owner.name for owner in flat(side)] for side in one_side._owners]
    assert "first.linear1" in owned[0]
    assert "body.first.linear1" not in owned[1]


class Mixed(nn.Module):
    """One module that factors, one that does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.mix = nn.Linear(72, width), nn.Bilinear(width, width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(1)).tanh()
        return self.mix(z, z)


def test_modules_that_do_not_factor_are_named_once() -> None:
    nets = networks(Mixed)
    text = (
        r"expected modules that factor.*student's 'mix' \(Bilinear\), teacher's 'mix' \(Bilinear\)"
    )
    with pytest.warns(UserWarning, match=text) as seen:
        m = meter(nets, ["fc", "mix"])
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lwkd")
        got = m.measure(X)
    both = [gradients(net, vectors("rademacher", nets, X, Y), X) for net in nets]
    want = [distance(*(layer(g, n) for g in both), "normalized").mean() for n in ("fc", "mix")]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = meter(nets, {"fc": "fc"}, exclude=["mix"]).measure(X)
    torch.testing.assert_close(alone, got[:1])


def test_norms_of_layers_of_any_width() -> None:
    nets = networks(widths=(4, 7))
    got = meter(nets, ["stem", "conv", "head"], compare="norms", projection="top").measure(X)
    both = [gradients(net, vectors("top", nets, X, Y), X) for net in nets]
    want = []
    for name in ("stem", "conv", "head"):
        s, t = (layer(g, name).norm(dim=1) for g in both)
        want.append(((s - t) / (s + t)).square().mean())
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("projection", ["rademacher", "top"])
def test_by_the_input(projection: str) -> None:
    """Other widths, other resolution: the gradient of the maps by the image."""

    class Maps(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(2, width, 3, 1 + (width > 4))
            self.two = nn.Conv2d(width, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh_())

    nets = networks(Maps, (3, 5))
    got = meter(nets, ["one", "two"], wrt="input", projection=projection).measure(X)

    def maps(net: nn.Module, v: Tensor, i: int) -> Tensor:
        first = net.one(v[None])
        m = (first if i == 0 else net.two(first.tanh())).square().sum(1)
        grid = nets[1].one(v[None]) if i == 0 else nets[1].two(nets[1].one(v[None]))
        return F.adaptive_avg_pool2d(m, grid.shape[2:]).flatten()

    want = []
    for i in (0, 1):
        values = torch.stack([maps(nets[1], v, i).detach() for v in X])
        v = signs(values, 0, OUTPUTS, i)
        if projection == "top":
            v = F.one_hot(values.argmax(1), values.shape[1]).double()
        rows = [
            torch.stack([v[n] @ jacrev(lambda z, net=net, i=i: maps(net, z, i))(X[n]).flatten(1)
                         for n in range(N)])
            for net in nets
        ]  # fmt: skip
        want.append(distance(*rows, "normalized").mean())
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-13)


def test_a_copy_is_at_no_distance() -> None:
    nets = networks()
    nets[1].load_state_dict(nets[0].state_dict())
    for options in ({}, {"normalize": False}, {"compare": "norms"}, {"wrt": "input"}):
        layers = ["stem", "conv", "down"] if options.get("wrt") else None
        d = meter(nets, layers, **options).measure(X)
        assert torch.equal(d, torch.zeros_like(d)), options


def test_the_seed_decides() -> None:
    nets = networks()
    a, b, c = (meter(nets, seed=s).measure(X) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- inside a training step ----------------------------------------------------------------------


def step(m: JacobianMeter, nets: Any, x: Tensor = X) -> Tensor | None:
    with m:
        loss = F.cross_entropy(nets[0](x), Y)
        teacher_loss = F.cross_entropy(nets[1](x), Y)
    loss.backward()
    return m.discrepancy(teacher_loss)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_measures_what_measure_does(kind: Any) -> None:
    nets = networks(kind)
    m = meter(nets, projection="loss")
    got = step(m, nets)
    assert got is not None
    want = m.measure(X, Y, F.cross_entropy)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in nets[1].parameters())
    grads = [p.grad.clone() for p in nets[0].parameters()]
    nets[0].zero_grad()
    F.cross_entropy(nets[0](X), Y).backward()
    for p, g in zip(nets[0].parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_a_scaled_loss_is_the_same() -> None:
    """As of a gradient scaler; and gradients of several backward passes add up."""
    nets = networks()
    m = meter(nets, projection="loss")
    want = step(m, nets)
    with m:
        loss = F.cross_entropy(nets[0](X), Y)
        teacher_loss = F.cross_entropy(nets[1](X), Y)
    (loss * 1000).backward(retain_graph=True)
    (loss * 24).backward()
    torch.testing.assert_close(m.discrepancy(teacher_loss), want, rtol=1e-9, atol=1e-13)


def test_blocks_that_are_not_due() -> None:
    nets = networks()
    m = meter(nets, projection="loss", every=2)
    assert [step(m, nets) is None for _ in range(4)] == [False, True, False, True]
    other = meter(nets, projection="loss", every=2)
    other.load_state_dict(m.state_dict())
    assert other.state_dict() == {"calls": 4}
    with pytest.raises(ValueError, match="int ≥ 0"):
        other.load_state_dict({"calls": -1})


def test_it_drives_rates() -> None:
    nets = networks()
    pairs = pair_layers(*nets, ["stem", "conv", "head"])
    groups = lwkd.param_groups_layerwise(nets[0], pairs, lr=0.1)
    rates = lwkd.LayerwiseLR(torch.optim.SGD(groups), pairs)
    m = JacobianMeter(pairs, projection="loss")
    for _ in range(2):
        rates.optimizer.zero_grad()
        d = step(m, nets)
        rates.optimizer.step()
        rates.update(d)
        rates.step()
    assert len(set(rates.get_last_lr())) > 1


def test_the_training_step_refuses_what_it_cannot_do() -> None:
    nets = networks()
    for options in ({"projection": "top"}, {"wrt": "input"},
                    {"projection": "loss", "normalize": False}):  # fmt: skip
        layers = ["stem", "conv"] if options.get("wrt") else None
        with (
            pytest.raises(RuntimeError, match="or a call of measure"),
            meter(nets, layers, **options),
        ):
            pass
    m = meter(nets, projection="loss")
    with pytest.raises(RuntimeError, match="no such block"):
        m.discrepancy(torch.ones(()))
    with m:
        loss, teacher_loss = F.cross_entropy(nets[0](X), Y), F.cross_entropy(nets[1](X), Y)
        with pytest.raises(RuntimeError, match="one inside the block"):
            m.discrepancy(teacher_loss)
        with pytest.raises(RuntimeError, match="would record it"):
            m.measure(X)
        with pytest.raises(RuntimeError, match="one entry at a time"), m:
            pass
    with pytest.raises(RuntimeError, match="a backward pass before the call"):
        m.discrepancy(teacher_loss)
    assert step(m, nets) is not None
    with pytest.raises(RuntimeError, match="no such block"):
        m.discrepancy(loss)
    with m:
        nets[0](X).sum().backward()
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"teacher .*runs with gradients"):
            nets[1](X)
    nets[0].train()
    with m:
        loss, teacher_loss = F.cross_entropy(nets[0](X), Y), F.cross_entropy(nets[1](X), Y)
    loss.backward()
    with pytest.raises(ValueError, match=r"layer 'norm'\): expected BatchNorm in eval mode"):
        m.discrepancy(teacher_loss)


# --- what is left behind: nothing ----------------------------------------------------------------


def everything(nets: Any) -> list[Any]:
    out: list[Any] = [torch.get_rng_state().tolist()]
    for net in nets:
        for name, module in net.named_modules():
            out.append(
                (name, module.training, len(module._forward_hooks), len(module._backward_hooks))
            )
        for name, x in (*net.named_parameters(), *net.named_buffers()):
            out.append((name, x.detach().clone().tolist(), x.requires_grad, x.grad is None))
    return out


@pytest.mark.parametrize("wrt", ["params", "input"])
def test_measure_leaves_everything_as_it_was(wrt: str) -> None:
    nets = networks()
    nets[0].train()
    m = meter(nets, ["stem", "conv", "down"], wrt=wrt)
    before = everything(nets)
    m.measure(X)
    assert everything(nets) == before
    broken = networks()
    broken[1].head.register_forward_pre_hook(lambda *_: 1 / 0)
    m = meter(broken, ["stem", "conv", "down"], wrt=wrt)
    before = everything(broken)
    with pytest.raises(ZeroDivisionError):
        m.measure(X)
    assert everything(broken) == before


def test_memory_does_not_grow() -> None:
    nets = networks()
    m = meter(nets, projection="loss")
    counts = []
    for _ in range(30):
        step(m, nets)
        m.measure(X, Y, F.cross_entropy)
        counts.append(live_tensors())
    assert counts[5] == counts[-1]


def test_autocast() -> None:
    nets = [net.float() for net in networks()]
    m = meter(nets)
    want = m.measure(X.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = m.measure(X.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)


def test_a_compiled_network_is_measured() -> None:
    nets = networks()
    want = meter(nets).measure(X)
    student = torch.compile(nets[0], backend="aot_eager")
    m = JacobianMeter(pair_layers(student, nets[1], LAYERS[Residual]))
    assert torch.equal(m.measure(X), want)
    torch._dynamo.reset()


def test_a_network_under_ddp(ddp: Any) -> None:
    """``measure`` runs the module inside, so that no reduction is waited for; a step runs DDP."""
    plain, (student, teacher) = networks(), networks()
    student = ddp(student)
    pairs = pair_layers(student, teacher, LAYERS[Residual])
    assert torch.equal(JacobianMeter(pairs).measure(X), meter(plain).measure(X))
    for _ in range(2):
        m = JacobianMeter(pairs, projection="loss")
        got = step(m, [student, teacher])
        assert torch.equal(got, step(meter(plain, projection="loss"), plain))
        assert torch.equal(m.measure(X, Y, F.cross_entropy), got)


# --- bad input -----------------------------------------------------------------------------------


class Unused(Residual):
    def forward(self, x: Tensor) -> Tensor:
        self.down(self.conv(self.stem(x)))
        return self.head(x.mean((2, 3)).repeat(1, 6))


class TimeFirst(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).permute(2, 0, 1)).mean(0)


def test_errors() -> None:
    nets = networks()
    pairs = pair_layers(*nets, ["stem", "head"])
    for options, kind, text in (
        ({"wrt": "weights"}, ValueError, r"wrt: expected one of \('params', 'input'\)"),
        ({"projection": "best"}, ValueError, "projection: expected one of"),
        ({"wrt": "input", "projection": "label"}, ValueError, r"\('rademacher', 'top'\)"),
        ({"normalize": 1}, TypeError, "normalize: expected True or False"),
        ({"every": 0}, ValueError, "every: expected an int ≥ 1"),
        ({"seed": 0.5}, TypeError, "seed: expected an int"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"exclude": "head"}, TypeError, "exclude: expected a list of names"),
        ({"exclude": ["haed"]}, ValueError, "exclude: expected names.*did you mean 'head'"),
        ({"exclude": ["head"]}, ValueError, r"layer 'head'\): expected a layer with parameters"),
        ({"exclude": ["head"], "wrt": "input"}, ValueError, "exclude: expected nothing with"),
    ):
        with pytest.raises(kind, match=text):
            JacobianMeter(pairs, **options)
    with pytest.raises(TypeError, match="LayerPairs, from pair_layers"):
        JacobianMeter(["stem"])
    with pytest.raises(ValueError, match=r"target: expected class indices int64 \[N\]"):
        JacobianMeter(pairs, projection="label").measure(X)
    with pytest.raises(ValueError, match=r"target: expected class indices \[3\]"):
        JacobianMeter(pairs, projection="label").measure(X, Y[:2])
    with pytest.raises(ValueError, match=r"loss_fn: expected loss_fn\(output, target\)"):
        JacobianMeter(pairs, projection="loss").measure(X, Y)
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar, got \[3\]"):
        JacobianMeter(pairs, projection="loss").measure(X, Y, lambda z, y: z.sum(1))
    with pytest.raises(TypeError, match="inputs: expected a floating tensor"):
        JacobianMeter(pairs[:1], wrt="input").measure((X,))


def test_errors_of_layers() -> None:
    torch.manual_seed(0)
    for nets, layers, options, kind, text in (
        (networks(widths=(6, 5)), ["stem"], {}, ValueError, "a parameter of the student's shape"),
        ([nn.Sequential(nn.ReLU()) for _ in "st"], ["0"], {}, ValueError,
         r"student \(layer '0'\): expected a layer with parameters that are trained"),
        ([nn.Sequential(nn.Linear(6, 4)).double(), nn.Sequential(nn.Linear(6, 4, False)).double()],
         ["0"], {}, ValueError, r"teacher \(layer '0'\): expected the student's parameters, bias"),
        (networks(Unused), ["head", "conv"], {}, RuntimeError,
         r"teacher \(layer 'conv'\): expected a layer that the output depends on"),
        (networks(Unused), ["norm"], {}, RuntimeError,
         r"teacher \(layer 'norm'\): expected the layer to run in the forward, got no call"),
        (networks(TimeFirst), ["fc"], {}, ValueError,
         r"teacher \(layer 'fc'\): expected a layer that has the batch, 3 samples, first, got 36"),
        ([nn.Sequential(nn.Flatten(0), nn.Linear(216, 4)).double() for _ in "st"], ["1"], {},
         ValueError, r"teacher: expected a network that puts out a floating tensor \[N, ...\]"),
        ([nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, c)).double()
          for c in (2, 9)], ["0"], {"projection": "top"}, ValueError, "as many outputs"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            meter(nets, layers, **options).measure(X)


def test_a_block_sees_layers_without_the_batch_first() -> None:
    """From the network's inputs and outputs, which the meter does not run itself."""
    student, teacher = networks(TimeFirst)
    own = JacobianMeter(pair_layers(student, teacher, ["fc"]), projection="loss")
    with own:
        with torch.enable_grad():
            teacher_loss = F.cross_entropy(teacher(X), Y)
        F.cross_entropy(student(X), Y).backward()
    text = r"student \(layer 'fc'\): expected a layer that has the batch, 3 samples, first, got 36"
    with pytest.raises(ValueError, match=text):
        own.discrepancy(teacher_loss)


def test_batch_norm_without_statistics() -> None:
    nets = networks()
    for net in nets:
        net.norm = nn.BatchNorm2d(6, track_running_stats=False).double()
    with pytest.raises(ValueError, match=r"layer 'norm'\): expected BatchNorm in eval mode"):
        meter(nets).measure(X)
