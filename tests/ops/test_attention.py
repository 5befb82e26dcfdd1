"""Every backend of the attention kind against the float64 oracle: values, gradients, the op."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lwkd
from tests import cases, oracle, tolerances
from tests.cases import CASES, DTYPES, LAYOUTS, Case, Option, Target, each_target, fast_target
from tests.ops.battery import agrees, close, one_thread

__all__ = ["one_thread"]  # a fixture


def cotangent(inputs: cases.Inputs, option: Option) -> tuple[Tensor, Tensor]:
    """The incoming gradient of the tested call, and the weights of D [L, N] that it means."""
    if option.reduction == "none":
        return inputs.weight, inputs.weight
    g = inputs.weight[:, 0]
    return g, (g.double() / inputs.weight.shape[1])[:, None].expand_as(inputs.weight)


@functools.cache
def verdict(name: str, dtype: str, altering: str, option: Option) -> tolerances.Verdict:
    """The oracle's word; layouts that leave the values alone share it. ``option`` has no sides."""
    inputs = cases.make(cases.BY_NAME[name], dtype, altering or "contiguous")
    _, weight = cotangent(inputs, option)
    return tolerances.judge(
        inputs.student, inputs.teacher, weight, **inputs.options, **option.formula()
    )


def check(target: Target, case: Case, dtype: str, layout: str, option: Option) -> None:
    """One sample: the distance, and the gradients of the sides that want one."""
    what = f"{target} {case.name!r} {dtype} {layout} {option}"
    inputs = cases.make(case, dtype, layout, target.device)
    altering = layout if layout in cases.ALTERING else ""
    want = verdict(case.name, dtype, altering, option._replace(sides=(True, True)))
    student, teacher = (
        [x.detach().requires_grad_(wanted) for x in xs]
        for xs, wanted in zip((inputs.student, inputs.teacher), option.sides, strict=True)
    )
    d = target.distance(
        student, teacher, reduction=option.reduction, **inputs.options, **option.formula()
    )
    compute = tolerances.compute_dtype(student, teacher)
    assert d.dtype == compute, what
    assert d.device == student[0].device, what
    value, bound = want.value, want.value_bound
    if option.reduction == "mean":
        value, bound = tolerances.mean(want, tolerances.U[compute])
    close(d, value, bound, what)
    wanted = [(side, i) for side in (0, 1) if option.sides[side] for i in range(len(student))]
    xs = [(student, teacher)[side][i] for side, i in wanted]
    grads = torch.autograd.grad(d, xs, cotangent(inputs, option)[0].to(d.dtype))
    for (side, i), x, g in zip(wanted, xs, grads, strict=True):
        assert g.dtype == x.dtype, what
        where = f"{what}, gradient of {('student', 'teacher')[side]} {i}"
        close(g, want.gradients[side][i], want.gradient_bounds[side][i], where)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@each_target
def test_values_and_gradients(target: Target, dtype: str, layout: str) -> None:
    """Faults 2, 3, 6: every layout of every operand, values and gradients, on every backend."""
    for case, option in cases.thinned(target, dtype, layout):
        check(target, case, dtype, layout, option)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_target
def test_maps(target: Target, layout: str) -> None:
    """Faults 2, 3: ops.attention_maps and its gradient."""
    for dtype, (case, p) in itertools.product(DTYPES, map_samples()):
        if target.slow and (case.name, p, dtype) not in (("plain", 1.5, "f32"), ("1-d", 2, "f16")):
            continue
        inputs = cases.make(case, dtype, layout, target.device)
        xs = [x.detach().requires_grad_() for x in inputs.student]
        dims = [d[0] for d in oracle.by_layer(case.channel_dim, len(xs))]
        got = target.maps(xs, p=p, channel_dim=dims)
        wide = [x.detach().cpu().double().requires_grad_() for x in xs]
        want = oracle.attention_maps(wide, p=p, channel_dim=dims)
        bounds = tolerances.attention_maps(xs, [m.detach() for m in want], p, dims)
        weight = [m.detach().cos() for m in want]
        for m, w, b in zip(got, want, bounds, strict=True):
            what = f"{target} {case.name!r} {dtype} {layout} p={p}"
            close(m, w.detach(), b.cpu(), what)
            assert m.is_contiguous(), what
        grads = torch.autograd.grad(got, xs, [w.to(m) for w, m in zip(weight, got, strict=True)])
        exact = torch.autograd.grad(want, wide, weight)
        for x, g, e in zip(xs, grads, exact, strict=True):
            u = tolerances.U[tolerances.compute_dtype([x])]
            depth = tolerances.power_depth(p) + tolerances.FORMULA
            tol = tolerances.gamma(depth, u) + 2 * tolerances.U[x.dtype]
            close(g, e, tol * e.abs() + tolerances.spacing(x.dtype), f"{case.name!r} {dtype} {p}")


