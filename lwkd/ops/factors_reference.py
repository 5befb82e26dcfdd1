"""The reference of the Jacobian kind by factors: stacked factors in plain PyTorch.

Serves every device that has no compiled kernel; lwkd.ops.factors states the formulas. Products are
the library's own; nothing larger than a tile of them is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lwkd.ops.convolution import patches_of, weight_of
from lwkd.ops.jacobian_reference import EPS, NORMALIZED, NORMS, SQUARES
from lwkd.ops.operands import compute_dtype

DENSE, INDICES, CONVOLUTION = 0, 1, 2  # the first of the integers that say what an item is
FORM = 15  # of them: form, groups, transposed, and four numbers for each of three dimensions
GRAM, DIRECT = 0, 1
_SCRATCH = 1 << 24  # bytes of a tile of products, or of one operand's patches
# A norm is off by 1e-6 of itself at the most: from so large a distance on, by less than 1e-6 of it.
_CLOSE = 1e-6
_TILE = 128  # rows of a tile of a gram: of one sum with itself, half of them are spared


class _Item(NamedTuple):
    """One parameter of one network: its two tensors, and what they are."""

    a: Tensor
    d: Tensor
    form: Sequence[int]


class _Pair(NamedTuple):
    student: _Item
    teacher: _Item
    contraction: int


class _Sums(NamedTuple):
    """A sum of Σ_t d[t] a[t]ᵀ over a chunk of samples, by pairs of tensors as they are given."""

    parts: Sequence[tuple[Tensor, Tensor]]
    form: Sequence[int]


def distances(
    student_a: Sequence[Tensor],
    student_d: Sequence[Tensor],
    teacher_a: Sequence[Tensor],
    teacher_d: Sequence[Tensor],
    layers: list[int],
    forms: list[int],
    contractions: list[int],
    how: int,
    mean: bool,
) -> Tensor:
    """The op lwkd::jacobian_factors: distances [L] or [L, N]."""
    dtype = compute_dtype(student_a, student_d, teacher_a, teacher_d)
    n, length = student_d[0].shape[0], layers[-1] + 1
    groups: list[list[_Pair]] = [[] for _ in range(length)]
    for i, layer in enumerate(layers):
        s_form, t_form = (forms[(2 * i + k) * FORM : (2 * i + k + 1) * FORM] for k in (0, 1))
        s = _Item(student_a[i], student_d[i], s_form)
        t = _Item(teacher_a[i], teacher_d[i], t_form)
        groups[layer].append(_Pair(s, t, contractions[i]))
    d = torch.stack([_layer(pairs, how, dtype, n) for pairs in groups])
    return (d.sum(1) / max(n, 1) if mean else d).to(dtype)


def _layer(pairs: Sequence[_Pair], how: int, dtype: torch.dtype, n: int) -> Tensor:
    """D [N] of one layer in float64: the squares and products of its parameters are added."""
    zero = torch.zeros(n, dtype=torch.float64, device=pairs[0].student.d.device)
    if how == SQUARES:
        return _square(pairs, 0, dtype, zero)
    if how == NORMS:
        ns, nt = (_square(pairs, side, dtype, zero).sqrt() for side in (0, 1))
        whole = ns + nt
        ratio: Tensor = torch.where(whole == 0, zero, (ns - nt) / whole)
        return ratio.square()
    ss, tt, c = zero, zero, zero + 1
    if how == NORMALIZED:
        ss, tt = (_square(pairs, side, dtype, zero) for side in (0, 1))
        dead = (ss.sqrt() < EPS) | (tt.sqrt() < EPS)
        c = torch.where(dead, c, ss.sqrt() / tt.sqrt())
    uu = _products(pairs, c, how, dtype, zero, own=False)
    if how != NORMALIZED:
        return uu.clamp(min=0)
    ns, nt = ss.sqrt(), tt.sqrt()
    near = uu / (ns * (c * nt))
    if bool((near[~dead] < _CLOSE).any()):
        # What rounding has left of ‖G_S‖ − c‖G_T‖; where the two are far apart it is nothing.
        us = _products(pairs, c, how, dtype, zero, own=True)
        x = (2 * us - uu) / (ns + c * nt)  # G_S + cG_T is 2G_S − U
        near = (uu - x.square()) / (ns * (c * nt))
    a, b = ns.clamp(min=EPS), nt.clamp(min=EPS)
    most = ns * nt  # of the product, or rounding over eps would be left of a zero gradient's
    st = ((ss + tt - uu) / 2).clamp(-most, most)
    short = ss / a.square() + tt / b.square() - 2 * st / (a * b)
    return torch.where(dead, short, near).clamp(min=0)


def _products(
    pairs: Sequence[_Pair], c: Tensor, how: int, dtype: torch.dtype, zero: Tensor, *, own: bool
) -> Tensor:
    """‖U‖², or (own) ⟨U, G_S⟩, [N]."""
    total = zero.clone()
    for pair in pairs:
        for part, student, teacher in _both(pair, dtype):
            u = _stack(student, teacher, c[part], how == NORMALIZED)
            total[part] += _inner(u, student if own else u, pair.contraction)
    return total


def _square(pairs: Sequence[_Pair], side: int, dtype: torch.dtype, zero: Tensor) -> Tensor:
    """‖G‖² [N] of the student (side 0) or the teacher."""
    total = zero.clone()
    for pair in pairs:
        for part, sums in _chunks((pair.student, pair.teacher)[side], dtype):
            total[part] += _inner(sums, sums, pair.contraction)
    return total.clamp(min=0)


# --- from an item to its sums ------------------------------------------------------------------


def _chunks(item: _Item, dtype: torch.dtype) -> Iterator[tuple[slice, _Sums]]:
    """Pieces of the batch whose patches and products are small, and their sums in ``dtype``."""
    n = item.d.shape[0]
    size = max(1, min(n, _SCRATCH // max(_bytes(item, dtype), 1)))
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        yield part, _sums(_Item(item.a[part], item.d[part], item.form), dtype)


def _both(pair: _Pair, dtype: torch.dtype) -> Iterator[tuple[slice, _Sums, _Sums]]:
    n = pair.student.d.shape[0]
    size = max(1, min(n, _SCRATCH // max(4 * _bytes(pair.student, dtype), 1)))
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        s, t = (_sums(_Item(x.a[part], x.d[part], x.form), dtype) for x in pair[:2])
        yield part, s, t


def _bytes(item: _Item, dtype: torch.dtype) -> int:
    """Of one sample's factors, the patches unfolded."""
    if item.form[0] != CONVOLUTION:
        return dtype.itemsize * (item.a[:1].numel() + item.d[:1].numel())
    patches, other = _roles(item)
    taps = 1
    for k in item.form[3:6]:
        taps *= k
    positions = other[0, :1].numel()
    return dtype.itemsize * positions * (patches.shape[1] * taps + other.shape[1])


