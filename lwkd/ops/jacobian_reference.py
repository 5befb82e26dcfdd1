"""The reference of the Jacobian kind: its definition in plain PyTorch, forward and backward.

Serves every device that has no compiled kernel; lwkd.ops.jacobian states the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.ops.operands import compute_dtype

EPS = 1e-12
DIFFERENCE, NORMALIZED, NORMS = 0, 1, 2  # what `how` says to the kernels
SQUARES = 3  # of factors alone: ‖G_S‖², and nothing of the teacher
COMPARISONS = ("difference", "norms")


def how(normalize: bool, compare: str) -> int:
    """What the kernels are told of ``normalize`` and ``compare``."""
    return NORMS if compare == "norms" else NORMALIZED if normalize else DIFFERENCE


def rows(
    student: Sequence[Tensor], teacher: Sequence[Tensor], how: int, mean: bool
) -> tuple[Tensor, Tensor]:
    """The op lwkd::jacobian_rows: distances, and the sums [L, N, 3] that the way back needs.

    The sums are Σs², Σt², Σst; of DIFFERENCE Σ(s − t)² and two zeros, of NORMS the last is 0.
    """
    sums = torch.stack([_sums(s, t, how) for s, t in zip(student, teacher, strict=True)])
    d = distance(sums, how)
    d = d.sum(1) / max(d.shape[1], 1) if mean else d
    return d.to(compute_dtype(student, teacher)), sums


def _sums(s: Tensor, t: Tensor, how: int) -> Tensor:
    s, t = s.flatten(1).double(), t.flatten(1).double()
    zero = s.new_zeros(s.shape[0])
    if how == DIFFERENCE:
        return torch.stack([(s - t).square().sum(1), zero, zero], 1)
    cross = zero if how == NORMS else (s * t).sum(1)
    return torch.stack([s.square().sum(1), t.square().sum(1), cross], 1)


def distance(sums: Tensor, how: int) -> Tensor:
    """D [L, N] of the sums [L, N, 3]."""
    if how == DIFFERENCE:
        return sums.select(-1, 0)
    ss, tt, st = sums.unbind(-1)
    ns, nt = ss.sqrt(), tt.sqrt()
    if how == NORMS:
        whole = ns + nt
        ratio: Tensor = torch.where(whole == 0, torch.zeros_like(whole), (ns - nt) / whole)
        return ratio * ratio
    a, b = ns.clamp_min(EPS), nt.clamp_min(EPS)
    short = ss / a.square() + tt / b.square() - 2 * (st / (a * b))
    # √(x·x) is x: equal rows are at a distance of exactly 0.
    d: Tensor = torch.where((ns >= EPS) & (nt >= EPS), 2 - 2 * (st / (ss * tt).sqrt()), short)
    return d.clamp(min=0)


def coefficients(sums: Tensor, how: int) -> Tensor:
    """dD/ds = own·s + other·t: [L, N, 2 sides, (own, other)] of the sums [L, N, 3]."""
    if how == DIFFERENCE:
        two = torch.full_like(sums[..., 0], 2)
        return torch.stack([two, -two, two, -two], -1).reshape(*two.shape, 2, 2)
    ss, tt, st = sums.unbind(-1)
    ns, nt = ss.sqrt(), tt.sqrt()
    zero = torch.zeros_like(ss)
    if how == NORMS:
        slope = 4 * (ns - nt) / (ns + nt) ** 3
        own_s, own_t, other = slope * nt / ns, -slope * ns / nt, zero
        dead_s, dead_t = ns < EPS, nt < EPS
    else:
        other = -2 / (ss * tt).sqrt()
        cos = st / (ss * tt).sqrt()
        own_s, own_t = 2 * cos / ss, 2 * cos / tt
        dead_s = dead_t = (ns < EPS) | (nt < EPS)
    parts = [(own_s, dead_s), (other, dead_s), (own_t, dead_t), (other, dead_t)]
    flat: Tensor = torch.stack([torch.where(dead, zero, x) for x, dead in parts], -1)
    return flat.reshape(*flat.shape[:-1], 2, 2)


def rows_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    others: Sequence[Tensor],
    sums: Tensor,
    layers: list[int],
    sides: list[int],
    how: int,
) -> list[Tensor]:
    """The op lwkd::jacobian_rows_backward: one gradient for each of xs."""
    n = sums.shape[1]
    each = grad[:, None].expand(-1, n) / max(n, 1) if grad.dim() == 1 else grad
    weight = coefficients(sums, how) * each.double()[:, :, None, None]
    out = []
    for i, (x, layer, side) in enumerate(zip(xs, layers, sides, strict=True)):
        shape = (n,) + (1,) * (x.dim() - 1)
        own, other = weight[layer, :, side].unbind(-1)
        dx = own.reshape(shape) * x.double()
        if others:
            dx = dx + other.reshape(shape) * others[i].double()
        # A row without a gradient has none either where it, or the other, is not finite.
        dead = (own == 0) & (other == 0) & ~torch.isnan(own)
        dx = torch.where(dead.reshape(shape), 0.0, dx)
        out.append(torch.empty_like(x).copy_(dx))
    return out
