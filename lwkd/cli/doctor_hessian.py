"""What the doctor asks of the Hessian kind: signs and their products, against the definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lwkd import ops
from lwkd.cli.info import why_not
from lwkd.ops import philox

if TYPE_CHECKING:
    from lwkd.cli.doctor import Diagnosis

SHAPES = ((5, 77), (129,), (3, 4, 5, 2), (9001,))
SEED, PROBE = 2**63 + 5, 7


def examine(diagnosis: Diagnosis) -> None:
    """Make signs bit for bit, and sum tensors by them."""
    if why_not(diagnosis.backend, diagnosis.device.split(":")[0], "probe_dot"):
        return
    with diagnosis.catching("signs"):
        _try_signs(diagnosis)
    with diagnosis.catching("products with signs"):
        _try_products(diagnosis)


def _try_signs(diagnosis: Diagnosis) -> None:
    for layer, shape in enumerate(SHAPES):
        like = torch.empty(shape, dtype=diagnosis.dtype, device=diagnosis.device)
        got = ops.rademacher(
            like, seed=SEED, layer=layer, probe=PROBE, backend=diagnosis.backend
        )  # fmt: skip
        want = philox.signs(torch.empty(shape, dtype=torch.float64), SEED, layer, PROBE)
        diagnosis.compare("distance", f"signs of layer {layer}", got, want)


def _try_products(diagnosis: Diagnosis) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    rounded = [x.to(diagnosis.dtype) for x in drawn]
    hvps = [x.to(diagnosis.device).requires_grad_() for x in rounded]
    got = ops.probe_dot(hvps, seed=SEED, probe=PROBE, backend=diagnosis.backend)
    signs = [philox.signs(x.double(), SEED, i, PROBE) for i, x in enumerate(rounded)]
    want = torch.stack([(v * x.double()).sum() for v, x in zip(signs, rounded, strict=True)])
    diagnosis.compare("distance", "products with signs", got, want)
    for g, v in zip(torch.autograd.grad(got.sum(), hvps), signs, strict=True):
        diagnosis.compare("gradient", "products with signs", g, v)