def _roles(item: _Item) -> tuple[Tensor, Tensor]:
    """(what patches are taken of, what is at their positions)."""
    return (item.d, item.a) if item.form[2] else (item.a, item.d)


def _sums(item: _Item, dtype: torch.dtype) -> _Sums:
    a = item.a if item.form[0] == INDICES else item.a.to(dtype)
    return _Sums([(a, item.d.to(dtype))], item.form)


def _rows(sums: _Sums) -> tuple[Tensor, Tensor]:
    """Both factors of all parts, [n, G, T, d_in] and [n, G, T, d_out]; indices [n, 1, T]."""
    both = [_rows_of(a, d, sums.form) for a, d in sums.parts]
    if len(both) == 1:
        return both[0]
    return torch.cat([a for a, _ in both], 2), torch.cat([d for _, d in both], 2)


def _rows_of(a: Tensor, d: Tensor, form: Sequence[int]) -> tuple[Tensor, Tensor]:
    if form[0] == CONVOLUTION:
        return patches_of(a, d, form)
    if form[0] == INDICES or a.dim() == 3:
        return a[:, None], d[:, None]
    return a, d


def _stack(s: _Sums, t: _Sums, c: Tensor, scaled: bool) -> _Sums:
    """U = G_S − cG_T by its factors, two for one.

    c is shared out, c = c_a·c_d, so that the teacher's a and d both come to the student's size: a
    network that is the other times a number may have it in either.

        U = Σ_t (d_S − c_d d_T) a_Sᵀ + c_d d_T (a_S − c_a a_T)ᵀ
    """
    (s_a, s_d), (t_a, t_d) = s.parts[0], t.parts[0]
    dtype, indices = s_d.dtype, s.form[0] == INDICES
    c_a = torch.ones_like(c)
    if scaled and not indices:
        size = [x.flatten(1).norm(dim=1, dtype=torch.float64) for x in (s_a, t_a)]
        c_a = torch.where((size[0] > 0) & (size[1] > 0), size[0] / size[1], c_a)
        c_a = c_a.to(dtype).double()  # what is multiplied in float32 and in float64 is one number
    c_a, c_d = (x.reshape(-1, *[1] * (s_d.dim() - 1)) for x in (c_a, c / c_a))
    # Differences in float64: the rounding of a product would be as large as what is left.
    near, other = _minus(s_d, t_d, c_d), (t_d * c_d).to(dtype)
    if indices and torch.equal(s_a, t_a):  # rows are the same: the difference is that of d
        return _Sums([(s_a, near)], s.form)
    if indices:
        return _Sums([(s_a, s_d), (t_a, -other)], s.form)
    return _Sums([(s_a, near), (_minus(s_a, t_a, c_a), other)], s.form)


