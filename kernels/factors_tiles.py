"""The tiles of Jacobian factors in Triton: what one program adds up of one item and sample.

direct_kernel    tiles of U and of G_S, squared and summed, by the matrix units
gram_kernel      pairs of blocks of rows: the four blocks of both grams, and their products
thin_kernel      gradients that are vectors, in float64
index_kernel     an embedding's: products of rows that look up the same
"""

from __future__ import annotations

import triton.language as tl

from .common import helper, kernel, locate
from .factors_operands import (
    CONV_WORDS,
    DENSE_WORDS,
    coefficients,
    is_done,
    load_tile,
    matrix,
    minus,
    product,
    sizes,
)

DIFFERENCE, NORMALIZED, NORMS = 0, 1, 2
_NORMALIZED, _NORMS = tl.constexpr(NORMALIZED), tl.constexpr(NORMS)
_DENSE, _CONV = tl.constexpr(DENSE_WORDS), tl.constexpr(CONV_WORDS)

# A row of all four: a and d of the student, a and d of the teacher, c_a [N], c [N], active [N],
# out [N, programs, 3], shape. A shape: programs of a sample, groups, rows, inputs, outputs, and the
# matrices in the order of the row.


@helper
def total(x):
    return tl.sum(tl.sum(x.to(tl.float64), 1), 0)


@helper
def dot64(x, y):
    """Σ x·y of two tiles."""
    return total(x.to(tl.float64) * y.to(tl.float64))


@helper
def store_sums(row, program, uu, us, ss):
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    tl.store(out, uu)
    tl.store(out + 1, us)
    tl.store(out + 2, ss)


