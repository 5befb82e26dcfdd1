"""Jacobian factors in Triton; lwkd/ops/factors.py states the formulas.

    sums_kernel      (of rows) ‖x‖², ‖y‖², ⟨x, y⟩ of both networks' factors
    guess_kernel     c_a of every item, and one c for a layer, from those
    direct_kernel, gram_kernel, thin_kernel, index_kernel
                     the sums of an item, tile by tile (factors_tiles.py)
    finish_kernel    the sums of a layer, and its distance
    mean_kernel      over the batch

What is summed, ‖U‖², ⟨U, G_S⟩ and ‖G_S‖², gives the distance whatever c is; where c was so far off
that digits are lost, ``finish_kernel`` writes a better one and the sample is done once more. Sums
of tiles are float64, in an order that follows from shapes: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import DTYPES, Plan, helper, kernel, locate, mean_kernel
from .factors_tiles import (
    MATRIX,
    NORMALIZED,
    NORMS,
    direct_kernel,
    gram_kernel,
    index_kernel,
    thin_kernel,
)
from .jacobian import plan_sums

__all__ = ["distances"]

DENSE, INDICES, CONVOLUTION = 0, 1, 2  # as lwkd/ops/factors_reference.py tells items apart
FORM = 15
_NORMALIZED, _NORMS = tl.constexpr(NORMALIZED), tl.constexpr(NORMS)
_EPS = tl.constexpr(1e-12)
_STEP = 32  # rows, or columns, that go into the matrix units at a time

# --- c, and the distances -------------------------------------------------------------------------


@kernel
def guess_kernel(
    table, base: tl.int64, items: tl.int64,
    ROUND: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: items of the layer, their words, N, c [N]. Of an item: sums of a and how many pieces a
    sample has (none of indices), the same of d, c_a [N], which is of type ROUND.
    """
    row, program = locate(table, base, items, WIDTH, ITEMS)
    count, item, samples = tl.load(row + 1), table + tl.load(row + 2), tl.load(row + 3)
    n = program * BLOCK + tl.arange(0, BLOCK)
    exists = n < samples
    heaviest, c = tl.full([BLOCK], -1, tl.float64), tl.full([BLOCK], 1, tl.float64)
    k = count * 0
    while k < count:
        weight, ratio = tl.full([BLOCK], 1, tl.float64), tl.full([BLOCK], 1, tl.float64)
        for side in tl.static_range(2):
            sums = tl.load(item + 2 * side).to(tl.pointer_type(tl.float64))
            pieces = tl.load(item + 2 * side + 1)
            ss, tt = tl.full([BLOCK], 0, tl.float64), tl.full([BLOCK], 0, tl.float64)
            i = pieces * 0
            while i < pieces:
                at = sums + (n * pieces + i) * 3
                ss += tl.load(at, mask=exists, other=0)
                tt += tl.load(at + 1, mask=exists, other=0)
                i += 1
            whole = pieces == 0
            good = (ss > 0) & (tt > 0)
            one = tl.where(good, tl.sqrt(ss / tl.where(good, tt, 1.0)), 1.0)
            if side == 0:  # what is multiplied in float32 and in float64 is one number
                one = one.to(ROUND).to(tl.float64)
                c_a = tl.load(item + 4).to(tl.pointer_type(tl.float64))
                tl.store(c_a + n, one, mask=exists)
            weight *= tl.where(whole, 1.0, tl.sqrt(ss))
            ratio *= one
        better = (weight > heaviest) & (ratio > 0) & (ratio < float("inf"))
        heaviest, c = tl.where(better, weight, heaviest), tl.where(better, ratio, c)
        item += 5
        k += 1
    tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float64)) + n, c, mask=exists)