def _minus(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Return s − c·t, rounded once."""
    return s - t if bool((c == 1).all()) else (s - t * c).to(s.dtype)


# --- ⟨Σ d aᵀ, Σ d' a'ᵀ⟩, [n] in float64 -----------------------------------------------------------


def _inner(x: _Sums, y: _Sums, contraction: int) -> Tensor:
    return _gram(x, y) if contraction == GRAM else _direct(x, y)


def _dot(p: Tensor, q: Tensor) -> Tensor:
    """Σ p·q over all but the first dimension."""
    return (p * q).flatten(1).sum(1, dtype=torch.float64)


def _gram(x: _Sums, y: _Sums) -> Tensor:
    """Tiles of (a·a')∘(δ·δ'); of one sum with itself, the upper ones twice."""
    same, indices = x is y, x.form[0] == INDICES
    a, d = _rows(x)
    b, e = (a, d) if same else _rows(y)
    total = torch.zeros(d.shape[0], dtype=torch.float64, device=d.device)
    for i in range(0, d.shape[2], _TILE):
        p, q = a[:, :, i : i + _TILE], d[:, :, i : i + _TILE]
        for j in range(i if same else 0, e.shape[2], _TILE):
            r = b[:, :, j : j + _TILE]
            products = (p[..., None] == r[..., None, :]).to(d.dtype) if indices else p @ r.mT
            tile = _dot(products, q @ e[:, :, j : j + _TILE].mT)
            total += tile * (2 if same and j > i else 1)
    return total


def _direct(x: _Sums, y: _Sums) -> Tensor:
    """Tiles of Σ_t δ aᵀ; of a convolution the whole, which the library computes as such."""
    if x.form[0] == CONVOLUTION:
        g = _weight(x)
        return _dot(g, g if x is y else _weight(y))
    a, d = _rows(x)
    b, e = (a, d) if x is y else _rows(y)
    if a.shape[3] == d.shape[3] == 1:  # a number a group: no product of matrices
        g = (d * a).sum(2)
        return _dot(g, g if x is y else (e * b).sum(2))
    total = torch.zeros(d.shape[0], dtype=torch.float64, device=d.device)
    step = max(1, _SCRATCH // max(d[:, :, :1, :1].numel() * a.shape[3] * d.itemsize, 1))
    for i in range(0, d.shape[3], step):
        g = d[..., i : i + step].mT @ a
        total += _dot(g, g if x is y else e[..., i : i + step].mT @ b)
    return total


def _weight(sums: _Sums) -> Tensor:
    """Every sample's gradient of a convolution's weight, [n, ...]."""
    total: Tensor | None = None
    for x, d in sums.parts:
        g = weight_of(x, d, sums.form)
        total = g if total is None else total + g
    assert total is not None
    return total
