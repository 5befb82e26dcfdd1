"""The attention kind against its rivals, each behind a gate: no time without a right result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cases import (
    CPU_CASES,
    GPU_CASES,
    GRAPH,
    STAGES,
    STEP_CASE,
    TRAINING,
    Case,
    Inputs,
    StepCase,
    draw,
    resnet,
)
from lwkd.layers import pair_layers
from lwkd.meters import AttentionMeter
from lwkd.ops import backends, layer_discrepancy
from lwkd.schedule import LayerwiseLR, param_groups_layerwise

Formula = baselines.Formula

# --- the rivals --------------------------------------------------------------------------------


def _ours(case: Case, backend: str | None = None) -> Formula:
    return lambda students, teachers, channel_dim: layer_discrepancy(
        students, teachers, channel_dim=channel_dim, divergence=case.divergence, backend=backend
    )


def _formulas(case: Case, quick: bool) -> dict[str, Formula]:
    """Ours first; others where their formula applies."""
    eager = baselines.eager(case.divergence)
    rivals = {"lwkd": _ours(case), "eager": eager}
    rivals["eager norm"] = baselines.eager(case.divergence, baselines.norms)
    if case.device == "cuda" and backends.CUDA.live and backends.TRITON.live:
        rivals["lwkd triton"] = _ours(case, "triton")
    if not quick:
        rivals["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if case.divergence == "l2" and case.channel_dim == 1:
        rivals.update(baselines.PEERS)
    return rivals


def _forward(formula: Formula, case: Case, inputs: Inputs) -> Sequence[Tensor]:
    with torch.no_grad():
        return formula(inputs.student, inputs.teacher, case.channel_dim)


def _training(formula: Formula, case: Case, inputs: Inputs) -> Sequence[Tensor]:
    """The gradients of the sum over layers with respect to the student."""
    d = formula(inputs.student, inputs.teacher, case.channel_dim)
    total = d.sum() if isinstance(d, Tensor) else sum(d[1:], d[0])
    return torch.autograd.grad(total, inputs.student)


# --- the gate ----------------------------------------------------------------------------------

# Relative, against float64 on the same inputs. All rivals accumulate in float32; the entropy form
# of js that eager code uses loses digits, and a gradient is rounded to the activations' dtype.
_DISTANCE = {"lwkd": 1e-4, "lwkd triton": 1e-4}
_DISTANCE_OTHERS = 2e-3
_GRADIENT = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
_GRADIENT_OURS = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


def _gate(case: Case, formulas: dict[str, Formula], inputs: Inputs, backward: bool) -> None:
    """Fail unless every formula gives what float64 gives, for the values and the gradients."""
    values = {name: _forward(f, case, inputs) for name, f in formulas.items()}
    grads = {}
    if backward:
        names = [n for n in formulas if n not in baselines.PEERS]
        grads = {n: _training(formulas[n], case, inputs) for n in names}
    for layer, (s, t) in enumerate(zip(inputs.student, inputs.teacher, strict=True)):
        rows, off, norm = [], dict.fromkeys(grads, 0.0), 0.0
        for part, d, reference in baselines.exact(case, s, t):
            rows.append(d)
            norm += float(reference.square().sum())
            for name, g in grads.items():
                off[name] += float((g[layer][part].double() - reference).square().sum())
        d, positions = torch.cat(rows), s[0].numel() // s.shape[case.channel_dim]
        for name, value in values.items():
            expected = baselines.CONVENTIONS.get(name, lambda d, _: d.mean())(d, positions)
            error = float(abs(value[layer].double() - expected) / expected)
            limit = _DISTANCE.get(name, _DISTANCE_OTHERS)
            assert error <= limit, f"{name}, layer {layer}: distance off by {error:.1e} > {limit}"
        for name, square in off.items():
            error = (square / norm) ** 0.5
            limits = _GRADIENT_OURS if name in _DISTANCE else _GRADIENT
            limit = limits[case.dtype]
            assert error <= limit, f"{name}, layer {layer}: gradient off by {error:.1e} > {limit}"


# --- the ops -----------------------------------------------------------------------------------


def _calls(
    case: Case, mode: str, formulas: dict[str, Formula], sets: Sequence[Inputs]
) -> dict[str, list[Callable[[], object]]]:
    run = _training if mode.startswith(TRAINING) else _forward
    return {name: [partial(run, f, case, x) for x in sets] for name, f in formulas.items()}


def _draw_sets(case: Case, mode: str, count: int) -> list[Inputs]:
    sets = [draw(case, seed) for seed in range(count)]
    for inputs in sets:
        for s in inputs.student:
            s.requires_grad_(mode.startswith(TRAINING))
    return sets


def _params(cases: Sequence[Any]) -> list[Any]:
    return [pytest.param(c, m, id=f"{c.name}-{m}") for c in cases for m in c.modes]


@pytest.mark.parametrize(("case", "mode"), _params(CPU_CASES))
def test_cpu(cpu_benchmark: Any, case: Case, mode: str) -> None:
    case = case.quick() if cpu_benchmark.quick else case
    backward = mode == TRAINING
    sets = _draw_sets(case, mode, 1)
    formulas = _formulas(case, cpu_benchmark.quick)
    _gate(case, formulas, sets[0], backward)
    floor = baselines.Floor(case, *sets[0], backward=backward)
    rivals = {**_calls(case, mode, formulas, sets), "floor": [floor]}
    cpu_benchmark(case, mode, rivals, moved=case.bytes(mode), info={"floor_is": str(floor)})


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "mode"), _params(GPU_CASES))
def test_gpu(gpu_benchmark: Any, case: Case, mode: str) -> None:
    case = case.quick() if gpu_benchmark.quick else case
    backward = mode.startswith(TRAINING)
    sets = _draw_sets(case, mode, gpu_benchmark.sets(case.bytes(mode)))
    formulas = _formulas(case, gpu_benchmark.quick)
    _gate(case, formulas, sets[0], backward)
    rivals = _calls(case, mode, formulas, sets)
    info = {"floor_is": "copy bandwidth"}
    if case.small:  # as few launches as can be: one pass over one buffer
        floors = [baselines.Floor(case, *x, backward=backward) for x in sets]
        rivals["floor"], info["floor_is"] = list(floors), f"launch: {floors[0]}"
    if mode.endswith(GRAPH):
        rivals = {name: [_captured(call) for call in calls] for name, calls in rivals.items()}
    gpu_benchmark(case, mode, rivals, moved=case.bytes(mode), info=info)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture the call in a CUDA graph; return its replay, which keeps the outputs alive."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# --- a whole training step ---------------------------------------------------------------------


class Step:
    """One step of distillation by logits; ``layerwise`` adds distances and rates, every step."""

    def __init__(self, case: StepCase, batch: tuple[Tensor, Tensor], *, layerwise: bool) -> None:
        torch.manual_seed(0)
        size = dict(width=case.width, classes=case.classes)
        options: dict[str, Any] = dict(device=case.device, memory_format=torch.channels_last)
        self._teacher = resnet((3, 4, 6, 3), bottleneck=True, **size).to(**options).eval()
        self._student = resnet((2, 2, 2, 2), bottleneck=False, **size).to(**options)
        self._batch = batch
        self._meter: Any = nullcontext()
        self.rates: LayerwiseLR | None = None
        groups: Any = self._student.parameters()
        rate: Any = 0.01
        if layerwise:
            pairs = pair_layers(self._student, self._teacher, STAGES)
            rate = torch.tensor(rate, device=case.device)
            groups = param_groups_layerwise(self._student, pairs, lr=rate, weight_decay=1e-4)
            self._meter = AttentionMeter(pairs)
        self.optimizer = torch.optim.SGD(
            groups, lr=rate, momentum=0.9, weight_decay=1e-4, fused=True
        )
        if layerwise:
            self.rates = LayerwiseLR(self.optimizer, pairs, policy="power")

    def __call__(self) -> Tensor:
        images, labels = self._batch
        with self._meter, torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                target = self._teacher(images)
            output = self._student(images)
            loss = F.cross_entropy(output, labels) + F.kl_div(
                F.log_softmax(output / 4, 1), F.log_softmax(target / 4, 1),
                reduction="batchmean", log_target=True,
            )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.rates is not None:
            self.rates.update(self._meter.discrepancy())
            self.rates.step()
        return loss.detach()


def make_steps(case: StepCase) -> dict[str, Step]:
    """The step with layer-wise rates, and the same with a uniform rate, on one batch."""
    images = torch.randn(case.samples, 3, case.side, case.side, device=case.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(case.classes, (case.samples,), device=case.device)
    batch = (images, labels)
    return {
        "lwkd": Step(case, batch, layerwise=True),
        "floor": Step(case, batch, layerwise=False),
    }


def check_rates(step: Step) -> None:
    """The gate of the step: it trains, and every layer has a rate of its own."""
    loss = [float(step()) for _ in range(3)][-1]
    assert math.isfinite(loss), f"the loss is {loss}"
    assert step.rates is not None
    assert not step.rates.skipped.any(), f"bad distances: {step.rates.skipped.tolist()}"
    assert len(step.rates.multipliers.unique()) > 1, "the rates are all the same"


def _peak_memory(step: Step) -> int:
    """Bytes that one step takes beyond those that stay."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _host_synchronisations(step: Step) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", STEP_CASE.modes)
def test_step(gpu_benchmark: Any, mode: str) -> None:
    case = STEP_CASE.quick() if gpu_benchmark.quick else STEP_CASE
    steps = make_steps(case)
    check_rates(steps["lwkd"])
    info: dict[str, Any] = {"floor_is": "the step with a uniform rate"}
    calls: dict[str, Callable[[], object]] = dict(steps)
    if mode.endswith(GRAPH):
        calls = {name: _captured(step) for name, step in steps.items()}
    else:
        memory = {name: _peak_memory(step) for name, step in steps.items()}
        info["extra_memory"] = memory["lwkd"] / memory["floor"] - 1
        info["host_synchronisations"] = _host_synchronisations(steps["lwkd"])
    gpu_benchmark(case, mode, {name: [call] for name, call in calls.items()}, info=info)
