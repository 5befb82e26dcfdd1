"""The reference of the attention kind: its definition in plain PyTorch, forward and backward.

Serves every device that has no compiled kernel; lwkd.ops.attention states the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd.ops.operands import compute_dtype

EPS = 1e-12
DIVERGENCES = {"l2": 0, "js": 1}
_SERIES = 0.02  # below this |u| the series of f is exact to rounding


# --- reading an operand ------------------------------------------------------------------------


def canonical(x: Tensor, layout: Sequence[int]) -> Tensor:
    """View x as [N, C, *space]."""
    channel_dim, prefix, h, w = layout
    x = x.movedim(channel_dim, 1)
    return x[:, :, prefix:].unflatten(2, (h, w)) if h else x


def space_of(shape: Sequence[int], layout: Sequence[int]) -> list[int]:
    """Return the spatial sizes of an operand of this shape."""
    channel_dim, _, h, w = layout
    if h:
        return [h, w]
    space = list(shape)
    del space[channel_dim], space[0]
    return space


def common_space(
    student: Sequence[Tensor], teacher: Sequence[Tensor], s_layout: list[int], t_layout: list[int]
) -> list[list[int]]:
    """Return, per layer, the smaller size of each spatial dimension."""
    spaces = []
    for s, t, how, other in zip(
        student, teacher, _by_four(s_layout), _by_four(t_layout), strict=True
    ):
        shape, t_shape = s.shape, t.shape
        space = space_of(shape, how)
        if shape != t_shape or how != other:
            space = [min(pair) for pair in zip(space, space_of(t_shape, other), strict=True)]
        spaces.append(space)
    return spaces


def _by_four(layout: list[int]) -> Iterable[tuple[int, ...]]:
    fields = iter(layout)
    return zip(fields, fields, fields, fields, strict=True)


def numel(sizes: Sequence[int]) -> int:
    """The product of sizes, symbolic ones included."""
    n = 1
    for s in sizes:
        n *= s
    return n


# --- reference ---------------------------------------------------------------------------------


def power_map(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Σ_c |x|^p over dimension 1, accumulated in ``dtype``."""
    x = x.to(dtype)
    if p == 2:
        return x.square().sum(1)
    return x.abs().sum(1) if p == 1 else x.abs().pow(p).sum(1)


def pool(m: Tensor, space: Sequence[int]) -> Tensor:
    """Average a map [N, *] over the cells of ``space``, the adaptive pooling of torch."""
    if list(m.shape[1:]) == list(space):
        return m
    if 0 in m.shape or 0 in space:
        return m.new_zeros(m.shape[0], *space)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(space) - 1]
    return pool(m.unsqueeze(1), tuple(space)).squeeze(1)  # type: ignore[arg-type]


def _unpool(g: Tensor, raw: Sequence[int]) -> Tensor:
    """Transpose of :func:`pool`: from the common space back to the raw one."""
    for d, size in enumerate(raw, start=1):
        out = g.shape[d]
        if out != size:
            i = torch.arange(out, device=g.device)
            r = torch.arange(size, device=g.device)
            lo, hi = i * size // out, -((-(i + 1) * size) // out)
            inside = (r >= lo[:, None]) & (r < hi[:, None])  # [out, size]
            weight = inside.to(g.dtype) / (hi - lo)[:, None]
            g = torch.tensordot(g, weight, dims=([d], [0])).movedim(-1, d)
    return g


def _shares(m: Tensor, keep: Tensor) -> Tensor:
    """P = m/Σm over dimension 1; an all-zero map is uniform over the positions kept."""
    total = m.double().sum(1, keepdim=True)  # a sum of float32 maps overflows float32
    uniform = keep.double() / keep.sum(1, keepdim=True).clamp_min(1)
    return torch.where(total == 0, uniform, m / total).to(m.dtype)


def _f(u: Tensor) -> Tensor:
    """(1+u)·log1p(u) − u."""
    v = u.clamp_min(-1)
    tail = 1 / 30 + u * (-1 / 42 + u / 56)
    series = u * u * (0.5 + u * (-1 / 6 + u * (1 / 12 + u * (-1 / 20 + u * tail))))
    exact = torch.where(v == -1, torch.ones_like(v), (1 + v) * torch.log1p(v) - v)
    return torch.where(u.abs() < _SERIES, series, exact)


def _js(ps: Tensor, pt: Tensor, beta: float) -> Tensor:
    delta, mix = ps - pt, beta * ps + (1 - beta) * pt
    term = mix * (beta * _f((1 - beta) * delta / mix) + (1 - beta) * _f(-beta * delta / mix))
    return torch.where(mix == 0, torch.zeros_like(mix), term).sum(1)


