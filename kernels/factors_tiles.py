"""The tiles of Jacobian factors in Triton: what one program adds up of one item and sample.

    direct_kernel    tiles of U and of G_S, squared and summed, by the matrix units
    gram_kernel      pairs of blocks of rows: the four blocks of both grams, and their products
    thin_kernel      gradients that are vectors, in float64
    index_kernel     an embedding's: pairs of rows that are the same, in float64

The stacked factors are formed as they are read; patches are gathered as they are read.
"""

from __future__ import annotations

import triton.language as tl

from .common import INTERPRET, helper, kernel, locate, widen

DIFFERENCE, NORMALIZED, NORMS = 0, 1, 2
_NORMALIZED, _NORMS = tl.constexpr(NORMALIZED), tl.constexpr(NORMS)
_INTERPRET = tl.constexpr(INTERPRET)

# --- tiles of operands ----------------------------------------------------------------------------
# The words of a matrix: strides of the batch, the groups, rows, columns; of a convolution then the
# positions along the last two dimensions, the kernel's sizes along them, and for each of three
# dimensions: steps, dilation, padding, size, stride.
MATRIX = 23
_M = tl.constexpr(MATRIX)


@helper
def load_tile(x, words, n, g, t, c, rows, columns, CONV: tl.constexpr, ACC: tl.constexpr):
    """Rows t and columns c of a matrix, [T, C] in ACC; 0 where there are none."""
    at = n * tl.load(words) + g * tl.load(words + 1)
    exists = (t < rows)[:, None] & (c < columns)[None, :]
    column = tl.load(words + 3)
    if CONV:
        o1, o2 = tl.load(words + 4), tl.load(words + 5)
        k1, k2 = tl.load(words + 6), tl.load(words + 7)
        taps = tl.load(words + 2) * k1 * k2
        tap = c % taps
        offset = at + (c // taps * column)[None, :]
        for k in tl.static_range(3):
            w = words + 8 + 5 * k
            o = t // (o1 * o2) if k == 0 else (t // o2 % o1 if k == 1 else t % o2)
            j = tap // (k1 * k2) if k == 0 else (tap // k2 % k1 if k == 1 else tap % k2)
            i = (o * tl.load(w) - tl.load(w + 2))[:, None] + (j * tl.load(w + 1))[None, :]
            exists = exists & (i >= 0) & (i < tl.load(w + 3))
            offset = offset + i * tl.load(w + 4)
    else:
        offset = at + (t * tl.load(words + 2))[:, None] + (c * column)[None, :]
    return widen(tl.load(x + offset, mask=exists, other=0), ACC)


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
def store_sums(out, uu, us, ss, active):
    tl.store(out, uu, mask=active)
    tl.store(out + 1, us, mask=active)
    tl.store(out + 2, ss, mask=active)


# A row of all four: a and d of the student, a and d of the teacher, c_a [N], c [N], active [N],
# out [N, programs, 3], shape. A shape: programs of a sample, groups, rows, inputs, outputs, and the
# matrices in the order of the row.


@kernel
def direct_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
    CONV: tl.constexpr, WAY: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    a = tl.load(row + 1).to(tl.pointer_type(A))
    d = tl.load(row + 2).to(tl.pointer_type(D))
    b = tl.load(row + 3).to(tl.pointer_type(B))
    e = tl.load(row + 4).to(tl.pointer_type(E))
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, inputs, outputs = tl.load(shape + 2), tl.load(shape + 3), tl.load(shape + 4)
    n, tile = program // programs, program % programs
    across = (inputs + BI - 1) // BI
    i = tile % across * BI + tl.arange(0, BI)
    o = tile // across % ((outputs + BO - 1) // BO) * BO + tl.arange(0, BO)
    g = tile // (programs // groups)
    words = shape + 5
    c_a = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float64)) + n)
    c_d = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n) / c_a
    active = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int32)) + n) != 0
    until = tl.where(active, rows, 0)
    u = tl.full([BO, BI], 0, ACC)
    own = u
    begin = until * 0
    while begin < until:
        t = begin + tl.arange(0, BT)
        x = load_tile(a, words, n, g, t, i, rows, inputs, CONV, ACC)
        y = load_tile(d, words + _M, n, g, t, o, rows, outputs, CONV, ACC)
        if WAY == _NORMS:
            u = product(tl.trans(y), x, u, PREC)
        else:
            p = load_tile(b, words + 2 * _M, n, g, t, i, rows, inputs, CONV, ACC)
            q = load_tile(e, words + 3 * _M, n, g, t, o, rows, outputs, CONV, ACC)
            u = product(tl.trans(minus(y, q, c_d)), x, u, PREC)
            u = product(tl.trans((q * c_d).to(ACC)), minus(x, p, c_a), u, PREC)
            if WAY == _NORMALIZED:
                own = product(tl.trans(y), x, own, PREC)
        begin += BT
    uu, us, ss = total(u.to(tl.float64) * u.to(tl.float64)), 0.0, 0.0
    if WAY == _NORMALIZED:
        us = total(u.to(tl.float64) * own.to(tl.float64))
        ss = total(own.to(tl.float64) * own.to(tl.float64))
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    store_sums(out, uu, us, ss, active)


