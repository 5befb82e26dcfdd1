"""The one table of tolerances, version 1, and the bounds that follow from it.

No tolerance here was tuned to what a kernel happens to do: every one is an a-priori rounding bound
γ_d = d·u/(1 − d·u), with d the worst depth of roundings behind a number and u the unit roundoff of
the dtype that accumulates. Loosening an entry needs a written reason beside it and a new version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import oracle

VERSION = 1

# Unit roundoff: half the distance from 1 to the next number.
U = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Roundings of one |x|^p, |x|^(p−1): exact, one product, or a library's pow. pow is good to about an
# ulp in C, in SLEEF and in CUDA; Triton's interpreter takes exp2(p·log2|x|), where the rounding of
# a logarithm of up to 2⁴ comes out multiplied: 2⁴ roundings.
POWER = {1.0: 0, 2.0: 1}
GENERAL_POWER = 16
NORMALISE = 3  # root, division, and the cast between them
OVERLAP = 8  # cells of adaptive pooling that share a position: two a dimension
FORMULA = 8  # the elementwise steps of either divergence after normalising

# js at relative differences of student and teacher: what the contract promises, by difference.
JS_NEARLY_EQUAL = {1e-2: 2e-5, 1e-4: 2e-3}
# (1+u)·log1p(u) − u by its series below |u| = 0.02: what the first missing term is worth there.
SERIES = 1e-13
# Over many draws the root-mean-square error may not exceed eager's by more than this: worst-case
# bounds alone would let an error hide that is systematic but small. (2 for tensors, 3 for
# gradients; a sum of another order is not better or worse than eager's, only different.)
RMS_VALUE, RMS_GRADIENT = 2.0, 3.0


def gamma(depth: float, u: float) -> float:
    return depth * u / (1 - depth * u)


def power_depth(p: float) -> int:
    return POWER.get(p, GENERAL_POWER)


def spacing(dtype: torch.dtype) -> float:
    """The distance between subnormal numbers: an absolute floor under every rounding."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def compute_dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for xs in lists for x in xs)
    return torch.float64 if wide else torch.float32


