"""DELTA against its formula, and against the authors' code, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwkd import pair_layers
from lwkd.losses import DELTA
from tests import cases

F64 = torch.float64
SHAPES = ((4, 6, 5, 3), (4, 8, 2, 2), (4, 5))
LAYERS = ["a", "b", "c"]
WEIGHTS = {
    name: cases.draw((shape[1],), F64, 3).softmax(0)
    for name, shape in zip(LAYERS, SHAPES, strict=True)
}


def features(seed: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [cases.draw(shape, dtype, seed + i) for i, shape in enumerate(SHAPES)]


def from_the_formula(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """[N]: ½ Σ_c (C·w_c/HW)·‖F[n,c] − F⁰[n,c]‖²."""
    n, c = s.shape[:2]
    total = torch.zeros(n, dtype=F64)
    for i in range(n):
        for k in range(c):
            distance = (s[i, k].double() - t[i, k].double()).square().sum()
            total[i] += 0.5 * c * w[k] / s[i, k].numel() * distance
    return total


def authors(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """As in their reg_att_fea_map: c·w·‖·‖²/(h·w), half of it, summed over batch and channels."""
    b, c, h, width = s.shape
    distance = torch.norm(s.reshape(b, c, h * width) - t.reshape(b, c, h * width), 2, 2)
    return 0.5 * (c * (w * distance**2) / (h * width)).sum()


@pytest.mark.parametrize("weighted", [True, False])
def test_the_formula(weighted: bool) -> None:
    s, t = features(1), features(11)
    for x in s:
        x.requires_grad_()
    loss = DELTA(WEIGHTS if weighted else LAYERS, alpha=0.3)
    terms = loss(s, t)
    uniform = [torch.full((x.shape[1],), 1 / x.shape[1], dtype=F64) for x in s]
    ws = list(WEIGHTS.values()) if weighted else uniform
    want = torch.stack([
        from_the_formula(a, b, w).mean() for a, b, w in zip(s, t, ws, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(terms.per_layer, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, 0.3 * want.sum(), rtol=1e-12, atol=0)
    got = torch.autograd.grad(terms.total, s)
    for g, expected in zip(got, torch.autograd.grad(0.3 * want.sum(), s), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=0)
    assert loss.layers == LAYERS


def test_the_authors_code() -> None:
    s, t = features(1)[:2], features(11)[:2]
    weights = {name: WEIGHTS[name] for name in LAYERS[:2]}
    terms = DELTA(weights, alpha=1.0, reduction="sum")(s, t)
    want = sum(authors(a, b, w) for a, b, w in zip(s, t, weights.values(), strict=True))
    torch.testing.assert_close(terms.total, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.per_layer.sum() * 4, want, rtol=1e-12, atol=0)


def test_tokens_and_half_precision() -> None:
    s, t = (cases.draw((3, 7, 6), torch.bfloat16, k) for k in (1, 2))
    w = WEIGHTS["a"]
    got = DELTA({"a": w}, alpha=1.0, channel_dim=-1)([s], [t])
    want = from_the_formula(s.mT, t.mT, w).mean()
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(got.per_layer[0].double(), want, rtol=1e-6, atol=0)


def test_with_networks_and_a_state() -> None:
    """The source's copy is at no distance; weights go with the module; compiled it is the same."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)) for _ in "st"]
    nets[0].load_state_dict(nets[1].state_dict())
    loss = DELTA({"0": torch.full((6,), 1 / 6), "2": torch.full((4,), 0.25)})
    pairs = pair_layers(*nets, loss.layers)
    x = torch.rand(2, 1, 8, 8)
    with pairs.capture() as seen:
        nets[0](x), nets[1](x)
    assert float(loss(seen.student, seen.teacher).total) == 0
    s, t = ([torch.rand(2, 6, 3, 3), torch.rand(2, 4, 2, 2)] for _ in "st")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t).per_layer, loss(s, t).per_layer)
    empty = [[x[:0] for x in xs] for xs in (s, t)]
    assert loss(*empty).per_layer.tolist() == [0.0, 0.0]