@kernel
def gram_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
    CONV: tl.constexpr, WAY: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    a = tl.load(row + 1).to(tl.pointer_type(A))
    d = tl.load(row + 2).to(tl.pointer_type(D))
    b = tl.load(row + 3).to(tl.pointer_type(B))
    e = tl.load(row + 4).to(tl.pointer_type(E))
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, inputs, outputs = tl.load(shape + 2), tl.load(shape + 3), tl.load(shape + 4)
    n, tile = program // programs, program % programs
    g, pair = tile // (programs // groups), tile % (programs // groups)
    blocks = (rows + BT - 1) // BT
    first = pair * 0
    while pair >= blocks - first:
        pair -= blocks - first
        first += 1
    second = first + pair
    t, r = first * BT + tl.arange(0, BT), second * BT + tl.arange(0, BT)
    words = shape + 5
    c_a = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float64)) + n)
    c_d = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n) / c_a
    active = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int32)) + n) != 0
    p11 = tl.full([BT, BT], 0, ACC)
    p12, p21, p22 = p11, p11, p11
    until = tl.where(active, inputs, 0)
    k = until * 0
    while k < until:
        c = k + tl.arange(0, BK)
        x = load_tile(a, words, n, g, t, c, rows, inputs, CONV, ACC)
        y = load_tile(a, words, n, g, r, c, rows, inputs, CONV, ACC)
        p11 = product(x, tl.trans(y), p11, PREC)
        if WAY != _NORMS:
            u = minus(x, load_tile(b, words + 2 * _M, n, g, t, c, rows, inputs, CONV, ACC), c_a)
            v = minus(y, load_tile(b, words + 2 * _M, n, g, r, c, rows, inputs, CONV, ACC), c_a)
            p12 = product(x, tl.trans(v), p12, PREC)
            p21 = product(u, tl.trans(y), p21, PREC)
            p22 = product(u, tl.trans(v), p22, PREC)
        k += BK
    q11 = tl.full([BT, BT], 0, ACC)
    q12, q21, q22 = q11, q11, q11
    until = tl.where(active, outputs, 0)
    k = until * 0
    while k < until:
        c = k + tl.arange(0, BK)
        x = load_tile(d, words + _M, n, g, t, c, rows, outputs, CONV, ACC)
        y = load_tile(d, words + _M, n, g, r, c, rows, outputs, CONV, ACC)
        if WAY == _NORMS:
            q11 = product(x, tl.trans(y), q11, PREC)
        else:
            u = load_tile(e, words + 3 * _M, n, g, t, c, rows, outputs, CONV, ACC)
            v = load_tile(e, words + 3 * _M, n, g, r, c, rows, outputs, CONV, ACC)
            x, y = minus(x, u, c_d), minus(y, v, c_d)
            u, v = (u * c_d).to(ACC), (v * c_d).to(ACC)
            q11 = product(x, tl.trans(y), q11, PREC)
            q12 = product(x, tl.trans(v), q12, PREC)
            q21 = product(u, tl.trans(y), q21, PREC)
            q22 = product(u, tl.trans(v), q22, PREC)
        k += BK
    # A pair of two blocks stands for two pairs.
    twice = tl.where(first == second, 1.0, 2.0).to(tl.float64)
    p, q = p11.to(tl.float64), q11.to(tl.float64)
    uu, us, ss = twice * total(p * q), 0.0, 0.0
    if WAY != _NORMS:
        p_12, p_21, p_22 = p12.to(tl.float64), p21.to(tl.float64), p22.to(tl.float64)
        q_12, q_21, q_22 = q12.to(tl.float64), q21.to(tl.float64), q22.to(tl.float64)
        uu = twice * total(p * q + p_12 * q_12 + p_21 * q_21 + p_22 * q_22)
        if WAY == _NORMALIZED:
            one = p * (q + q_12) + p_21 * (q_21 + q_22)
            other = p * (q + q_21) + p_12 * (q_12 + q_22)
            us = twice * total(one + other) / 2
            ss = twice * total(p * (q + q_12 + q_21 + q_22))
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    store_sums(out, uu, us, ss, active)


