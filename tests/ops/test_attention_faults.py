"""Faults that other people's kernels had, injected here: layouts, sizes, extremes, autograd."""

from __future__ import annotations

import gc
import itertools
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lwkd
from tests import cases, oracle, tolerances
from tests.cases import Target, cpu_target, each_target, fast_target
from tests.ops.test_attention import close

F32 = torch.float32
DIVERGENCES = pytest.mark.parametrize("divergence", ["l2", "js"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pairs(target: Target, dtype: torch.dtype = F32, n: int = 4) -> tuple[list[Tensor], ...]:
    """Three layers: one pooled, one with a tail in every vector width."""
    shapes = [((n, 5, 4, 6), (n, 7, 4, 6)), ((n, 3, 3, 11), (n, 33, 3, 11)), ((n, 4, 2, 3),) * 2]
    shapes[2] = ((n, 4, 2, 3), (n, 4, 5, 3))
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


@each_target
@DIVERGENCES
def test_strided_incoming_gradients(target: Target, divergence: str) -> None:
    """Fault 1: against an oracle of its own, since gradcheck passes a backward that ignores
    the strides of its gradient."""
    student, teacher = pairs(target)
    length, n = len(student), 4
    for name, g in incoming(length, n, target.device).items():
        for reduction in ("none", "mean"):
            if target.slow and (reduction == "mean") != (name == "every second"):
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
        close(g, e, b + 64 * tolerances.U[F32] * e.abs() + 1e-9, f"{target} {name}")


@each_target
def test_strided_incoming_gradients_of_the_maps(target: Target) -> None:
    """Fault 1, for attention_maps."""
    x = cases.draw((2, 5, 3, 4), F32, 1).to(target.device)
    wide = cases.draw((4, 6, 8), F32, 2).to(target.device)
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
@DIVERGENCES
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
@DIVERGENCES
def test_autocast_changes_nothing(target: Target, divergence: str) -> None:
    """Fault 17: bfloat16 activations, float32 accumulation, forward and backward."""
    student, teacher = pairs(target, torch.bfloat16)
    agrees(target, student, teacher, "bfloat16", divergence=divergence)
    s, u = leaves(student), leaves(student)
    plain = target.distance(s, teacher, divergence=divergence)
    with torch.autocast(target.device, torch.bfloat16):
        cast = target.distance(u, teacher, divergence=divergence)
        grads = torch.autograd.grad(cast.sum(), u)
    assert cast.dtype == F32
    assert torch.equal(plain, cast)
    for a, b in zip(torch.autograd.grad(plain.sum(), s), grads, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a, b)


# --- zeros and scales ----------------------------------------------------------------------------


@each_target
@DIVERGENCES
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_exact_zeros(target: Target, divergence: str, p: float) -> None:
    """Activations after ReLU, all-zero maps on one side and on both: gradients finite, 0 at 0."""
    student, teacher = pairs(target)
    student, teacher = [x.relu() for x in student], [x.relu() for x in teacher]
    for s, t in zip(student, teacher, strict=True):
        s[0], s[1], t[1], t[2] = 0, 0, 0, 0
        s[3, :, 0] = 0  # whole positions: M = 0 there, or only P_S
        t[3, :, 0, :2] = 0
    options = {"divergence": divergence, "p": p, "beta": 0.3}
    d, grads = agrees(target, student, teacher, target, **options)
    assert d[:, 1].count_nonzero() == 0
    for x, g in zip(student + teacher, grads, strict=True):
        assert g.isfinite().all()
        assert g[x == 0].count_nonzero() == 0
        if divergence == "js":  # no direction at an all-zero map
            assert g[1].count_nonzero() == 0


@each_target
@DIVERGENCES
def test_far_scales(target: Target, divergence: str) -> None:
    """Squares of such maps overflow, or vanish, in float32; the distances do not care."""
    student, teacher = pairs(target)
    for a, b, p in ((1e10, 1e10, 2.0), (1e-10, 1e10, 2.0), (1e10, 1e-10, 1.0), (1e-10, 1e-10, 2.0),
                    (1e9, 1e9, 3.0), (8e17, 8e17, 2.0)):  # fmt: skip
        if target.slow and a == b:
            continue
        s, t = [x * a for x in student], [x * b for x in teacher]
        agrees(target, s, t, f"{target} {divergence} {a} {b} p={p}", divergence=divergence, p=p)


@each_target
@DIVERGENCES
def test_sums_beyond_float32(target: Target, divergence: str) -> None:
    """Every map entry fits float32, but neither their sum nor their norm does."""
    s = torch.full((1, 1, 4, 4), 1.5e19, device=target.device)
    t = s.clone()
    t[..., :2] *= 0.5
    agrees(target, [s], [t], f"{target} {divergence}", divergence=divergence)


@each_target
def test_low_precision_is_never_the_accumulator(target: Target) -> None:
    """Fault 12: 512 ones in bfloat16 add up to 256 there; 65504² does not fit half."""
    ones = torch.ones(1, 512, 1, 3, dtype=torch.bfloat16, device=target.device)
    largest = torch.full((1, 4, 1, 3), 65504.0, dtype=torch.float16, device=target.device)
    for layout in ("contiguous", "channels_last", "strided"):
        arrange = cases.LAYOUTS[layout]
        for p in (1.0, 2.0):
            assert target.maps([arrange(ones)], p=p)[0].tolist() == [[[512.0] * 3]]
            assert target.maps([arrange(largest)], p=p)[0].tolist() == [[[4 * 65504.0**p] * 3]]
    teacher = cases.draw((1, 2, 1, 3), torch.float16, 1).to(target.device)
    agrees(target, [largest], [teacher], target)
    agrees(target, [ones], [teacher], target, divergence="js", p=1.0)


# --- NaN, Inf, denormals -------------------------------------------------------------------------


def places(x: Tensor) -> list[tuple[int, ...]]:
    """First, last, the tail behind whole vectors, and the middle of one sample: (c, *space)."""
    c, h, w = x.shape[1:]
    return [(0, 0, 0), (c - 1, h - 1, w - 1), (c // 2, h - 1, w - 2), (c - 1, 0, w // 2)]


@each_target
@DIVERGENCES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_comes_out_where_it_went_in(target: Target, divergence: str, value: float) -> None:
    """Fault 10: exactly the samples and layers that hold one are NaN, all others keep their
    bits, in values and in gradients."""
    student, teacher = pairs(target)
    options = {"divergence": divergence, "p": 2.0}
    clean, grads = run(target, student, teacher, **options)
    turns = itertools.product((0, 1), range(3), places(student[0]))
    for turn, (side, layer, _) in enumerate(turns):
        if target.slow and turn % 11:
            continue
        lists = [[x.clone() for x in student], [x.clone() for x in teacher]]
        x = lists[side][layer]
        sample = turn % 4
        x[(sample, *places(x)[turn % 4])] = value
        got, dirty = run(target, *lists, **options)
        expected = torch.zeros_like(got, dtype=torch.bool)
        expected[layer, sample] = True
        assert torch.equal(got.isnan(), expected), (side, layer, sample)
        assert torch.equal(got[~expected], clean[~expected])
        for i, (a, b) in enumerate(zip(dirty, grads, strict=True)):
            rows = torch.arange(4, device=a.device) != (sample if i % 3 == layer else -1)
            assert a[rows].isfinite().all()
            torch.testing.assert_close(a[rows], b[rows], rtol=1e-5, atol=1e-7)
        assert dirty[3 * side + layer][sample].isnan().any()
        mean = target.distance(*lists, **options)
        assert mean.isnan().tolist() == [i == layer for i in range(3)]


def run(target: Target, student: Any, teacher: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    s, t = leaves(student), leaves(teacher)
    d = target.distance(s, t, reduction="none", **options)
    return d.detach(), list(torch.autograd.grad(d.sum(), s + t))


@each_target
@DIVERGENCES
def test_what_is_masked_out_does_not_leak(target: Target, divergence: str) -> None:
    """Faults 10, 11: NaN at positions that do not count change no bit of the distances, and
    their gradients are 0 as any other's that does not count."""
    student, teacher = pairs(target)
    mask: list[Tensor | None] = [None, torch.ones(4, 3, 11, dtype=torch.bool), None]
    mask[1][0, 0, 0] = mask[1][1, 2, 10] = mask[1][2, 1, 7] = False
    mask[1][3] = False
    out = ~mask[1].to(target.device)
    mask = [m if m is None else m.to(target.device) for m in mask]
    clean, grads = run(target, student, teacher, mask=mask, divergence=divergence)
    assert clean[1, 3] == 0
    for value in (float("nan"), float("inf")):
        s, t = [x.clone() for x in student], [x.clone() for x in teacher]
        s[1].masked_fill_(out[:, None], value)
        t[1].masked_fill_(out[:, None], value)
        got, dirty = run(target, s, t, mask=mask, divergence=divergence)
        assert torch.equal(got, clean), value
        for a, b in zip(dirty, grads, strict=True):
            assert torch.equal(a, b), value


@each_target
@DIVERGENCES
def test_denormals(target: Target, divergence: str) -> None:
    """Fault 10: tiny is not zero, and no NaN."""
    student, teacher = pairs(target)
    s = [x * 1e-40 for x in student]
    d = target.distance(s, teacher, p=1.0, divergence=divergence, reduction="none")
    want = oracle.distances(s, teacher, p=1.0, divergence=divergence)
    torch.testing.assert_close(d.cpu().double(), want, rtol=1e-5, atol=1e-6)


# --- empty, misaligned, far apart ----------------------------------------------------------------

EMPTY = [
    ((0, 3, 4, 4), (0, 5, 4, 4)),
    ((0, 3, 4, 6), (0, 5, 2, 7)),
    ((2, 0, 4, 4), (2, 5, 4, 4)),
    ((2, 0, 4, 4), (2, 0, 2, 2)),
    ((2, 3, 0, 4), (2, 5, 0, 4)),
    ((2, 3, 4, 0), (2, 5, 4, 4)),
    ((0, 0, 0, 0), (0, 0, 0, 0)),
]


@each_target
@DIVERGENCES
@pytest.mark.parametrize("shapes", EMPTY, ids=str)
def test_empty(target: Target, divergence: str, shapes: Any) -> None:
    """Fault 9: every dimension zero in turn, beside a layer of the ordinary kind."""
    n = shapes[0][0]
    s, t = ([torch.ones(x, device=target.device), cases.draw((n, 2, 3, 3), F32, i)] for i, x in
            enumerate(shapes))  # fmt: skip
    s[1], t[1] = s[1].to(target.device), t[1].to(target.device)
    d, grads = agrees(target, s, t, shapes, divergence=divergence)
    assert d.shape == (2, n)
    assert [g.shape for g in grads] == [x.shape for x in s + t]
    mean = target.distance(s, t, divergence=divergence)
    assert mean.shape == (2,)
    assert mean.isfinite().all()
    if n == 0:
        assert mean.tolist() == [0.0, 0.0]
        for x in target.maps(s):
            assert x.shape[0] == 0


@each_target
def test_pointers_off_the_vector_width(target: Target) -> None:
    """Fault 6: a contiguous view one element into its storage, in every dtype."""
    for dtype in (torch.float64, F32, torch.float16, torch.bfloat16):
        flat = cases.draw((2 * 5 * 7 * 9 + 1,), dtype, 1).to(target.device)
        s = flat[1:].view(2, 5, 7, 9)
        assert s.is_contiguous()
        assert s.data_ptr() % 16 != 0
        for x in (s, s.permute(0, 3, 1, 2)):
            agrees(target, [x], [x.flip(0)], f"{target} {dtype}")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@cpu_target
def test_pointers_off_the_element(target: Target, dtype: Any) -> None:
    """Fault 6: from_numpy can give a tensor at an odd address. Right, or an error that names it."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros(2 * 3 * 4 * 4 * size + 1, dtype=np.uint8)
    array = raw[1:].view(dtype).reshape(2, 3, 4, 4)
    array[...] = cases.draw((2, 3, 4, 4), torch.float64, 1).numpy()
    x = torch.from_numpy(array)
    assert x.data_ptr() % size != 0
    before, y = x.clone(), cases.draw((2, 5, 4, 4), F32, 2)
    try:
        agrees(target, [x], [y], target)
    except (RuntimeError, ValueError) as error:
        assert "aligned" in str(error)  # noqa: PT017
    assert torch.equal(x, before)


def lazily_mapped(elements: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of address space: only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


FAR = 2**31
FAR_VIEWS = {
    "batch": ((2, 8, 2, 3), (FAR, 6, 3, 1)),
    "channels": ((1, 2, 3, 5), (7, FAR, 5, 1)),
    "rows": ((2, 3, 2, 4), (12, 4, FAR, 1)),
    "positions": ((2, 3, 5, 2), (15, 5, 1, FAR)),
}


@cpu_target
@pytest.mark.parametrize("view", FAR_VIEWS)
def test_offsets_beyond_32_bits(target: Target, view: str) -> None:
    """Fault 4: strides of 2³¹ elements, of an activation, of its mask and of the gradient."""
    shape, strides = FAR_VIEWS[view]
    near = cases.draw(shape, torch.float16, 1)
    x = lazily_mapped(FAR + 64, torch.float16).as_strided(shape, strides).copy_(near)
    assert torch.equal(x, near)
    y = cases.draw((shape[0], 3, *shape[2:]), torch.float16, 2)
    for divergence in ("l2", "js"):
        agrees(target, [x], [y], view, divergence=divergence)
        agrees(target, [y], [x], view, divergence=divergence)
    torch.testing.assert_close(target.maps([x])[0], near.float().square().sum(1))
    if view == "batch":
        mask = lazily_mapped(FAR + 64, torch.bool).as_strided((2, 2, 3), (FAR, 3, 1))
        mask.copy_(torch.rand(2, 2, 3) < 0.7)
        agrees(target, [x], [y], "mask", mask=[mask])
        g = lazily_mapped(FAR + 64, F32).as_strided((1, 2), (1, FAR)).fill_(1.5)
        s = leaves([x])
        d = target.distance(s, [y], reduction="none")
        want = tolerances.judge([near], [y], torch.full((1, 2), 1.5))
        (got,) = torch.autograd.grad(d, s, g)
        close(got, want.gradients[0][0], want.gradient_bounds[0][0], "gradient")
    gc.collect()


# --- nothing may stay unwritten ------------------------------------------------------------------


@each_target
def test_every_output_is_written(target: Target) -> None:
    """Fault 11: torch.empty filled with NaN, a free initcheck of outputs, maps and gradients."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    sample = ("f32", "strided"), ("bf16/f32", "channels_last"), ("f64", "expanded")
    for dtype, layout in sample[: 1 if target.slow else 3]:
        for i, case in enumerate(cases.CASES):
            if target.slow and i % 6:
                continue
            x = cases.make(case, dtype, layout, target.device)
            for divergence, p in (("l2", 2.0), ("js", 1.5)):
                options = {"divergence": divergence, "p": p, **x.options}
                agrees(target, x.student, x.teacher, (case.name, dtype, layout), **options)
            if case.tokens is None:
                dims = [d[0] for d in oracle.by_layer(case.channel_dim, len(x.student))]
                for m in target.maps(x.student, channel_dim=dims):
                    assert m.isfinite().all()


def test_the_teacher_is_not_kept() -> None:
    """Only what needs a gradient stays alive: a teacher's activations are free at once."""
    student, teacher = pairs(Target("reference", "cpu"))
    s = leaves(student)
    d = lwkd.ops.layer_discrepancy(s, teacher)
    held = {id(x) for x in teacher}
    saved = {id(x) for x in gc.get_referents(d.grad_fn) if isinstance(x, Tensor)}
    assert not held & saved
    import weakref

    ghosts = [weakref.ref(x) for x in teacher]
    del teacher
    gc.collect()
    assert all(ghost() is None for ghost in ghosts)
    assert d.requires_grad