def map_samples() -> list[tuple[Case, float]]:
    some = [c for c in CASES if c.tokens is None and c.fill != "near"]
    return list(itertools.product(some[:10], cases.POWERS))


def test_the_battery_is_as_large_as_promised() -> None:
    """op × dtype × layout × option, not counting backends: at least 5,000."""
    pairs = {
        (dtype, layout, case.name, option)
        for dtype in DTYPES
        for layout in LAYOUTS
        for case, option in cases.samples(dtype, layout)
    }
    maps = len(DTYPES) * len(LAYOUTS) * len(map_samples())
    assert 2 * len(pairs) + 2 * maps >= 5000  # forward and backward are two ops
    options = {(o.p, o.divergence, o.reduction, o.sides) for *_, o in pairs}
    assert len(options) == len(cases.POWERS) * 2 * 2 * len(cases.SIDES)


@each_target
def test_around_the_tile(target: Target) -> None:
    """Fault 11: one position less and one more than a task of the CPU kernels has."""
    for dtype, layout in (("f32", "contiguous"), ("bf16", "channels_last"), ("f64", "offset")):
        for option in cases.options(0) + cases.options(1):
            if not target.slow or (dtype == "f32" and option.p in (1.0, 2.0)):
                check(target, cases.TILES, dtype, layout, option)


# Positions at which the CPU kernels change their ways (a vector, 2, 4 and 8 of them, a line of
# prefetching more or less), and channels around a group of those that are added together.
POSITIONS = (7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 127, 1023, 1024, 1029)
CHANNELS = (1, 2, 3, 4, 5, 7, 63, 64, 65, 69, 131)


@fast_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_around_vectors_and_groups(target: Target, dtype: torch.dtype) -> None:
    """Fault 11: maps to the last bit, in exact arithmetic; gradients against the oracle."""
    shapes = [(1, c, q) for q in POSITIONS for c in CHANNELS]
    for p in (1.0, 2.0):
        xs = [cases.draw(s, dtype, i, "integer").to(target.device) for i, s in enumerate(shapes)]
        for x, m in zip(xs, target.maps(xs, p=p, channel_dim=1), strict=True):
            assert torch.equal(m.double(), x.double().abs().pow(p).sum(1)), (p, x.shape)
    chosen = [s for s in shapes if s[1] in (1, 5, 64)]
    student, teacher = (
        [cases.draw(s, dtype, j + 2 * i).to(target.device) for i, s in enumerate(chosen)]
        for j in (0, 1)
    )
    agrees(target, student, teacher, channel_dim=1)


@fast_target
def test_a_gradient_of_many_pages(target: Target) -> None:
    """Large gradients are allocated another way than small ones; all of it is written."""
    x, y = (cases.draw((2, 21, 400, 320), torch.float32, i).to(target.device) for i in (1, 2))
    assert x.numel() * x.element_size() > 4 << 20
    agrees(target, [x], [y])


# --- the exact lane ------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_integers_are_exact(target: Target, p: float) -> None:
    """Every partial sum is exact: not one bit may differ from the oracle's, on any backend."""
    edges = zip(cases.EDGES, cases.EDGES[::-1], strict=True)
    shapes = [((2, c, q), (2, c + 1, q)) for c, q in edges]
    shapes = shapes[::4] if target.slow else shapes
    for dtype, (layout, arrange) in itertools.product(DTYPES, list(LAYOUTS.items())[:8]):
        if target.slow and (layout, dtype) not in (("contiguous", "bf16"), ("strided", "f32")):
            continue
        first, second = DTYPES[dtype]
        student = [cases.draw(s, first, 1, "integer").to(target.device) for s, _ in shapes]
        teacher = [cases.draw(t, second, 2, "integer").to(target.device) for _, t in shapes]
        student, teacher = [arrange(x) for x in student], [arrange(x) for x in teacher]
        for xs in (student, teacher):
            for m, x in zip(target.maps(xs, p=p, channel_dim=1), xs, strict=True):
                assert torch.equal(m.double(), x.double().abs().pow(p).sum(1)), (dtype, layout)
        layouts = [1, 0, 0, 0] * len(student)
        flat = target.namespace.attention(student, teacher, [], layouts, layouts, p, 0, 0.5, True)[
            1
        ]
        pairs = [
            x.double().abs().pow(p).sum(1).flatten()
            for pair in zip(student, teacher, strict=True)
            for x in pair
        ]
        assert torch.equal(flat.double(), torch.cat(pairs)), (dtype, layout)


