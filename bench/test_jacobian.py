"""The Jacobian kind against its rivals, each behind a gate: no time without a right result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench import baselines
from bench.cases import (
    FACTORS_CASES,
    FORWARD,
    METER_CASES,
    ROWS_CASES,
    TRAINING,
    FactorsCase,
    MeterCase,
    RowsCase,
    resnet,
)
from lwkd import JacobianMeter, pair_layers
from lwkd.ops import ConvFactors, Factors, backends, layer_discrepancy
from lwkd.ops.philox import OUTPUTS, signs

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


# --- factors -----------------------------------------------------------------------------------

Gradients = Callable[[Sequence[Tensor]], Tensor]


def by_bmm(factors: Sequence[Tensor]) -> Tensor:
    """Every sample's gradient, built: [N, d_out, d_in]."""
    a, d = factors
    if a.dim() == 4:
        return d.flatten(2) @ F.unfold(a, 3, padding=1).mT
    return d.mT @ a


def by_vmap(factors: Sequence[Tensor]) -> Tensor:
    """The same as torch.func does it."""
    a, d = factors
    weight = a.new_zeros(d.shape[1 if a.dim() == 4 else 2], a.shape[1 if a.dim() == 4 else 2])
    if a.dim() == 4:
        weight = weight[..., None, None].expand(-1, -1, 3, 3)

    def scalar(w: Tensor, x: Tensor, g: Tensor) -> Tensor:
        y = F.conv2d(x[None], w, padding=1)[0] if x.dim() == 3 else F.linear(x, w)
        return (y * g).sum()

    return vmap(grad(scalar), in_dims=(None, 0, 0))(weight, a, d).flatten(1)


