"""The operands of Jacobian factors in Triton: matrices, tile by tile, stacked as they are read."""

from __future__ import annotations

import triton.language as tl

from .common import INTERPRET, helper, widen

_INTERPRET = tl.constexpr(INTERPRET)

# --- matrices -------------------------------------------------------------------------------------
# The words of a matrix: strides of the batch, the groups, rows, columns. Of a convolution (CONV 1:
# of the inputs, 2: of the outputs too) then the positions along the last two dimensions, the
# kernel's sizes along three, and for each of these: steps, dilation, padding, size, stride.
DENSE_WORDS, CONV_WORDS = 4, 24
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
def is_done(row, n):
    """Whether nothing is wanted of the sample in this pass."""
    return tl.load(tl.load(row + 7).to(tl.pointer_type(tl.float64)) + n) == 0


@helper
def coefficients(row, n, ACC: tl.constexpr):
    """(c_a, c_d, c): c = c_a·c_d, and c_d a number in ACC.

    Then what is taken from d of the student, and what is left, are that d again: exactly 0 of 0.
    """
    c = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float64)) + n)
    c_d = c / tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float64)) + n)
    c_d = c_d.to(ACC).to(tl.float64)
    return c / c_d, c_d, c


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
