"""The Triton kernels of Jacobian rows: what tests/ops cannot see, and their machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from lwkd.kernels import common, jacobian

from tests import cases
from tests.kernels import machine_code

DEVICE = "cpu" if common.INTERPRET else "cuda"
F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
WAYS = (jacobian.DIFFERENCE, jacobian.NORMALIZED, jacobian.NORMS)


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return cases.draw(shape, dtype, seed).to(DEVICE)


def exact(s: Tensor, t: Tensor, how: int) -> Tensor:
    """The sums [N, 3] in float64."""
    s, t = s.flatten(1).double(), t.flatten(1).double()
    zero = torch.zeros(len(s), dtype=F64, device=s.device)
    if how == jacobian.DIFFERENCE:
        return torch.stack([(s - t).square().sum(1), zero, zero], 1)
    cross = (s * t).sum(1) if how == jacobian.NORMALIZED else zero
    return torch.stack([s.square().sum(1), t.square().sum(1), cross], 1)


@pytest.mark.parametrize("how", WAYS)
def test_long_rows_are_cut(how: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one tile and of several, a last one that is shorter, and rows of one piece."""
    for programs, longest in ((2048, 64), (1, 2), (1, 64)):
        monkeypatch.setattr(jacobian, "_PROGRAMS", programs)
        monkeypatch.setattr(jacobian, "_LONGEST", longest)
        s = [draw(2, 5001, seed=1), draw(2, 1025, seed=2), draw(2, 3, seed=3)]
        t = [draw(2, 5001, seed=4), draw(2, 1025, seed=5), draw(2, 3, seed=6)]
        d, sums = jacobian.rows(s, t, how, False)
        for i in range(3):
            want = exact(s[i], t[i], how)
            assert (sums[i] - want).abs().max() <= 1e-13 * want.abs().max() * s[i].shape[1]
        grads = jacobian.rows_backward(
            torch.ones_like(d), s, [] if how == jacobian.NORMS else t, sums, [0, 1, 2], [0] * 3, how
        )
        assert all(g.isfinite().all() for g in grads)


def test_more_dimensions_than_a_kernel_knows() -> None:
    """They are copied, and the gradient comes back in the strides of its row."""
    s = draw(2, 3, 2, 3, 2, 3, 2, seed=1)[:, ::2, :, ::2, :, ::2].movedim(1, 4)
    t = draw(*s.shape, seed=2)
    d, sums = jacobian.rows([s], [t], jacobian.NORMALIZED, True)
    assert torch.allclose(sums[0], exact(s, t, jacobian.NORMALIZED), rtol=1e-14)
    (g,) = jacobian.rows_backward(torch.ones_like(d), [s], [t], sums, [0], [0], jacobian.NORMALIZED)
    leaf = s.double().detach().requires_grad_()
    unit = torch.nn.functional.normalize
    want = (unit(leaf.flatten(1)) - unit(t.double().flatten(1))).square().sum(1).mean()
    (e,) = torch.autograd.grad(want, leaf)
    assert (g - e).abs().max() <= 1e-6 * e.abs().max()
    assert g.stride() == torch.empty_like(s).stride()


def test_a_call_is_a_few_launches() -> None:
    """Layers of one kind share them, 64 as well as two."""
    for count in (2, 64):
        s = [draw(4, 3, 8, seed=i) for i in range(count)]
        plan, d, sums, keep = jacobian.plan_rows(s, s, jacobian.NORMALIZED, True)
        launches = [kernel.__name__ for kernel, _, _ in plan.launches()]
        assert launches == ["sums_kernel", "distance_kernel", "mean_kernel"]
        indices = list(range(count))
        plan, *_, kept = jacobian.plan_rows_backward(
            torch.ones_like(d), s, s, sums, indices, [0] * count, jacobian.NORMALIZED
        )
        assert [kernel.__name__ for kernel, _, _ in plan.launches()] == ["spread_kernel"]
        del keep, kept


def test_wide_loads_where_alignment_allows() -> None:
    x, odd = draw(2, 64), draw(2, 63)
    flat = draw(1, 129)[0]
    for s, t, wide in ((x, x, True), (odd, odd, False), (x, flat[1:].view(2, 64), False),
                       (x, x.to(B16), True), (x.t().contiguous().t(), x, False)):  # fmt: skip
        plan, *keep = jacobian.plan_rows([s], [t], jacobian.NORMALIZED, True)
        vector = plan.launches()[0][2]["VECTOR"]
        assert (vector > 1) == wide, (s.stride(), t.stride())
        del keep


def test_64_bit_indices() -> None:
    """Fault 4: the kernels that 2³¹ elements would use, on fewer."""
    s, t = draw(2, 3, 700, seed=1).mT, draw(2, 700, 3, seed=2)
    plan, d, sums, keep = jacobian.plan_rows([s], [t], jacobian.NORMALIZED, False)
    table_launches = plan.launches()
    table = plan.upload()
    for kernel, programs, arguments in table_launches:
        if "INDEX" in arguments:
            assert arguments["INDEX"] == tl.int32
            arguments = arguments | {"INDEX": tl.int64}
        kernel[(programs,)](table, **arguments, **common.OPTIONS)
    want, want_sums = jacobian.rows([s], [t], jacobian.NORMALIZED, False)
    assert torch.equal(d, want)
    assert torch.equal(sums, want_sums)
    del keep


def test_repeats_bitwise() -> None:
    """Fault 13: the same call gives the same bits."""
    s, t = [draw(3, 2049, seed=1)], [draw(3, 2049, dtype=B16, seed=2)]
    first: list[Tensor] = []
    for _ in range(2 if DEVICE == "cpu" else 1000):
        d, sums = jacobian.rows(s, t, jacobian.NORMALIZED, True)
        now = [d, sums, *jacobian.rows_backward(d, s, t, sums, [0], [0], jacobian.NORMALIZED)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


# --- machine code ---------------------------------------------------------------------------------

KERNELS = [name for name in vars(jacobian) if name.endswith("_kernel")]


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """Machine code for sm_80 and sm_90 of every kernel, in a process without the interpreter."""
    machine_code.check_module("tests.kernels.test_jacobian", {*KERNELS, "write_table"})


def launches_to_compile() -> machine_code.Launches:
    """One launch of every kernel and set of constants that a spread of calls needs."""
    plans: list[Any] = []
    for how in WAYS:
        for s, t in (
            (draw(2, 4096, dtype=B16), draw(2, 4096, dtype=B16, seed=1)),
            (draw(2, 3, 5), draw(2, 5, 3, dtype=F64).mT),
            (draw(2, 64, dtype=F16), draw(2, 64)),
        ):
            plan, d, sums, _ = jacobian.plan_rows([s], [t], how, True)
            others = [] if how == jacobian.NORMS else [t]
            back, *_ = jacobian.plan_rows_backward(d, [s], others, sums, [0], [0], how)
            plans += [plan, back]
    return machine_code.launches_of(plans)


if __name__ == "__main__":
    DEVICE = "cpu"  # planned there, launched nowhere
    machine_code.check_that_no_value_compiles_again([vars(jacobian)[name] for name in KERNELS])
    machine_code.report(launches_to_compile())