@helper
def distance_of(uu, us, ss, c, WAY: tl.constexpr):
    """D from its sums (of NORMS ‖G_S‖², ‖G_T‖²), and a better c, or 0 where this one will do."""
    mended = uu * 0
    if WAY == _NORMS:
        ns, nt = tl.sqrt(uu), tl.sqrt(us)
        whole = ns + nt
        ratio = tl.where(whole == 0, 0.0, (ns - nt) / tl.where(whole == 0, 1.0, whole))
        d = ratio * ratio
    elif WAY == _NORMALIZED:
        vv = ss - 2 * us + uu  # of v = c·G_T
        vv = tl.where(vv < 0, 0.0, vv)
        ns, nv = tl.sqrt(ss), tl.sqrt(vv)
        nt = nv / c
        eps = tl.full([], _EPS, tl.float64)
        dead = (ns < eps) | (nt < eps)
        x = (2 * us - uu) / tl.where(dead, 1.0, ns + nv)
        d = (uu - x * x) / tl.where(dead, 1.0, ns * nv)
        lost = (2 * x * x > uu) & (dead == 0)  # more than half of ‖U‖² is along G_S
        mended = tl.where(lost, c * (ns / tl.where(dead, 1.0, nv)), 0.0)
        a, b = tl.where(ns < eps, eps, ns), tl.where(nt < eps, eps, nt)
        short = ss / a / a + nt / b * (nt / b) - 2 * ((ss - us) / c / a / b)
        d = tl.where(dead, short, d)
        d = tl.where(d < 0, 0.0, d)
    else:
        d = uu
    return d, mended