def built(gradients: Gradients, normalize: bool) -> Callable[..., Tensor]:
    def formula(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        s, t = gradients(student).flatten(1), gradients(teacher).flatten(1)
        return units(s, t) if normalize else difference(s, t)

    return formula


def stacked_norm(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The ghost norm of [S; −T], by T × T products: what per-sample clipping libraries compute."""
    (a, d), (b, e) = student, teacher
    if a.dim() == 4:
        a, b = (F.unfold(x, 3, padding=1).mT for x in (a, b))
        d, e = (x.flatten(2).mT for x in (d, e))
    x, y = torch.cat([a, b], 1), torch.cat([d, -e], 1)
    return ((x @ x.mT) * (y @ y.mT)).sum((1, 2)).mean()


def _ours_factors(case: FactorsCase, backend: str | None = None) -> Callable[..., Tensor]:
    def item(factors: Sequence[Tensor]) -> Any:
        if case.conv:
            return ConvFactors(*factors, (3, 3), (1, 1), (1, 1), (1, 1), 1, False)
        return Factors(*factors)

    return lambda s, t: layer_discrepancy(
        [item(s)], [item(t)], kind="jacobian", normalize=case.normalize, backend=backend
    )


class _Products:
    """The floor: the library's products of the contraction with the fewest operations."""

    def __init__(self, case: FactorsCase) -> None:
        flops = case.flops()
        self.name = min(flops, key=flops.__getitem__)
        rows = case.rows**2 if case.conv else case.rows
        inputs = case.inputs * (9 if case.conv else 1)
        # On a GPU all samples at once; on a CPU one, whose products stay in the cache.
        self._calls, batch = (1, case.samples) if case.device == "cuda" else (case.samples, 1)
        self._a, self._d = (
            torch.randn(batch, 2 * rows, k, device=case.device).to(case.dtype)
            for k in (inputs, case.outputs)
        )
        self._rows = rows

    def __call__(self) -> None:
        a, d, rows = self._a, self._d, self._rows
        for _ in range(self._calls):
            if self.name == "direct":
                torch.bmm(d.mT, a)
            else:
                for x in (a, d):
                    for i, j in ((0, 0), (0, 1), (1, 1)):
                        torch.bmm(x[:, i * rows : (i + 1) * rows],
                                  x[:, j * rows : (j + 1) * rows].mT)  # fmt: skip


def _exact_factors(inputs: Any, normalize: bool) -> Tensor:
    """The mean distance in float64, some samples at a time."""
    values = []
    for part in torch.arange(len(inputs.student[0])).split(4):
        s, t = (
            by_bmm([x[part].double() for x in side]).flatten(1)
            for side in (inputs.student, inputs.teacher)
        )
        if normalize:
            s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
        values.append((s - t).square().sum(1))
    return torch.cat(values).mean()


def in_float32(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Short dtypes lose the difference of gradients that are built in them."""
    return lambda *sides: formula(*([x.float() for x in side] for side in sides))


def _race_factors(race: Any, case: FactorsCase) -> None:
    inputs = case.draw(0)
    formulas = {
        "eager": built(by_bmm, case.normalize),
        "vmap(grad)": built(by_vmap, case.normalize),
    }
    if not case.normalize and not (case.conv and case.rows > 20):
        formulas["ghost norm"] = stacked_norm
    formulas = {name: in_float32(formula) for name, formula in formulas.items()}
    formulas = {"lwkd": _ours_factors(case), **formulas}
    if case.device == "cuda" and backends.CUDA.live and backends.TRITON.live:
        formulas["lwkd compiled"] = _ours_factors(case, "compiled")
    exact = _exact_factors(inputs, case.normalize)
    for name, formula in formulas.items():
        # Triton multiplies short dtypes in TF32.
        ours = 2e-6 if case.dtype == torch.float32 else 1e-3
        limit = ours if name.startswith("lwkd") else 2e-3
        error = float((formula(*inputs).double() - exact).abs() / exact)
        assert error <= limit, f"{name}: off by {error:.1e} > {limit}"
    floor = _Products(case)
    rivals = {name: [partial(f, *inputs)] for name, f in formulas.items()}
    race(case, FORWARD, {**rivals, "floor": [floor]}, info={"floor_is": f"products, {floor.name}"})


def _factors_cases(device: str) -> Any:
    cases = [case for case in FACTORS_CASES if case.device == device]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@_factors_cases("cpu")
def test_factors_cpu(cpu_benchmark: Any, case: FactorsCase) -> None:
    _race_factors(cpu_benchmark, case.quick() if cpu_benchmark.quick else case)


@pytest.mark.gpu
@_factors_cases("cuda")
def test_factors_gpu(gpu_benchmark: Any, case: FactorsCase) -> None:
    _race_factors(gpu_benchmark, case.quick() if gpu_benchmark.quick else case)


# --- whole networks ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        heads = self.qkv(self.norm1(x)).view(n, t, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, t, width)
        )
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Patches(nn.Module):
    """[N, 3, 32, 32] as [N, 64, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mT


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _network(name: str) -> nn.Module:
    if name == "resnet18":
        return resnet((2, 2, 2, 2), bottleneck=False, width=64, classes=10).eval()
    blocks = [Block(192) for _ in range(4)]
    return nn.Sequential(Patches(192), *blocks, Mean(), nn.Linear(192, 10)).eval()


def _per_sample(nets: Sequence[nn.Module], names: Sequence[str], x: Tensor, chunk: int) -> Tensor:
    """torch.func: both networks' per-sample gradients, a few samples at a time."""
    v = signs(torch.empty(len(x), 10, dtype=x.dtype), 0, OUTPUTS)
    total = torch.zeros(len(names), dtype=x.dtype)
    for part in torch.arange(len(x)).split(chunk):
        sides = []
        for net in nets:
            params = {n: p.detach() for n, p in net.named_parameters()}

            def scalar(p: Any, xs: Tensor, vs: Tensor, net: nn.Module = net) -> Tensor:
                return (functional_call(net, p, (xs[None],))[0] * vs).sum()

            sides.append(vmap(grad(scalar), in_dims=(None, 0, 0))(params, x[part], v[part]))
        for k, name in enumerate(names):
            s, t = (
                torch.cat(
                    [g.flatten(1) for n, g in side.items() if n.rpartition(".")[0] == name], 1
                )
                for side in sides
            )
            total[k] += (F.normalize(s) - F.normalize(t)).square().sum()
    return total / len(x)


@pytest.mark.parametrize("case", METER_CASES, ids=lambda case: case.name)
def test_meter_cpu(cpu_benchmark: Any, case: MeterCase) -> None:
    case = case.quick() if cpu_benchmark.quick else case
    torch.manual_seed(0)
    nets = [_network(case.network) for _ in "st"]
    names = [n for n, m in nets[0].named_modules() if list(m.parameters(recurse=False))]
    x = torch.randn(case.samples, 3, 32, 32)
    meter = JacobianMeter(pair_layers(*nets, names))
    plain = partial(_per_sample, nets, names, x, 4)
    error = float(((meter.measure(x) - plain()).abs() / plain()).max())
    assert error <= 1e-3, f"meter and torch.func differ by {error:.1e}"
    cpu_benchmark(
        case, FORWARD,
        {"lwkd": [partial(meter.measure, x)], "vmap(grad)": [plain],
         "floor": [partial(_passes, nets, x)]},
        info={"floor_is": "both networks' forward and backward by the activations"},
    )  # fmt: skip


def _passes(nets: Sequence[nn.Module], x: Tensor) -> None:
    """What cannot be spared: a forward and a backward of each network, no parameter's gradient."""
    for net in nets:
        for p in net.parameters():
            p.requires_grad_(False)
        xs = x.clone().requires_grad_()
        torch.autograd.grad(net(xs).sum(), xs)
        for p in net.parameters():
            p.requires_grad_(True)