@each_target
def test_pooled_integers_are_exact(target: Target) -> None:
    """Windows of a power of two: the averages are exact as well, and masks cut exactly."""
    s, t = cases.draw((2, 3, 4, 8), torch.float32, 1, "integer"), torch.ones(2, 1, 2, 2)
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [True, False]]])
    s, t, mask = (x.to(target.device) for x in (s, t, mask))
    layout = [1, 0, 0, 0]
    flat = target.namespace.attention([s], [t], [mask], layout, layout, 2.0, 0, 0.5, True)[1]
    m = s.double().square().sum(1).view(2, 2, 2, 2, 4).mean((2, 4)) * mask
    assert torch.equal(flat.double(), torch.stack([m, mask.double()]).flatten())


# --- small and equal differences -----------------------------------------------------------------


@each_target
@pytest.mark.parametrize("divergence", ["l2", "js"])
def test_equal_networks_are_at_zero(target: Target, divergence: str) -> None:
    """Bitwise 0.0 with gradient 0, for every layout that both sides share."""
    for dtype, (layout, arrange) in itertools.product(("f64", "f32", "bf16"), LAYOUTS.items()):
        if target.slow and (dtype != "f32" or layout not in ("contiguous", "channels_last")):
            continue
        x = cases.draw((3, 9, 5, 7), DTYPES[dtype][0], 4).to(target.device)
        s, t = arrange(x).detach().requires_grad_(), arrange(x)
        d = target.distance([s], [t], divergence=divergence, beta=0.3, p=1.5, reduction="none")
        assert torch.equal(d, torch.zeros_like(d)), (dtype, layout)
        (g,) = torch.autograd.grad(d.sum(), s)
        assert g.isfinite().all(), (dtype, layout)
        limit = 1e-6 if dtype != "f64" else 1e-15
        assert g.abs().max() <= limit, (dtype, layout)


@each_target
@pytest.mark.parametrize("difference", tolerances.JS_NEARLY_EQUAL)
def test_js_of_nearly_equal_networks(target: Target, difference: float) -> None:
    """The form with the series keeps its digits where entropies and KL terms lose them."""
    g = torch.Generator().manual_seed(2)
    t = torch.randn(4, 16, 14, 14, generator=g)
    s = t * (1 + difference * torch.randn(t.shape, generator=g))
    want = oracle.distances([s], [t], divergence="js")
    got = target.distance(
        [s.to(target.device)], [t.to(target.device)], divergence="js", reduction="none"
    )
    error = (got.cpu().double() / want - 1).abs().max()
    assert error <= tolerances.JS_NEARLY_EQUAL[difference]


@each_target
def test_no_distance_is_negative(target: Target) -> None:
    """Every term of js is ≥ 0, down to differences in the last bit, with few positions too."""
    t = cases.draw((64, 2, 3), torch.float32, 1)
    noise = cases.draw((64, 2, 3), torch.float32, 2)
    for difference in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        pair = [x.to(target.device) for x in (t * (1 + difference * noise), t)]
        options = {"channel_dim": 1, "divergence": "js", "reduction": "none"}
        d = target.distance(pair[:1], pair[1:], **options)
        assert (d >= 0).all(), difference
        assert d.max() < 4 * difference**2


@fast_target
@pytest.mark.parametrize("divergence", ["l2", "js"])
def test_errors_over_many_draws_are_no_worse_than_eager(target: Target, divergence: str) -> None:
    """RMS over 256 draws against the definition in plain float32 PyTorch."""
    g = torch.Generator().manual_seed(6)
    s, t = (torch.randn(256, 24, 6, 6, generator=g) for _ in range(2))

    def eager(a: Tensor, b: Tensor) -> Tensor:
        ma, mb = (x.square().sum(1).flatten(1) for x in (a, b))
        keep = torch.ones_like(ma, dtype=torch.bool)
        if divergence == "l2":
            return oracle.distance(ma, mb, keep, "l2", 0.5)
        pa, pb = (m / m.sum(1, keepdim=True) for m in (ma, mb))
        mix = (pa + pb) / 2
        return (pa * (pa / mix).log() + pb * (pb / mix).log()).sum(1) / 2

    def run(f: Any, *xs: Tensor) -> tuple[Tensor, Tensor]:
        leaf = xs[0].detach().requires_grad_()
        d = f(leaf, xs[1])
        return d.detach().double(), torch.autograd.grad(d.sum(), leaf)[0].double()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        sides = [a.to(target.device)], [b.to(target.device)]
        return target.distance(*sides, divergence=divergence, reduction="none").cpu()

    exact = run(
        lambda a, b: oracle.distances([a], [b], divergence=divergence)[0], s.double(), t.double()
    )
    plain, got = run(eager, s, t), run(lambda a, b: ours(a, b)[0], s, t)
    limits = (tolerances.RMS_VALUE, tolerances.RMS_GRADIENT)
    for e, ref, x, limit in zip(exact, plain, got, limits, strict=True):
        rms = [(y - e).square().mean().sqrt().item() for y in (x, ref)]
        floor = tolerances.U[torch.float32] * e.abs().max().item()
        assert rms[0] <= limit * rms[1] + floor


