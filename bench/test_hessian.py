"""The Hessian kind against its rivals, each behind a gate: no time without a right result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import traces
from bench.cases import FORWARD, JOINT_CASES, PROBE_CASES, JointCase, ProbeCase
from lwkd.ops import backends, probe_dot, rademacher
from lwkd.ops.philox import signs


def stored(vs: list[Tensor], hvps: list[Tensor]) -> Tensor:
    """Signs that are kept: read once more than they need to be."""
    return torch.stack([(v * h).sum() for v, h in zip(vs, hvps, strict=True)])


def bernoulli(hvps: list[Tensor]) -> Tensor:
    """Signs made by torch and multiplied in, as PyHessian does it: other signs than ours."""
    return torch.stack([
        (torch.randint_like(h, high=2).mul_(2).sub_(1) * h).sum() for h in hvps
    ])  # fmt: skip


def _race(race: Any, case: ProbeCase) -> None:
    hvps = case.draw()
    with torch.no_grad():
        vs = [rademacher(h, seed=1, layer=i) for i, h in enumerate(hvps)]
    rivals: dict[str, Callable[[], Tensor]] = {
        "lwkd": partial(probe_dot, hvps, seed=1),
        "stored signs": partial(stored, vs, hvps),
        "torch's signs": partial(bernoulli, hvps),
    }
    if case.device == "cuda" and backends.CUDA.live and backends.TRITON.live:
        rivals["lwkd triton"] = partial(probe_dot, hvps, seed=1, backend="triton")
    if not race.quick:
        rivals["compile"] = partial(torch.compile(stored, dynamic=False), vs, hvps)
    want = torch.stack([
        (signs(h.cpu(), 1, i).double() * h.cpu().double()).sum() for i, h in enumerate(hvps)
    ])  # fmt: skip
    scale = torch.stack([h.cpu().double().norm() for h in hvps])
    for name, run in rivals.items():
        if name == "torch's signs":
            continue
        error = float(((run().cpu().double() - want).abs() / scale).max())
        limit = 1e-6 if name.startswith("lwkd") else 1e-3
        assert error <= limit, f"{name}: off by {error:.1e} > {limit}"
    moved = sum(h.numel() * h.element_size() for h in hvps)
    if case.device == "cpu":
        rivals["floor"] = lambda: torch.stack([h.sum() for h in hvps])
    calls = {name: [run] for name, run in rivals.items()}
    race(case, FORWARD, calls, moved=moved, info={"floor_is": "one read, torch.sum"})


def _cases(device: str) -> Any:
    cases = [case for case in PROBE_CASES if case.device == device]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@_cases("cpu")
def test_probes_cpu(cpu_benchmark: Any, case: ProbeCase) -> None:
    _race(cpu_benchmark, case.quick() if cpu_benchmark.quick else case)


@pytest.mark.gpu
@_cases("cuda")
def test_probes_gpu(gpu_benchmark: Any, case: ProbeCase) -> None:
    _race(gpu_benchmark, case.quick() if gpu_benchmark.quick else case)


# --- joint probes of a whole network -------------------------------------------------------------


@pytest.mark.parametrize("case", JOINT_CASES, ids=lambda case: case.name)
def test_joint_cpu(cpu_benchmark: Any, case: JointCase) -> None:
    """Both ways of one estimator: what differs is all that is not the product itself."""
    case = case.quick() if cpu_benchmark.quick else case
    problem = traces.problem_of(*traces.NETWORKS[case.network])
    ours = partial(traces.ours, problem, "hutchinson", case.samples, 0)
    graph, params = traces.first_order(problem)
    vs = [rademacher(p, seed=0, layer=i) for i, p in enumerate(params)]
    want = sum((v * h).sum() for v, h in zip(vs, _product(graph, params, vs), strict=True))
    error = float((ours()[0].sum() - want).abs() / want.abs())
    assert error <= 1e-3, f"traces and products differ by {error:.1e}"

    def products() -> None:
        own, own_params = traces.first_order(problem)
        for _ in range(case.samples):
            _product(own, own_params, vs)

    cpu_benchmark(
        case, FORWARD,
        {"lwkd": [ours], "PyHessian's way": [partial(traces.joint, problem, case.samples, 0)],
         "floor": [products]},
        info={"floor_is": "the graph and the products, of signs that are there"},
    )  # fmt: skip


def _product(graph: Any, params: list[Tensor], vs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(graph, params, vs, retain_graph=True)
