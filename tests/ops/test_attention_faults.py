"""Faults that other people's kernels had, injected here: extremes, NaN, empty and far memory."""

from __future__ import annotations

import gc
import itertools
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import cases, oracle, tolerances
from tests.cases import Target, cpu_target, each_target
from tests.ops.battery import agrees, close, divergences, leaves, one_thread, pairs

__all__ = ["one_thread"]  # a fixture
F32 = torch.float32


# --- zeros and scales ----------------------------------------------------------------------------


@each_target
@divergences
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_exact_zeros(target: Target, divergence: str, p: float) -> None:
    """Activations after ReLU, all-zero maps on one side and on both: gradients finite, 0 at 0."""
    student, teacher = pairs(target)
    student, teacher = [x.relu() for x in student], [x.relu() for x in teacher]
    for s, t in zip(student, teacher, strict=True):
        s[0], s[1], t[1], t[2] = 0, 0, 0, 0
        s[3, :, 0] = 0  # whole positions: M = 0 there, or only P_S
        t[3, :, 0, :2] = 0
    mask = torch.rand(4, 3, 11, device=target.device) < 0.6  # uniform over what is kept
    options = {"divergence": divergence, "p": p, "beta": 0.3, "mask": [None, mask, None]}
    d, grads = agrees(target, student, teacher, target, **options)
    assert d[:, 1].count_nonzero() == 0
    for x, g in zip(student + teacher, grads, strict=True):
        assert g.isfinite().all()
        assert g[x == 0].count_nonzero() == 0
        if divergence == "js":  # no direction at an all-zero map
            assert g[1].count_nonzero() == 0


@each_target
@divergences
def test_far_scales(target: Target, divergence: str) -> None:
    """Squares of such maps overflow, or vanish, in float32; the distances do not care."""
    student, teacher = pairs(target)
    for a, b, p in ((1e10, 1e10, 2.0), (1e-10, 1e10, 2.0), (1e10, 1e-10, 1.0), (1e-10, 1e-10, 2.0),
                    (1e9, 1e9, 3.0), (8e17, 8e17, 2.0),
                    (1.8e-7, 1.0, 2.0)):  # norms just below eps, and above  # fmt: skip
        if target.slow and a == b:
            continue
        s, t = [x * a for x in student], [x * b for x in teacher]
        agrees(target, s, t, f"{target} {divergence} {a} {b} p={p}", divergence=divergence, p=p)


@each_target
@divergences
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
@divergences
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_comes_out_where_it_went_in(target: Target, divergence: str, value: float) -> None:
    """Fault 10: exactly the samples and layers that hold one are NaN, all others keep their
    bits, in values and in gradients."""
    student, teacher = pairs(target)
    options = {"divergence": divergence, "p": 2.0}
    clean, grads = run(target, student, teacher, **options)
    turns = itertools.product((0, 1), range(3), places(student[0]))
    for turn, (side, layer, _) in enumerate(turns):
        if target.slow and turn % 17:
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
@divergences
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
    for value in (float("nan"), float("inf"))[: 1 if target.slow else 2]:
        s, t = [x.clone() for x in student], [x.clone() for x in teacher]
        s[1].masked_fill_(out[:, None], value)
        t[1].masked_fill_(out[:, None], value)
        got, dirty = run(target, s, t, mask=mask, divergence=divergence)
        assert torch.equal(got, clean), value
        for a, b in zip(dirty, grads, strict=True):
            assert torch.equal(a, b), value


@each_target
@divergences
def test_denormals(target: Target, divergence: str) -> None:
    """Fault 10: tiny is not zero, and no NaN."""
    student, teacher = pairs(target)
    s = [x * 1e-40 for x in student]
    d = target.distance(s, teacher, p=1.0, divergence=divergence, reduction="none")
    want = oracle.distances(s, teacher, p=1.0, divergence=divergence)
    torch.testing.assert_close(d.cpu().double(), want, rtol=1e-5, atol=1e-6)


@each_target
def test_denormal_maps(target: Target) -> None:
    """Fault 10: a sum so small that its inverse overflows still makes shares."""
    student, teacher = (x.double() for x in (pair[0] for pair in pairs(target)))
    s, t = student * 1e-160, teacher * 1e-160
    d = target.distance([s], [t], divergence="js")
    want = oracle.distances([student], [teacher], divergence="js").mean(1)
    torch.testing.assert_close(d.cpu().double(), want, rtol=1e-2, atol=0.0)  # of few digits


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
@divergences
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
