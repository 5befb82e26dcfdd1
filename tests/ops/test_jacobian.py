"""The rows of the Jacobian kind on every backend: against float64 written from the definition."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lwkd
from tests import cases, tolerances
from tests.cases import DTYPES, LAYOUTS, Target, cpu_target, each_target, fast_target
from tests.ops.battery import close, leaves, one_thread
from tests.ops.test_attention_autograd import CONSUMERS, incoming

__all__ = ["one_thread"]  # a fixture
F64, F32 = torch.float64, torch.float32

WAYS: dict[str, dict[str, Any]] = {
    "normalized": {"normalize": True},
    "difference": {"normalize": False},
    "norms": {"compare": "norms"},
}
ways = pytest.mark.parametrize("way", WAYS)
SHAPES = ((3, 7), (3, 1), (3, 2, 3, 4), (3, 4, 1, 5), (3, 33), (3, 3, 2, 2, 3))


# --- the oracle: float64, from the definition ----------------------------------------------------


def distances(student: list[Tensor], teacher: list[Tensor], way: str) -> Tensor:
    """D [L, N] of float64 rows."""
    out = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.flatten(1), t.flatten(1)
        ns, nt = (x.norm(dim=1, keepdim=True) for x in (s, t))
        if way == "norms":
            whole = ns + nt
            d = torch.where(whole == 0, 0.0, (ns - nt) / torch.where(whole == 0, 1.0, whole))
        elif way == "difference":
            d = s - t
        else:
            d = s / ns.clamp_min(1e-12) - t / nt.clamp_min(1e-12)
        out.append(d.square().sum(1))
    return torch.stack(out)


class Verdict(NamedTuple):
    value: Tensor
    value_bound: Tensor
    gradients: list[list[Tensor]]
    gradient_bounds: list[list[Tensor]]


def judge(student: list[Tensor], teacher: list[Tensor], weight: Tensor, way: str) -> Verdict:
    """Values, gradients of Σ weight·D, and their bounds: see tolerances.rows."""
    wide = [leaves([x.detach().cpu().double() for x in xs]) for xs in (student, teacher)]
    value = distances(*wide, way)
    flat = torch.autograd.grad((weight.double() * value).sum(), wide[0] + wide[1])
    sides = [list(flat[: len(student)]), list(flat[len(student) :])]
    dtypes = [[x.dtype for x in xs] for xs in (student, teacher)]
    plain = [[x.detach() for x in xs] for xs in wide]
    return Verdict(
        value.detach(), *tolerances.rows(plain, dtypes, value.detach(), weight, sides, way)
    )


def agrees(
    target: Target, student: list[Tensor], teacher: list[Tensor], way: str, what: Any = ""
) -> None:
    """Values and all gradients of one call."""
    s, t = leaves(student), leaves(teacher)
    d = target.distance(s, t, kind="jacobian", reduction="none", **WAYS[way])
    weight = torch.linspace(0.5, 2.5, d.numel()).view(d.shape)
    want = judge(student, teacher, weight, way)
    assert d.dtype == tolerances.compute_dtype(student, teacher), what
    close(d, want.value, want.value_bound, (what, way))
    grads = torch.autograd.grad(d, s + t, weight.to(d))
    exact, bounds = ([*x[0], *x[1]] for x in (want.gradients, want.gradient_bounds))
    for i, (x, g, e, b) in enumerate(zip(s + t, grads, exact, bounds, strict=True)):
        assert g.dtype == x.dtype, what
        close(g, e, b, (what, way, f"gradient {i}"))


def draw(dtype: str, layout: str, device: str, fill: str = "normal") -> tuple[list[Tensor], ...]:
    names = list(LAYOUTS)
    other = layout if layout in cases.ALTERING else names[(names.index(layout) + 3) % 8]
    sides: tuple[list[Tensor], ...] = ([], [])
    for i, shape in enumerate(SHAPES):
        for side, how in enumerate((layout, other)):
            x = cases.draw(shape, DTYPES[dtype][(side + i) % 2], 10 * i + side, fill)
            sides[side].append(LAYOUTS[how](x.to(device)))
    return sides


@ways
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@each_target
def test_values_and_gradients(target: Target, dtype: str, layout: str, way: str) -> None:
    """Faults 2, 3, 6, 12: every layout of every operand, on every backend."""
    if target.slow and (list(DTYPES).index(dtype) + list(LAYOUTS).index(layout)) % 6:
        pytest.skip("the interpreter sees one in six")
    agrees(target, *draw(dtype, layout, target.device), way, (target, dtype, layout))


# Around a vector, the 16 partial sums, and a task of the CPU kernels.
LENGTHS = (1, 3, 4, 5, 15, 16, 17, 31, 33, 255, 4095, 4096, 4097, 8192, 9001)


@ways
@fast_target
def test_lengths_of_rows(target: Target, way: str) -> None:
    """Fault 11: tails behind whole vectors and whole tasks."""
    for dtype in (F32, torch.bfloat16, F64):
        rows = [
            [cases.draw((2, k), dtype, k + i).to(target.device) for k in LENGTHS] for i in (0, 1)
        ]
        agrees(target, *rows, way, (target, dtype))


@each_target
def test_exact_lane(target: Target) -> None:
    """Integers whose sums float64 holds exactly: bitwise equal, values and gradients."""
    for dtype, layout in itertools.product(("f32", "bf16", "f64"), ("contiguous", "permuted")):
        student, teacher = draw(dtype, layout, target.device, "integer")
        s, t = leaves(student), leaves(teacher)
        d = target.distance(s, t, kind="jacobian", normalize=False, reduction="none")
        want = distances([x.double() for x in student], [x.double() for x in teacher], "difference")
        assert torch.equal(d.double().cpu(), want.cpu()), (target, dtype, layout)
        for x, y, g in zip(s, t, torch.autograd.grad(d.sum(), s), strict=True):
            assert torch.equal(g.double(), 2 * (x.double() - y.double()).detach()), (dtype, layout)


# --- the contract: digits that survive -----------------------------------------------------------

APART = {1.0: 1e-5, 1e-2: 1e-5, 1e-4: 1e-4, 1e-6: 1e-2}  # difference -> relative error, promised
SCALES = (1.0, 1.1, 2.0, 100.0)


@each_target
def test_nearly_equal_rows_keep_their_digits(target: Target) -> None:
    """A student starts as a copy, or a rescaled copy, of its teacher."""
    length = 300 if target.slow else 20000
    for (apart, allowed), scale in itertools.product(APART.items(), SCALES):
        g = torch.Generator().manual_seed(0)
        s = torch.randn(3, length, generator=g, dtype=F64)
        noise = torch.randn(3, length, generator=g, dtype=F64)
        t = (scale * (s + apart * noise)).float().to(target.device)
        s = s.float().to(target.device)
        for way in ("normalized", "difference"):
            x, y = leaves([s]), leaves([t])
            d = target.distance(x, y, kind="jacobian", reduction="none", **WAYS[way])
            wide = [leaves([z.double()]) for z in (s, t)]
            want = distances(*wide, way)
            off = (d.double() - want).abs() / want
            assert off.max() <= allowed, f"{target} {way} {apart} {scale}: value off by {off.max()}"
            exact = torch.autograd.grad(want.sum(), wide[0] + wide[1])
            for got, e in zip(torch.autograd.grad(d.sum(), x + y), exact, strict=True):
                off = (got.double() - e).norm() / e.norm()
                assert off <= allowed, f"{target} {way} {apart} {scale}: gradient off by {off}"


@ways
@pytest.mark.parametrize("layout", LAYOUTS)
@each_target
def test_equal_rows_are_at_no_distance(target: Target, layout: str, way: str) -> None:
    """Bitwise 0, and a gradient that is nothing but rounding."""
    for dtype in ("f64", "f32", "bf16"):
        if target.slow and (dtype != "f32" or layout not in ("contiguous", "strided")):
            continue
        rows = [
            LAYOUTS[layout](cases.draw(s, DTYPES[dtype][0], 3).to(target.device)) for s in SHAPES
        ]
        s = leaves(rows)
        d = target.distance(s, [LAYOUTS[layout](x.clone()) for x in rows] if layout not in
                            cases.ALTERING else rows, kind="jacobian", **WAYS[way])  # fmt: skip
        assert torch.equal(d, torch.zeros_like(d)), (target, dtype, layout)
        for x, g in zip(s, torch.autograd.grad(d.sum(), s), strict=True):
            assert g.abs().max() <= 1e-14 * (1 + 1 / x.detach().abs().max().double()), (
                dtype,
                layout,
            )


# --- where a row is nothing, or not a number -----------------------------------------------------


@each_target
def test_rows_without_a_norm(target: Target) -> None:
    """Both zero: 0. One zero: 1. Below eps: divided by eps. The gradient is 0 in all of these."""
    a = torch.zeros(4, 5, dtype=F64)
    b = a.clone()
    b[1] = cases.draw((5,), F64, 1)
    a[2], b[2] = 1e-13 * torch.ones(5), cases.draw((5,), F64, 2)
    a[3], b[3] = cases.draw((5,), F64, 3), cases.draw((5,), F64, 4)
    for dtype in (F64, F32):
        s, t = leaves([a.to(target.device, dtype)]), leaves([b.to(target.device, dtype)])
        d = target.distance(s, t, kind="jacobian", reduction="none")
        want = distances(*[[x[0].detach().cpu().double()] for x in (s, t)], "normalized")
        assert d[0, 0] == 0
        assert (d.cpu().double() - want).abs().max() <= 1e-6
        assert abs(float(d[0, 1].detach()) - 1) <= 1e-6
        for g in torch.autograd.grad(d.sum(), s + t):
            assert torch.equal(g[:3], torch.zeros_like(g[:3]))
            assert g[3].abs().min() > 0
        d = target.distance(s, t, kind="jacobian", compare="norms", reduction="none")
        assert d[0, 0] == 0
        assert d[0, 1] == 1
        for g in torch.autograd.grad(d.sum(), s + t):
            assert g.isfinite().all()


@ways
@each_target
def test_nan_and_infinity_come_out(target: Target, way: str) -> None:
    """Fault 10: first, last, tail; the other samples and layers are not touched by it."""
    length = 37
    for value, at, side in itertools.product((float("nan"), float("inf")), (0, 35, 36), (0, 1)):
        if target.slow and at != 36:
            continue
        rows = [
            [cases.draw((3, length), F32, i + side), cases.draw((3, 4), F32, 5 + i)] for i in (0, 2)
        ]
        rows[side][0][1, at] = value
        s, t = ([x.to(target.device) for x in xs] for xs in rows)
        d = target.distance(leaves(s), t, kind="jacobian", reduction="none", **WAYS[way]).cpu()
        finite = torch.ones(2, 3, dtype=torch.bool)
        finite[0, 1] = False
        assert torch.equal(d.isfinite(), finite), (target, way, value, at, side)
        if way != "difference" or value != value:
            assert d[0, 1].isnan(), (target, way, value)


@ways
@each_target
def test_empty(target: Target, way: str) -> None:
    """Fault 9: no samples, or rows of nothing: distance 0."""
    for shape in ((0, 5), (3, 0), (0, 0), (3, 4, 0)):
        s = leaves([torch.ones(shape, device=target.device)])
        for reduction in ("mean", "none"):
            d = target.distance(s, [torch.ones(shape, device=target.device)], kind="jacobian",
                                reduction=reduction, **WAYS[way])  # fmt: skip
            assert d.shape == ((1,) if reduction == "mean" else (1, shape[0]))
            assert torch.equal(d, torch.zeros_like(d)), (target, shape)
            (g,) = torch.autograd.grad(d.sum(), s)
            assert g.shape == shape


@each_target
def test_norms_of_rows_of_any_length(target: Target) -> None:
    s = [cases.draw((3, 5, 7), F32, 1), cases.draw((3, 40), torch.bfloat16, 2)]
    t = [cases.draw((3, 11), F32, 3), cases.draw((3, 2, 2, 2), F32, 4)]
    agrees(target, [x.to(target.device) for x in s], [x.to(target.device) for x in t], "norms")


# --- autograd ------------------------------------------------------------------------------------


@ways
@each_target
def test_strided_incoming_gradients(target: Target, way: str) -> None:
    """Fault 1: gradcheck passes a backward that ignores the strides of its gradient."""
    student, teacher = draw("f32", "contiguous", target.device)
    student, teacher = student[:3], teacher[:3]
    n = 3
    for name, g in incoming(len(student), n, target.device).items():
        if g.dtype != F32 or (target.slow and name not in ("every second", "really transposed")):
            continue
        for reduction in ("none", "mean"):
            s = leaves(student)
            d = target.distance(s, teacher, kind="jacobian", reduction=reduction, **WAYS[way])
            g1 = g if reduction == "none" else g[:, 1]
            weight = g if reduction == "none" else (g1 / n)[:, None].expand(len(student), n)
            want = judge(student, teacher, weight.detach().cpu(), way)
            got = torch.autograd.grad(d, s, g1)
            for x, e, b in zip(got, want.gradients[0], want.gradient_bounds[0], strict=True):
                close(x, e, b, (target, way, reduction, name))


@pytest.mark.parametrize("name", CONSUMERS)
@fast_target
def test_consumers_of_the_distances(target: Target, name: str) -> None:
    """Fault 1: gradients that come out of expand, cat, slices and transposes."""
    student, teacher = draw("f64", "contiguous", target.device)
    student, teacher = ([cases.draw((4, 6), F64, 9 * j + i).to(target.device) for i in range(3)]
                        for j in (1, 2))  # fmt: skip
    s = leaves(student)
    consume: Callable[[Tensor], Tensor] = CONSUMERS[name]
    got = torch.autograd.grad(
        consume(target.distance(s, teacher, kind="jacobian", reduction="none")), s
    )
    wide = leaves(student)
    want = torch.autograd.grad(consume(distances(wide, teacher, "normalized")), wide)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@each_target
@ways
def test_gradcheck_and_no_second_derivative(target: Target, way: str) -> None:
    """Fault 15: the first derivative is right; a second one raises and says what to do."""
    if target.slow and way != "normalized":
        pytest.skip("the interpreter sees one way")
    rows = [cases.draw((2, 5), F64, i).to(target.device).requires_grad_() for i in range(2)]

    def f(s: Tensor, t: Tensor) -> Tensor:
        return target.distance([s], [t], kind="jacobian", reduction="none", **WAYS[way])

    assert torch.autograd.gradcheck(f, rows, nondet_tol=0.0)
    (g,) = torch.autograd.grad(f(*rows).sum(), rows[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


@fast_target
def test_training_through_rows(target: Target) -> None:
    """What the loss of Jacobian matching does: rows by create_graph, and backward through D."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    net = net.to(target.device, F64)
    x = cases.draw((4, 5), F64, 1).to(target.device).requires_grad_()
    t = cases.draw((4, 5), F64, 2).to(target.device)
    grads = []
    for measure in (
        lambda rows: target.distance([rows], [t], kind="jacobian").sum(),
        lambda rows: distances([rows], [t], "normalized").mean(),
    ):
        (rows,) = torch.autograd.grad(net(x)[:, 1].sum(), x, create_graph=True)
        wanted = [p for name, p in net.named_parameters() if name != "2.bias"]
        grads.append(torch.autograd.grad(measure(rows), wanted, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp_min(1e-3)


@ways
@pytest.mark.parametrize("length", [2_500_000, 2_500_001])
def test_gradients_larger_than_the_caches(length: int, way: str) -> None:
    """Are written past them; rows that are not aligned are not."""
    rows = [cases.draw((4, length), F32, k) for k in (1, 2)]
    agrees(Target("compiled", "cpu"), [rows[0]], [rows[1]], way)


# --- determinism, threads, far offsets -----------------------------------------------------------


def test_any_thread_count_gives_the_same_bits() -> None:
    """D1: the split follows the shapes alone."""
    Target("compiled", "cpu").require()
    s = leaves([cases.draw((3, 20001), F32, 1), cases.draw((3, 4, 5), F32, 2)])
    t = [cases.draw((3, 20001), F32, 3), cases.draw((3, 4, 5), F32, 4)]
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        d = lwkd.ops.layer_discrepancy(s, t, kind="jacobian", reduction="none")
        results.append([d, *torch.autograd.grad(d.sum(), s)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@cpu_target
def test_offsets_beyond_32_bits(target: Target) -> None:
    """Fault 4: strides of 2³¹ elements, of either row and of its gradient."""
    far = 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    for strides in ((far, 3, 1), (5, far, 1)):
        flat = torch.frombuffer(mmap.mmap(-1, 2 * (far + 64), flags=flags), dtype=torch.float16)
        near = cases.draw((2, 2, 3), torch.float16, 1)
        x = flat.as_strided((2, 2, 3), strides).copy_(near)
        y = cases.draw((2, 2, 3), torch.float16, 2)
        agrees(target, [x], [y], "normalized", strides)
        agrees(target, [y], [x], "difference", strides)


@each_target
def test_nothing_stays_unwritten(target: Target) -> None:
    """Fault 11: torch.empty filled with NaN."""
    torch.use_deterministic_algorithms(True)
    for way in WAYS:
        agrees(target, *draw("f32", "strided", target.device), way, target)


@each_target
def test_inputs_are_left_alone(target: Target) -> None:
    student, teacher = draw("bf16/f32", "permuted", target.device)
    before = [x.clone() for x in student + teacher]
    target.distance(leaves(student), leaves(teacher), kind="jacobian").sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, student + teacher, strict=True))


@each_target
def test_equal_rows_that_are_nothing(target: Target) -> None:
    """Below eps as well: exactly 0."""
    for dtype in (F64, F32):
        x = 1e-14 * cases.draw((50, 7), dtype, 3)
        for way in ({"normalize": True}, {"normalize": False}, {"compare": "norms"}):
            d = target.distance([x.to(target.device)], [x.clone().to(target.device)],
                                kind="jacobian", reduction="none", **way)  # fmt: skip
            assert d.eq(0).all(), (dtype, way)
