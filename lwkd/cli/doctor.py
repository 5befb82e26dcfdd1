"""Run every backend on every device and in every dtype, and compare to float64.

Distances ("l2" and "js", and of Jacobian rows and factors), gradients and maps, in several layouts,
against the definition written out a second time. An error of more than the tolerance, a value that
is not finite, a backend that raises: exit code 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lwkd import ops
from lwkd.cli import doctor_hessian, doctor_jacobian, table
from lwkd.cli.definition import CASES, Case, Sides, distance, layout
from lwkd.cli.info import why_not
from lwkd.ops import backends

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DIVERGENCES = ("l2", "js")
# Relative to the largest entry of what is compared. Everything is accumulated in float32 or
# better, so that one figure holds for all dtypes but float64; gradients are then rounded once.
FLOAT64, FLOAT32 = 5e-13, 4e-6


@dataclass
class Diagnosis:
    """What one backend did on one device in one dtype.

    Attributes:
        worst: Largest error over tolerance of "distance", "gradient" and "map"; inf for a value
            that is not finite.
        checks: How many comparisons were made.
        faults: What failed, in words.
    """

    backend: str
    device: str
    dtype: torch.dtype
    worst: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("distance", "gradient", "map"), 0.0)
    )
    checks: int = 0
    faults: list[str] = field(default_factory=list)

    def compare(self, what: str, where: str, got: Tensor, want: Tensor) -> None:
        """Record the error of ``got`` [any dtype, device] against ``want`` [float64, CPU]."""
        self.checks += 1
        want = want.detach()
        if got.shape != want.shape:
            self.worst[what] = math.inf
            self.faults.append(f"{where}: {what} of shape {list(got.shape)}")
            return
        scale = float(want.abs().max()) if want.numel() else 0.0
        tolerance = (FLOAT64 if self.dtype == torch.float64 else FLOAT32) * scale
        kind = torch.finfo(got.dtype)
        if what == "gradient":
            tolerance += kind.eps / 2 * scale + kind.smallest_normal * kind.eps
        error = (got.detach().double().cpu() - want).abs()
        worst = float(error.max()) if error.numel() else 0.0
        share = worst / max(tolerance, 1e-300) if math.isfinite(worst) else math.inf
        self.worst[what] = max(self.worst[what], share)
        if share > 1:
            self.faults.append(f"{where}: {what} off by {worst:.2g}, allowed {tolerance:.2g}")

    @contextmanager
    def catching(self, where: str) -> Iterator[None]:
        """Record what the block raises."""
        try:
            yield
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            self.faults.append(f"{where}: {type(error).__name__}: {text}")

    def expect(self, where: str, holds: bool) -> None:
        """Record a property that must hold exactly."""
        self.checks += 1
        if not holds:
            self.faults.append(where)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m lwkd doctor``."""
    parser.add_argument("-v", "--verbose", action="store_true", help="list every fault, not ten")


def main(args: argparse.Namespace) -> int:
    """Examine everything that is live; return 1 if anything is wrong."""
    places = list(live())
    with table.progress("examining", len(places) * len(DTYPES)) as tick:
        diagnoses = []
        for backend, device in places:
            for dtype in DTYPES:
                diagnoses.append(examine(backend, device, dtype))
                tick()
    _report(diagnoses)
    faults = [
        f"{d.backend} on {d.device}, {_short(d.dtype)}: {f}" for d in diagnoses for f in d.faults
    ]
    shown = faults if args.verbose else faults[:10]
    print("".join(f"\n  {fault}" for fault in shown))
    if len(faults) > len(shown):
        print(f"  ... and {len(faults) - len(shown)} more (--verbose)")
    checks = sum(d.checks for d in diagnoses)
    print(f"FAILED: {len(faults)} of {checks} checks" if faults else f"all {checks} checks passed")
    return 1 if faults else 0