@kernel
def direct_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
    CONV: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    WAY: tl.constexpr, PREC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, inputs, outputs = sizes(shape, ACROSS, VECTOR, INDEX)
    n, tile = program // programs, program % programs
    if is_done(row, n):
        return
    g, tile = tile // (programs // groups), (tile % (programs // groups)).to(INDEX)
    across = (inputs + BI - 1) // BI
    i, o = tile % across * BI + tl.arange(0, BI), tile // across * BO + tl.arange(0, BO)
    each: tl.constexpr = _CONV if CONV else _DENSE
    words = shape + 5
    m_a = matrix(row + 1, words, n, g, A, CONV > 0, ACROSS, VECTOR, INDEX)
    m_d = matrix(row + 2, words + each, n, g, D, CONV > 1, ACROSS, VECTOR, INDEX)
    m_b = matrix(row + 3, words + 2 * each, n, g, B, CONV > 0, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * each, n, g, E, CONV > 1, ACROSS, VECTOR, INDEX)
    c_a, c_d, _ = coefficients(row, n, ACC)
    scale = c_d.to(ACC)
    u = tl.full([BO, BI], 0, ACC)
    own = u
    k = rows * 0
    while k * BT < rows:
        t = k * BT + tl.arange(0, BT)
        x = load_tile(m_a, t, i, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC)
        y = load_tile(m_d, t, o, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
        if WAY == _NORMS:
            u = product(tl.trans(y), x, u, PREC)
        else:
            p = load_tile(m_b, t, i, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC)
            q = load_tile(m_e, t, o, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
            u = product(tl.trans(minus(y, q, c_d)), x, u, PREC)
            u = product(tl.trans(q * scale), minus(x, p, c_a), u, PREC)
            if WAY == _NORMALIZED:
                own = product(tl.trans(y), x, own, PREC)
        k += 1
    uu, us, ss = dot64(u, u), 0.0, 0.0
    if WAY == _NORMALIZED:
        us, ss = dot64(u, own), dot64(own, own)
    store_sums(row, program, uu, us, ss)


@kernel
def gram_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
    CONV: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    WAY: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, inputs, outputs = sizes(shape, ACROSS, VECTOR, INDEX)
    n, pair = program // programs, program % programs
    if is_done(row, n):
        return
    g, pair = pair // (programs // groups), (pair % (programs // groups)).to(INDEX)
    blocks = (rows + BT - 1) // BT
    first = pair * 0
    while pair >= blocks - first:
        pair -= blocks - first
        first += 1
    t, r = first * BT + tl.arange(0, BT), (first + pair) * BT + tl.arange(0, BT)
    each: tl.constexpr = _CONV if CONV else _DENSE
    words = shape + 5
    m_a = matrix(row + 1, words, n, g, A, CONV > 0, ACROSS, VECTOR, INDEX)
    m_d = matrix(row + 2, words + each, n, g, D, CONV > 1, ACROSS, VECTOR, INDEX)
    m_b = matrix(row + 3, words + 2 * each, n, g, B, CONV > 0, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * each, n, g, E, CONV > 1, ACROSS, VECTOR, INDEX)
    c_a, c_d, _ = coefficients(row, n, ACC)
    scale = c_d.to(ACC)
    p11 = tl.full([BT, BT], 0, ACC)
    p12, p21, p22, q11, q12, q21, q22 = p11, p11, p11, p11, p11, p11, p11
    k = inputs * 0
    while k * BK < inputs:
        c = k * BK + tl.arange(0, BK)
        x = load_tile(m_a, t, c, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC)
        y = load_tile(m_a, r, c, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC)
        p11 = product(x, tl.trans(y), p11, PREC)
        if WAY != _NORMS:
            u = minus(x, load_tile(m_b, t, c, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC), c_a)
            v = minus(y, load_tile(m_b, r, c, rows, inputs, CONV > 0, ACROSS, VECTOR, ACC), c_a)
            p12 = product(x, tl.trans(v), p12, PREC)
            p21 = product(u, tl.trans(y), p21, PREC)
            p22 = product(u, tl.trans(v), p22, PREC)
        k += 1
    k = outputs * 0
    while k * BK < outputs:
        c = k * BK + tl.arange(0, BK)
        x = load_tile(m_d, t, c, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
        y = load_tile(m_d, r, c, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
        if WAY != _NORMS:
            u = load_tile(m_e, t, c, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
            v = load_tile(m_e, r, c, rows, outputs, CONV > 1, ACROSS, VECTOR, ACC)
            x, y, u, v = minus(x, u, c_d), minus(y, v, c_d), u * scale, v * scale
            q12 = product(x, tl.trans(v), q12, PREC)
            q21 = product(u, tl.trans(y), q21, PREC)
            q22 = product(u, tl.trans(v), q22, PREC)
        q11 = product(x, tl.trans(y), q11, PREC)
        k += 1
    # A pair of two blocks stands for two pairs.
    twice = tl.where(pair == 0, 1.0, 2.0).to(tl.float64)
    uu, us, ss = dot64(p11, q11), 0.0, 0.0
    if WAY != _NORMS:
        uu += dot64(p12, q12) + dot64(p21, q21) + dot64(p22, q22)
    if WAY == _NORMALIZED:
        # d of the student is what is left of it and what was taken from it.
        left, right = q11.to(tl.float64) + q12, q11.to(tl.float64) + q21
        us = dot64(p11, left) + dot64(p21, q21.to(tl.float64) + q22)
        us = (us + dot64(p11, right) + dot64(p12, q12.to(tl.float64) + q22)) / 2
        ss = dot64(p11, left + (q21.to(tl.float64) + q22))
    store_sums(row, program, twice * uu, twice * us, twice * ss)


@kernel
def thin_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
    CONV: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    WAY: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Of a shape the inputs are the columns of all four matrices, some of stride 0."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, columns, _ = sizes(shape, ACROSS, VECTOR, INDEX)
    n, tile = program // programs, program % programs
    if is_done(row, n):
        return
    g, tile = tile // (programs // groups), (tile % (programs // groups)).to(INDEX)
    j = tile * BJ + tl.arange(0, BJ)
    each: tl.constexpr = _CONV if CONV else _DENSE
    words = shape + 5
    m_a = matrix(row + 1, words, n, g, A, CONV > 0, ACROSS, VECTOR, INDEX)
    m_d = matrix(row + 2, words + each, n, g, D, CONV > 1, ACROSS, VECTOR, INDEX)
    m_b = matrix(row + 3, words + 2 * each, n, g, B, CONV > 0, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * each, n, g, E, CONV > 1, ACROSS, VECTOR, INDEX)
    _, _, c = coefficients(row, n, tl.float64)
    own = tl.full([BT, BJ], 0, tl.float64)
    other = own
    k = rows * 0
    while k * BT < rows:
        t = k * BT + tl.arange(0, BT)
        x = load_tile(m_a, t, j, rows, columns, CONV > 0, ACROSS, VECTOR, tl.float64)
        own += x * load_tile(m_d, t, j, rows, columns, CONV > 1, ACROSS, VECTOR, tl.float64)
        if WAY != _NORMS:
            x = load_tile(m_b, t, j, rows, columns, CONV > 0, ACROSS, VECTOR, tl.float64)
            other += x * load_tile(m_e, t, j, rows, columns, CONV > 1, ACROSS, VECTOR, tl.float64)
        k += 1
    g_s = tl.sum(own, 0)
    u = g_s - c * tl.sum(other, 0)
    store_sums(row, program, tl.sum(u * u, 0), tl.sum(u * g_s, 0), tl.sum(g_s * g_s, 0))


@helper
def looked_up(at, words, n, t, rows, other):
    """The rows of an embedding at t."""
    x = tl.load(at).to(tl.pointer_type(tl.int64)) + n * tl.load(words)
    return tl.load(x + t * tl.load(words + 2), mask=t < rows, other=other)


@kernel
def index_kernel(
    table, base: tl.int64, items: tl.int64,
    D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
    ACROSS: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    WAY: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Every pair of blocks. Where both networks look up the same, U has one row, else two."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    shape = table + tl.load(row + 9)
    programs = tl.load(shape)
    rows, _, outputs = sizes(shape, ACROSS, VECTOR, INDEX)
    n, pair = program // programs, (program % programs).to(INDEX)
    if is_done(row, n):
        return
    blocks = (rows + BT - 1) // BT
    t = pair // blocks * BT + tl.arange(0, BT)
    r = pair % blocks * BT + tl.arange(0, BT)
    words = shape + 5
    m_d = matrix(row + 2, words + _DENSE, n, 0, D, False, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * _DENSE, n, 0, E, False, ACROSS, VECTOR, INDEX)
    s_t, s_r = looked_up(row + 1, words, n, t, rows, -1), looked_up(row + 1, words, n, r, rows, -2)
    words += 2 * _DENSE
    t_t, t_r = looked_up(row + 3, words, n, t, rows, -1), looked_up(row + 3, words, n, r, rows, -2)
    same_t, same_r = (s_t == t_t)[:, None], (s_r == t_r)[:, None]
    _, _, c = coefficients(row, n, tl.float64)
    scale = c.to(ACC)
    q11 = tl.full([BT, BT], 0, ACC)
    q12, q22, u1, u2, own = q11, q11, q11, q11, q11
    k = outputs * 0
    while k * BK < outputs:
        column = k * BK + tl.arange(0, BK)
        x = load_tile(m_d, t, column, rows, outputs, False, ACROSS, VECTOR, ACC)
        y = load_tile(m_d, r, column, rows, outputs, False, ACROSS, VECTOR, ACC)
        own = product(x, tl.trans(y), own, PREC)
        if WAY != _NORMS:
            u = load_tile(m_e, t, column, rows, outputs, False, ACROSS, VECTOR, ACC)
            v = load_tile(m_e, r, column, rows, outputs, False, ACROSS, VECTOR, ACC)
            x = tl.where(same_t, minus(x, u, c), x)
            u = tl.where(same_t, 0.0, -u * scale)
            if WAY == _NORMALIZED:
                u1 = product(x, tl.trans(y), u1, PREC)
                u2 = product(u, tl.trans(y), u2, PREC)
            y = tl.where(same_r, minus(y, v, c), y)
            v = tl.where(same_r, 0.0, -v * scale)
            q11 = product(x, tl.trans(y), q11, PREC)
            q12 = product(x, tl.trans(v), q12, PREC)
            q22 = product(u, tl.trans(v), q22, PREC)
        k += 1
    ss = total(tl.where(s_t[:, None] == s_r[None, :], own, 0.0))
    uu, us = ss, ss
    if WAY != _NORMS:
        uu = total(tl.where(s_t[:, None] == s_r[None, :], q11, 0.0))
        uu += 2 * total(tl.where(s_t[:, None] == t_r[None, :], q12, 0.0))
        uu += total(tl.where(t_t[:, None] == t_r[None, :], q22, 0.0))
        us = total(tl.where(s_t[:, None] == s_r[None, :], u1, 0.0))
        us += total(tl.where(t_t[:, None] == s_r[None, :], u2, 0.0))
    store_sums(row, program, uu, us, ss)
