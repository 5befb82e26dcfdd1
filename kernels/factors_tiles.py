"""The tiles of Jacobian factors in Triton: what one program adds up of one item and sample.

    direct_kernel    tiles of U and of G_S, squared and summed, by the matrix units
    gram_kernel      pairs of blocks of rows: the four blocks of both grams, and their products
    thin_kernel      gradients that are vectors, in float64
    index_kernel     an embedding's: products of rows that look up the same

The stacked factors are formed as they are read; patches are gathered as they are read.
"""

from __future__ import annotations

import triton.language as tl

from .common import INTERPRET, helper, kernel, locate, widen

DIFFERENCE, NORMALIZED, NORMS = 0, 1, 2
_NORMALIZED, _NORMS = tl.constexpr(NORMALIZED), tl.constexpr(NORMS)
_INTERPRET = tl.constexpr(INTERPRET)

# --- matrices -------------------------------------------------------------------------------------
# A row of all four kernels: a and d of the student, a and d of the teacher, c_a [N], c [N],
# active [N], out [N, programs, 3], shape. A shape: programs of a sample, groups, rows, inputs,
# outputs, and the matrices in the order of the row.
# The words of a matrix: strides of the batch, the groups, rows, columns. Of a convolution (CONV 1:
# of the inputs, 2: of the outputs too) then the positions along the last two dimensions, the
# kernel's sizes along three, and for each of these: steps, dilation, padding, size, stride.
DENSE_WORDS, CONV_WORDS = 4, 24
_DENSE, _CONV = tl.constexpr(DENSE_WORDS), tl.constexpr(CONV_WORDS)
# ACROSS: rows are adjacent in memory, not columns. VECTOR elements are then read at a time, or one.


@helper
def sizes(shape, ACROSS: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr):
    """Rows, inputs, outputs."""
    down: tl.constexpr = VECTOR if ACROSS else 1
    along: tl.constexpr = 1 if ACROSS else VECTOR
    return (
        tl.multiple_of(tl.load(shape + 2).to(INDEX), down),
        tl.multiple_of(tl.load(shape + 3).to(INDEX), along),
        tl.multiple_of(tl.load(shape + 4).to(INDEX), along),
    )


@helper
def dimension(words, INDEX: tl.constexpr):
    return (
        tl.load(words).to(INDEX), tl.load(words + 1).to(INDEX), tl.load(words + 2).to(INDEX),
        tl.load(words + 3).to(INDEX), tl.load(words + 4).to(INDEX),
    )  # fmt: skip


@helper
def matrix(
    at, words, n, g, DTYPE: tl.constexpr, CONV: tl.constexpr, ACROSS: tl.constexpr,
    VECTOR: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What ``load_tile`` reads: where the group of the sample begins, and the words."""
    aligned: tl.constexpr = 16 if VECTOR > 1 else 1
    start = n * tl.multiple_of(tl.load(words), VECTOR)
    start += g * tl.multiple_of(tl.load(words + 1), VECTOR)
    x = tl.multiple_of(tl.load(at).to(tl.pointer_type(DTYPE)), aligned) + start
    row, column = tl.load(words + 2).to(INDEX), tl.load(words + 3).to(INDEX)
    if CONV:
        out = (
            x, column, tl.load(words + 4).to(INDEX), tl.load(words + 5).to(INDEX),
            tl.load(words + 6).to(INDEX), tl.load(words + 7).to(INDEX),
            tl.load(words + 8).to(INDEX), dimension(words + 9, INDEX),
            dimension(words + 14, INDEX), dimension(words + 19, INDEX),
        )  # fmt: skip
    else:
        # Where VECTOR are read at a time one of the two is 1.
        out = (x, tl.multiple_of(row, VECTOR), tl.multiple_of(column, VECTOR))
    return out


@helper
def outer(t, c, ACROSS: tl.constexpr):
    """t + c of rows t and columns c, those that are adjacent last."""
    return t[None, :] + c[:, None] if ACROSS else t[:, None] + c[None, :]


@helper
def both(t, c, ACROSS: tl.constexpr):
    return t[None, :] & c[:, None] if ACROSS else t[:, None] & c[None, :]


@helper
def gather(dim, o, j, offset, exists, ACROSS: tl.constexpr):
    """Positions o and taps j along one dimension, added to where they lie and whether."""
    i = outer(o * dim[0] - dim[2], j * dim[1], ACROSS)
    return offset + i * dim[4], exists & (i >= 0) & (i < dim[3])


@helper
def load_tile(
    m, t, c, rows, columns,
    CONV: tl.constexpr, ACROSS: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows t and columns c of a matrix, [T, C] in ACC; 0 where there are none."""
    exists = both(t < rows, c < columns, ACROSS)
    if CONV:
        x, column, o1, o2, k0, k1, k2, first, second, third = m
        taps = k0 * k1 * k2
        if ACROSS:
            channel, tap = c // taps, c % taps
        else:  # channels are adjacent: the order of columns is nothing to a sum of squares
            channel, tap = c % (columns // taps), c // (columns // taps)
        offset = outer(t * 0, channel * column, ACROSS)
        offset, exists = gather(first, t // (o1 * o2), tap // (k1 * k2), offset, exists, ACROSS)
        offset, exists = gather(second, t // o2 % o1, tap // k2 % k1, offset, exists, ACROSS)
        offset, exists = gather(third, t % o2, tap % k2, offset, exists, ACROSS)
    else:
        x, row, column = m
        if VECTOR == 1:
            offset = outer(t * row, c * column, ACROSS)
        elif ACROSS:
            offset = outer(t, c * column, ACROSS)
        else:
            offset = outer(t * row, c, ACROSS)
    y = widen(tl.load(x + offset, mask=exists, other=0), ACC)
    if ACROSS:
        y = tl.trans(y)
    return y


# --- stacked factors ------------------------------------------------------------------------------


@helper
def coefficients(row, n):
    """(c_a, c_d, c, whether the sample is to be done)."""
    c_a = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float64)) + n)
    c = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n)
    return c_a, c / c_a, c, tl.load(tl.load(row + 7).to(tl.pointer_type(tl.float64)) + n) != 0


