"""Jacobian factors in Triton; lwkd/ops/factors.py states the formulas.

    sums_kernel      (of rows) ‖x‖², ‖y‖², ⟨x, y⟩ of both networks' factors
    guess_kernel     c_a of every item, and one c for a layer, from those
    direct_kernel, gram_kernel, thin_kernel, index_kernel
                     the sums of an item, tile by tile (factors_tiles.py)
    finish_kernel    the sums of a layer, and its distance
    mean_kernel      over the batch

What is summed, ‖U‖², ⟨U, G_S⟩ and ‖G_S‖², gives the distance whatever c is; where c was so far off
that digits are lost, ``finish_kernel`` writes a better one, and the next of three passes does the
sample once more: nobody waits to see whether there is one. Sums of tiles are float64, in an order
that follows from shapes: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .common import DTYPES, Plan, helper, kernel, locate, mean_kernel
from .factors_items import FORM, Job, job_of
from .factors_tiles import NORMALIZED, NORMS
from .jacobian import plan_sums

__all__ = ["distances"]

_NORMALIZED, _NORMS = tl.constexpr(NORMALIZED), tl.constexpr(NORMS)
_EPS = tl.constexpr(1e-12)
SQUARES = 3  # of ``how``: ‖G_S‖², and nothing of the teacher
_PASSES = 3
_NOISE = tl.constexpr(1e-5)  # from one square to another: below, it is half or more rounding

# --- c, and the distances -------------------------------------------------------------------------


@kernel
def guess_kernel(
    table, base: tl.int64, items: tl.int64,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: items of the layer, their words, N, c [N]. Of an item: sums of a and how many pieces a
    sample has (none of indices), the same of d, c_a [N].
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
            if side == 0:
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
    uu = tl.where(uu < 0, 0.0, uu)  # what a gram may round nothing to
    mended = uu * 0
    if WAY == _NORMS:
        ns, nt = tl.sqrt(uu), tl.sqrt(tl.where(us < 0, 0.0, us))
        whole = ns + nt
        ratio = tl.where(whole == 0, 0.0, (ns - nt) / tl.where(whole == 0, 1.0, whole))
        d = ratio * ratio
    elif WAY == _NORMALIZED:
        vv = ss - 2 * us + uu  # of v = c·G_T
        # Of one that is far the smaller rounding leaves nothing; what is nothing leaves exactly 0.
        own = tl.where((ss < uu * _NOISE) & (ss != 0), uu * _NOISE, ss)
        other = tl.where((vv < ss * _NOISE) & (vv != 0), ss * _NOISE, vv)
        unsure = (own != ss) | (other != vv)
        ss, vv = tl.where(ss < 0, 0.0, ss), tl.where(vv < 0, 0.0, vv)
        ns, nv = tl.sqrt(ss), tl.sqrt(vv)
        nt = nv / c
        eps = tl.full([], _EPS, tl.float64)
        dead = (ns < eps) | (nt < eps)
        x = (2 * us - uu) / tl.where(dead, 1.0, ns + nv)
        d = (uu - x * x) / tl.where(dead, 1.0, ns * nv)
        lost = (2 * x * x > uu) & (dead == 0)  # more than half of ‖U‖² is along G_S
        mended = tl.where(unsure | lost, c * tl.sqrt(own / tl.where(other > 0, other, 1.0)), 0.0)
        a, b = tl.where(ns < eps, eps, ns), tl.where(nt < eps, eps, nt)
        st, most = (ss - us) / c, ns * nt
        st = tl.where(st > most, most, tl.where(st < -most, -most, st))
        tt = vv / (c * c)
        short = ss / (a * a) + tt / (b * b) - 2 * (st / (a * b))
        d = tl.where(dead, short, d)
        d = tl.where(d < 0, 0.0, d)
    else:
        d = uu
    return d, mended


@kernel
def finish_kernel(
    table, base: tl.int64, items: tl.int64,
    WAY: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
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
    active = tl.load(row + 4).to(tl.pointer_type(tl.float64)) + n
    wanted = tl.load(active) != 0
    tl.store(tl.load(row + 5).to(tl.pointer_type(OUT)) + n, d.to(OUT), mask=wanted)
    if WAY == _NORMALIZED:
        again = (mended > 0) & (mended < float("inf")) & wanted
        tl.store(c_at, mended, mask=again)
        tl.store(active, again.to(tl.float64))


# --- on the host ----------------------------------------------------------------------------------


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
    jobs: list[list[tuple[int, Job]]] = [[] for _ in range(length)]  # of a layer: (item, job)
    way = NORMS if how == SQUARES else how
    for i, layer in enumerate(layers):
        s, t = (student_a[i], student_d[i]), (teacher_a[i], teacher_d[i])
        form, other = (forms[(2 * i + k) * FORM : (2 * i + k + 1) * FORM] for k in (0, 1))
        gram = contractions[i] == 0
        if way == NORMS:
            jobs[layer].append((i, job_of([s], form, gram, way)))
            if how == NORMS:
                jobs[layer].append((i, job_of([t], other, gram, way)._replace(side=1)))
        else:
            jobs[layer].append((i, job_of([s, t], form, gram, way)))
    # c and whether a sample is to be done, of every layer; c_a of every item.
    state = torch.ones((2 * length + len(layers), n), dtype=torch.float64, device=like.device)
    keep_alive: list[Any] = [each, jobs, state]
    if how == NORMALIZED:
        keep_alive += _plan_guess(plan, jobs, state)
    keep_alive += _plan_passes(plan, jobs, state, each, how)
    if mean:
        end, step = distance.data_ptr(), distance.element_size()
        plan.launch(mean_kernel, OUT=DTYPES[dtype], BLOCK=128 if n <= 128 else 1024).extend(
            (1, (each[i].data_ptr(), end + i * step, n)) for i in range(length)
        )
    return plan, distance, keep_alive


def _plan_guess(plan: Plan, jobs: Sequence[Sequence[tuple[int, Job]]], state: Tensor) -> list[Any]:
    """c of every layer and c_a of every item."""
    keep_alive: list[Any] = []
    n, length = state.shape[1], len(jobs)
    block = 32 if n <= 32 else 128
    passes = sum(map(len, jobs))
    rows = []
    for layer, own in enumerate(jobs):
        words: list[int] = []
        for i, job in own:
            a, d, b, e = job.tensors
            for pair in ((a, b), (d, e)):
                if pair[0].dtype == torch.int64 or pair[0].numel() == 0:
                    words += [0, 0]
                    continue
                partial, pieces, kept = plan_sums(plan, pair, NORMALIZED, passes)
                words += [partial.data_ptr(), pieces]
                keep_alive += [partial, kept]
            words.append(state[2 * length + i].data_ptr())
        at = plan.share(tuple(words))
        rows.append((-(-n // block), (len(own), at, n, state[layer].data_ptr())))
    plan.launch(guess_kernel, BLOCK=block).extend(rows)
    return keep_alive


def _plan_passes(
    plan: Plan, jobs: Sequence[Sequence[tuple[int, Job]]], state: Tensor, each: Tensor, how: int
) -> list[Any]:
    """The sums of all items, and then the distances of all layers, as often as c may be mended."""
    n, length, keep_alive = state.shape[1], len(jobs), []
    tiles: list[tuple[Job, int, tuple[int, ...]]] = []
    ends: list[tuple[int, tuple[int, ...]]] = []
    for layer, own in enumerate(jobs):
        words: list[int] = []
        c, active = state[layer].data_ptr(), state[length + layer].data_ptr()
        for i, job in own:
            sums = state.new_empty((n, job.programs, 3))
            keep_alive.append(sums)
            words += [sums.data_ptr(), job.programs, job.side]
            tiles.append((job, n * job.programs, (
                *(x.data_ptr() for x in job.tensors), state[2 * length + i].data_ptr(), c, active,
                sums.data_ptr(), plan.share(job.words),
            )))  # fmt: skip
        at = plan.share(tuple(words))
        ends.append((n, (len(own), at, c, active, each[layer].data_ptr())))
    for again in range(_PASSES if how == NORMALIZED else 1):
        for job, programs, row in tiles:
            plan.launch(job.kernel, stage=again, **job.constants).append((programs, row))
        plan.launch(finish_kernel, stage=again, WAY=how, OUT=DTYPES[each.dtype], BLOCK=128).extend(
            ends
        )
    return keep_alive
