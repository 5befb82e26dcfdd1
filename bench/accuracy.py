"""How many digits of a Jacobian distance are left, by formula: in float32, against float64.

    python -m bench.accuracy --record bench/results/accuracy/jacobian.jsonl
    python -m bench.accuracy --show bench/results/accuracy/jacobian.jsonl

A teacher is so far apart from its student, relative to its norm, and so many times as large: what a
student that starts as a copy, or as a rescaled copy, looks like. The error is that of the mean over
the batch, the largest of several draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.test_jacobian import built, by_bmm, by_vmap, careful, stacked_norm, units
from bench.transfer import rows
from lwkd.ops import Factors, layer_discrepancy

APART = (1.0, 1e-2, 1e-4, 1e-6)
SCALES = (1.0, 1.1, 2.0, 100.0)
Sides = tuple[Sequence[Tensor], Sequence[Tensor]]
Formula = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def _ours(normalize: bool) -> Formula:
    def formula(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        items = [list(side) if len(side) == 1 else [Factors(*side)] for side in (s, t)]
        return layer_discrepancy(*items, kind="jacobian", normalize=normalize)

    return formula


def three_terms(normalize: bool) -> Formula:
    """‖G_S‖² + ‖G_T‖² − 2⟨G_S, G_T⟩ by T × T products, as one would write it first."""

    def inner(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        (a, d), (b, e) = x, y
        return ((a @ b.mT) * (d @ e.mT)).sum((1, 2))

    def formula(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        ss, tt, st = inner(s, s), inner(t, t), inner(s, t)
        d = 2 - 2 * st / (ss * tt).sqrt() if normalize else ss + tt - 2 * st
        return d.mean()

    return formula


def _cosine(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
    return (2 - 2 * F.cosine_similarity(s[0], t[0], dim=1)).mean()


# By what is measured: shapes of a student's tensors, and formulas, ours first.
FORMULAS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Formula]]] = {
    "rows, normalised": (
        ((8, 4096),),
        {
            "lwkd": _ours(True),
            "norms first": lambda s, t: careful(s[0], t[0]),
            "unit vectors": lambda s, t: units(s[0], t[0]),
            "2 − 2cos": _cosine,
        },
    ),
    "factors, normalised": (
        ((8, 64, 128), (8, 64, 96)),
        {
            "lwkd": _ours(True),
            "gradients built": built(by_bmm, True),
            "vmap(grad)": built(by_vmap, True),
            "three terms": three_terms(True),
        },
    ),
    "factors": (
        ((8, 64, 128), (8, 64, 96)),
        {
            "lwkd": _ours(False),
            "gradients built": built(by_bmm, False),
            "vmap(grad)": built(by_vmap, False),
            "ghost norm of [S; −T]": stacked_norm,
            "three terms": three_terms(False),
        },
    ),
}


def _draw(shapes: Sequence[tuple[int, ...]], apart: float, scale: float, seed: int) -> Sides:
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(s, generator=g) for s in shapes]
    teacher = [x + apart * torch.randn(x.shape, generator=g) for x in student]
    teacher[-1] = scale * teacher[-1]
    return student, teacher


def _exact(name: str, sides: Sides) -> Tensor:
    """From the definition, in float64."""
    s, t = (
        x[0].double() if len(x) == 1 else by_bmm([y.double() for y in x]).flatten(1) for x in sides
    )
    if name.endswith("normalised"):
        s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
    return (s - t).square().sum(1).mean()


def study(seeds: int) -> Iterable[rows.Row]:
    """Yield a row for every distance, difference, scale and formula: the largest of the errors."""
    for name, (shapes, formulas) in FORMULAS.items():
        for apart in APART:
            for scale in SCALES:
                draws = [_draw(shapes, apart, scale, seed) for seed in range(seeds)]
                exact = [_exact(name, sides) for sides in draws]
                for formula, run in formulas.items():
                    errors = [
                        float((run(*sides).double() - want).abs() / want)
                        for sides, want in zip(draws, exact, strict=True)
                    ]
                    yield {"distance": name, "apart": apart, "scale": scale, "arm": formula,
                           "error": max(errors)}  # fmt: skip


def table(found: list[rows.Row]) -> str:
    """Return the errors as Markdown: the largest over the scales, and of scale 1 alone."""
    lines = ["| distance | formula | " + " | ".join(f"{a:g} apart" for a in APART) + " |"]
    lines.append("|---|---|" + "--:|" * len(APART))
    for name, (_, formulas) in FORMULAS.items():
        for formula in formulas:
            own = [r for r in found if (r["distance"], r["arm"]) == (name, formula)]
            cells = [_cell(own, apart) for apart in APART]
            lines.append(f"| {name} | {formula} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(own: list[dict[str, Any]], apart: float) -> str:
    errors = {r["scale"]: r["error"] for r in own if r["apart"] == apart}
    return f"{errors[1.0]:.0e} / {max(errors.values()):.0e}"


if __name__ == "__main__":
    rows.main(__doc__.split("\n")[0], 3, study, table)
