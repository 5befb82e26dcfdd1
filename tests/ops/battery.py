"""What the tests of the ops share: inputs, and the comparison with the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases, tolerances
from tests.cases import Target

divergences = pytest.mark.parametrize("divergence", ["l2", "js"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the shapes are small, and conftest restores it


def close(got: Tensor, want: Tensor, bound: Tensor, what: Any) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want, bound = got.detach().cpu().double(), want.cpu(), bound.cpu()
    bad = ~((got - want).abs() <= bound)  # a NaN is bad too
    if bad.any():
        i = tuple(bad.nonzero()[0].tolist())
        text = f"{what}: {int(bad.sum())} of {bad.numel()} wrong, the first at {i}: "
        text += f"{got[i].item()}, not {want[i].item()} ± {bound[i].item():.1e}"
        pytest.fail(text)


def pairs(target: Target, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ...]:
    """Three layers of four samples: one pooled, one with a tail in every vector width."""
    shapes = [
        ((4, 5, 4, 6), (4, 7, 4, 6)),
        ((4, 3, 3, 11), (4, 33, 3, 11)),
        ((4, 4, 2, 3), (4, 4, 5, 3)),
    ]
    draw = [[cases.draw(s, dtype, 10 * i + j) for j, s in enumerate(p)]
            for i, p in enumerate(shapes)]  # fmt: skip
    return [s.to(target.device) for s, _ in draw], [t.to(target.device) for _, t in draw]


def leaves(xs: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in xs]


def agrees(
    target: Target,
    student: list[Tensor],
    teacher: list[Tensor],
    what: Any = "",
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Distances [L, N] and all gradients against the oracle; returned for further questions."""
    s, t = leaves(student), leaves(teacher)
    d = target.distance(s, t, reduction="none", **options)
    weight = torch.linspace(0.5, 2.5, d.numel(), device=d.device).view(d.shape)
    want = tolerances.judge(student, teacher, weight, **options)
    close(d, want.value, want.value_bound, what)
    grads = torch.autograd.grad(d, s + t, weight.to(d.dtype))
    for i, (g, (exact, bound)) in enumerate(zip(grads, want.flat(), strict=True)):
        close(g, exact, bound, f"{what}, gradient {i}")
    return d.detach(), list(grads)
