"""The reference of the Jacobian kind by factors: stacked factors in plain PyTorch.

Serves every device that has no compiled kernel; lwkd.ops.factors states the formulas. Products are
the library's own; nothing larger than a tile of them is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd.ops.jacobian_reference import EPS, NORMALIZED, NORMS
from lwkd.ops.operands import compute_dtype

DENSE, INDICES, CONVOLUTION = 0, 1, 2  # the first of the integers that say what an item is
FORM = 15  # of them: form, groups, transposed, and four numbers for each of three dimensions
GRAM, DIRECT = 0, 1
_SCRATCH = 1 << 24  # bytes of a tile of products, or of one operand's patches
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
    """Of a chunk of samples: Σ_t d[t] a[t]ᵀ by its factors, [n, G, T, d_in] and [n, G, T, d_out].

    ``a`` of an embedding is int64 [n, 1, T], its rows.
    """

    a: Tensor
    d: Tensor


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
    uu, us = zero.clone(), zero.clone()
    for pair in pairs:
        for part, student, teacher in _both(pair, dtype):
            u = _stack(student, teacher, c[part], how == NORMALIZED)
            uu[part] += _inner(u, u, pair.contraction)
            if how == NORMALIZED:
                us[part] += _inner(u, student, pair.contraction)
    if how != NORMALIZED:
        return uu.clamp(min=0)
    ns, nt = ss.sqrt(), tt.sqrt()
    x = (2 * us - uu) / (ns + c * nt)  # G_S + cG_T is 2G_S − U
    near = (uu - x.square()) / (ns * (c * nt))
    a, b = ns.clamp(min=EPS), nt.clamp(min=EPS)
    short = ss / a.square() + tt / b.square() - (ss + tt - uu) / a / b
    return torch.where(dead, short, near).clamp(min=0)


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
    if item.form[0] == INDICES:
        return _Sums(item.a[:, None], item.d.to(dtype)[:, None])
    if item.form[0] == CONVOLUTION:
        return _Sums(*patches_of(item.a.to(dtype), item.d.to(dtype), item.form))
    a, d = item.a.to(dtype), item.d.to(dtype)
    return _Sums(a, d) if a.dim() == 4 else _Sums(a[:, None], d[:, None])


def patches_of(x: Tensor, d: Tensor, form: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gather the patches of a convolution: of x, or, of a transposed one, of d.

    Returns:
        Both factors, [N, G, T, d_in] and [N, G, T, d_out].
    """
    groups, front = form[1], 5 - d.dim()
    kernel, stride, padding, dilation = (form[3 + 3 * i : 6 + 3 * i] for i in range(4))
    patches, other = (d, x) if form[2] else (x, d)
    for _ in range(front):
        patches, other = patches.unsqueeze(2), other.unsqueeze(2)
    patches = F.pad(patches, [p for p in reversed(padding) for _ in "lr"])
    for k in range(3):
        reach = dilation[k] * (kernel[k] - 1) + 1
        patches = patches.unfold(2 + k, reach, stride[k])[..., :: dilation[k]]
        patches = patches.narrow(2 + k, 0, other.shape[2 + k])
    n, c = patches.shape[:2]
    patches = patches.reshape(n, groups, c // groups, *patches.shape[2:])
    a = patches.permute(0, 1, 3, 4, 5, 2, 6, 7, 8).flatten(5).flatten(2, 4)
    return a, other.reshape(n, groups, other.shape[1] // groups, -1).transpose(2, 3)


def _stack(s: _Sums, t: _Sums, c: Tensor, scaled: bool) -> _Sums:
    """U = G_S − cG_T as factors of 2T rows.

    c is shared out, c = c_a·c_d, so that the teacher's a and d both come to the student's size: a
    network that is the other times a number may have it in either.

        U = Σ_t (d_S − c_d d_T) a_Sᵀ + c_d d_T (a_S − c_a a_T)ᵀ
    """
    dtype, indices = s.d.dtype, s.a.dtype == torch.int64
    c_a = torch.ones_like(c)
    if scaled and not indices:
        size = [x.a.flatten(1).norm(dim=1, dtype=torch.float64) for x in (s, t)]
        c_a = torch.where((size[0] > 0) & (size[1] > 0), size[0] / size[1], c_a)
        c_a = c_a.to(dtype).double()  # what is multiplied in float32 and in float64 is one number
    c_a, c_d = (x.reshape(-1, 1, 1, 1) for x in (c_a, c / c_a))
    # Differences in float64: the rounding of a product would be as large as what is left.
    near, other = (s.d - t.d * c_d).to(dtype), (t.d * c_d).to(dtype)
    if indices and torch.equal(s.a, t.a):  # rows are the same: the difference is that of d
        return _Sums(s.a, near)
    if indices:
        return _Sums(torch.cat([s.a, t.a], 2), torch.cat([s.d, -other], 2))
    moved = (s.a - t.a * c_a).to(dtype)
    return _Sums(torch.cat([s.a, moved], 2), torch.cat([near, other], 2))


# --- ⟨Σ d aᵀ, Σ d' a'ᵀ⟩, [n] in float64 ---------------------------------------------------------


def _inner(x: _Sums, y: _Sums, contraction: int) -> Tensor:
    return _gram(x, y) if contraction == GRAM else _direct(x, y)


def _dot(p: Tensor, q: Tensor) -> Tensor:
    """Σ p·q over all but the first dimension."""
    return (p * q).flatten(1).sum(1, dtype=torch.float64)


def _gram(x: _Sums, y: _Sums) -> Tensor:
    """Tiles of (a·a')∘(δ·δ'); of one sum with itself, the upper ones twice."""
    total = torch.zeros(x.d.shape[0], dtype=torch.float64, device=x.d.device)
    same = x is y
    for i in range(0, x.d.shape[2], _TILE):
        a, d = x.a[:, :, i : i + _TILE], x.d[:, :, i : i + _TILE]
        for j in range(i if same else 0, y.d.shape[2], _TILE):
            b, e = y.a[:, :, j : j + _TILE], y.d[:, :, j : j + _TILE]
            if x.a.dtype == torch.int64:
                products = (a[..., None] == b[..., None, :]).to(d.dtype)
            else:
                products = a @ b.mT
            total += _dot(products, d @ e.mT) * (2 if same and j > i else 1)
    return total


def _direct(x: _Sums, y: _Sums) -> Tensor:
    """Tiles of Σ_t δ aᵀ."""
    total = torch.zeros(x.d.shape[0], dtype=torch.float64, device=x.d.device)
    if x.a.shape[3] == x.d.shape[3] == 1:  # a number a group: no product of matrices
        g = (x.d * x.a).sum(2)
        return _dot(g, g if x is y else (y.d * y.a).sum(2))
    step = max(1, _SCRATCH // max(x.d[:, :, :1, :1].numel() * x.a.shape[3] * x.d.itemsize, 1))
    for i in range(0, x.d.shape[3], step):
        g = x.d[..., i : i + step].mT @ x.a
        h = g if x is y else y.d[..., i : i + step].mT @ y.a
        total += _dot(g, h)
    return total
