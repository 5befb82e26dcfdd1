"""The attention kind in Triton; lwkd/ops/attention.py states the formulas.

    forward    maps_kernel       Σ_c |x|^p of every operand of every layer, each read once
               gather_kernel     only where channels were split, pooled or masked: the finished map
               distance_kernel   normalise and compare: one program a sample of a layer
               mean_kernel       over the batch
    backward   slope_kernel      p·dD/dm at the common space, from the saved maps
               scatter_kernel    only where maps were pooled: its transpose
               spread_kernel     dx = slope · |x|^(p−1)·sign(x), one pass over x and dx

All layers of a call share these launches (one more for every further dtype, layout or tile). Maps
are summed in float32 (float64 for float64), everything after them in float64, in an order that
follows from shapes and strides: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    DTYPES,
    INTERPRET,
    Plan,
    View,
    Walk,
    locate,
    log1p,
    narrow,
    offsets,
    place,
    power,
    power_of,
    space_words,
    tile,
    tile_mask,
    tile_of,
    widen,
)

__all__ = ["INTERPRET", "backward", "forward", "maps"]

_EPS = tl.constexpr(1e-12)
_SERIES = tl.constexpr(0.02)  # below this |u| the series of f is exact to rounding
_FLAT = 256  # elements of a program of gather_kernel and scatter_kernel

# --- Σ_c |x|^p ------------------------------------------------------------------------------------


@triton.jit
def maps_kernel(
    table, base: tl.int64, items: tl.int64, p: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, POWER: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, CB: tl.constexpr, QB: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: x, out, shape. out: [parts, N, period], the sums of each part of the channels."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    n, q, exists, split = tile_of(shape, program, ORDER, VECTOR, QB)
    at = offsets(shape + 8, n, q, ORDER, VECTOR)
    stride_c = tl.multiple_of(tl.load(shape + 9), VECTOR if ORDER == 0 else 1)
    begin = tl.multiple_of(split * tl.load(shape + 6), VECTOR)
    end = tl.minimum(begin + tl.load(shape + 6), tl.load(shape + 1))
    end = tl.multiple_of(end, VECTOR if ORDER == 1 else 1)
    if ORDER == 1:
        total = tl.zeros([QB, CB], ACC)
    else:
        total = tl.zeros([CB, QB], ACC)
    step = begin * 0
    while begin + step * CB < end:
        c = begin + step * CB + tl.arange(0, CB)
        mask = tile_mask(exists, c < end, ORDER)
        value = tl.load(x + tile(at, c, stride_c, ORDER), mask=mask, other=0)
        total += power(widen(value, ACC), p, POWER)
        step += 1
    period = tl.load(shape + 3)
    part = split * (tl.load(shape + 2) // period) + q // period
    to = (part * tl.load(shape) + n) * period + q % period
    tl.store(out + to, tl.sum(total, 1 if ORDER == 1 else 0), mask=exists)


# --- from sums to maps ----------------------------------------------------------------------------


@triton.jit
def keep_at(mask, shape, n, q, exists):
    """Whether position q of sample n counts; mask: the address of the mask, 0 for none."""
    at = n * tl.load(shape) + place(shape + 1, q)
    given = exists & (q * 0 + mask != 0)  # no scalar condition: the interpreter splats it wrong
    return tl.load(mask.to(tl.pointer_type(tl.int8)) + at, mask=given, other=1) != 0


@triton.jit
def gather_kernel(
    table, base: tl.int64, items: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: raw [parts, N, positions], out [N, cells], shape, mask, mask's shape.

    Shape: parts, N, raw sizes, common sizes, largest windows. Adaptive average pooling.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    raw = tl.load(row + 1).to(tl.pointer_type(ACC))
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    parts, samples = tl.load(shape), tl.load(shape + 1)
    r0, r1, r2 = tl.load(shape + 2), tl.load(shape + 3), tl.load(shape + 4)
    s0, s1, s2 = tl.load(shape + 5), tl.load(shape + 6), tl.load(shape + 7)
    w0, w1, w2 = tl.load(shape + 8), tl.load(shape + 9), tl.load(shape + 10)
    cells, positions = s0 * s1 * s2, r0 * r1 * r2
    e = program * BLOCK + tl.arange(0, BLOCK)
    exists = e < samples * cells
    n, q = e // cells, e % cells
    i, j, k = q // (s1 * s2), q // s2 % s1, q % s2
    i0, j0, k0 = i * r0 // s0, j * r1 // s1, k * r2 // s2
    i1 = ((i + 1) * r0 + s0 - 1) // s0
    j1 = ((j + 1) * r1 + s1 - 1) // s1
    k1 = ((k + 1) * r2 + s2 - 1) // s2
    total = tl.zeros([BLOCK], tl.float64)
    a = w0 * 0
    while a < w0:
        b = w1 * 0
        while b < w1:
            c = w2 * 0
            while c < w2:
                inside = exists & (i0 + a < i1) & (j0 + b < j1) & (k0 + c < k1)
                at = n * positions + ((i0 + a) * r1 + j0 + b) * r2 + k0 + c
                part = parts * 0
                while part < parts:
                    total += tl.load(raw + at, mask=inside, other=0).to(tl.float64)
                    at += samples * positions
                    part += 1
                c += 1
            b += 1
        a += 1
    total /= ((i1 - i0) * (j1 - j0) * (k1 - k0)).to(tl.float64)
    keep = keep_at(tl.load(row + 4), table + tl.load(row + 5), n, q, exists)
    tl.store(out + e, tl.where(keep, total, 0.0).to(ACC), mask=exists)


# --- from maps to distances -----------------------------------------------------------------------


@triton.jit
def load_map(address, q, exists, ACC: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(ACC)) + q, mask=exists, other=0).to(tl.float64)


@triton.jit
def statistics(
    own, other, cells, mask, shape, n,
    JS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What both maps are divided by (l2: the norms; js: the sums), and how many positions count."""
    a, b = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    kept = tl.zeros([BLOCK], tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        s, t = load_map(own, q, exists, ACC), load_map(other, q, exists, ACC)
        if JS:
            a += s
            b += t
            kept += (keep_at(mask, shape, n, q, exists) & exists).to(tl.float64)
        else:
            a += s * s
            b += t * t
        begin += BLOCK
    a, b, kept = tl.sum(a, 0), tl.sum(b, 0), tl.sum(kept, 0)
    if not JS:
        a, b = tl.sqrt(a), tl.sqrt(b)
    return a, b, kept


@triton.jit
def normalise(m, keep, size, kept, JS: tl.constexpr):
    """q = m/max(‖m‖, eps), or P = m/Σm: uniform where the map is zero everywhere."""
    if JS:
        uniform = keep.to(tl.float64) / tl.where(kept > 0, kept, 1.0)
        share = tl.where(size == 0, uniform, m / tl.where(size == 0, 1.0, size))
    else:
        share = m / tl.where(size <= _EPS, _EPS, size)  # a NaN stays one
    return share


@triton.jit
def f_of(u):
    """(1+u)·log1p(u) − u."""
    tail = 1 / 30 + u * (-1 / 42 + u / 56)
    series = u * u * (0.5 + u * (-1 / 6 + u * (1 / 12 + u * (-1 / 20 + u * tail))))
    v = tl.where(u <= -1, 0.0, u)
    exact = tl.where(u <= -1, 1.0, (1 + v) * log1p(v) - v)
    return tl.where(tl.abs(u) < _SERIES, series, exact)


@triton.jit
def distance_kernel(
    table, base: tl.int64, items: tl.int64, beta: tl.float64,
    JS: tl.constexpr, ACC: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: student's and teacher's maps [N, cells], out [N], cells, mask, mask's shape."""
    row, n = locate(table, base, items, WIDTH, ITEMS)
    size = 8 if ACC == tl.float64 else 4
    cells = tl.load(row + 4)
    own = tl.load(row + 1) + n * cells * size
    other = tl.load(row + 2) + n * cells * size
    mask, shape = tl.load(row + 5), table + tl.load(row + 6)
    a, b, kept = statistics(own, other, cells, mask, shape, n, JS, ACC, BLOCK)
    weight = tl.full((), beta, tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = exists
        if JS:
            keep = keep_at(mask, shape, n, q, exists) & exists
        s = normalise(load_map(own, q, exists, ACC), keep, a, kept, JS)
        t = normalise(load_map(other, q, exists, ACC), keep, b, kept, JS)
        if JS:
            mix = weight * s + (1 - weight) * t
            u = (s - t) / tl.where(mix == 0, 1.0, mix)
            term = weight * f_of((1 - weight) * u) + (1 - weight) * f_of(-weight * u)
            total += tl.where(mix == 0, 0.0, mix * term)
        else:
            total += (s - t) * (s - t)
        begin += BLOCK
    out = tl.load(row + 3).to(tl.pointer_type(OUT))
    tl.store(out + n, tl.sum(total, 0).to(OUT))


@triton.jit
def mean_kernel(
    table, base: tl.int64, items: tl.int64,
    OUT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: each [N] in float64, out [1], N."""
    row, _ = locate(table, base, items, WIDTH, ITEMS)
    each, samples = tl.load(row + 1).to(tl.pointer_type(tl.float64)), tl.load(row + 3)
    total = tl.zeros([BLOCK], tl.float64)
    begin = samples * 0
    while begin < samples:
        n = begin + tl.arange(0, BLOCK)
        total += tl.load(each + n, mask=n < samples, other=0)
        begin += BLOCK
    mean = tl.sum(total, 0) / samples.to(tl.float64)
    tl.store(tl.load(row + 2).to(tl.pointer_type(OUT)), mean.to(OUT))


# --- the way back ---------------------------------------------------------------------------------


@triton.jit
def slope_of(s, t, own, JS: tl.constexpr):
    """dD/dq (l2) or dD/dP (js) of the map that s was normalised from; own: its weight in js."""
    if JS:
        # log(P/M) = −log1p((1−own)·(P_other − P)/P), exact where the two are nearly equal.
        u = (1 - own) * (t - s) / tl.where(s == 0, 1.0, s)
        slope = tl.where(s == 0, 0.0, -own * log1p(u))
    else:
        slope = 2 * (s - t)
    return slope


@triton.jit
def slope_kernel(
    table, base: tl.int64, items: tl.int64, grad_stride: tl.int64,
    scale: tl.float64, beta: tl.float64,
    JS: tl.constexpr, ACC: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: own and other map [N, cells], out [N, cells], cells, mask, its shape, grad, side."""
    row, n = locate(table, base, items, WIDTH, ITEMS)
    size = 8 if ACC == tl.float64 else 4
    cells = tl.load(row + 4)
    own = tl.load(row + 1) + n * cells * size
    other = tl.load(row + 2) + n * cells * size
    out = tl.load(row + 3).to(tl.pointer_type(ACC)) + n * cells
    mask, shape = tl.load(row + 5), table + tl.load(row + 6)
    a, b, kept = statistics(own, other, cells, mask, shape, n, JS, ACC, BLOCK)
    weight = tl.full((), beta, tl.float64)
    weight = tl.where(tl.load(row + 8) == 0, weight, 1 - weight)
    grad = tl.load(tl.load(row + 7).to(tl.pointer_type(GRAD)) + n * grad_stride)
    # What a common factor of the map does to D: nothing, and below eps the norm is a constant.
    along = tl.zeros([BLOCK], tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = keep_at(mask, shape, n, q, exists) & exists
        s = normalise(load_map(own, q, exists, ACC), keep, a, kept, JS)
        t = normalise(load_map(other, q, exists, ACC), keep, b, kept, JS)
        along += s * slope_of(s, t, weight, JS)
        begin += BLOCK
    radial = tl.sum(along, 0)
    if JS:
        divisor = tl.where(a == 0, 1.0, a)
        factor = tl.where(a == 0, 0.0, grad.to(tl.float64) * scale)
    else:
        radial = tl.where(a <= _EPS, 0.0, radial)
        divisor = tl.where(a <= _EPS, _EPS, a)
        factor = grad.to(tl.float64) * scale
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = keep_at(mask, shape, n, q, exists) & exists
        s = normalise(load_map(own, q, exists, ACC), keep, a, kept, JS)
        t = normalise(load_map(other, q, exists, ACC), keep, b, kept, JS)
        slope = slope_of(s, t, weight, JS)
        if JS:
            slope = (slope - radial) / divisor * factor
        else:
            slope = (slope - s * radial) / divisor * factor
        tl.store(out + q, tl.where(keep, slope, 0.0).to(ACC), mask=exists)
        begin += BLOCK


@triton.jit
def overlap(r, t, size, cells):
    """1/(length of the t-th cell that may contain r), or 0 where it does not; and the cell."""
    i = r * cells // size + t
    lo, hi = i * size // cells, ((i + 1) * size + cells - 1) // cells
    inside = (i < cells) & (lo <= r) & (r < hi)
    return i, tl.where(inside, 1 / (hi - lo).to(tl.float64), 0.0)


@triton.jit
def scatter_kernel(
    table, base: tl.int64, items: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: slopes [N, cells], out [N, positions], shape (as of gather_kernel).

    A position lies in one cell or, where cells overlap, in two neighbours, in each dimension.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    slopes = tl.load(row + 1).to(tl.pointer_type(ACC))
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    samples = tl.load(shape + 1)
    r0, r1, r2 = tl.load(shape + 2), tl.load(shape + 3), tl.load(shape + 4)
    s0, s1, s2 = tl.load(shape + 5), tl.load(shape + 6), tl.load(shape + 7)
    e = program * BLOCK + tl.arange(0, BLOCK)
    exists = e < samples * r0 * r1 * r2
    n, q = e // (r0 * r1 * r2), e % (r0 * r1 * r2)
    total = tl.zeros([BLOCK], tl.float64)
    choice = samples * 0
    while choice < 8:
        i, wi = overlap(q // (r1 * r2), choice // 4, r0, s0)
        j, wj = overlap(q // r2 % r1, choice // 2 % 2, r1, s1)
        k, wk = overlap(q % r2, choice % 2, r2, s2)
        weight = wi * wj * wk
        at = ((n * s0 + i) * s1 + j) * s2 + k
        slope = tl.load(slopes + at, mask=exists & (weight != 0), other=0).to(tl.float64)
        total += slope * weight
        choice += 1
    tl.store(out + e, total.to(ACC), mask=exists)


@triton.jit
def spread_kernel(
    table, base: tl.int64, items: tl.int64, p: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, POWER: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, CB: tl.constexpr, QB: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: x, dx, slopes [N, period], shape. p: the power less one. Leading tokens get 0."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    dx = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    slopes = tl.load(row + 3).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 4)
    n, q, exists, split = tile_of(shape, program, ORDER, VECTOR, QB)
    period, lead = tl.load(shape + 3), tl.load(shape + 7)
    within = q % (period + lead) - lead
    live = exists & (within >= 0)
    slope = tl.load(slopes + n * period + within, mask=live, other=0)
    slope = slope[:, None] if ORDER == 1 else slope[None, :]
    live = live[:, None] if ORDER == 1 else live[None, :]
    at = offsets(shape + 8, n, q, ORDER, VECTOR)
    to = offsets(shape + 15, n, q, ORDER, VECTOR)
    stride_c = tl.multiple_of(tl.load(shape + 9), VECTOR if ORDER == 0 else 1)
    to_stride_c = tl.multiple_of(tl.load(shape + 16), VECTOR if ORDER == 0 else 1)
    begin = tl.multiple_of(split * tl.load(shape + 6), VECTOR)
    end = tl.minimum(begin + tl.load(shape + 6), tl.load(shape + 1))
    end = tl.multiple_of(end, VECTOR if ORDER == 1 else 1)
    step = begin * 0
    while begin + step * CB < end:
        c = begin + step * CB + tl.arange(0, CB)
        mask = tile_mask(exists, c < end, ORDER)
        value = tl.load(x + tile(at, c, stride_c, ORDER), mask=mask, other=0)
        value = widen(value, ACC)
        if POWER == 2:
            d = slope * value
        else:
            sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, value)).to(ACC)
            d = slope * sign if POWER == 1 else slope * sign * power(value, p, POWER)
        d = tl.where((value == 0) | (live == 0), 0.0, d)
        tl.store(dx + tile(to, c, to_stride_c, ORDER), narrow(d, DTYPE), mask=mask)
        step += 1


# --- on the host ----------------------------------------------------------------------------------


def _read(x: Tensor, layout: Sequence[int], lead: bool = False) -> View:
    """View x as its layout says; ``lead``: with the leading tokens, space as one run."""
    channel, prefix, h, w = layout
    sizes, strides = x.shape, x.stride()
    address, size, stride = x.data_ptr(), [1, 1, 1], [0, 0, 0]
    if h:
        step = strides[3 - channel]
        if lead:
            size[2], stride[2] = prefix + h * w, step
        else:
            size[1:], stride[1:] = (h, w), (w * step, step)
            address += prefix * step * x.element_size()
    else:
        dims = [d for d in range(1, x.dim()) if d != channel]
        size[3 - len(dims) :] = [sizes[d] for d in dims]
        stride[3 - len(dims) :] = [strides[d] for d in dims]
    return View(
        address, x.dtype, sizes[0], sizes[channel], tuple(size), strides[0], strides[channel],
        tuple(stride),
    )  # fmt: skip


def _mask_words(plan: Plan, mask: Sequence[Tensor], layer: int) -> tuple[int, int]:
    """(address, place of its strides) of a layer's mask; address 0: none."""
    if not mask or mask[layer].dim() < 2:
        return 0, plan.share((0, 1, 1, 0, 0, 0))
    m = mask[layer]
    view = View(
        m.data_ptr(), m.dtype, m.shape[0], 1, (1,) * (4 - m.dim()) + tuple(m.shape[1:]),
        m.stride(0), 0, (0,) * (4 - m.dim()) + m.stride()[1:],
    )  # fmt: skip
    return view.address, plan.share((view.stride_n, *space_words(view.runs())))


def _wide(*lists: Sequence[Tensor]) -> bool:
    return any(x.dtype == torch.float64 for xs in lists for x in xs)


def _dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


class _Maps:
    """The maps of a call: first all sums over channels, then what is left to gather."""

    def __init__(self, plan: Plan, p: float) -> None:
        self.plan, self.p = plan, float(p)
        self._gathers: list[tuple[Any, ...]] = []
        self._scratch: list[Tensor] = []

    def add(
        self, x: View, vector: int, walk: Walk, wide: bool, space: Sequence[int], out: int,
        mask: tuple[int, int], like: Tensor,
    ) -> None:  # fmt: skip
        """Reduce x to its map [N, *space] at address ``out``."""
        programs, splits, words = walk.shape([x], 0, target=1024, longest=1 << 40)
        parts = splits * walk.fold
        raw = out
        if parts > 1 or tuple(space) != x.size or mask[0]:
            scratch = like.new_empty(parts * x.n * x.positions, dtype=_dtype(wide))
            self._scratch.append(scratch)
            raw = scratch.data_ptr()
            self._gathers.append((parts, x, wide, tuple(space), raw, out, mask))
        self.plan.add(
            maps_kernel, programs, (x.address, raw, self.plan.share(words)),
            p=self.p, DTYPE=DTYPES[x.dtype], ACC=DTYPES[_dtype(wide)], POWER=power_of(self.p),
            ORDER=walk.order, VECTOR=vector, CB=walk.channels, QB=walk.positions,
        )  # fmt: skip

    def gather(self) -> None:
        for parts, x, wide, space, raw, out, mask in self._gathers:
            shape = self.plan.share((parts, *_pool_words(x.n, x.size, space)))
            cells = x.n * space[0] * space[1] * space[2]
            self.plan.add(
                gather_kernel, -(-cells // _FLAT), (raw, out, shape, *mask),
                ACC=DTYPES[_dtype(wide)], BLOCK=_FLAT,
            )  # fmt: skip


def _pool_words(n: int, raw: Sequence[int], space: Sequence[int]) -> tuple[int, ...]:
    """N, raw sizes, common sizes, the largest window in each dimension."""
    windows = (1 if r == s else -(-r // s) + 1 for r, s in zip(raw, space, strict=True))
    return (n, *raw, *space, *windows)


def _block(cells: int) -> int:
    return 128 if cells <= 128 else 1024


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Sequence[Tensor],
    student_layout: Sequence[int],
    teacher_layout: Sequence[int],
    p: float,
    divergence: int,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """lwkd::attention: the distances and the maps that they were taken of."""
    plan, distance, flat, _ = plan_forward(
        student, teacher, mask, student_layout, teacher_layout, p, divergence, beta, mean
    )
    plan.run()
    return distance, flat


def plan_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Sequence[Tensor],
    student_layout: Sequence[int],
    teacher_layout: Sequence[int],
    p: float,
    divergence: int,
    beta: float,
    mean: bool,
) -> tuple[Plan, Tensor, Tensor, Any]:
    """Allocate and plan :func:`forward`; the last item keeps what the plan needs alive."""
    like, wide = student[0], _wide(student, teacher)
    n, dtype = like.shape[0], _dtype(wide)
    pairs = [
        (_read(s, student_layout[4 * i : 4 * i + 4]), _read(t, teacher_layout[4 * i : 4 * i + 4]))
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]
    spaces = [tuple(map(min, s.size, t.size)) for s, t in pairs]
    cells = [a * b * c for a, b, c in spaces]
    flat = like.new_empty(2 * n * sum(cells), dtype=dtype)
    shape = (len(pairs),) if mean else (len(pairs), n)
    plan = Plan(like.device)
    if n == 0:
        return plan, like.new_zeros(shape, dtype=dtype), flat, None
    distance = like.new_empty(shape, dtype=dtype)
    each = like.new_empty((len(pairs), n), dtype=torch.float64) if mean else distance
    maps, rows, at, step = _Maps(plan, p), [], flat.data_ptr(), flat.element_size()
    for i, (pair, space) in enumerate(zip(pairs, spaces, strict=True)):
        keep = _mask_words(plan, mask, i)
        walks = [Walk.of([x], wide) for x in pair]
        # One width for both: a load's width decides how a tile is summed, and a layer's distance
        # to an equal one must be exactly 0 wherever the two lie in memory.
        vectors = [walk.vector([x]) for walk, x in zip(walks, pair, strict=True)]
        vectors = [min(vectors)] * 2 if pair[0].dtype == pair[1].dtype else vectors
        ends = at, at + n * cells[i] * step
        at += 2 * n * cells[i] * step
        if cells[i]:
            for x, vector, walk, out in zip(pair, vectors, walks, ends, strict=True):
                maps.add(x, vector, walk, wide, space, out, keep, like)
        rows.append((*ends, each[i].data_ptr(), cells[i], *keep))
    maps.gather()
    for row in rows:
        plan.add(
            distance_kernel, n, row, beta=float(beta), JS=bool(divergence), ACC=DTYPES[dtype],
            OUT=DTYPES[each.dtype], BLOCK=_block(max(cells)),
        )  # fmt: skip
    for i in range(len(pairs) if mean else 0):
        row = (each[i].data_ptr(), distance[i].data_ptr(), n)
        plan.add(mean_kernel, 1, row, OUT=DTYPES[dtype], BLOCK=_block(n))
    return plan, distance, flat, (each, maps)


def maps(xs: Sequence[Tensor], channel_dims: Sequence[int], p: float) -> list[Tensor]:
    """lwkd::attention_maps: Σ_c |x|^p of every tensor."""
    plan, outs, _ = plan_maps(xs, channel_dims, p)
    plan.run()
    return outs


def plan_maps(
    xs: Sequence[Tensor], channel_dims: Sequence[int], p: float
) -> tuple[Plan, list[Tensor], Any]:
    """Allocate and plan :func:`maps`."""
    plan = Plan(xs[0].device)
    sums, outs = _Maps(plan, p), []
    for x, channel in zip(xs, channel_dims, strict=True):
        view, wide = _read(x, (channel, 0, 0, 0)), _wide([x])
        sizes = [s for d, s in enumerate(x.shape) if d != channel]
        out = x.new_empty(sizes, dtype=_dtype(wide))
        if out.numel():
            walk = Walk.of([view], wide)
            none = _mask_words(plan, (), 0)
            sums.add(view, walk.vector([view]), walk, wide, view.size, out.data_ptr(), none, x)
        outs.append(out)
    sums.gather()
    return plan, outs, sums


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    mask: Sequence[Tensor],
    maps: Tensor,
    layers: Sequence[int],
    sides: Sequence[int],
    layout: Sequence[int],
    space: Sequence[int],
    p: float,
    divergence: int,
    beta: float,
) -> list[Tensor]:
    """lwkd::attention_backward: the gradients of ``xs``."""
    plan, grads, _ = plan_backward(
        grad, xs, mask, maps, layers, sides, layout, space, p, divergence, beta
    )
    plan.run()
    return grads


def plan_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    mask: Sequence[Tensor],
    maps: Tensor,
    layers: Sequence[int],
    sides: Sequence[int],
    layout: Sequence[int],
    space: Sequence[int],
    p: float,
    divergence: int,
    beta: float,
) -> tuple[Plan, list[Tensor], Any]:
    """Allocate and plan :func:`backward`."""
    dtype, p = maps.dtype, float(p)
    wide, step = dtype == torch.float64, maps.element_size()
    spaces = [tuple(space[i : i + 3]) for i in range(0, len(space), 3)]
    cells = [a * b * c for a, b, c in spaces]
    plan, keep_alive = Plan(maps.device), []
    slopes, scatters, spreads, grads = [], [], [], []
    for i, (x, layer, side) in enumerate(zip(xs, layers, sides, strict=True)):
        dx, how, n = torch.empty_like(x), layout[4 * i : 4 * i + 4], x.shape[0]
        grads.append(dx)
        raw, size = _read(x, how), n * cells[layer]
        if x.numel() == 0 or size == 0:
            dx.zero_()
            continue
        pooled = raw.size != spaces[layer]
        slope = maps.new_empty(size + (n * raw.positions if pooled else 0))
        keep_alive.append(slope)
        start = slope.data_ptr()
        first = maps.data_ptr() + 2 * n * sum(cells[:layer]) * step
        ends = first + side * size * step, first + (1 - side) * size * step
        at = grad.data_ptr() + layer * grad.stride(0) * grad.element_size()
        slopes.append((*ends, start, cells[layer], *_mask_words(plan, mask, layer), at, side))
        if pooled:
            shape = plan.share((1, *_pool_words(n, raw.size, spaces[layer])))
            scatters.append((n * raw.positions, (start, start + size * step, shape)))
            start += size * step
        spreads.append((_read(x, how, lead=True), _read(dx, how, lead=True), start, how))
    for row in slopes:
        plan.add(
            slope_kernel, xs[0].shape[0], row, grad_stride=grad.stride(1) if grad.dim() > 1 else 0,
            scale=p / max(xs[0].shape[0], 1) if grad.dim() == 1 else p, beta=float(beta),
            JS=bool(divergence), ACC=DTYPES[dtype], GRAD=DTYPES[grad.dtype],
            BLOCK=_block(max(cells)),
        )  # fmt: skip
    for count, row in scatters:
        plan.add(scatter_kernel, -(-count // _FLAT), row, ACC=DTYPES[dtype], BLOCK=_FLAT)
    for x, dx, start, how in spreads:
        walk = Walk.of([x, dx], wide)
        lead = how[1] if how[2] else 0
        programs, _, words = walk.shape([x, dx], lead, target=1, longest=4)
        plan.add(
            spread_kernel, programs, (x.address, dx.address, start, plan.share(words)),
            p=p - 1, DTYPE=DTYPES[x.dtype], ACC=DTYPES[dtype], POWER=power_of(p),
            ORDER=walk.order, VECTOR=walk.vector([x, dx]), CB=walk.channels, QB=walk.positions,
        )  # fmt: skip
    return plan, grads, keep_alive