def _unit(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return m/max(‖m‖, eps) and ‖m‖, which is float64: it overflows float32."""
    norm = m.double().square().sum(1, keepdim=True).sqrt()
    return (m / norm.clamp_min(EPS)).to(m.dtype), norm


def _keep(mask: Sequence[Tensor], layer: int, m: Tensor) -> Tensor:
    """The positions of layer's map that count, bool [N, P]."""
    if mask and mask[layer].dim() > 1:
        return mask[layer].reshape(m.shape)
    return torch.ones_like(m, dtype=torch.bool)


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Sequence[Tensor],
    student_layout: list[int],
    teacher_layout: list[int],
    p: float,
    divergence: int,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The op lwkd::attention: distances and the flat maps."""
    dtype = compute_dtype(student, teacher)
    spaces = common_space(student, teacher, student_layout, teacher_layout)
    distances, maps = [], []
    for layer, space in enumerate(spaces):
        pair = []
        for x, layout in (
            (student[layer], student_layout[4 * layer : 4 * layer + 4]),
            (teacher[layer], teacher_layout[4 * layer : 4 * layer + 4]),
        ):
            m = pool(power_map(canonical(x, layout), p, dtype), space).flatten(1)
            pair.append(torch.where(_keep(mask, layer, m), m, torch.zeros_like(m)))
        keep = _keep(mask, layer, pair[0])
        if divergence == DIVERGENCES["l2"]:
            d = (_unit(pair[0])[0] - _unit(pair[1])[0]).square().sum(1)
        else:
            d = _js(_shares(pair[0], keep), _shares(pair[1], keep), beta)
        distances.append(d.sum(0) / max(d.shape[0], 1) if mean else d)
        maps += [m.reshape(-1) for m in pair]
    return torch.stack(distances), torch.cat(maps)


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    mask: Sequence[Tensor],
    maps: Tensor,
    layers: list[int],
    sides: list[int],
    layout: list[int],
    space: list[int],
    p: float,
    divergence: int,
    beta: float,
) -> list[Tensor]:
    """The op lwkd::attention_backward: one gradient for each of xs."""
    sizes = [space[i : i + 3] for i in range(0, len(space), 3)]
    grads = []
    for i, (x, layer, side) in enumerate(zip(xs, layers, sides, strict=True)):
        how = layout[4 * i : 4 * i + 4]
        n = x.shape[0]
        start = 2 * n * sum(numel(s) for s in sizes[:layer])
        pair = maps[start : start + 2 * n * numel(sizes[layer])].view(2, n, numel(sizes[layer]))
        g = grad[layer] / max(n, 1) if grad.dim() == 1 else grad[layer]
        keep = _keep(mask, layer, pair[0])
        coefficient = _map_gradient(pair[side], pair[1 - side], keep, side, divergence, beta)
        coefficient = coefficient * g.to(maps.dtype).reshape(-1, 1)
        view = canonical(x, how)
        raw = list(view.shape[2:])
        cells = sizes[layer][3 - len(raw) :]
        coefficient = _unpool(coefficient.view(n, *cells), raw).unsqueeze(1)
        wide = view.to(maps.dtype)
        dx = coefficient * p * wide.abs().pow(p - 1) * wide.sign()
        # Nothing flows to a zero, nor from where nothing counts: a masked-out NaN stays there.
        dx = torch.where((wide == 0) | (coefficient == 0), torch.zeros_like(dx), dx)
        out = torch.empty_like(x).zero_()
        canonical(out, how).copy_(dx)
        grads.append(out)
    return grads


def _map_gradient(
    m: Tensor, other: Tensor, keep: Tensor, side: int, divergence: int, beta: float
) -> Tensor:
    """dD/dm of one side at the common space, [N, P]; the other side's map is constant."""
    if divergence == DIVERGENCES["l2"]:
        q, norm = _unit(m)
        g = 2 * (q - _unit(other)[0])
        radial = (q * g).sum(1, keepdim=True)
        radial = torch.where(norm > EPS, radial, torch.zeros_like(radial))
        d = (g - q * radial) / norm.clamp_min(EPS)
    else:
        own = beta if side == 0 else 1 - beta
        total = m.double().sum(1, keepdim=True)
        ps, pt = _shares(m, keep), _shares(other, keep)
        # log(P/M) = −log1p((1−own)(P_other − P)/P), exact where the two are nearly equal
        g = -own * torch.log1p((1 - own) * (pt - ps) / ps)
        g = torch.where(ps == 0, torch.zeros_like(g), g)
        d = (g - (ps * g).sum(1, keepdim=True)) / total
        d = torch.where(total == 0, torch.zeros_like(d), d)
    return torch.where(keep, d, torch.zeros_like(d)).to(m.dtype)


def maps(xs: Sequence[Tensor], channel_dims: list[int], p: float) -> list[Tensor]:
    """The op lwkd::attention_maps."""
    return [
        power_map(x.movedim(d, 1), p, compute_dtype([x])).contiguous()
        for x, d in zip(xs, channel_dims, strict=True)
    ]