@helper
def minus(s, t, c):
    """s − c·t, c in float64, without losing what is left of it."""
    if s.dtype == tl.float64:
        y = s - c * t
    elif _INTERPRET:  # which has no fused product
        y = (s.to(tl.float64) - c * t.to(tl.float64)).to(tl.float32)
    else:
        high = c.to(tl.float32)
        low = (c - high.to(tl.float64)).to(tl.float32)
        y = tl.fma(t, -low, tl.fma(t, -high, s))
    return y


@helper
def product(x, y, z, PREC: tl.constexpr):
    """z + x·y, in float64 without matrix units."""
    if z.dtype == tl.float64:
        out = z + tl.sum(x[:, :, None] * y[None, :, :], 1)
    else:
        out = tl.dot(x, y, z, input_precision=PREC, out_dtype=tl.float32)
    return out


@helper
def total(x):
    return tl.sum(tl.sum(x.to(tl.float64), 1), 0)


@helper
def dot64(x, y):
    """Σ x·y of two tiles."""
    return total(x.to(tl.float64) * y.to(tl.float64))


@helper
def store_sums(row, program, uu, us, ss, active):
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    tl.store(out, uu, mask=active)
    tl.store(out + 1, us, mask=active)
    tl.store(out + 2, ss, mask=active)


# --- kernels --------------------------------------------------------------------------------------


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
    g, tile = tile // (programs // groups), (tile % (programs // groups)).to(INDEX)
    across = (inputs + BI - 1) // BI
    i, o = tile % across * BI + tl.arange(0, BI), tile // across * BO + tl.arange(0, BO)
    each: tl.constexpr = _CONV if CONV else _DENSE
    words = shape + 5
    m_a = matrix(row + 1, words, n, g, A, CONV > 0, ACROSS, VECTOR, INDEX)
    m_d = matrix(row + 2, words + each, n, g, D, CONV > 1, ACROSS, VECTOR, INDEX)
    m_b = matrix(row + 3, words + 2 * each, n, g, B, CONV > 0, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * each, n, g, E, CONV > 1, ACROSS, VECTOR, INDEX)
    c_a, c_d, _, active = coefficients(row, n)
    scale = c_d.to(ACC)
    u = tl.full([BO, BI], 0, ACC)
    own = u
    until = tl.where(active, rows, 0)
    k = until * 0
    while k * BT < until:
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
    store_sums(row, program, uu, us, ss, active)


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
    c_a, c_d, _, active = coefficients(row, n)
    scale = c_d.to(ACC)
    p11 = tl.full([BT, BT], 0, ACC)
    p12, p21, p22, q11, q12, q21, q22 = p11, p11, p11, p11, p11, p11, p11
    until = tl.where(active, inputs, 0)
    k = until * 0
    while k * BK < until:
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
    until = tl.where(active, outputs, 0)
    k = until * 0
    while k * BK < until:
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
    store_sums(row, program, twice * uu, twice * us, twice * ss, active)


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
    g, tile = tile // (programs // groups), (tile % (programs // groups)).to(INDEX)
    j = tile * BJ + tl.arange(0, BJ)
    each: tl.constexpr = _CONV if CONV else _DENSE
    words = shape + 5
    m_a = matrix(row + 1, words, n, g, A, CONV > 0, ACROSS, VECTOR, INDEX)
    m_d = matrix(row + 2, words + each, n, g, D, CONV > 1, ACROSS, VECTOR, INDEX)
    m_b = matrix(row + 3, words + 2 * each, n, g, B, CONV > 0, ACROSS, VECTOR, INDEX)
    m_e = matrix(row + 4, words + 3 * each, n, g, E, CONV > 1, ACROSS, VECTOR, INDEX)
    _, _, c, active = coefficients(row, n)
    own = tl.full([BT, BJ], 0, tl.float64)
    other = own
    until = tl.where(active, rows, 0)
    k = until * 0
    while k * BT < until:
        t = k * BT + tl.arange(0, BT)
        x = load_tile(m_a, t, j, rows, columns, CONV > 0, ACROSS, VECTOR, tl.float64)
        own += x * load_tile(m_d, t, j, rows, columns, CONV > 1, ACROSS, VECTOR, tl.float64)
        if WAY != _NORMS:
            x = load_tile(m_b, t, j, rows, columns, CONV > 0, ACROSS, VECTOR, tl.float64)
            other += x * load_tile(m_e, t, j, rows, columns, CONV > 1, ACROSS, VECTOR, tl.float64)
        k += 1
    g_s = tl.sum(own, 0)
    u = g_s - c * tl.sum(other, 0)
    store_sums(row, program, tl.sum(u * u, 0), tl.sum(u * g_s, 0), tl.sum(g_s * g_s, 0), active)


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
    _, _, c, active = coefficients(row, n)
    scale = c.to(ACC)
    q11 = tl.full([BT, BT], 0, ACC)
    q12, q22, u1, u2, own = q11, q11, q11, q11, q11
    until = tl.where(active, outputs, 0)
    k = until * 0
    while k * BK < until:
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
    store_sums(row, program, uu, us, ss, active)
