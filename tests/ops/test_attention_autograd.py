"""Faults of autograd, injected here: strided incoming gradients, retained graphs, autocast."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import lwkd
from tests import cases, oracle, tolerances
from tests.cases import Target, cpu_target, each_target, fast_target
from tests.ops.battery import agrees, close, divergences, leaves, one_thread, pairs

__all__ = ["one_thread"]  # a fixture


# --- incoming gradients --------------------------------------------------------------------------


def incoming(length: int, n: int, device: str) -> dict[str, Tensor]:
    """The same kind of gradient [L, N] in every memory layout that autograd hands on."""
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(2 * length, 3 * n, generator=g).to(device)
    return {
        "contiguous": wide[:length, :n].clone(),
        "transposed": wide.t()[:length, :n].clone().t().clone().t()[:length],
        "really transposed": torch.randn(n, length, generator=g).to(device).t(),
        "every second": wide[::2, ::3],
        "cropped": wide[1 : length + 1, 2 : n + 2],
        "stride 0 over samples": wide[:length, :1].expand(length, n),
        "stride 0 over layers": wide[:1, :n].expand(length, n),
        "one number": torch.tensor(0.7, device=device).expand(length, n),
        "float64": wide[:length, :n].double(),
    }


# What the interpreter has the time for.
SLOW = (
    ("mean", "every second"),
    ("none", "really transposed"),
    ("none", "cropped"),
    ("none", "one number"),
)


@each_target
@divergences
def test_strided_incoming_gradients(target: Target, divergence: str) -> None:
    """Fault 1: against an oracle of its own, since gradcheck passes a backward that ignores
    the strides of its gradient."""
    student, teacher = pairs(target)
    length, n = len(student), 4
    for name, g in incoming(length, n, target.device).items():
        for reduction in ("none", "mean"):
            if target.slow and (reduction, name) not in SLOW:
                continue
            s = leaves(student)
            d = target.distance(s, teacher, divergence=divergence, reduction=reduction)
            g1 = g if reduction == "none" else g[:, 1]
            weight = g if reduction == "none" else (g1 / n)[:, None].expand(length, n)
            want = tolerances.judge(student, teacher, weight, divergence=divergence)
            if g1.dtype != d.dtype:  # autograd insists on the dtype; the op itself need not
                layout, spaces = [1, 0, 0, 0] * length, [1, 4, 6, 1, 3, 11, 1, 2, 3]
                js = int(divergence == "js")
                args = (s, teacher, [], layout, layout, 2.0, js, 0.5, False)
                maps = target.namespace.attention(*args)[1]
                got = target.namespace.attention_backward(
                    g1.to(d.dtype), student, [], maps.detach(), list(range(length)), [0] * length,
                    layout, spaces, 2.0, js, 0.5,
                )  # fmt: skip
            else:
                got = torch.autograd.grad(d, s, g1)
            for x, e, b in zip(got, want.gradients[0], want.gradient_bounds[0], strict=True):
                close(x, e, b, f"{target} {divergence} {reduction}, {name}")


CONSUMERS = {
    "sum": lambda d: d.sum(),
    "expanded": lambda d: (d.expand(3, *d.shape) * 2).sum(),
    "transposed": lambda d: (d.t() * torch.arange(1.0, 5, device=d.device)[:, None]).sum(),
    "sliced": lambda d: d[:, ::2].sum() + d[1:].square().sum(),
    "concatenated": lambda d: (torch.cat([d, 3 * d], 1).t().cumsum(0) ** 2).sum(),
    "stacked": lambda d: torch.stack([d, d.flip(0)], 2).select(2, 1).mean(),
    "one sample": lambda d: d[0, 1] * 5,
}


@pytest.mark.parametrize("name", CONSUMERS)
@fast_target
def test_consumers_of_the_distances(target: Target, name: str) -> None:
    """Fault 1: gradients that come out of expand, cat, slices and transposes."""
    student, teacher = pairs(target)
    s = leaves(student)
    consume = CONSUMERS[name]
    grads = torch.autograd.grad(consume(target.distance(s, teacher, reduction="none")), s)
    leaf = oracle.distances(student, teacher).requires_grad_()
    (weight,) = torch.autograd.grad(consume(leaf), leaf)
    want = tolerances.judge(student, teacher, weight)
    for g, e, b in zip(grads, want.gradients[0], want.gradient_bounds[0], strict=True):
        # The consumer saw a rounded distance: its weight is off by a few roundings as well.
        close(g, e, b + 64 * tolerances.U[torch.float32] * e.abs() + 1e-9, f"{target} {name}")


@each_target
def test_strided_incoming_gradients_of_the_maps(target: Target) -> None:
    """Fault 1, for attention_maps."""
    x = cases.draw((2, 5, 3, 4), torch.float32, 1).to(target.device)
    wide = cases.draw((4, 6, 8), torch.float32, 2).to(target.device)
    for g in (wide[::2, ::2, ::2], wide[:1, :1, :1].expand(2, 3, 4), wide.mT[:2, :3, :4].clone()):
        leaf = x.detach().requires_grad_()
        (got,) = torch.autograd.grad(target.maps([leaf], p=3.0), leaf, g)
        want = 3 * x.double() * x.double().abs() * g.double()[:, None]
        close(got, want.cpu(), 1e-6 * want.abs() + 1e-30, f"{target} {g.stride()}")


@each_target
def test_gradients_exist_where_and_only_where_they_are_wanted(target: Target) -> None:
    """Fault 2: not one gradient silently becomes None, for strided leaves and mixed wishes."""
    student, teacher = pairs(target)
    layouts = list(cases.LAYOUTS.values())
    for turn in range(1 if target.slow else 8):
        s = [layouts[(turn + i) % 8](x).detach() for i, x in enumerate(student)]
        t = [layouts[(turn + i + 3) % 8](x).detach() for i, x in enumerate(teacher)]
        wishes = [s[0], s[2], t[1]]
        for x in wishes:
            x.requires_grad_()
        target.distance(s, t).sum().backward()
        assert all(x.grad is not None and x.grad.count_nonzero() > 0 for x in wishes)
        assert all(x.grad is None for x in (s[1], t[0], t[2]))
        want = tolerances.judge(student, teacher, torch.full((3, 4), 0.25))
        for x, i, side in zip(wishes, (0, 2, 1), (0, 0, 1), strict=True):
            close(x.grad, want.gradients[side][i], want.gradient_bounds[side][i], (turn, i))


@fast_target
def test_no_gradient_wanted_and_none_arriving(target: Target) -> None:
    """Fault 2: no graph without a wish; a distance that nobody uses gives zeros, not a crash."""
    student, teacher = pairs(target)
    assert not target.distance(student, teacher).requires_grad
    s = leaves(student)
    with torch.no_grad():
        assert not target.distance(s, teacher).requires_grad
    with torch.inference_mode():
        target.distance(s, teacher)
    d = target.distance(s, teacher)
    assert torch.autograd.grad(d[:0].sum(), s[0])[0].count_nonzero() == 0
    other = s[0].sum() + 0 * d.detach().sum()
    assert torch.autograd.grad(other, s, allow_unused=True)[1:] == (None, None)


# --- autograd's promises -------------------------------------------------------------------------


@each_target
def test_a_second_derivative_raises(target: Target) -> None:
    """Fault 15: an error that says what to do, never a silently wrong number."""
    student, teacher = pairs(target)
    s = leaves(student[:1])
    d = target.distance(s, teacher[:1]).sum()
    (g,) = torch.autograd.grad(d, s, create_graph=True)
    plain = torch.autograd.grad(target.distance(s, teacher[:1]).sum(), s)[0]
    assert torch.equal(g, plain)  # the first derivative is right under create_graph
    with pytest.raises(RuntimeError, match=r"no second derivative.*attention_maps"):
        torch.autograd.grad(g.sum(), s)


@each_target
@divergences
def test_a_retained_graph_twice(target: Target, divergence: str) -> None:
    """Fault 16: twice the same bits, and no input was written to."""
    student, teacher = pairs(target)
    mask = [torch.rand(4, 4, 6, device=target.device) < 0.5, None, None]
    s, t = leaves(student), leaves(teacher)
    before = [x.detach().clone() for x in [*s, *t, mask[0]]]
    versions = [x._version for x in [*s, *t, mask[0]]]
    d = target.distance(s, t, divergence=divergence, mask=mask, reduction="none")
    weight = torch.ones_like(d)
    first = torch.autograd.grad(d, s + t, weight, retain_graph=True)
    second = torch.autograd.grad(d, s + t, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for x, old, version in zip([*s, *t, mask[0]], before, versions, strict=True):
        assert torch.equal(x.detach(), old)
        assert x._version == version
    assert torch.equal(weight, torch.ones_like(d))


@fast_target
def test_an_in_place_write_is_noticed(target: Target) -> None:
    """Fault 16: what the backward needs was changed in between: an error, no wrong gradient."""
    student, teacher = pairs(target)
    base = student[0].requires_grad_()
    x = base * 1
    d = target.distance([x], teacher[:1])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.sum().backward()


@fast_target
def test_in_place_relu_before_and_teacher_writes_after(target: Target) -> None:
    """Fault 16: a teacher's activations are free once they are maps."""
    student, teacher = pairs(target)
    x = student[0].requires_grad_()
    h = (x * 1).relu_()
    t = teacher[0].clone()
    d = target.distance([h], [t])
    t.zero_()
    (g,) = torch.autograd.grad(d.sum(), x)
    weight = torch.full((1, 4), 0.25)
    want = tolerances.judge([x.detach().relu()], teacher[:1], weight)
    assert g[x <= 0].count_nonzero() == 0
    close(g, want.gradients[0][0], want.gradient_bounds[0][0], target)