@kernel
def finish_kernel(
    table, base: tl.int64, items: tl.int64,
    WAY: tl.constexpr, OUT: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: items of the layer, their words, c [N], active [N], distances [N]. Of an item: sums, how
    many a sample has, and (of NORMS) the network, 0 or 1.
    """
    row, n = locate(table, base, items, WIDTH, ITEMS)
    count, item = tl.load(row + 1), table + tl.load(row + 2)
    zero = tl.full([], 0, tl.float64)
    uu, us, ss = zero, zero, zero
    k = count * 0
    while k < count:
        sums = tl.load(item).to(tl.pointer_type(tl.float64))
        programs, side = tl.load(item + 1), tl.load(item + 2)
        first, second, third = zero, zero, zero
        i = programs * 0
        while i < programs:
            p = i + tl.arange(0, BLOCK)
            at = sums + (n * programs + p) * 3
            first += tl.sum(tl.load(at, mask=p < programs, other=0), 0)
            if WAY == _NORMALIZED:
                second += tl.sum(tl.load(at + 1, mask=p < programs, other=0), 0)
                third += tl.sum(tl.load(at + 2, mask=p < programs, other=0), 0)
            i += BLOCK
        if WAY == _NORMS:
            uu += tl.where(side == 0, first, 0.0)
            us += tl.where(side == 0, 0.0, first)
        else:
            uu, us, ss = uu + first, us + second, ss + third
        item += 3
        k += 1
    c_at = tl.load(row + 3).to(tl.pointer_type(tl.float64)) + n
    d, mended = distance_of(uu, us, ss, tl.load(c_at), WAY)
    active = tl.load(row + 4).to(tl.pointer_type(tl.int32)) + n
    tl.store(tl.load(row + 5).to(tl.pointer_type(OUT)) + n, d.to(OUT), mask=tl.load(active) != 0)
    if ROUND == 0 and WAY == _NORMALIZED:
        again = (mended > 0) & (mended < float("inf"))
        tl.store(c_at, mended, mask=again)
        tl.store(active, again.to(tl.int32))


# --- on the host ----------------------------------------------------------------------------------


class _Job(NamedTuple):
    """One parameter, of one network or of both: how it is contracted, and what kernels are told."""

    kernel: Any
    programs: int  # of a sample
    tensors: tuple[Tensor, ...]  # a and d of the student, and of the teacher
    words: tuple[int, ...]
    constants: dict[str, Any]
    side: int = 0


def _power(size: int, most: int) -> int:
    """The power of two from 16 that covers size, at the most ``most``."""
    return min(max(16, 1 << max(size - 1, 0).bit_length()), most)


def _dense_words(x: Tensor) -> tuple[int, ...]:
    """Of [N, T, C] or [N, G, T, C]."""
    g = x.stride(1) if x.dim() == 4 else 0
    return _padded((x.stride(0), g, x.stride(-2), x.stride(-1)))


def _padded(words: tuple[int, ...]) -> tuple[int, ...]:
    return words + (0,) * (MATRIX - len(words))


def _conv_words(x: Tensor, y: Tensor, form: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the patches of x, and of y as patches of one position each."""
    groups, front = form[1], 5 - x.dim()
    kernel, stride, padding, dilation = (form[3 + 3 * i : 6 + 3 * i] for i in range(4))
    positions = (1,) * front + tuple(y.shape[2:])
    out = []
    for z, patch in ((x, True), (y, False)):
        size = (1,) * front + tuple(z.shape[2:])
        steps = (0,) * front + z.stride()[2:]
        k = kernel if patch else (1, 1, 1)
        words = [z.stride(0), z.shape[1] // groups * z.stride(1), k[0], z.stride(1)]
        words += [positions[1], positions[2], k[1], k[2]]
        for i in range(3):
            words += [stride[i], dilation[i], padding[i]] if patch else [1, 1, 0]
            words += [size[i], steps[i]]
        out.append(tuple(words))
    return out


def _job(sides: Sequence[tuple[Tensor, Tensor]], form: Sequence[int], gram: bool, how: int) -> _Job:
    a, d = sides[0]
    conv, indices = form[0] == CONVOLUTION, form[0] == INDICES
    if conv:
        # A transposed convolution's gradient is that of an ordinary one from its output.
        sides = [pair[::-1] if form[2] else pair for pair in sides]
        x, y = sides[0]
        groups, rows = form[1], y[0, 0].numel() if len(y) else 0
        inputs = x.shape[1] // groups * form[3] * form[4] * form[5]
        outputs = y.shape[1] // groups
        words = [w for pair in sides for w in _conv_words(*pair, form)]
    else:
        groups, rows, outputs = d.shape[1] if d.dim() == 4 else 1, d.shape[-2], d.shape[-1]
        inputs = 1 if indices else a.shape[-1]
        words = []
        for p, q in sides:
            words += [_padded((p.stride(0), 0, p.stride(1))) if indices else _dense_words(p)]
            words += [_dense_words(q)]
    tensors = tuple(x for pair in sides for x in pair) * (1 if len(sides) == 2 else 2)
    words = words * (1 if len(sides) == 2 else 2)
    double = any(x.dtype == torch.float64 for x in tensors)
    types = [DTYPES.get(x.dtype) for x in tensors]
    constants: dict[str, Any] = {"WAY": how}
    if indices:
        block = _power(rows, 32)
        blocks = -(-rows // block)
        programs, kernel = blocks * (blocks + 1) // 2, index_kernel
        constants |= {"D": types[1], "E": types[3], "BT": block}
    elif not conv and 1 in (inputs, outputs):
        words, groups, inputs = _thin(words, groups, inputs, outputs)
        block = _power(inputs, 64)
        programs, kernel = groups * -(-inputs // block), thin_kernel
        constants |= dict(zip("ADBE", types, strict=True)) | {"BT": 16, "BJ": block}
    else:
        constants |= dict(zip("ADBE", types, strict=True))
        constants |= {"ACC": tl.float64 if double else tl.float32, "CONV": conv}
        constants["PREC"] = precision = _precision(tensors)
        # As large as registers hold them: without matrix units they hold less.
        most = 16 if double else 64 if precision == "tf32" else 32
        constants["num_warps"] = 8 if precision == "tf32" else 4
        step = 16 if double else _STEP
        if gram:
            block = _power(rows, most)
            blocks = -(-rows // block)
            programs, kernel = groups * blocks * (blocks + 1) // 2, gram_kernel
            constants |= {"BT": block, "BK": step}
        else:
            o, i = _power(outputs, most), _power(inputs, most)
            programs, kernel = groups * -(-outputs // o) * -(-inputs // i), direct_kernel
            constants |= {"BO": o, "BI": i, "BT": step}
    shape = (programs, groups, rows, inputs, outputs)
    flat = shape + tuple(w for m in words for w in m)
    return _Job(kernel, programs, tensors, flat, constants)


def _thin(
    words: list[tuple[int, ...]], groups: int, inputs: int, outputs: int
) -> tuple[list[tuple[int, ...]], int, int]:
    """Matrices of one row of columns each: of the groups, where they are single numbers."""
    single = inputs == outputs == 1
    out = []
    for k, (n, g, t, c, *_) in enumerate(words):
        width = outputs if k % 2 else inputs
        column = g if single else c if width > 1 else 0
        out.append(_padded((n, 0 if single else g, t, column)))
    return out, 1 if single else groups, groups if single else max(inputs, outputs)


def _precision(tensors: Sequence[Tensor]) -> str:
    """As torch multiplies float32 matrices; what has fewer digits loses none in TF32."""
    short = all(x.dtype in (torch.float16, torch.bfloat16) for x in tensors)
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact and not short else "tf32"


def distances(*args: Any) -> Tensor:
    """lwkd::jacobian_factors: distances [L] or [L, N]."""
    plan, distance, _ = plan_distances(*args)
    plan.run()
    return distance


def plan_distances(
    student_a: Sequence[Tensor],
    student_d: Sequence[Tensor],
    teacher_a: Sequence[Tensor],
    teacher_d: Sequence[Tensor],
    layers: Sequence[int],
    forms: Sequence[int],
    contractions: Sequence[int],
    how: int,
    mean: bool,
) -> tuple[Plan, Tensor, Any]:
    """Plan :func:`distances`, allocate its result; the last item keeps alive what that needs."""
    every = (*student_a, *student_d, *teacher_a, *teacher_d)
    like, n, length = student_d[0], student_d[0].shape[0], layers[-1] + 1
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in every) else torch.float32
    plan = Plan(like.device)
    shape = (length,) if mean else (length, n)
    if n == 0:
        return plan, like.new_zeros(shape, dtype=dtype), None
    distance = like.new_empty(shape, dtype=dtype)
    each = like.new_empty((length, n), dtype=torch.float64) if mean else distance
    c = torch.ones((length, n), dtype=torch.float64, device=like.device)
    c_a = torch.ones((len(layers), n), dtype=torch.float64, device=like.device)
    active = torch.ones((length, n), dtype=torch.int32, device=like.device)
    jobs: list[tuple[int, int, _Job]] = []  # (item, layer, job)
    for i, layer in enumerate(layers):
        form, other = (forms[(2 * i + k) * FORM : (2 * i + k + 1) * FORM] for k in (0, 1))
        s, t, gram = (
            (student_a[i], student_d[i]),
            (teacher_a[i], teacher_d[i]),
            contractions[i] == 0,
        )
        if how == NORMS:
            jobs.append((i, layer, _job([s], form, gram, how)))
            jobs.append((i, layer, _job([t], other, gram, how)._replace(side=1)))
        else:
            jobs.append((i, layer, _job([s, t], form, gram, how)))
    keep_alive: list[Any] = [each, c, c_a, active, jobs]
    if how == NORMALIZED:
        keep_alive += _plan_guess(plan, jobs, c, c_a, dtype)
    sums = [like.new_empty((n, job.programs, 3), dtype=torch.float64) for _, _, job in jobs]
    keep_alive += sums
    for again in range(2 if how == NORMALIZED else 1):
        for (i, layer, job), partial in zip(jobs, sums, strict=True):
            plan.launch(job.kernel, ROUND=again, **job.constants).append((n * job.programs, (
                *(x.data_ptr() for x in job.tensors), c_a[i].data_ptr(), c[layer].data_ptr(),
                active[layer].data_ptr(), partial.data_ptr(), plan.share(job.words),
            )))  # fmt: skip
        launch = plan.launch(finish_kernel, WAY=how, OUT=DTYPES[each.dtype], ROUND=again, BLOCK=128)
        for layer in range(length):
            own = [k for k, (_, of, _) in enumerate(jobs) if of == layer]
            words: list[int] = []
            for k in own:
                words += [sums[k].data_ptr(), jobs[k][2].programs, jobs[k][2].side]
            launch.append((n, (len(own), plan.share(tuple(words)), c[layer].data_ptr(),
                               active[layer].data_ptr(), each[layer].data_ptr())))  # fmt: skip
    if mean:
        end, step = distance.data_ptr(), distance.element_size()
        plan.launch(mean_kernel, OUT=DTYPES[dtype], BLOCK=128 if n <= 128 else 1024).extend(
            (1, (each[i].data_ptr(), end + i * step, n)) for i in range(length)
        )
    return plan, distance, keep_alive


def _plan_guess(
    plan: Plan, jobs: Sequence[tuple[int, int, _Job]], c: Tensor, c_a: Tensor, dtype: torch.dtype
) -> list[Any]:
    """c of every layer and c_a of every item."""
    keep_alive: list[Any] = []
    words: list[list[int]] = [[] for _ in c]
    for i, layer, job in jobs:
        a, d, b, e = job.tensors
        for pair in ((a, b), (d, e)):
            if pair[0].dtype == torch.int64 or pair[0].numel() == 0:
                words[layer] += [0, 0]
                continue
            partial, pieces, kept = plan_sums(plan, pair, NORMALIZED, len(jobs))
            words[layer] += [partial.data_ptr(), pieces]
            keep_alive += [partial, kept]
        words[layer].append(c_a[i].data_ptr())
    n = c.shape[1]
    block = 32 if n <= 32 else 128
    plan.launch(guess_kernel, ROUND=DTYPES[dtype], BLOCK=block).extend(
        (-(-n // block), (len(w) // 5, plan.share(tuple(w)), n, c[layer].data_ptr()))
        for layer, w in enumerate(words)
    )
    return keep_alive