def map_depth(x: Tensor, space: Sequence[int], p: float) -> int:
    """Roundings behind one entry of a map: the power, the sum over channels, the pooling."""
    window = 1
    for size, out in zip(x.shape[2:], space, strict=True):
        if size != out:
            window *= -(-size // max(out, 1)) + 1
    return x.shape[1] + power_depth(p) + (window + 1 if window > 1 else 0) + 1


def attention_maps(xs: Sequence[Tensor], maps: Sequence[Tensor], p: float, dims: Any) -> list:
    """Bounds on the entries of ops.attention_maps."""
    out = []
    for x, m, dim in zip(xs, maps, dims, strict=True):
        dtype = compute_dtype([x])
        depth = x.shape[1 if dim is None else dim] + power_depth(p) + 1
        out.append(gamma(depth, U[dtype]) * m.abs() + spacing(dtype))
    return out


# --- distances: relative errors e of the entries of both maps, carried through the formula -------


def _log_ratio(q: Tensor, mix: Tensor, u: float) -> Tensor:
    """|log(q/M)|, cut off where a rounded 1 + u could not be told from 0."""
    ratio = torch.where(mix > 0, q / torch.where(mix > 0, mix, 1.0), 1.0)
    return ratio.clamp_min(u).log().abs()


def _value_l2(ms: Tensor, mt: Tensor, e: float, u: float) -> Tensor:
    qs, qt = oracle.unit(ms), oracle.unit(mt)
    diff, size = (qs - qt).abs(), (qs.abs() + qt.abs()) * e
    d = diff.square().sum(1)
    return (2 * diff * size + size.square()).sum(1) + gamma(qs.shape[1] + FORMULA, u) * d


def _value_js(ms: Tensor, mt: Tensor, keep: Tensor, beta: float, e: float, u: float) -> Tensor:
    ps, pt = oracle.shares(ms, keep), oracle.shares(mt, keep)
    mix = beta * ps + (1 - beta) * pt
    ls, lt = _log_ratio(ps, mix, u), _log_ratio(pt, mix, u)
    own = beta * ps * ls + (1 - beta) * pt * lt
    delta = beta * (1 - beta) * (ps - pt).abs()
    d = oracle.distance(ms, mt, keep, "js", beta).abs()
    # The oracle itself subtracts entropies in float64.
    naive = 16 * U[torch.float64] * (1 + (mix * mix.clamp_min(1e-300).log().abs()).sum(1))
    moved = e * own.sum(1) + e * e  # first and second order
    rounded = u * (4 * own + 8 * delta + 4 * delta * (ls + lt)).sum(1)
    return moved + rounded + (gamma(ps.shape[1] + FORMULA, u) + SERIES) * d + naive


def _slope_l2(m: Tensor, other: Tensor, e: float, u: float) -> Tensor:
    """Bound on the error of dD/dm, [N, positions]."""
    q, qo = oracle.unit(m), oracle.unit(other)
    norm = torch.linalg.vector_norm(m, dim=1, keepdim=True).clamp_min(oracle.EPS)
    g = 2 * (q - qo).abs()
    dg = 2 * e * (q + qo) + 2 * u * g
    radial = (q * g).sum(1, keepdim=True)
    d_radial = (q * dg).sum(1, keepdim=True) + (2 * e + gamma(q.shape[1], u)) * radial
    return (dg + q * d_radial + 3 * (e + u) * (g + q * radial)) / norm


def _slope_js(m: Tensor, other: Tensor, keep: Tensor, own: float, e: float, u: float) -> Tensor:
    ps, po = oracle.shares(m, keep), oracle.shares(other, keep)
    total = m.sum(1, keepdim=True)
    mix = own * ps + (1 - own) * po
    g = own * _log_ratio(ps, mix, u) * (ps > 0)
    safe = torch.where(mix > 0, mix, 1.0)
    dg = own * (2 * e + 4 * u * (1 - own) * (po - ps).abs() / safe) + (2 * u + SERIES) * g
    radial = (ps * g).sum(1, keepdim=True)
    d_radial = (ps * dg).sum(1, keepdim=True) + (2 * e + gamma(ps.shape[1], u)) * radial
    out = (dg + d_radial + 3 * (e + u) * (g + radial)) / torch.where(total > 0, total, 1.0)
    return torch.where((ps > 0) & (total > 0), out, 0.0)


# --- the whole verdict ---------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What must come out, and how far from it a number may be."""

    value: Tensor  # [L, N]
    value_bound: Tensor
    gradients: list[list[Tensor]]  # student's, teacher's; of Σ weight·D
    gradient_bounds: list[list[Tensor]]

    def flat(self) -> list[tuple[Tensor, Tensor]]:
        """(gradient, bound), the student's before the teacher's."""
        pairs = zip(self.gradients, self.gradient_bounds, strict=True)
        return [both for xs, bs in pairs for both in zip(xs, bs, strict=True)]


def judge(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weight: Tensor, **options: Any
) -> Verdict:
    """Float64 values and gradients of Σ weight·D, weight [L, N], with their bounds.

    options: p, divergence, beta, channel_dim, tokens, mask as of ops.layer_discrepancy.
    """
    p, js = options.pop("p", 2.0), options.pop("divergence", "l2") == "js"
    beta = options.pop("beta", 0.5)
    names = ("channel_dim", "tokens", "mask")
    where = [options.get(name) for name in names]
    u = U[compute_dtype(student, teacher)]
    leaves = [[x.detach().double().requires_grad_() for x in xs] for xs in (student, teacher)]
    layers = oracle.operands(*leaves, *where)
    maps = [[oracle.map_of(x, p, space, keep) for x in pair] for *pair, space, keep in layers]
    name = "js" if js else "l2"
    d = [oracle.distance(*m, row[3], name, beta) for m, row in zip(maps, layers, strict=True)]
    c = torch.autograd.grad(sum(x.sum() for x in d), [m for pair in maps for m in pair],
                            retain_graph=True)  # fmt: skip
    bounds, looseness = [], []
    later = gamma(power_depth(p) + FORMULA + OVERLAP, u)
    with torch.no_grad():
        for i, (s, t, space, keep) in enumerate(layers):
            ms, mt = maps[i]
            depth = max(map_depth(s, space, p), map_depth(t, space, p))
            e = 2 * gamma(depth, u) + (gamma(ms.shape[1], u) if js else 0) + NORMALISE * u
            if js:
                bounds.append(_value_js(ms, mt, keep, beta, e, u))
                slopes = [_slope_js(ms, mt, keep, beta, e, u)]
                slopes += [_slope_js(mt, ms, keep, 1 - beta, e, u)]
            else:
                bounds.append(_value_l2(ms, mt, e, u))
                slopes = [_slope_l2(ms, mt, e, u), _slope_l2(mt, ms, e, u)]
            # |dD/dm| once more: its roundings on the way to the activation, pooling undone.
            w = weight[i].double().abs()[:, None]
            pairs = zip(slopes, c[2 * i : 2 * i + 2], strict=True)
            looseness += [w * (b + later * g.abs()) for b, g in pairs]
    flat = leaves[0] + leaves[1]
    value = torch.stack(d)
    exact = torch.autograd.grad((weight.double() * value).sum(), flat, retain_graph=True)
    flow = sum((b * m).sum() for b, m in zip(looseness, (m for x in maps for m in x), strict=True))
    loose = [
        b.abs() + 2 * U[x.dtype] * g.abs() + spacing(x.dtype) * (g != 0)
        for b, g, x in zip(
            torch.autograd.grad(flow, flat), exact, [*student, *teacher], strict=True
        )
    ]
    n = len(student)
    return Verdict(
        value.detach(),
        torch.stack(bounds) + spacing(compute_dtype(student, teacher)),
        [list(exact[:n]), list(exact[n:])],
        [loose[:n], loose[n:]],
    )


def mean(verdict: Verdict, u: float) -> tuple[Tensor, Tensor]:
    """Value and bound of reduction="mean"."""
    value, n = oracle.mean(verdict.value), verdict.value.shape[1]
    return value, oracle.mean(verdict.value_bound) + gamma(n + 2, u) * value.abs() + 1e-300


# --- Jacobian rows: every sum in float64, whatever the rows are ----------------------------------


def rows(
    sides: Sequence[Sequence[Tensor]],
    dtypes: Sequence[Sequence[torch.dtype]],
    value: Tensor,
    weight: Tensor,
    gradients: list[list[Tensor]],
    way: str,
) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """Bounds on D [L, N] and on the gradients of Σ weight·D: (bounds of D, gradients, bounds).

    sides: the rows in float64, student's and teacher's, of ``dtypes`` before. The oracle's own
    float64 roundings are as many as ours: every bound is doubled.
    """
    out_dtype = torch.float64 if torch.float64 in [d for x in dtypes for d in x] else torch.float32
    values, bounds = [], [[], []]
    for i, (s, t) in enumerate(zip(*sides, strict=True)):
        e = 2 * gamma(max(s[0:1].numel(), t[0:1].numel(), 1) + FORMULA, U[torch.float64])
        values.append(_row_value(s.flatten(1), t.flatten(1), value[i], e, way))
        for side, (x, y) in enumerate(((s, t), (t, s))):
            w = weight[i].double().abs().reshape(-1, *[1] * (x.dim() - 1))
            loose = w * _row_slope(x, y, e, way)
            g = gradients[side][i].abs()
            u = U[dtypes[side][i]]
            bounds[side].append(loose + 2 * u * g + spacing(dtypes[side][i]) * (g != 0))
    bound = torch.stack(values) + U[out_dtype] * value.abs() + spacing(out_dtype)
    return bound, gradients, bounds


def _row_value(s: Tensor, t: Tensor, d: Tensor, e: float, way: str) -> Tensor:
    if way == "difference":
        return e * d
    if way == "norms":
        return 4 * e * d.sqrt() + 4 * e * e
    return torch.full_like(d, 4 * e) * (1 - (d == 0).double() * (s.abs().sum(1) == 0).double())


def _row_slope(x: Tensor, y: Tensor, e: float, way: str) -> Tensor:
    """Of dD/dx, where it is a difference of two terms: their sizes count, not what is left."""
    shape = (-1, *[1] * (x.dim() - 1))
    nx, ny = (z.flatten(1).norm(dim=1).reshape(shape) for z in (x, y))
    alive = (nx >= oracle.EPS) & ((ny >= oracle.EPS) | (way == "norms"))
    one = torch.ones_like(nx)
    a, b = torch.where(alive, nx, one), torch.where(ny >= oracle.EPS, ny, one)
    if way == "difference":
        return 2 * e * (x.abs() + y.abs())
    if way == "norms":
        return (
            torch.where(alive, 8 * e * ny / (nx + ny + (nx + ny == 0)).square() / a, 0.0) * x.abs()
        )
    return torch.where(alive, one, 0.0) * 6 * e * (2 * x.abs() / a.square() + 2 * y.abs() / (a * b))


# --- factored rows -------------------------------------------------------------------------------

# The contract, relative, whatever is left of a difference: float32 by what it is multiplied in.
FACTORS = {torch.float64: 1e-11, torch.float32: 2e-6}
# What all four factors have in half precision Triton multiplies in TF32 on a GPU: those themselves
# are exact there, their differences are cut to 10 bits.
TF32 = 2.0**-10


def factors_in_tf32(products: Tensor, u: Tensor, ns: Tensor, nv: Tensor) -> Tensor:
    """Bound on D [N] of ‖Σ|Δ||A|‖ of the stacked factors, ‖U‖, ‖G_S‖ and c‖G_T‖.

    U is off by both factors of every product: ‖U‖², x² and ‖G_S‖·c‖G_T‖ by four times ‖U‖ times
    that, or less, each.
    """
    off = 2 * TF32 * products
    return 16 * (u * off + off.square()) / (ns * nv)


# --- probes --------------------------------------------------------------------------------------


def probe_dot(h: Tensor, want: float) -> float:
    """Bound on ⟨v, h⟩: sums are in float64, and the result is rounded once, to float32 at most."""
    u = 2.0**-53 if h.dtype == torch.float64 else 2.0**-24
    return u * abs(want) + max(h.numel(), 1) * 2.0**-52 * float(h.double().abs().sum())