# --- derivatives ---------------------------------------------------------------------------------

GRADCHECK = [
    {"divergence": "l2", "p": 2.0},
    {"divergence": "l2", "p": 1.5, "reduction": "none"},
    {"divergence": "js", "p": 3.0, "beta": 0.3},
    {"divergence": "js", "p": 1.0, "reduction": "none"},
]


@pytest.mark.parametrize("options", GRADCHECK, ids=lambda o: f"{o['divergence']}-{o['p']}")
@fast_target
def test_gradcheck(target: Target, options: dict[str, Any]) -> None:
    """Float64, both sides, two layers, one of them pooled and masked; nothing nondeterministic."""
    shapes = [((2, 3, 4, 3), (2, 2, 3, 4)), ((2, 2, 2, 2), (2, 3, 2, 2))]
    pairs = [[cases.draw(s, torch.float64, i).to(target.device) for s in pair]
             for i, pair in enumerate(shapes)]  # fmt: skip
    mask = [torch.tensor([[[True, True, False]] * 3] * 2, device=target.device), None]
    leaves = [x.detach().requires_grad_() for s, t in pairs for x in (s, t)]

    def f(*xs: Tensor) -> Tensor:
        return target.distance(xs[::2], xs[1::2], mask=mask, **options)

    assert torch.autograd.gradcheck(f, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("p", [1.5, 2.0, 2.5, 3.0])
@fast_target
def test_maps_are_twice_differentiable(target: Target, p: float) -> None:
    """Fault 15: gradcheck and gradgradcheck of attention_maps."""
    xs = [cases.draw(s, torch.float64, 3).to(target.device) for s in ((2, 3, 2, 2), (2, 4, 3))]
    leaves = [x.detach().requires_grad_() for x in xs]

    def f(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(target.maps(list(xs), p=p, channel_dim=[1, 2]))

    assert torch.autograd.gradcheck(f, leaves, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(f, leaves, gen_non_contig_grad_outputs=True)


def test_the_public_maps_are_those_of_the_op() -> None:
    xs = [cases.draw((2, 3, 4, 5), torch.bfloat16, 1), cases.draw((2, 6, 3), torch.float64, 2)]
    got = lwkd.ops.attention_maps(xs, p=3.0, channel_dim=[-3, 2])
    again = lwkd.ops.attention_maps(xs, p=3.0, channel_dim=(-3, 2))  # no (student, teacher) here
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert [m.dtype for m in got] == [torch.float32, torch.float64]
    for m, w in zip(got, oracle.attention_maps(xs, p=3.0, channel_dim=[1, 2]), strict=True):
        torch.testing.assert_close(m.double(), w, rtol=1e-5, atol=0)


@fast_target
def test_maps_compose_to_a_second_derivative(target: Target) -> None:
    """What the message on the second derivative recommends is right: Hessian-vector product."""
    s, t = (cases.draw((2, 3, 3, 3), torch.float64, i).to(target.device) for i in (1, 2))

    def hvp(distance: Any) -> Tensor:
        leaf = s.detach().requires_grad_()
        (g,) = torch.autograd.grad(distance(leaf), leaf, create_graph=True)
        return torch.autograd.grad((g * s.cos()).sum(), leaf)[0]

    def composed(x: Tensor) -> Tensor:
        a, b = (m.flatten(1) for m in target.maps([x, t]))
        return (oracle.unit(a) - oracle.unit(b)).square().sum()

    want = hvp(lambda x: oracle.distances([x], [t]).sum())
    torch.testing.assert_close(hvp(composed), want, rtol=1e-10, atol=1e-12)


def test_the_range_of_the_distances() -> None:
    """Disjoint maps: 2 for l2, ln 2 for js at β = ½, whatever their scale."""
    s, t = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    s[..., 0], t[..., 1] = 3.0, 1e-4
    assert lwkd.ops.layer_discrepancy([s], [t]).item() == 2.0
    js = lwkd.ops.layer_discrepancy([s], [t], divergence="js").item()
    assert js == pytest.approx(math.log(2), rel=1e-6)