@fast_target
@divergences
def test_autocast_changes_nothing(target: Target, divergence: str) -> None:
    """Fault 17: bfloat16 activations, float32 accumulation, forward and backward."""
    student, teacher = pairs(target, torch.bfloat16)
    agrees(target, student, teacher, "bfloat16", divergence=divergence)
    s, u = leaves(student), leaves(student)
    plain = target.distance(s, teacher, divergence=divergence)
    with torch.autocast(target.device, torch.bfloat16):
        cast = target.distance(u, teacher, divergence=divergence)
        grads = torch.autograd.grad(cast.sum(), u)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    for a, b in zip(torch.autograd.grad(plain.sum(), s), grads, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_the_teacher_is_not_kept() -> None:
    """Only what needs a gradient stays alive: a teacher's activations are free at once."""
    student, teacher = pairs(Target("reference", "cpu"))
    s = leaves(student)
    d = lwkd.ops.layer_discrepancy(s, teacher)
    ghosts = [weakref.ref(x) for x in teacher]
    del teacher
    gc.collect()
    assert all(ghost() is None for ghost in ghosts)
    assert d.requires_grad


# --- what would be wrong in silence ---------------------------------------------------------------


def _calls(target: Target) -> list[Callable[[Tensor], Any]]:
    y = torch.rand(2, 5, 4, 4, dtype=torch.float64)
    maps, layout = torch.rand(2 * 2 * 16, dtype=torch.float64), [1, 0, 0, 0]
    space = getattr(torch.ops, "lwkd" if target.backend == "compiled" else f"lwkd_{target.backend}")
    grad = torch.ones(1, dtype=torch.float64)
    return [
        lambda x: lwkd.ops.layer_discrepancy([x], [y], backend=target.backend),
        lambda x: lwkd.ops.attention_maps([x])[0],
        lambda x: space.attention([x], [y], [], layout, layout, 2.0, 0, 0.5, True)[0],
        lambda x: space.attention_maps([x], [1], 2.0)[0],
        lambda x: space.attention_backward(
            grad, [x], [], maps, [0], [0], layout, [1, 4, 4], 2.0, 0, 0.5
        )[0],
    ]  # fmt: skip


@cpu_target
def test_forward_mode_raises(target: Target) -> None:
    """A tangent would be dropped below autograd: no derivative is better than 0."""
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    for f in _calls(target):
        with forward_ad.dual_level():
            for primal in (x, x.clone().requires_grad_()):
                dual = forward_ad.make_dual(primal, torch.ones_like(x))
                with pytest.raises(RuntimeError, match=r"lwkd\.ops\.attention.*forward-mode"):
                    f(dual)
            assert f(x) is not None  # beside one, a tensor without a tangent is served


def _total(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x).sum()


@cpu_target
def test_function_transforms_raise(target: Target) -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    for f in _calls(target)[:2]:
        for transform, args in (
            (partial(torch.func.jvp, f), ((x,), (x,))),
            (torch.func.jacfwd(f), (x,)),
            (torch.func.grad(partial(_total, f)), (x,)),
            (torch.func.vmap(f), (x[None],)),
        ):
            with pytest.raises(RuntimeError, match=r"lwkd\.ops\.attention.*reverse-mode"):
                transform(*args)


def test_the_graph_says_whose_gradient_it_is() -> None:
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert "lwkd_attention_" in str(lwkd.ops.layer_discrepancy([x], [x.detach()]).grad_fn)
    assert "lwkd_attention_maps" in str(lwkd.ops.attention_maps([x])[0].grad_fn)