@kernel
def thin_kernel(
    table, base: tl.int64, items: tl.int64,
    A: tl.constexpr, D: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
    WAY: tl.constexpr, ROUND: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Of a shape the inputs are the columns of all four matrices, some of stride 0."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    a = tl.load(row + 1).to(tl.pointer_type(A))
    d = tl.load(row + 2).to(tl.pointer_type(D))
    b = tl.load(row + 3).to(tl.pointer_type(B))
    e = tl.load(row + 4).to(tl.pointer_type(E))
    shape = table + tl.load(row + 9)
    programs, groups = tl.load(shape), tl.load(shape + 1)
    rows, columns = tl.load(shape + 2), tl.load(shape + 3)
    n, tile = program // programs, program % programs
    g = tile // (programs // groups)
    j = tile % (programs // groups) * BJ + tl.arange(0, BJ)
    words = shape + 5
    c = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n)
    active = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int32)) + n) != 0
    until = tl.where(active, rows, 0)
    own = tl.full([BJ], 0, tl.float64)
    other = own
    begin = until * 0
    while begin < until:
        t = begin + tl.arange(0, BT)
        x = load_tile(a, words, n, g, t, j, rows, columns, False, tl.float64)
        y = load_tile(d, words + _M, n, g, t, j, rows, columns, False, tl.float64)
        own += tl.sum(x * y, 0)
        if WAY != _NORMS:
            x = load_tile(b, words + 2 * _M, n, g, t, j, rows, columns, False, tl.float64)
            y = load_tile(e, words + 3 * _M, n, g, t, j, rows, columns, False, tl.float64)
            other += tl.sum(x * y, 0)
        begin += BT
    u = own - c * other
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    store_sums(out, tl.sum(u * u, 0), tl.sum(u * own, 0), tl.sum(own * own, 0), active)


@kernel
def index_kernel(
    table, base: tl.int64, items: tl.int64,
    D: tl.constexpr, E: tl.constexpr, WAY: tl.constexpr, ROUND: tl.constexpr, BT: tl.constexpr,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Rows t of the student and the teacher, with those of a second block; a: what they look up."""
    row, program = locate(table, base, items, WIDTH, ITEMS)
    a = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    d = tl.load(row + 2).to(tl.pointer_type(D))
    b = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    e = tl.load(row + 4).to(tl.pointer_type(E))
    shape = table + tl.load(row + 9)
    programs, rows, outputs = tl.load(shape), tl.load(shape + 2), tl.load(shape + 4)
    n, pair = program // programs, program % programs
    blocks = (rows + BT - 1) // BT
    first = pair * 0
    while pair >= blocks - first:
        pair -= blocks - first
        first += 1
    second = first + pair
    t, r = first * BT + tl.arange(0, BT), second * BT + tl.arange(0, BT)
    words = shape + 5
    c = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n)
    active = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int32)) + n) != 0
    at, step = a + n * tl.load(words), tl.load(words + 2)
    s_t = tl.load(at + t * step, mask=t < rows, other=-1)
    s_r = tl.load(at + r * step, mask=r < rows, other=-2)
    at, step = b + n * tl.load(words + 2 * _M), tl.load(words + 2 * _M + 2)
    t_t = tl.load(at + t * step, mask=t < rows, other=-1)
    t_r = tl.load(at + r * step, mask=r < rows, other=-2)
    q11 = tl.full([BT, BT], 0, tl.float64)
    q12, q21, q22 = q11, q11, q11
    until = tl.where(active, outputs, 0)
    k = until * 0
    column = tl.arange(0, 1)
    while k < until:
        x = load_tile(d, words + _M, n, 0, t, k + column, rows, outputs, False, tl.float64)
        y = load_tile(d, words + _M, n, 0, r, k + column, rows, outputs, False, tl.float64)
        q11 += x * tl.trans(y)
        if WAY != _NORMS:
            u = load_tile(e, words + 3 * _M, n, 0, t, k + column, rows, outputs, False, tl.float64)
            v = load_tile(e, words + 3 * _M, n, 0, r, k + column, rows, outputs, False, tl.float64)
            u, v = -c * u, -c * v
            q12 += x * tl.trans(v)
            q21 += u * tl.trans(y)
            q22 += u * tl.trans(v)
        k += 1
    twice = tl.where(first == second, 1.0, 2.0).to(tl.float64)
    q11 = tl.where(s_t[:, None] == s_r[None, :], q11, 0.0)
    q12 = tl.where(s_t[:, None] == t_r[None, :], q12, 0.0)
    q21 = tl.where(t_t[:, None] == s_r[None, :], q21, 0.0)
    q22 = tl.where(t_t[:, None] == t_r[None, :], q22, 0.0)
    out = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + program * 3
    uu = twice * total(q11 + q12 + q21 + q22)
    store_sums(out, uu, twice * total(q11 + (q12 + q21) / 2), twice * total(q11), active)
