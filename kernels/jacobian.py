"""Jacobian rows in Triton; lwkd/ops/jacobian.py states the formulas.

    forward    sums_kernel       Σs², Σt², Σst (or Σ(s−t)²) of a piece of a row, each read once
               distance_kernel   the pieces of a row added up, and its distance
               mean_kernel       over the batch
    backward   spread_kernel     dx = own·x + other·y, one pass over both rows and dx

All layers of a call share these launches (one more for every further pair of dtypes, or way of
loading). Every sum is in float64, in an order that follows from shapes and strides: results repeat
bit for bit. Two products of float32 and their sum are three float64 operations an element: on a
GPU with half as many float64 as float32 units that is less than reading the element takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import (
    DTYPES,
    Plan,
    element_size,
    helper,
    index_of,
    kernel,
    locate,
    mean_kernel,
    narrow,
    place,
    place_words,
    widen,
)

__all__ = ["rows", "rows_backward"]

DIFFERENCE, NORMALIZED, NORMS = 0, 1, 2
_DIFFERENCE, _NORMALIZED, _NORMS = (tl.constexpr(i) for i in range(3))
_EPS = tl.constexpr(1e-12)  # made float64 where it is used: a literal may be float32
_TILE = 1024  # elements that a program reads at a time
_PROGRAMS = 2048  # wanted at the least, if rows are long enough to be cut
_LONGEST = 64  # tiles of a program at the most: later ones would wait for a whole row
_DIMS = 4  # that ``place`` knows

# --- one pass over the rows -----------------------------------------------------------------------
# The words of a shape: pieces of a row, elements of a piece and of a row; then for each tensor the
# stride of the batch and what ``place`` reads.


@helper
def elements(dims, n, q, DENSE: tl.constexpr, VECTOR: tl.constexpr, RUNS: tl.constexpr):
    """Where elements q of row n lie."""
    start = n * tl.multiple_of(tl.load(dims), VECTOR)
    return start + q if DENSE else start + place(dims + 1, q, RUNS, 1)


@kernel
def sums_kernel(
    table, base: tl.int64, items: tl.int64,
    S: tl.constexpr, T: tl.constexpr, WAY: tl.constexpr, DENSE: tl.constexpr,
    VECTOR: tl.constexpr, RUNS: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: s, t, out, shape. out: [N, pieces, 3], of NORMS the first of the three alone."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    aligned: tl.constexpr = 16 if VECTOR > 1 else 1
    s = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(S)), aligned)
    t = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(T)), aligned)
    shape = table + tl.load(row + 4)
    pieces = tl.load(shape)
    n, piece = program // pieces, program % pieces
    begin = tl.multiple_of(piece * tl.load(shape + 1), VECTOR)
    end = tl.minimum(begin + tl.load(shape + 1), tl.load(shape + 2))
    end = tl.multiple_of(end, VECTOR)
    ss = tl.full([TILE], 0, tl.float64)
    tt, st = ss, ss
    step = begin * 0
    while begin + step * TILE < end:
        q = (begin + step * TILE).to(INDEX) + tl.arange(0, TILE)
        exists = q < end
        x = widen(tl.load(s + elements(shape + 3, n, q, DENSE, VECTOR, RUNS), mask=exists, other=0),
                  tl.float64)  # fmt: skip
        if WAY == _NORMS:
            ss += x * x
        else:
            at = elements(shape + 12, n, q, DENSE, VECTOR, RUNS)
            y = widen(tl.load(t + at, mask=exists, other=0), tl.float64)
            if WAY == _DIFFERENCE:
                ss += (x - y) * (x - y)
            else:
                ss += x * x
                tt += y * y
                st += x * y
        step += 1
    out = tl.load(row + 3).to(tl.pointer_type(tl.float64)) + program * 3
    tl.store(out, tl.sum(ss, 0))
    tl.store(out + 1, tl.sum(tt, 0))
    tl.store(out + 2, tl.sum(st, 0))


@helper
def distance_of(ss, tt, st, WAY: tl.constexpr):
    """D of a row from its sums."""
    if WAY == _DIFFERENCE:
        d = ss
    else:
        ns, nt = tl.sqrt(ss), tl.sqrt(tt)
        if WAY == _NORMS:
            whole = ns + nt
            ratio = tl.where(whole == 0, 0.0, (ns - nt) / tl.where(whole == 0, 1.0, whole))
            d = ratio * ratio
        else:
            eps = tl.full(ss.shape, _EPS, tl.float64)
            a, b = tl.where(ns < eps, eps, ns), tl.where(nt < eps, eps, nt)
            short = ss / (a * a) + tt / (b * b) - 2 * (st / (a * b))
            # √(x·x) is x: equal rows are at a distance of exactly 0.
            root = tl.sqrt(ss * tt)
            long = 2 - 2 * (st / tl.where(root == 0, 1.0, root))
            d = tl.where((ns >= eps) & (nt >= eps), long, short)
            d = tl.where(d < 0, 0.0, d)
    return d


@kernel
def distance_kernel(
    table, base: tl.int64, items: tl.int64,
    WAY: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: pieces of s, pieces of t, how many of each, sums [N, 3], distances [N], N."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    s = tl.load(row + 1).to(tl.pointer_type(tl.float64))
    t = tl.load(row + 2).to(tl.pointer_type(tl.float64))
    s_pieces, t_pieces = tl.load(row + 3), tl.load(row + 4)
    n = program * BLOCK + tl.arange(0, BLOCK)
    exists = n < tl.load(row + 7)
    ss = tl.full([BLOCK], 0, tl.float64)
    tt, st = ss, ss
    i = s_pieces * 0
    while i < s_pieces:
        at = s + (n * s_pieces + i) * 3
        ss += tl.load(at, mask=exists, other=0)
        if WAY == _NORMALIZED:
            tt += tl.load(at + 1, mask=exists, other=0)
            st += tl.load(at + 2, mask=exists, other=0)
        i += 1
    if WAY == _NORMS:
        i = t_pieces * 0
        while i < t_pieces:
            tt += tl.load(t + (n * t_pieces + i) * 3, mask=exists, other=0)
            i += 1
    sums = tl.load(row + 5).to(tl.pointer_type(tl.float64)) + n * 3
    tl.store(sums, ss, mask=exists)
    tl.store(sums + 1, tt, mask=exists)
    tl.store(sums + 2, st, mask=exists)
    d = distance_of(ss, tt, st, WAY)
    tl.store(tl.load(row + 6).to(tl.pointer_type(OUT)) + n, d.to(OUT), mask=exists)


# --- the way back ---------------------------------------------------------------------------------


@helper
def slope_of(ss, tt, st, WAY: tl.constexpr):
    """(own, other) of dD/ds = own·s + other·t, from Σs², Σt², Σst."""
    if WAY == _DIFFERENCE:
        own = ss * 0 + 2
        other = -own
    else:
        eps = tl.full([], _EPS, tl.float64)
        ns, nt = tl.sqrt(ss), tl.sqrt(tt)
        if WAY == _NORMS:
            dead = ns < eps
            a = tl.where(dead, 1.0, ns)
            whole = tl.where(dead, 1.0, ns + nt)
            own = tl.where(dead, 0.0, 4 * (ns - nt) * nt / (whole * whole * whole) / a)
            other = own * 0
        else:
            dead = (ns < eps) | (nt < eps)
            root = tl.where(dead, 1.0, tl.sqrt(ss * tt))
            own = tl.where(dead, 0.0, 2 * (st / root) / tl.where(dead, 1.0, ss))
            other = tl.where(dead, 0.0, -2 / root)
    return own, other


@kernel
def spread_kernel(
    table, base: tl.int64, items: tl.int64, grad_stride: tl.int64, scale: tl.float64,
    X: tl.constexpr, Y: tl.constexpr, GRAD: tl.constexpr, WAY: tl.constexpr, DENSE: tl.constexpr,
    VECTOR: tl.constexpr, RUNS: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: x, dx, y, sums [N, 3] of the layer, side, grad of the layer, shape."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    aligned: tl.constexpr = 16 if VECTOR > 1 else 1
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(X)), aligned)
    dx = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(X)), aligned)
    y = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(Y)), aligned)
    shape = table + tl.load(row + 7)
    pieces = tl.load(shape)
    n, piece = program // pieces, program % pieces
    sums = tl.load(row + 4).to(tl.pointer_type(tl.float64)) + n * 3
    side = tl.load(row + 5)
    grad = tl.load(row + 6).to(tl.pointer_type(GRAD))
    g = tl.load(grad + n * grad_stride).to(tl.float64) * scale
    own, other = slope_of(tl.load(sums + side), tl.load(sums + 1 - side), tl.load(sums + 2), WAY)
    own, other = g * own, g * other
    none = (own == 0) & (other == 0)  # whatever the rows hold
    begin = tl.multiple_of(piece * tl.load(shape + 1), VECTOR)
    end = tl.minimum(begin + tl.load(shape + 1), tl.load(shape + 2))
    end = tl.multiple_of(end, VECTOR)
    step = begin * 0
    while begin + step * TILE < end:
        q = (begin + step * TILE).to(INDEX) + tl.arange(0, TILE)
        exists = q < end
        at = elements(shape + 3, n, q, DENSE, VECTOR, RUNS)
        d = own * widen(tl.load(x + at, mask=exists, other=0), tl.float64)
        if WAY != _NORMS:
            at = elements(shape + 21, n, q, DENSE, VECTOR, RUNS)
            d += other * widen(tl.load(y + at, mask=exists, other=0), tl.float64)
        d = tl.where(none, 0.0, d)
        at = elements(shape + 12, n, q, DENSE, VECTOR, RUNS)
        tl.store(dx + at, narrow(d, X), mask=exists)
        step += 1


# --- on the host ----------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """How tensors of one shape [N, ...] are walked together, and what a kernel is told of it."""

    programs: int
    pieces: int
    words: tuple[int, ...]
    constants: dict[str, Any]


def _walk(tensors: Sequence[Tensor], layers: int) -> _Rows:
    """In the order of the first one's memory; it follows from shapes, strides and alignment."""
    x = tensors[0]
    n, length = x.shape[0], x[0].numel() if x.shape[0] else 0
    dims = sorted((d for d in range(1, x.dim()) if x.shape[d] != 1), key=lambda d: -x.stride(d))
    runs = _merge([x.shape[d] for d in dims], [[t.stride(d) for d in dims] for t in tensors])
    dense = len(runs) == 1 and all(stride == 1 for stride in runs[0][1])
    tiles = -(-length // _TILE)
    pieces = min(max(-(-_PROGRAMS // max(n * layers, 1)), -(-tiles // _LONGEST), 1), max(tiles, 1))
    piece = -(-tiles // pieces) * _TILE
    pieces = -(-length // piece) if piece else 0
    words: tuple[int, ...] = (pieces, piece, length)
    for k, t in enumerate(tensors):
        words += (t.stride(0), *place_words([(size, strides[k]) for size, strides in runs]))
    widest = 16 // max(element_size(t.dtype) for t in tensors)
    odd = any(
        t.data_ptr() % 16 or (n > 1 and t.stride(0) % widest) or length % widest for t in tensors
    )
    constants = {
        "DENSE": dense,
        "VECTOR": widest if dense and not odd else 1,
        "RUNS": len(runs),
        "INDEX": index_of(length),
        "TILE": _TILE,
    }
    return _Rows(n * pieces, pieces, words, constants)


def _merge(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride of each tensor) of dimensions that no tensor breaks, innermost first."""
    out: list[tuple[int, tuple[int, ...]]] = []
    for d in reversed(range(len(sizes))):
        step = tuple(s[d] for s in strides)
        if out and all(a == out[-1][0] * b for a, b in zip(step, out[-1][1], strict=True)):
            out[-1] = (out[-1][0] * sizes[d], out[-1][1])
        else:
            out.append((sizes[d], step))
    return out or [(1, (1,) * len(strides))]


def _readable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or copies where their dimensions are more than ``place`` knows."""
    x = tensors[0]
    dims = sorted((d for d in range(1, x.dim()) if x.shape[d] != 1), key=lambda d: -x.stride(d))
    runs = _merge([x.shape[d] for d in dims], [[t.stride(d) for d in dims] for t in tensors])
    return list(tensors) if len(runs) <= _DIMS else [t.contiguous() for t in tensors]


def rows(*args: Any) -> tuple[Tensor, Tensor]:
    """lwkd::jacobian_rows: the distances, and the sums that they were made of."""
    plan, distance, sums, _ = plan_rows(*args)
    plan.run()
    return distance, sums


def plan_sums(
    plan: Plan, tensors: Sequence[Tensor], how: int, layers: int
) -> tuple[Tensor, int, list[Tensor]]:
    """Plan one pass over rows of one shape, of ``layers``: sums, pieces, what the plan needs."""
    group = _readable(tensors)
    walk = _walk(group, layers)
    partial = group[0].new_empty((group[0].shape[0] * walk.pieces, 3), dtype=torch.float64)
    # Every shape has the words of two tensors: one launch serves rows of any kind.
    words = walk.words + (0,) * (21 - len(walk.words))
    plan.launch(
        sums_kernel, S=DTYPES[group[0].dtype], T=DTYPES[group[-1].dtype], WAY=how, **walk.constants
    ).append((walk.programs, (
        group[0].data_ptr(), group[-1].data_ptr(), partial.data_ptr(), plan.share(words),
    )))  # fmt: skip
    return partial, walk.pieces, group


def plan_rows(
    student: Sequence[Tensor], teacher: Sequence[Tensor], how: int, mean: bool
) -> tuple[Plan, Tensor, Tensor, Any]:
    """Plan :func:`rows`, allocate its results; the last item keeps what the plan needs alive."""
    like, n, length = student[0], student[0].shape[0], len(student)
    wide = any(x.dtype == torch.float64 for x in (*student, *teacher))
    dtype = torch.float64 if wide else torch.float32
    plan = Plan(like.device)
    sums = like.new_empty((length, n, 3), dtype=torch.float64)
    shape = (length,) if mean else (length, n)
    if n == 0:
        return plan, like.new_zeros(shape, dtype=dtype), sums, None
    distance = like.new_empty(shape, dtype=dtype)
    each = like.new_empty((length, n), dtype=torch.float64) if mean else distance
    keep_alive: list[Any] = [each]
    out = []
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        groups = [[x] for x in pair] if how == NORMS else [list(pair)]
        parts = []
        for group in groups:
            partial, pieces, kept = plan_sums(plan, group, how, length)
            keep_alive += [partial, kept]
            parts.append((partial.data_ptr(), pieces))
        (s, s_pieces), (t, t_pieces) = parts[0], parts[-1]
        out.append((s, t, s_pieces, t_pieces, sums[i].data_ptr(), each[i].data_ptr(), n))
    block = 32 if n <= 32 else 128
    plan.launch(distance_kernel, WAY=how, OUT=DTYPES[each.dtype], BLOCK=block).extend(
        (-(-n // block), row) for row in out
    )
    if mean:
        end, step = distance.data_ptr(), distance.element_size()
        plan.launch(mean_kernel, OUT=DTYPES[dtype], BLOCK=128 if n <= 128 else 1024).extend(
            (1, (each[i].data_ptr(), end + i * step, n)) for i in range(length)
        )
    return plan, distance, sums, keep_alive


def rows_backward(*args: Any) -> list[Tensor]:
    """lwkd::jacobian_rows_backward: the gradients of ``xs``."""
    plan, grads, copies, _ = plan_rows_backward(*args)
    plan.run()
    for dx, dense in copies:
        dx.copy_(dense)
    return grads


def plan_rows_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    others: Sequence[Tensor],
    sums: Tensor,
    layers: Sequence[int],
    sides: Sequence[int],
    how: int,
) -> tuple[Plan, list[Tensor], list[tuple[Tensor, Tensor]], Any]:
    """Plan :func:`rows_backward`, allocate its results.

    Of the last two items one says what to copy where after the run, the other keeps alive what the
    plan needs.
    """
    n = sums.shape[1]
    plan, grads = Plan(sums.device), [torch.empty_like(x) for x in xs]
    copies: list[tuple[Tensor, Tensor]] = []
    keep_alive: list[Any] = []
    for i, (x, dx, layer, side) in enumerate(zip(xs, grads, layers, sides, strict=True)):
        if x.numel() == 0:
            continue
        y = x if how == NORMS else others[i]
        group = _readable([x, dx, y])
        if group[1] is not dx:
            copies.append((dx, group[1]))
        keep_alive.append(group)
        walk = _walk(group, len(xs))
        at = grad.data_ptr() + layer * grad.stride(0) * grad.element_size()
        plan.launch(
            spread_kernel, grad_stride=grad.stride(1) if grad.dim() > 1 else 0,
            scale=1 / max(n, 1) if grad.dim() == 1 else 1.0, X=DTYPES[x.dtype],
            Y=DTYPES[y.dtype], GRAD=DTYPES[grad.dtype], WAY=how, **walk.constants,
        ).append((walk.programs, (
            *(z.data_ptr() for z in group), sums[layer].data_ptr(), side, at,
            plan.share(walk.words),
        )))  # fmt: skip
    return plan, grads, copies, keep_alive
