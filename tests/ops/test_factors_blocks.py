"""Factored rows at sizes where the compiled kernel takes its work in parts.

oneDNN's products, blocks of rows, columns, channels, groups; both ways to a difference; a mended c.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lwkd.ops import ConvFactors, Factors, factors
from tests.ops.test_factors import WAYS, distance, draw, gradient, ways

F32 = torch.float32
N = 2


def dense(rows: int, inputs: int, outputs: int, seed: int) -> Factors:
    shapes = (N, rows, inputs), (N, rows, outputs)
    return Factors(*(draw(*s, seed=seed + k, dtype=F32) for k, s in enumerate(shapes)))


def conv(
    inputs: int, outputs: int, side: int, kernel: int, groups: int, seed: int, transposed: bool
) -> ConvFactors:
    shapes = (N, inputs, side, side), (N, outputs, side, side)
    x, d = (draw(*s, seed=seed + k, dtype=F32) for k, s in enumerate(shapes))
    pad = kernel // 2
    return ConvFactors(x, d, (kernel, kernel), (1, 1), (pad, pad), (1, 1), groups, transposed)


ITEMS: dict[str, Any] = {
    "one block of rows": lambda seed: dense(197, 96, 130, seed),
    "several": lambda seed: dense(600, 40, 50, seed),
    "several of inputs": lambda seed: dense(270, 1500, 40, seed),
    "several of outputs": lambda seed: dense(64, 900, 400, seed),
    "wide": lambda seed: dense(16, 3000, 70, seed),
    "conv": lambda seed: conv(64, 64, 28, 3, 1, seed, False),
    "conv, several of channels": lambda seed: conv(160, 400, 6, 3, 1, seed, False),
    "conv, large": lambda seed: conv(20, 18, 200, 3, 1, seed, False),
    "pointwise": lambda seed: conv(200, 33, 9, 1, 1, seed, False),
    "pointwise, groups": lambda seed: conv(64, 96, 9, 1, 2, seed, False),
    "depthwise": lambda seed: conv(32, 32, 14, 3, 32, seed, False),
    "groups": lambda seed: conv(64, 96, 40, 3, 8, seed, False),
    "transposed": lambda seed: conv(64, 48, 28, 3, 1, seed, True),
}
each_item = pytest.mark.parametrize("name", ITEMS)
ONLY_BUILT = "conv, large"  # 40,000 rows: a gram of them takes minutes
contractions = pytest.mark.parametrize("contraction", ["gram", "direct"])
threads = pytest.fixture(autouse=True)(lambda: torch.set_num_threads(2))  # conftest restores it


def near(item: Any, apart: float, scale: float, seed: int) -> Any:
    """Another network's item: ``apart`` away, and ``scale`` times as large."""
    a, d = (x + apart * draw(*x.shape, seed=seed + k, dtype=F32) for k, x in enumerate(item[:2]))
    return type(item)(a, (scale * d).to(F32), *item[2:])


def measure(s: Any, t: Any, contraction: str, way: str) -> Tensor:
    return factors.discrepancy(
        "test", [s], [t], "none", "compiled", contraction=contraction, **WAYS[way]
    )[0]


def off(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want) / want).abs().max())


@contractions
@each_item
def test_digits(name: str, contraction: str) -> None:
    """The contract: 2e-6 in float32, whatever is left of the difference."""
    if name == ONLY_BUILT and contraction == "gram":
        pytest.skip("a gram of 40,000 rows")
    s = ITEMS[name](1)
    large, of_s = name == ONLY_BUILT, gradient(s)
    for apart in (1.0, 1e-2) if large else (1.0, 3e-2, 1e-2, 1e-3, 1e-4, 1e-6):
        for scale in (1.0, 1.1, 100.0):
            t = near(s, apart, scale, 7)
            of_t = gradient(t)
            for way in ("normalized", "difference") if scale == 1 else ("normalized",):
                error = off(measure(s, t, contraction, way), distance(of_s, of_t, way))
                assert error <= 2e-6, (way, apart, scale, error)


@ways
@each_item
def test_any_number_of_threads(name: str, way: str) -> None:
    """Bit for bit: every product is one thread's."""
    s = ITEMS[name](1)
    t = near(s, 1e-2, 1.1, 5)
    for contraction in ("direct",) if name == ONLY_BUILT else ("gram", "direct"):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(measure(s, t, contraction, way))
        assert torch.equal(found[0], found[1]), contraction
        assert torch.equal(found[0], found[2]), contraction


@contractions
@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e5])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_a_wrong_guess_of_c_is_mended(contraction: str, apart: float, factor: float) -> None:
    """Factors whose own norms say nothing of the gradients': what d is at a row where a is 0."""
    s = dense(30, 20, 24, 1)
    t = near(s, apart, 1.0, 3)
    (t if factor > 1 else s).d[:, 0] *= max(factor, 1 / factor)
    for x in (s, t):
        x.a[:, 0] *= 1e-15
    want = distance(gradient(s), gradient(t), "normalized")
    assert off(measure(s, t, contraction, "normalized"), want) <= 2e-6


@contractions
@pytest.mark.parametrize("way", ["normalized", "difference"])
def test_factors_apart_and_gradients_not(contraction: str, way: str) -> None:
    """Rows turned among themselves, in a and in d, give the same gradient.

    What rounding leaves of that: a gram's in its squares, a gradient's before it is squared.
    """
    s = dense(64, 300, 400, 1)
    turn = torch.linalg.qr(draw(64, 64, seed=9))[0]
    t = Factors(*((turn @ x.double()).float() for x in s))
    scale = gradient(s).square().sum(1) if way == "difference" else 1
    left = measure(s, t, contraction, way) / scale
    assert (left.abs() <= (2e-6 if contraction == "gram" else 1e-11)).all()


def test_parameters_of_one_layer_of_other_sizes() -> None:
    """c is the layer's: what one parameter says of it is wrong for the other."""
    s = (dense(40, 30, 20, 1), dense(40, 1, 20, 3))
    t = (near(s[0], 0.1, 50.0, 5), near(s[1], 0.1, 0.02, 7))
    want = distance(gradient(s), gradient(t), "normalized")
    assert off(measure(s, t, "direct", "normalized"), want) <= 2e-6
