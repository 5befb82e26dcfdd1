"""The Triton kernels of the Hessian kind: what tests/ops cannot see, and their machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lwkd.kernels import common, hessian

from lwkd.ops import philox
from tests import cases
from tests.kernels import machine_code

DEVICE = "cpu" if common.INTERPRET else "cuda"
F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return cases.draw(shape, dtype, seed).to(DEVICE)


def test_a_call_is_a_few_launches() -> None:
    """Layers and probes share them; those of other alignment have one more."""
    for count in (2, 64):
        hvps = [draw(3, 8, 4, seed=i) for i in range(count)]
        plan, _, keep = hessian.plan_probe_dot(hvps, range(count), 0, 0, 3)
        assert [k.__name__ for k, _, _ in plan.launches()] == ["dot_kernel", "total_kernel"]
        del keep
    odd = [draw(3, 5, 3), draw(3, 4)]
    plan, _, keep = hessian.plan_probe_dot(odd, [0, 1], 0, 0, 3)
    names = [k.__name__ for k, _, _ in plan.launches()]
    assert names == ["dot_kernel", "dot_kernel", "total_kernel"]
    del keep


def test_many_tiles() -> None:
    """More than one program adds up at a time."""
    h = torch.ones(4096 * 1100 if DEVICE == "cuda" else 4096 * 20 + 5, device=DEVICE)
    got = hessian.probe_dot([h], [3], 1, 2, 0)
    assert float(got[0]) == float(philox.signs(h, 1, 3, 2).sum())


def test_repeats_bitwise() -> None:
    """Fault 13: the same call gives the same bits."""
    hvps = [draw(9001, seed=1), draw(33, 7, dtype=B16, seed=2)]
    first = hessian.probe_dot(hvps, [0, 1], 5, 0, 0)
    for _ in range(2 if DEVICE == "cpu" else 1000):
        assert torch.equal(first, hessian.probe_dot(hvps, [0, 1], 5, 0, 0))


# --- machine code ---------------------------------------------------------------------------------

KERNELS = [name for name in vars(hessian) if name.endswith("_kernel")]


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """Machine code for sm_80 and sm_90 of every kernel, in a process without the interpreter."""
    machine_code.check_module("tests.kernels.test_hessian", {*KERNELS, "write_table"})


def launches_to_compile() -> machine_code.Launches:
    """One launch of every kernel and set of constants that a spread of calls needs."""
    plans: list[Any] = []
    for dtype in (F64, F32, F16, B16):
        h = draw(2, 4096, dtype=dtype)
        plans.append(hessian.plan_probe_dot([h], [0], 1, 0, 2)[0])
        plans.append(hessian.plan_rademacher(h, 1, 0, 0))
    plans.append(hessian.plan_probe_dot([draw(2, 3)], [0], 1, 0, 2)[0])
    return machine_code.launches_of(plans)


if __name__ == "__main__":
    DEVICE = "cpu"  # planned there, launched nowhere
    machine_code.check_that_no_value_compiles_again([vars(hessian)[name] for name in KERNELS])
    machine_code.report(launches_to_compile())
