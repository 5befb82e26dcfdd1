"""The attention distance in float64, written from its definition and from nothing of lwkd's.

    map    m[n,q] = Σ_c |x[n,c,q]|^p, averaged over the cells of the pair's common space, masked
    l2     q = m / max(‖m‖₂, eps),  D = Σ_q (q_S − q_T)²
    js     P = m / Σm, M = βP_S + (1−β)P_T,  D = H(M) − βH(P_S) − (1−β)H(P_T)

It is slow and naive on purpose. Inputs are whatever was rounded to the tested dtype; everything
below happens in float64, and gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12


def read(x: Tensor, channel_dim: int | None, fold: tuple[int, int, int] | None) -> Tensor:
    """[N, C, *space] in float64, from any of the ways in which activations are laid out."""
    x = x.double()
    if fold is None:
        return x.movedim(1 if channel_dim is None else channel_dim, 1)
    h, w, prefix = fold
    x = x.movedim(2 if channel_dim is None else channel_dim, 1)[:, :, prefix:]
    return x.reshape(x.shape[0], x.shape[1], h, w)


def cells(size: int, out: int) -> Tensor:
    """Adaptive average pooling of one dimension as a matrix [out, size], cell by cell."""
    weight = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        begin = i * size // out
        end = -(-(i + 1) * size // out)
        weight[i, begin:end] = 1 / (end - begin)
    return weight


def pool(m: Tensor, space: Sequence[int]) -> Tensor:
    for d, out in enumerate(space, start=1):
        if m.shape[d] != out:
            m = torch.tensordot(m, cells(m.shape[d], out).to(m.device), dims=([d], [1]))
            m = m.movedim(-1, d)
    return m


def map_of(x: Tensor, p: float, space: Sequence[int], keep: Tensor) -> Tensor:
    """[N, positions] of one operand as :func:`read` returns it; keep: bool [N, positions]."""
    m = pool(x.abs().pow(p).sum(1), space).flatten(1)
    return torch.where(keep, m, torch.zeros_like(m))


def keep_of(mask: Tensor | None, n: int, space: Sequence[int], device: Any) -> Tensor:
    if mask is None:
        return torch.ones(n, *space, dtype=torch.bool, device=device).flatten(1)
    return mask.reshape(n, *space).flatten(1)


def unit(m: Tensor) -> Tensor:
    return m / torch.linalg.vector_norm(m, dim=1, keepdim=True).clamp_min(EPS)


def shares(m: Tensor, keep: Tensor) -> Tensor:
    """P = m/Σm; an all-zero map is uniform over the positions that are kept."""
    total = m.sum(1, keepdim=True)
    uniform = keep.double() / keep.sum(1, keepdim=True).clamp_min(1)
    return torch.where(total == 0, uniform, m / torch.where(total == 0, 1.0, total))


def entropy(q: Tensor) -> Tensor:
    """−Σ q·log q, where 0·log 0 = 0 with gradient 0."""
    return -(q * torch.where(q > 0, q, 1.0).log()).sum(1)


def distance(ms: Tensor, mt: Tensor, keep: Tensor, divergence: str, beta: float) -> Tensor:
    """D [N] of two maps [N, positions]."""
    if divergence == "l2":
        return (unit(ms) - unit(mt)).square().sum(1)
    ps, pt = shares(ms, keep), shares(mt, keep)
    mix = beta * ps + (1 - beta) * pt
    return entropy(mix) - beta * entropy(ps) - (1 - beta) * entropy(pt)


def by_layer(channel_dim: Any, length: int) -> list[tuple[Any, Any]]:
    """One (student, teacher) pair of channel dimensions for each layer."""
    rows = channel_dim if isinstance(channel_dim, list) else [channel_dim] * length
    return [row if isinstance(row, tuple) else (row, row) for row in rows]


def operands(
    student: Sequence[Tensor], teacher: Sequence[Tensor], channel_dim: Any, tokens: Any, mask: Any
) -> list[tuple[Tensor, Tensor, list[int], Tensor]]:
    """(student, teacher, common space, keep) of each layer."""
    out = []
    folds = tokens or (None, None)
    for i, dims in enumerate(by_layer(channel_dim, len(student))):
        s, t = read(student[i], dims[0], folds[0]), read(teacher[i], dims[1], folds[1])
        space = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        keep = keep_of(mask[i] if mask else None, s.shape[0], space, s.device)
        out.append((s, t, space, keep))
    return out


def distances(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    p: float = 2.0,
    divergence: str = "l2",
    beta: float = 0.5,
    channel_dim: Any = None,
    tokens: Any = None,
    mask: Any = None,
) -> Tensor:
    """D [L, N] in float64; differentiable."""
    rows = []
    for s, t, space, keep in operands(student, teacher, channel_dim, tokens, mask):
        ms, mt = map_of(s, p, space, keep), map_of(t, p, space, keep)
        rows.append(distance(ms, mt, keep, divergence, beta))
    return torch.stack(rows)


def mean(d: Tensor) -> Tensor:
    """reduction="mean": an empty batch is at distance 0."""
    return d.sum(1) / max(d.shape[1], 1)


def attention_maps(xs: Sequence[Tensor], *, p: float = 2.0, channel_dim: Any = None) -> list:
    dims = channel_dim if isinstance(channel_dim, list) else [channel_dim] * len(xs)
    return [read(x, d, None).abs().pow(p).sum(1) for x, d in zip(xs, dims, strict=True)]