def live() -> Iterator[tuple[str, str]]:
    """Yield every (backend, device) that can be asked for here."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for backend in backends.BACKENDS:
            if not why_not(backend, device.split(":")[0], "attention"):
                yield backend, device


def examine(backend: str, device: str, dtype: torch.dtype) -> Diagnosis:
    """Try every case; what a backend raises is a fault like any other."""
    diagnosis = Diagnosis(backend, device, dtype)
    for case in CASES:
        for divergence in DIVERGENCES:
            where = f"{case.name}, {divergence}"
            with diagnosis.catching(where):
                _try(diagnosis, where, case, divergence)
    with diagnosis.catching("maps"):
        _try_maps(diagnosis)
    with diagnosis.catching("exact values"):
        _try_exact(diagnosis)
    doctor_jacobian.examine(diagnosis)
    doctor_hessian.examine(diagnosis)
    return diagnosis


def _try(diagnosis: Diagnosis, where: str, case: Case, divergence: str) -> None:
    """Distances and gradients of one case, per sample and averaged."""
    values = case.values()
    operands, leaves = _operands(diagnosis, values, case.layouts)
    xs, exact_xs = operands[0] + operands[1], leaves[0] + leaves[1]
    views = [
        layout(name, v).view for name, vs in zip(case.layouts, values, strict=True) for v in vs
    ]
    masks = case.masks()
    options = {"divergence": divergence, "beta": 0.3, **case.options}
    want = torch.stack(
        [
            distance(s, t, case.power, divergence, 0.3, mask)
            for s, t, mask in zip(*leaves, masks or [None] * len(leaves[0]), strict=True)
        ]
    )
    if masks is not None:
        options["mask"] = [None if m is None else m.to(diagnosis.device) for m in masks]
    for reduction in ("none", "mean"):
        got = ops.layer_discrepancy(
            *operands, reduction=reduction, backend=diagnosis.backend, **options
        )
        target = want if reduction == "none" else want.mean(1)
        diagnosis.compare("distance", where, got, target)
        # An expanded gradient: its strides are 0.
        weight = torch.linspace(1, 2, len(target), dtype=torch.float64)
        weight = weight[:, None].expand_as(target) if target.dim() == 2 else weight
        grads = torch.autograd.grad(got, xs, weight.to(got))
        exact = torch.autograd.grad(target, exact_xs, weight, retain_graph=True)
        for grad, e, view in zip(grads, exact, views, strict=True):
            diagnosis.compare("gradient", f"{where}, {reduction}", view(grad.cpu()), e)


def _try_maps(diagnosis: Diagnosis) -> None:
    (xs, _), (leaves, _) = _operands(diagnosis, CASES[0].values(), CASES[0].layouts)
    name = "lwkd" if diagnosis.backend == "compiled" else f"lwkd_{diagnosis.backend}"
    for p in (1.0, 1.5, 2.0):
        got = getattr(torch.ops, name).attention_maps(xs, [1] * len(xs), p)
        for m, x in zip(got, leaves, strict=True):
            diagnosis.compare("map", f"maps, p={p}", m, x.detach().abs().pow(p).sum(1))


def _try_exact(diagnosis: Diagnosis) -> None:
    """Equal operands are at a distance of exactly 0, and a NaN is not swallowed."""
    (xs, _), _ = _operands(diagnosis, CASES[0].values(), CASES[0].layouts)
    for divergence in DIVERGENCES:
        run = partial(ops.layer_discrepancy, xs, backend=diagnosis.backend, divergence=divergence)
        others = [x.detach().clone() for x in xs]
        zero = bool((run(others) == 0).all())
        diagnosis.expect(f"{divergence}: equal operands are not at 0", zero)
        others[0].view(-1)[-1] = math.nan
        nan = run(others).isnan().tolist()
        diagnosis.expect(
            f"{divergence}: a NaN went in, {nan} came out", nan == [True, False, False]
        )


def _operands(diagnosis: Diagnosis, values: Sides, names: tuple[str, str]) -> tuple[Sides, Sides]:
    """Return what the backend gets, and the same rounded values as float64 leaves."""
    operands: Sides = ([], [])
    leaves: Sides = ([], [])
    for side, name in enumerate(names):
        for value in values[side]:
            rounded = value.to(diagnosis.dtype)
            stored = layout(name, value).store(rounded.to(diagnosis.device))
            operands[side].append(stored.detach().requires_grad_())
            leaves[side].append(rounded.double().requires_grad_())
    return operands, leaves


def _report(diagnoses: list[Diagnosis]) -> None:
    rows = [
        (
            d.backend,
            d.device,
            _short(d.dtype),
            str(d.checks),
            *(f"{d.worst[k]:.3f}" for k in ("distance", "gradient", "map")),
            "FAILED" if d.faults else "ok",
        )
        for d in diagnoses
    ]
    table.show(
        ("backend", "device", "dtype", "checks", "distance", "gradient", "map", ""),
        rows,
        title="worst error over tolerance, against float64 (1 is the limit)",
        align="lllrrrrl",
    )
    there = set(live())
    for backend in backends.BACKENDS:
        for device in ("cpu", "cuda"):
            if not any(b == backend and d.startswith(device) for b, d in there):
                print(
                    f"not examined: {backend} on {device}: {why_not(backend, device, 'attention')}"
                )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