def test_a_state_goes_by_the_layers_names() -> None:
    there = {"a": torch.rand(6), "b.0": torch.rand(6)}
    loss, other = DELTA(there), DELTA({name: torch.rand(6) for name in reversed(there)})
    assert list(loss.state_dict()) == ["weights_a", "weights_b/0"]
    other.load_state_dict(loss.state_dict())
    xs = [[torch.rand(2, 6, 3, 3) for _ in there] for _ in "st"]
    want = loss(*xs).per_layer
    got = other(*(x[::-1] for x in xs)).per_layer
    assert torch.equal(got.flip(0), want)
    with pytest.raises(RuntimeError, match=r"Missing key.*weights_c"):
        DELTA({"a": there["a"], "c": there["a"]}).load_state_dict(loss.state_dict())


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 2), (4, 6, 2, 3, 2)])
def test_where_the_channels_are(shape: tuple[int, ...]) -> None:
    """What is not said is 1, but of three dimensions nothing is assumed."""
    xs = [[cases.draw(shape, F64, k)] for k in (1, 2)]
    weights = {"a": WEIGHTS["a"]}
    want = DELTA(weights, channel_dim=1)(*xs).total
    assert torch.equal(DELTA(weights)(*xs).total, want)
    last = [[x.movedim(1, -1) for x in side] for side in xs]
    torch.testing.assert_close(DELTA(weights, channel_dim=-1)(*last).total, want)


def test_no_gradient_into_the_source() -> None:
    s, t = (cases.draw((2, 3, 2, 2), F64, k).requires_grad_() for k in (1, 2))
    DELTA(["a"])([s], [t]).total.backward()
    assert s.grad is not None
    assert t.grad is None


def test_errors() -> None:
    s = [torch.rand(2, 6, 3, 3)]
    w = torch.full((6,), 1 / 6)

    def call(loss: DELTA, *args: Any) -> Any:
        return lambda: loss(*args)

    for run, kind, text in (
        (lambda: DELTA("a"), TypeError, "layers: expected names of layers"),
        (lambda: DELTA([]), ValueError, "layers: expected one name at least"),
        (lambda: DELTA(["a"], alpha=-1), ValueError, "alpha: expected a finite number ≥ 0"),
        (lambda: DELTA(["a"], alpha="1"), TypeError, "alpha: expected a finite number"),
        (lambda: DELTA(["a"], reduction="none"), ValueError, "reduction: expected one of"),
        (lambda: DELTA(["a"], channel_dim=0), ValueError, "channel_dim: expected None or an int"),
        (lambda: DELTA({"a": w[None]}), ValueError, r"layer 'a'\): expected weights \[C\]"),
        (lambda: DELTA({"a": -w}), ValueError, r"layer 'a'\): expected weights \[C\], finite"),
        (lambda: DELTA({"a": [1.0]}), TypeError, r"layer 'a'\): expected weights \[C\]"),
        (call(DELTA({"a": w[:5]}), s, s), ValueError,
         r"layers \(layer 'a'\): expected weights of 6 channels, .* got 5"),
        (call(DELTA(["a"]), s, [s[0][:, :5]]), ValueError,
         r"source \(layer 'a'\): expected \[2, 6, 3, 3\], .* one architecture, got \[2, 5, 3, 3\]"),
        (call(DELTA(["a", "b"]), s, s), ValueError, "student: expected a list of 2, one for"),
        (call(DELTA(["a"]), s, s[0]), ValueError, "source: expected a list of 1, one for"),
        (call(DELTA(["a"]), [s[0].long()], s), TypeError, "student .*: expected a floating tensor"),
        (call(DELTA(["a"]), [torch.rand(3)], [torch.rand(3)]), ValueError, "with a batch"),
        (call(DELTA(["a"]), [s[0][0]], [s[0][0]]), ValueError,
         r"channel_dim \(layer 'a'\): expected an int for three-dim.* -1: tokens .* got None"),
        (call(DELTA(["a"], channel_dim=4), s, s), ValueError, "channels in dimension 4"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
