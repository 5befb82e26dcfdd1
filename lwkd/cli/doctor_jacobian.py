"""What the doctor asks of the Jacobian kind: rows and factors, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwkd import ops
from lwkd.cli.info import why_not

if TYPE_CHECKING:
    from lwkd.cli.doctor import Diagnosis

WAYS: dict[str, dict[str, Any]] = {
    "normalized": {"normalize": True},
    "difference": {"normalize": False},
    "norms": {"compare": "norms"},
}
SHAPES = ((3, 257), (3, 4, 5, 2), (3, 5000))


def distance(s: Tensor, t: Tensor, way: str) -> Tensor:
    """Return D [N] of float64 rows [N, ...], differentiable."""
    s, t = s.flatten(1), t.flatten(1)
    ns, nt = s.norm(dim=1, keepdim=True), t.norm(dim=1, keepdim=True)
    d = s - t if way == "difference" else s / ns - t / nt
    if way == "norms":
        d = (ns - nt) / (ns + nt)
    return d.square().sum(1)


def examine(diagnosis: Diagnosis) -> None:
    """Try rows in three ways and, where the backend has them, factors."""
    for way in WAYS:
        with diagnosis.catching(f"rows, {way}"):
            _try_rows(diagnosis, way)
    if why_not(diagnosis.backend, diagnosis.device.split(":")[0], "jacobian_factors"):
        return
    for way in WAYS:
        with diagnosis.catching(f"factors, {way}"):
            _try_factors(diagnosis, way)


def _draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _try_rows(diagnosis: Diagnosis, way: str) -> None:
    draw = _draw(1)
    exact: list[list[Tensor]] = []
    for _ in "st":
        rounded = [draw(*shape).to(diagnosis.dtype) for shape in SHAPES]
        exact.append([x.double().requires_grad_() for x in rounded])
    operands = [
        [_store(i, x.detach().to(diagnosis.dtype).to(diagnosis.device)) for i, x in enumerate(xs)]
        for xs in exact
    ]
    got = ops.layer_discrepancy(
        *operands, kind="jacobian", reduction="none", backend=diagnosis.backend, **WAYS[way]
    )
    want = torch.stack([distance(s, t, way) for s, t in zip(*exact, strict=True)])
    for i in range(len(SHAPES)):
        diagnosis.compare("distance", f"rows, {way}, layer {i}", got[i], want[i])
    weight = torch.linspace(1, 2, len(want), dtype=torch.float64)[:, None].expand_as(want)
    xs, leaves = operands[0] + operands[1], exact[0] + exact[1]
    grads = torch.autograd.grad(got, xs, weight.to(got))
    for grad, e in zip(grads, torch.autograd.grad(want, leaves, weight), strict=True):
        diagnosis.compare("gradient", f"rows, {way}", grad, e)


def _store(i: int, x: Tensor) -> Tensor:
    """The rows as they are, or with their dimensions the other way round in memory."""
    if i == 1:
        back = x.permute(0, *reversed(range(1, x.dim()))).contiguous()
        x = back.permute(0, *reversed(range(1, x.dim())))
    return x.requires_grad_()


def _try_factors(diagnosis: Diagnosis, way: str) -> None:
    draw = _draw(2)
    dense, conv, built = [], [], []
    for _ in "st":
        a, d = (draw(*shape).to(diagnosis.dtype) for shape in ((3, 7, 5), (3, 7, 4)))
        x, e = (draw(*shape).to(diagnosis.dtype) for shape in ((3, 2, 6, 5), (3, 4, 6, 5)))
        home = [z.to(diagnosis.device) for z in (a, d, x, e)]
        dense.append(ops.Factors(home[0], home[1]))
        conv.append(ops.ConvFactors(home[2], home[3], (3, 3), (1, 1), (1, 1), (1, 1), 1, False))
        patches = torch.nn.functional.unfold(x.double(), 3, padding=1)
        built.append(
            (
                torch.einsum("nto,nti->noi", d.double(), a.double()),
                torch.einsum("not,nit->noi", e.double().flatten(2), patches),
            )
        )
    got = ops.layer_discrepancy(
        [dense[0], conv[0]], [dense[1], conv[1]], kind="jacobian", reduction="none",
        backend=diagnosis.backend, **WAYS[way],
    )  # fmt: skip
    for i, (s, t) in enumerate(zip(*built, strict=True)):
        diagnosis.compare("distance", f"factors, {way}, layer {i}", got[i], distance(s, t, way))
