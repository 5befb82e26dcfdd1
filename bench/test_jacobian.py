"""The Jacobian kind against its rivals, each behind a gate: no time without a right result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cases import ROWS_CASES, TRAINING, RowsCase
from lwkd.ops import backends, layer_discrepancy

Rows = Callable[[Tensor, Tensor], Tensor]


def units(s: Tensor, t: Tensor) -> Tensor:
    """‖s/‖s‖ − t/‖t‖‖², what one would write first; loses two digits of four at 1e-4 apart."""
    return (F.normalize(s.float(), dim=1) - F.normalize(t.float(), dim=1)).square().sum(1).mean()


def careful(s: Tensor, t: Tensor) -> Tensor:
    """The same with its digits: norms, c = ‖s‖/‖t‖, u = s − ct, (‖u‖² − x²)/(‖s‖·c‖t‖)."""
    s, t = s.float(), t.float()
    ns, nt = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (s, t))
    c = ns / nt
    u = s - c * t
    x = (u * (s + c * t)).sum(1) / (ns + c * nt).squeeze(1)
    return ((u.square().sum(1) - x.square()) / (ns * c * nt).squeeze(1)).mean()


def difference(s: Tensor, t: Tensor) -> Tensor:
    return (s.float() - t.float()).square().sum(1).mean()


def _formulas(case: RowsCase, quick: bool) -> dict[str, Rows]:
    """Ours first."""

    def ours(backend: str | None, s: Tensor, t: Tensor) -> Tensor:
        return layer_discrepancy(
            [s], [t], kind="jacobian", normalize=case.normalize, backend=backend
        )

    rivals: dict[str, Rows] = {"lwkd": partial(ours, None)}
    rivals["eager"] = careful if case.normalize else difference
    if case.normalize:
        rivals["eager norm"] = units
    if case.device == "cuda" and backends.CUDA.live and backends.TRITON.live:
        rivals["lwkd triton"] = partial(ours, "triton")
    if not quick:
        rivals["compile"] = torch.compile(rivals["eager"], fullgraph=True, dynamic=False)
    return rivals


def _run(formula: Rows, mode: str, s: Tensor, t: Tensor) -> Tensor:
    if mode == TRAINING:
        return torch.autograd.grad(formula(s, t).sum(), s)[0]
    with torch.no_grad():
        return formula(s, t)


def _gate(case: RowsCase, mode: str, formulas: dict[str, Rows], s: Tensor, t: Tensor) -> None:
    """Fail unless every formula gives what float64 gives, some samples at a time."""
    values, grads = [], []
    for part in torch.arange(case.samples).split(16):
        a, b = (x.detach()[part].double() for x in (s, t))
        a.requires_grad_()
        if case.normalize:
            d = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
        else:
            d = (a - b).square().sum(1)
        grads.append(torch.autograd.grad(d.sum() / case.samples, a)[0].to(s.dtype))
        values.append(d.detach())
    value, grad = torch.cat(values).mean(), torch.cat(grads)
    for name, formula in formulas.items():
        limit = 1e-5 if name.startswith("lwkd") else 2e-3
        error = float((_run(formula, "f", s, t).double() - value).abs().max() / value)
        assert error <= limit, f"{name}: distance off by {error:.1e} > {limit}"
        if mode == TRAINING:
            limit = max(limit, 2 * torch.finfo(s.dtype).eps)
            error = float((_run(formula, mode, s, t) - grad).norm() / grad.norm())
            assert error <= limit, f"{name}: gradient off by {error:.1e} > {limit}"


def _params(device: str) -> list[Any]:
    return [
        pytest.param(case, mode, id=f"{case.name}-{mode}")
        for case in ROWS_CASES
        for mode in case.modes
        if case.device == device
    ]


def _race(race: Any, case: RowsCase, mode: str, sets: int) -> None:
    inputs = [case.draw(seed) for seed in range(sets)]
    for x in inputs:
        x.student[0].requires_grad_(mode == TRAINING)
    formulas = _formulas(case, race.quick)
    _gate(case, mode, formulas, inputs[0].student[0], inputs[0].teacher[0])
    rivals: dict[str, list[Callable[[], object]]] = {
        name: [partial(_run, f, mode, x.student[0], x.teacher[0]) for x in inputs]
        for name, f in formulas.items()
    }
    info = {"floor_is": "copy bandwidth"}
    if case.device == "cpu":
        floor = baselines.Floor(case, *inputs[0], backward=mode == TRAINING)
        rivals["floor"], info["floor_is"] = [floor], str(floor)
    race(case, mode, rivals, moved=case.bytes(mode), info=info)


@pytest.mark.parametrize(("case", "mode"), _params("cpu"))
def test_rows_cpu(cpu_benchmark: Any, case: RowsCase, mode: str) -> None:
    _race(cpu_benchmark, case.quick() if cpu_benchmark.quick else case, mode, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "mode"), _params("cuda"))
def test_rows_gpu(gpu_benchmark: Any, case: RowsCase, mode: str) -> None:
    case = case.quick() if gpu_benchmark.quick else case
    _race(gpu_benchmark, case, mode, gpu_benchmark.sets(case.bytes(mode)))
