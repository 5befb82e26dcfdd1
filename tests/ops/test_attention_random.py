"""Random shapes, strides and options against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases, oracle
from tests.cases import Target, cpu_target
from tests.ops.battery import agrees, one_thread

__all__ = ["one_thread"]  # a fixture
hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@st.composite
def tensors(draw: Any, sizes: list[int], fill: str) -> Tensor:
    """Values of any dtype in memory of any order, step, crop and offset."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    x = cases.draw(tuple(sizes), dtype, seed, fill)
    order = draw(st.permutations(range(len(sizes))))
    steps = [draw(st.integers(1, 3)) for _ in sizes]
    before = [draw(st.integers(0, 2)) for _ in sizes]
    big = torch.full(
        [b + n * s for b, n, s in zip(before, sizes, steps, strict=True)], float("nan"), dtype=dtype
    )
    big = big.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    inside = tuple(slice(b, b + n * s, s) for b, n, s in zip(before, sizes, steps, strict=True))
    x = big[inside].copy_(x)
    d = draw(st.sampled_from([None, None, None, *range(len(sizes))]))
    return x if d is None or not sizes[d] else x.narrow(d, 0, 1).expand(sizes)


@st.composite
def calls(draw: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Student, teacher and options of one call."""
    n = draw(st.integers(0, 3))
    size = st.integers(0, 9) if draw(st.booleans()) else st.integers(1, 5)
    fill = draw(st.sampled_from(["normal", "normal", "relu", "integer"]))
    student, teacher, dims, masks = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        spaces = draw(st.integers(1, 3))
        pair, sides = [], []
        same = draw(st.booleans())
        space = [draw(size) for _ in range(spaces)]
        for side in range(2):
            own = space if same or side == 0 else [draw(size) for _ in range(spaces)]
            dim = draw(st.integers(1, spaces + 1))
            channels = draw(st.integers(0, 5) | st.sampled_from([8, 17, 33]))
            sizes = [n, *own[: dim - 1], channels, *own[dim - 1 :]]
            pair.append(draw(tensors(sizes, fill if n else "normal")))
            sides.append(dim if draw(st.booleans()) else dim - spaces - 2)
        student.append(pair[0])
        teacher.append(pair[1])
        dims.append(tuple(sides))
        (_, _, common, _) = oracle.operands(pair[:1], pair[1:], [dims[-1]], None, None)[0]
        keep = torch.rand(n, *common, generator=torch.Generator().manual_seed(n)) < 0.7
        masks.append(draw(st.sampled_from([None, keep])))
    options: dict[str, Any] = {
        "p": draw(st.sampled_from([1.0, 2.0, 1.25, 1.5, 2.5, 3.0, 4.0])),
        "divergence": draw(st.sampled_from(["l2", "js"])),
        "beta": draw(st.sampled_from([0.5, 0.1, 0.7])),
        "channel_dim": dims,
    }
    if any(m is not None for m in masks):
        options["mask"] = masks
    return student, teacher, options


@given(call=calls())
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_random_calls(backend: str, call: Any) -> None:
    student, teacher, options = call
    agrees(Target(backend, "cpu"), student, teacher, **options)


@given(call=calls())
@settings(max_examples=max(8, settings().max_examples // 20))
@cpu_target
def test_random_calls_everywhere(target: Target, call: Any) -> None:
    """A few for the interpreter too."""
    student, teacher, options = call
    agrees(target, student, teacher, **options)
