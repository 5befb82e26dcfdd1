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
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .common import (
    DTYPES,
    INTERPRET,
    PLANE,
    Plan,
    Walk,
    element_size,
    helper,
    index_of,
    kernel,
    locate,
    log1p,
    mean_kernel,
    merge,
    narrow,
    offsets,
    place,
    place_words,
    power,
    power_of,
    tile_of,
    view_of,
    widen,
)

__all__ = ["INTERPRET", "backward", "forward", "maps"]

_EPS = tl.constexpr(1e-12)  # made float64 where it is used: a literal may be float32
_FLAT = 256  # elements of a program of gather_kernel and scatter_kernel

# --- Σ_c |x|^p ------------------------------------------------------------------------------------


@kernel
def maps_kernel(
    table, base: tl.int64, items: tl.int64, p: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, POWER: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, CB: tl.constexpr, QB: tl.constexpr,
    RUNS: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: x, out, shape. out: [parts, N, positions], the sums of each part of the channels."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    n, q, exists, split = tile_of(shape, program, ORDER, VECTOR, QB, INDEX)
    at = offsets(shape + 9, n, q, ORDER, VECTOR, RUNS)
    stride_c = tl.multiple_of(tl.load(shape + 8), VECTOR if ORDER == 0 else 1)
    begin = tl.multiple_of(split * tl.load(shape + 2), VECTOR if ORDER == 1 else 1)
    end = tl.minimum(begin + tl.load(shape + 2), tl.load(shape + 3))
    end = tl.multiple_of(end, VECTOR if ORDER == 1 else 1)
    total = tl.full([QB, CB] if ORDER == 1 else [CB, QB], 0, ACC)
    step = begin * 0
    while begin + step * CB < end:
        c = begin + step * CB + tl.arange(0, CB)
        if ORDER == 1:
            mask = exists[:, None] & (c < end)[None, :]
            value = tl.load(x + (at[:, None] + c[None, :]), mask=mask, other=0)
        else:
            mask = exists[None, :] & (c < end)[:, None]
            value = tl.load(x + (at[None, :] + c[:, None] * stride_c), mask=mask, other=0)
        total += power(widen(value, ACC), p, POWER)
        step += 1
    samples, positions = tl.load(shape + 5), tl.load(shape + 6)
    if ORDER == 0:
        fold, inner = tl.load(shape + 4) // positions, positions.to(INDEX)
        to = ((split * fold + q // inner) * samples + n) * positions + q % inner
    else:
        to = (split * samples + n) * positions + q
    tl.store(out + to, tl.sum(total, 1 if ORDER == 1 else 0), mask=exists)


# --- from sums to maps ----------------------------------------------------------------------------


@helper
def keep_at(table, row, n, q, exists, MASK: tl.constexpr):
    """Whether positions count. Row: a mask's address, 0 where all do, and the place of its words.

    Words: sample stride, then what ``place`` reads. MASK: dimensions of the masks, 0 for none.
    """
    keep = exists
    if MASK > 0:
        address, words = tl.load(row), table + tl.load(row + 1)
        at = n * tl.load(words) + place(words + 1, q, MASK, 1)
        given = exists & (at * 0 + address != 0)  # the interpreter cannot splat a condition
        keep &= tl.load(address.to(tl.pointer_type(tl.int8)) + at, mask=given, other=1) != 0
    return keep


@kernel
def gather_kernel(
    table, base: tl.int64, items: tl.int64,
    ACC: tl.constexpr, POOLED: tl.constexpr, MASK: tl.constexpr, INDEX: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: raw [parts, N, positions], out [N, cells], shape, mask. Adaptive average pooling.

    Shape: parts, N, cells, raw sizes, common sizes, largest windows.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    raw = tl.load(row + 1).to(tl.pointer_type(ACC))
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    parts, samples, cells = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
    e = program.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = e < samples * cells
    n, q = e // cells.to(INDEX), e % cells.to(INDEX)
    total = tl.full([BLOCK], 0, tl.float64)
    if POOLED:
        r0, r1, r2 = tl.load(shape + 3), tl.load(shape + 4), tl.load(shape + 5)
        s0, s1, s2 = tl.load(shape + 6), tl.load(shape + 7), tl.load(shape + 8)
        i0, i1 = window(q // (s1 * s2).to(INDEX), r0.to(INDEX), s0.to(INDEX))
        j0, j1 = window(q // s2.to(INDEX) % s1.to(INDEX), r1.to(INDEX), s1.to(INDEX))
        k0, k1 = window(q % s2.to(INDEX), r2.to(INDEX), s2.to(INDEX))
        corner = ((n.to(tl.int64) * r0 + i0) * r1 + j0) * r2 + k0
        a = parts * 0
        while a < tl.load(shape + 9):
            b = parts * 0
            while b < tl.load(shape + 10):
                c = parts * 0
                while c < tl.load(shape + 11):
                    inside = exists & (i0 + a < i1) & (j0 + b < j1) & (k0 + c < k1)
                    at = corner + (a * r1 + b) * r2 + c
                    part = parts * 0
                    while part < parts:
                        total += tl.load(raw + at, mask=inside, other=0).to(tl.float64)
                        at += samples * r0 * r1 * r2
                        part += 1
                    c += 1
                b += 1
            a += 1
        total /= ((i1 - i0) * (j1 - j0) * (k1 - k0)).to(tl.float64)
    else:
        part = parts * 0
        while part < parts:
            at = part * samples * cells + e
            total += tl.load(raw + at, mask=exists, other=0).to(tl.float64)
            part += 1
    keep = keep_at(table, row + 4, n, q, exists, MASK)
    tl.store(out + e, tl.where(keep, total, 0.0).to(ACC), mask=exists)


@helper
def window(i, size, cells):
    """Where adaptive pooling's cell i of ``cells`` begins and ends."""
    return i * size // cells, ((i + 1) * size + cells - 1) // cells


# --- from maps to distances -----------------------------------------------------------------------


@helper
def statistics(
    table, row, own, other, cells, n,
    JS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What both maps are divided by (l2: the norms; js: the sums), and how many positions count."""
    a, b = tl.full([BLOCK], 0, tl.float64), tl.full([BLOCK], 0, tl.float64)
    count = tl.full([BLOCK], 0, tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        s = tl.load(own + q, mask=exists, other=0).to(tl.float64)
        t = tl.load(other + q, mask=exists, other=0).to(tl.float64)
        if JS:
            a += s
            b += t
            count += keep_at(table, row + 5, n, q, exists, MASK).to(tl.float64)
        else:
            a += s * s
            b += t * t
        begin += BLOCK
    a, b, kept = tl.sum(a, 0), tl.sum(b, 0), tl.sum(count, 0)
    if not JS:
        a, b = tl.sqrt(a), tl.sqrt(b)
    return a, b, kept


@helper
def normalise(m, keep, size, kept, JS: tl.constexpr):
    """q = m/max(‖m‖, eps), or P = m/Σm: uniform where the map is zero everywhere."""
    if JS:
        uniform = keep.to(tl.float64) / tl.where(kept > 0, kept, 1.0)
        share = tl.where(size == 0, uniform, m / tl.where(size == 0, 1.0, size))
    else:
        eps = tl.full((), _EPS, tl.float64)
        share = m / tl.where(size <= eps, eps, size)  # a NaN stays one
    return share


@helper
def f_of(u):
    """(1+u)·log1p(u) − u."""
    tail = 1 / 30 + u * (-1 / 42 + u / 56)
    series = u * u * (0.5 + u * (-1 / 6 + u * (1 / 12 + u * (-1 / 20 + u * tail))))
    v = tl.where(u <= -1, 0.0, u)
    exact = tl.where(u <= -1, 1.0, (1 + v) * log1p(v) - v)
    return tl.where(tl.abs(u) < 0.02, series, exact)  # there the series is exact to rounding


@kernel
def distance_kernel(
    table, base: tl.int64, items: tl.int64, beta: tl.float64,
    JS: tl.constexpr, ACC: tl.constexpr, OUT: tl.constexpr, MASK: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: student's and teacher's maps [N, cells], out [N], cells, mask."""
    row, n = locate(table, base, items, WIDTH, ITEMS)
    cells = tl.load(row + 4)
    own = tl.load(row + 1).to(tl.pointer_type(ACC)) + n * cells
    other = tl.load(row + 2).to(tl.pointer_type(ACC)) + n * cells
    a, b, kept = statistics(table, row, own, other, cells, n, JS, MASK, BLOCK)
    weight = tl.full((), beta, tl.float64)
    total = tl.full([BLOCK], 0, tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = keep_at(table, row + 5, n, q, exists, MASK if JS else 0)
        s = tl.load(own + q, mask=exists, other=0).to(tl.float64)
        t = tl.load(other + q, mask=exists, other=0).to(tl.float64)
        s, t = normalise(s, keep, a, kept, JS), normalise(t, keep, b, kept, JS)
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


# --- the way back ---------------------------------------------------------------------------------


@helper
def slope_of(s, t, own, JS: tl.constexpr):
    """dD/dq (l2) or dD/dP (js) of the map that s was normalised from; own: its weight in js."""
    if JS:
        # log(P/M) = −log1p((1−own)·(P_other − P)/P), exact where the two are nearly equal.
        u = (1 - own) * (t - s) / tl.where(s == 0, 1.0, s)
        slope = tl.where(s == 0, 0.0, -own * log1p(u))
    else:
        slope = 2 * (s - t)
    return slope


@kernel
def slope_kernel(
    table, base: tl.int64, items: tl.int64, grad_stride: tl.int64,
    scale: tl.float64, beta: tl.float64,
    JS: tl.constexpr, ACC: tl.constexpr, GRAD: tl.constexpr, MASK: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: own and other map [N, cells], out [N, cells], cells, mask, grad, side."""
    row, n = locate(table, base, items, WIDTH, ITEMS)
    cells = tl.load(row + 4)
    own = tl.load(row + 1).to(tl.pointer_type(ACC)) + n * cells
    other = tl.load(row + 2).to(tl.pointer_type(ACC)) + n * cells
    out = tl.load(row + 3).to(tl.pointer_type(ACC)) + n * cells
    grad = tl.load(tl.load(row + 7).to(tl.pointer_type(GRAD)) + n * grad_stride)
    weight = tl.full((), beta, tl.float64)
    weight = tl.where(tl.load(row + 8) == 0, weight, 1 - weight)
    a, b, kept = statistics(table, row, own, other, cells, n, JS, MASK, BLOCK)
    # What a common factor of the map does to D: nothing, so the radial part goes.
    along = tl.full([BLOCK], 0, tl.float64)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = keep_at(table, row + 5, n, q, exists, MASK)
        s = tl.load(own + q, mask=exists, other=0).to(tl.float64)
        t = tl.load(other + q, mask=exists, other=0).to(tl.float64)
        s, t = normalise(s, keep, a, kept, JS), normalise(t, keep, b, kept, JS)
        along += s * slope_of(s, t, weight, JS)
        begin += BLOCK
    radial = tl.sum(along, 0)
    factor = grad.to(tl.float64) * scale
    if JS:
        factor = tl.where(a == 0, 0.0, factor / tl.where(a == 0, 1.0, a))
    else:  # below eps the norm is a constant
        eps = tl.full((), _EPS, tl.float64)
        radial = tl.where(a <= eps, 0.0, radial)
        factor /= tl.where(a <= eps, eps, a)
    begin = cells * 0
    while begin < cells:
        q = begin + tl.arange(0, BLOCK)
        exists = q < cells
        keep = keep_at(table, row + 5, n, q, exists, MASK)
        s = tl.load(own + q, mask=exists, other=0).to(tl.float64)
        t = tl.load(other + q, mask=exists, other=0).to(tl.float64)
        s, t = normalise(s, keep, a, kept, JS), normalise(t, keep, b, kept, JS)
        d = slope_of(s, t, weight, JS) - (radial if JS else s * radial)
        tl.store(out + q, tl.where(keep, d * factor, 0.0).to(ACC), mask=exists)
        begin += BLOCK


@helper
def overlap(r, t, size, cells):
    """The t-th cell that may contain r, and 1/its length, or 0 where it does not."""
    i = r * cells // size + t
    lo, hi = window(i, size, cells)
    inside = (i < cells) & (lo <= r) & (r < hi)
    return i, tl.where(inside, 1 / (hi - lo).to(tl.float64), 0.0)


@kernel
def scatter_kernel(
    table, base: tl.int64, items: tl.int64,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: slopes [N, cells], out [N, positions], shape (N, raw sizes, common sizes).

    A position lies in one cell or, where cells overlap, in two neighbours, in each dimension.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    slopes = tl.load(row + 1).to(tl.pointer_type(ACC))
    out = tl.load(row + 2).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 3)
    r0, r1, r2 = tl.load(shape + 1), tl.load(shape + 2), tl.load(shape + 3)
    s0, s1, s2 = tl.load(shape + 4), tl.load(shape + 5), tl.load(shape + 6)
    e = program.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = e < tl.load(shape) * r0 * r1 * r2
    n, q = e // (r0 * r1 * r2).to(INDEX), e % (r0 * r1 * r2).to(INDEX)
    i, j, k = q // (r1 * r2).to(INDEX), q // r2.to(INDEX) % r1.to(INDEX), q % r2.to(INDEX)
    total = tl.full([BLOCK], 0, tl.float64)
    for a in tl.static_range(2):
        ia, wi = overlap(i, a, r0.to(INDEX), s0.to(INDEX))
        for b in tl.static_range(2):
            jb, wj = overlap(j, b, r1.to(INDEX), s1.to(INDEX))
            for c in tl.static_range(2):
                kc, wk = overlap(k, c, r2.to(INDEX), s2.to(INDEX))
                weight = wi * wj * wk
                at = ((n.to(tl.int64) * s0 + ia) * s1 + jb) * s2 + kc
                slope = tl.load(slopes + at, mask=exists & (weight != 0), other=0)
                total += slope.to(tl.float64) * weight
    tl.store(out + e, total.to(ACC), mask=exists)


@kernel
def spread_kernel(
    table, base: tl.int64, items: tl.int64, p: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, POWER: tl.constexpr, PERIODIC: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, CB: tl.constexpr, QB: tl.constexpr,
    RUNS: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: x, dx, slopes [N, positions less the leading ones], shape. p: the power less one.

    PERIODIC: positions may be those of several channels, or lead, in which case dx is 0.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    dx = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(DTYPE)), 16 if VECTOR > 1 else 1)
    slopes = tl.load(row + 3).to(tl.pointer_type(ACC))
    shape = table + tl.load(row + 4)
    n, q, exists, split = tile_of(shape, program, ORDER, VECTOR, QB, INDEX)
    positions, lead = tl.load(shape + 6), tl.load(shape + 7)
    if PERIODIC:
        within = q % positions.to(INDEX) - lead
        sample = n if ORDER == 0 else q // positions.to(INDEX)
        source = slopes + sample * (positions - lead) + within
        slope = tl.load(source, mask=exists & (within >= 0), other=0)
    else:
        slope = tl.load(slopes + n * positions + q, mask=exists, other=0)
    at = offsets(shape + 9, n, q, ORDER, VECTOR, RUNS)
    to = offsets(shape + 18, n, q, ORDER, VECTOR, RUNS)
    stride_c = tl.multiple_of(tl.load(shape + 8), VECTOR if ORDER == 0 else 1)
    to_stride_c = tl.multiple_of(tl.load(shape + 17), VECTOR if ORDER == 0 else 1)
    begin = tl.multiple_of(split * tl.load(shape + 2), VECTOR if ORDER == 1 else 1)
    end = tl.minimum(begin + tl.load(shape + 2), tl.load(shape + 3))
    end = tl.multiple_of(end, VECTOR if ORDER == 1 else 1)
    step = begin * 0
    while begin + step * CB < end:
        c = begin + step * CB + tl.arange(0, CB)
        if ORDER == 1:
            mask, k = exists[:, None] & (c < end)[None, :], slope[:, None]
            i, o = at[:, None] + c[None, :], to[:, None] + c[None, :]
        else:
            mask, k = exists[None, :] & (c < end)[:, None], slope[None, :]
            i, o = at[None, :] + c[:, None] * stride_c, to[None, :] + c[:, None] * to_stride_c
        value = widen(tl.load(x + i, mask=mask, other=0), ACC)
        if POWER == 2:
            d = k * value
        else:
            d = k * tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, value)).to(ACC)
        if POWER == 0:
            d *= power(value, p, POWER)
        # Nothing flows to a zero, nor from where nothing counts: a masked-out NaN stays there.
        d = tl.where((value != 0) & (k != 0), d, 0.0).to(ACC)
        tl.store(dx + o, narrow(d, DTYPE), mask=mask)
        step += 1


# --- on the host ----------------------------------------------------------------------------------


class _Masks:
    """The masks of a call in the table: (address, place of their words) of each layer."""

    def __init__(self, plan: Plan, mask: Sequence[Tensor]) -> None:
        self._plan, self._mask = plan, mask
        self._none = 0, plan.share((0, *place_words([])))
        given = [merge(m.shape[1:], m.stride()[1:]) for m in mask if m.dim() > 1]
        self.dims = max(map(len, given), default=0)

    def __getitem__(self, layer: int) -> tuple[int, int]:
        if not self._mask or self._mask[layer].dim() < 2:
            return self._none
        m = self._mask[layer]
        words = place_words(merge(m.shape[1:], m.stride()[1:]))
        return m.data_ptr(), self._plan.share((m.stride(0), *words))


def _dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for xs in lists for x in xs)
    return torch.float64 if wide else torch.float32


def _small(dtype: torch.dtype, p: float) -> bool:
    return dtype == torch.float64 or power_of(p) == 0


def _block(count: int) -> int:
    return 128 if count <= 128 else 1024


def _pool_index(n: int, raw: Sequence[int], space: Sequence[int]) -> tl.dtype:
    """The integers of pooling, where a cell's number is multiplied by a size."""
    products = ((s + 1) * (r + 1) for r, s in zip(raw, space, strict=True))
    return index_of(max(n * raw[0] * raw[1] * raw[2], *products))


class _Maps:
    """The maps of a call: first all sums over channels, then what is left to gather."""

    def __init__(self, plan: Plan, p: float, masks: _Masks) -> None:
        self._plan, self._p, self._masks = plan, float(p), masks
        self._walks: dict[Any, Walk] = {}
        self._sums: dict[Any, Any] = {}
        self._gathers: list[Any] = []
        self._scratch: list[Tensor] = []

    def walk(self, x: Tensor, layout: Sequence[int], dtype: torch.dtype) -> Walk:
        """How x is walked, worked out once for all tensors alike."""
        key = x.dtype, x.shape, x.stride(), *layout, dtype
        if key not in self._walks:
            view, small = view_of(x, key[3:7]), _small(dtype, self._p)
            self._walks[key] = Walk([view], small, target=1024, longest=1 << 40)
        return self._walks[key]

    def add(
        self, walk: Walk, x: int, aligned: int, like: Tensor, space: tuple[int, ...],
        keep: tuple[int, int], out: int,
    ) -> None:  # fmt: skip
        """Reduce the tensor at address x to its map [N, *space] at ``out``, of like's dtype.

        ``aligned``: an address that tells what loads are allowed.
        """
        key = walk, aligned % 16, like.dtype
        if key not in self._sums:
            launch = self._plan.launch(
                maps_kernel, p=self._p, ACC=DTYPES[like.dtype], POWER=power_of(self._p),
                **walk.constants(aligned),
            )  # fmt: skip
            self._sums[key] = launch, self._plan.share(walk.words)
        launch, shape = self._sums[key]
        view, raw = walk.view, out
        if walk.parts > 1 or space != view.size or keep[0]:
            self._scratch.append(like.new_empty(walk.parts * view.n * view.positions))
            raw = self._scratch[-1].data_ptr()
            self._gathers.append((walk, like.dtype, space, keep, raw, out))
        start = view.start * element_size(view.dtype)
        launch.append((walk.programs, (x + start, raw, shape)))

    def gather(self) -> None:
        for walk, dtype, space, keep, raw, out in self._gathers:
            n, size, cells = walk.view.n, walk.view.size, space[0] * space[1] * space[2]
            windows = (1 if r == s else -(-r // s) + 1 for r, s in zip(size, space, strict=True))
            shape = self._plan.share((walk.parts, n, cells, *size, *space, *windows))
            self._plan.launch(
                gather_kernel, ACC=DTYPES[dtype], POOLED=space != size, MASK=self._masks.dims,
                INDEX=_pool_index(n, size, space), BLOCK=_FLAT,
            ).append((-(-n * cells // _FLAT), (raw, out, shape, *keep)))  # fmt: skip


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """lwkd::attention: the distances and the maps that they were taken of."""
    plan, distance, flat, _ = plan_forward(*args)
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
    """Plan :func:`forward`, allocate its results; the last item keeps what the plan needs alive."""
    like, n, length = student[0], student[0].shape[0], len(student)
    dtype = _dtype(student, teacher)
    plan = Plan(like.device)
    masks = _Masks(plan, mask)
    maps = _Maps(plan, p, masks)
    walks = [
        (
            maps.walk(student[i], student_layout[4 * i : 4 * i + 4], dtype),
            maps.walk(teacher[i], teacher_layout[4 * i : 4 * i + 4], dtype),
        )
        for i in range(length)
    ]
    spaces = [tuple(map(min, s.view.size, t.view.size)) for s, t in walks]
    cells = [a * b * c for a, b, c in spaces]
    flat = like.new_empty(2 * n * sum(cells), dtype=dtype)
    shape = (length,) if mean else (length, n)
    if n == 0:
        return plan, like.new_zeros(shape, dtype=dtype), flat, None
    distance = like.new_empty(shape, dtype=dtype)
    each = like.new_empty((length, n), dtype=torch.float64) if mean else distance
    at, step, rows = flat.data_ptr(), flat.element_size(), []
    result, size = each.data_ptr(), each.element_size()
    for i, (pair, space) in enumerate(zip(walks, spaces, strict=True)):
        keep, ends = masks[i], (at, at + n * cells[i] * step)
        at += 2 * n * cells[i] * step
        rows.append((n, (*ends, result + i * n * size, cells[i], *keep)))
        addresses = student[i].data_ptr(), teacher[i].data_ptr()
        # A load's width decides how a tile is summed: equal operands are read alike, wherever
        # the two lie in memory.
        alike = addresses[0] | addresses[1] if pair[0] is pair[1] else None
        for walk, x, out in zip(pair, addresses, ends, strict=True):
            if cells[i]:
                maps.add(walk, x, x if alike is None else alike, flat, space, keep, out)
    maps.gather()
    plan.launch(
        distance_kernel, beta=float(beta), JS=bool(divergence), ACC=DTYPES[dtype],
        OUT=DTYPES[each.dtype], MASK=masks.dims, BLOCK=_block(max(cells)),
    ).extend(rows)  # fmt: skip
    if mean:
        end, step = distance.data_ptr(), distance.element_size()
        plan.launch(mean_kernel, OUT=DTYPES[dtype], BLOCK=_block(n)).extend(
            (1, (result + i * n * size, end + i * step, n)) for i in range(length)
        )
    return plan, distance, flat, (each, maps)


def maps(*args: Any) -> list[Tensor]:
    """lwkd::attention_maps: Σ_c |x|^p of every tensor."""
    plan, outs, _ = plan_maps(*args)
    plan.run()
    return outs


def plan_maps(
    xs: Sequence[Tensor], channel_dims: Sequence[int], p: float
) -> tuple[Plan, list[Tensor], Any]:
    """Plan :func:`maps`, allocate its results; the last item keeps what the plan needs alive."""
    plan = Plan(xs[0].device)
    masks = _Masks(plan, ())
    sums, outs = _Maps(plan, p, masks), []
    for x, channel in zip(xs, channel_dims, strict=True):
        sizes = [s for d, s in enumerate(x.shape) if d != channel]
        out = x.new_empty(sizes, dtype=_dtype([x]))
        outs.append(out)
        if out.numel():
            walk, at = sums.walk(x, (channel, 0, 0, 0), out.dtype), x.data_ptr()
            sums.add(walk, at, at, out, walk.view.size, masks[0], out.data_ptr())
    sums.gather()
    return plan, outs, sums


def backward(*args: Any) -> list[Tensor]:
    """lwkd::attention_backward: the gradients of ``xs``."""
    plan, grads, _ = plan_backward(*args)
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
    """Plan :func:`backward`, allocate its results; the last item keeps what it needs alive."""
    n, step, acc = xs[0].shape[0], maps.element_size(), DTYPES[maps.dtype]
    spaces = [tuple(space[i : i + 3]) for i in range(0, len(space), 3)]
    cells = [a * b * c for a, b, c in spaces]
    starts = [2 * n * step * s for s in accumulate(cells, initial=0)]
    plan = Plan(maps.device)
    masks, grads = _Masks(plan, mask), [torch.empty_like(x) for x in xs]
    slopes = plan.launch(
        slope_kernel, grad_stride=grad.stride(1) if grad.dim() > 1 else 0,
        scale=float(p) / (max(n, 1) if grad.dim() == 1 else 1), beta=float(beta),
        JS=bool(divergence), ACC=acc, GRAD=DTYPES[grad.dtype], MASK=masks.dims,
        BLOCK=_block(max(cells)),
    )  # fmt: skip
    keep_alive, spreads, walks = [], [], {}
    for i, (x, dx, layer, side) in enumerate(zip(xs, grads, layers, sides, strict=True)):
        size = n * cells[layer]
        if x.numel() == 0 or size == 0:
            dx.zero_()
            continue
        key = x.dtype, x.shape, x.stride(), dx.stride(), *layout[4 * i : 4 * i + 4]
        if key not in walks:
            views = [view_of(y, key[4:], lead=True) for y in (x, dx)]
            walk = Walk(views, _small(maps.dtype, p), target=2048, longest=4)
            walks[key] = walk, view_of(x, key[4:]).size, plan.share(walk.words)
        walk, raw, shape = walks[key]
        pooled = n * raw[0] * raw[1] * raw[2] if raw != spaces[layer] else 0
        keep_alive.append(maps.new_empty(size + pooled))
        slope, first = keep_alive[-1].data_ptr(), maps.data_ptr() + starts[layer]
        ends = (first + side * size * step, first + (1 - side) * size * step)
        at = grad.data_ptr() + layer * grad.stride(0) * grad.element_size()
        slopes.append((n, (*ends, slope, cells[layer], *masks[layer], at, side)))
        if pooled:
            where = plan.share((n, *raw, *spaces[layer]))
            index = _pool_index(n, raw, spaces[layer])
            plan.launch(scatter_kernel, ACC=acc, INDEX=index, BLOCK=_FLAT).append(
                (-(-pooled // _FLAT), (slope, slope + size * step, where))
            )
            slope += size * step
        spreads.append((walk, (x.data_ptr(), dx.data_ptr(), slope, shape)))
    for walk, row in spreads:
        plan.launch(
            spread_kernel, p=p - 1.0, ACC=acc, POWER=power_of(p),
            PERIODIC=walk.order == PLANE or walk.view.lead > 0, **walk.constants(*row[:2]),
        ).append((walk.programs, row))  # fmt: skip
    return plan, grads, keep_alive
