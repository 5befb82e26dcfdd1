"""How long until the trace of every layer's Hessian block is known to 5 %, by method.

    python -m bench.traces --record bench/results/traces/hessian.jsonl
    python -m bench.traces --show bench/results/traces/hessian.jsonl

A method's probes cost time and have a variance, layer by layer: a relative standard error of 5 %
takes variance / (0.05 · trace)² of them, and one at least, after what comes before the first (a
graph, a test). Methods of one estimator have one variance, whoever draws its probes: it is pooled
over their samples, so that chance makes none of them faster. The traces themselves are exact where
outputs are linear in the layers, else the mean of 32 probes of the least noisy method. Methods of
other libraries are measured where these are installed (PyHessian, curvlinops, BackPACK).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from math import sqrt
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.conftest import _processor
from bench.test_jacobian import _network
from bench.transfer import rows
from lwkd import hessian_trace

WANTED = 0.05  # relative standard error
ROUNDS = 3  # of one probe, to time what comes before it
AT_ONCE = 4  # probes, where several go through a second backward pass together
OURS = ("auto", "gauss_newton", "split", "block", "hutchinson")


class Problem(NamedTuple):
    """A network, its layers, and one batch."""

    title: str
    net: nn.Module
    layers: list[str]
    x: Tensor
    y: Tensor
    linear: bool  # outputs are linear in every layer's parameters

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y


class Method(NamedTuple):
    """Samples [K, L] of K probes; K = 0: exact, one row."""

    name: str
    run: Callable[[int, int], Tensor]  # (probes, seed)
    probes: int
    estimator: list[str]  # of every layer


# Title, samples, their shape.
NETWORKS = (
    ("MLP, 2.9 M, ReLU", 64, (784,)),
    ("ResNet-18, 32², BatchNorm in eval mode, ReLU", 32, (3, 32, 32)),
    ("ViT d192 × 4, GELU", 8, (3, 32, 32)),
)


def problem_of(name: str, n: int, shape: tuple[int, ...]) -> Problem:
    torch.manual_seed(0)
    if name.startswith("MLP"):
        parts: list[nn.Module] = []
        for a, b in pairwise((784, 1024, 1024, 1024, 10)):
            parts += [nn.Linear(a, b), nn.ReLU()]
        net: nn.Module = nn.Sequential(*parts[:-1])
    else:
        net = _network("resnet18" if name.startswith("ResNet") else "vit")
    layers = [n for n, m in net.named_modules() if list(m.parameters(recurse=False))]
    x, y = torch.randn(n, *shape), torch.randint(10, (n,))
    return Problem(name, net, layers, x, y, "ReLU" in name)


# --- methods -------------------------------------------------------------------------------------


def ours(problem: Problem, estimator: str, probes: int, seed: int, chunk: int = 1) -> Tensor:
    return hessian_trace(
        problem.net, F.cross_entropy, problem.batch, problem.layers, estimator=estimator,
        probes=probes, seed=seed, chunk=chunk,
    ).samples  # fmt: skip


def first_order(problem: Problem) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The loss's gradients with their graph, and the parameters."""
    params = list(problem.net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(problem.net(problem.x), problem.y)
        return torch.autograd.grad(loss, params, create_graph=True), params


def joint(problem: Problem, probes: int, seed: int) -> Tensor:
    """Probes over all layers at once, as PyHessian makes them: one graph, a product a probe."""
    torch.manual_seed(seed)
    owned = dict(problem.net.named_parameters())
    grads, params = first_order(problem)
    samples = []
    for _ in range(probes):
        v = [torch.randint_like(p, high=2).mul_(2).sub_(1) for p in params]
        hv = torch.autograd.grad(grads, params, v, retain_graph=True)
        own = {n: (a * b).sum() for n, a, b in zip(owned, v, hv, strict=True)}
        samples.append([sum(own[n] for n in owned if n.rpartition(".")[0] == layer)
                        for layer in problem.layers])  # fmt: skip
    return torch.tensor(samples, dtype=torch.float64)


def curvlinops(problem: Problem, probes: int, seed: int) -> Tensor:
    """Its Hessian of one layer's parameters at a time, its own matrix–vector product."""
    from curvlinops import HessianLinearOperator

    torch.manual_seed(seed)
    columns = []
    with sdpa_kernel(SDPBackend.MATH):
        for layer in problem.layers:
            params = list(problem.net.get_submodule(layer).parameters(recurse=False))
            operator = HessianLinearOperator(
                problem.net, nn.CrossEntropyLoss(), params, [problem.batch],
                check_deterministic=False,
            )  # fmt: skip
            v = torch.randint(2, (operator.shape[1], probes)).float().mul_(2).sub_(1)
            columns.append((v * (operator @ v)).sum(0).double())
    return torch.stack(columns, 1)


def backpack(problem: Problem, extension: str, probes: int, seed: int) -> Tensor:
    """Its diagonals: DiagHessian is exact, DiagGGNMC draws one vector a sample and call."""
    from backpack import backpack as extending
    from backpack import extend
    from backpack.extensions import DiagGGNMC, DiagHessian

    torch.manual_seed(seed)
    net, loss = extend(problem.net), extend(nn.CrossEntropyLoss())
    found = []
    for _ in range(max(probes, 1)):
        diagonal = DiagHessian() if extension == "diag_h" else DiagGGNMC(mc_samples=1)
        with extending(diagonal):
            loss(net(problem.x), problem.y).backward()
        found.append([
            sum(getattr(p, extension).sum()
                for p in net.get_submodule(layer).parameters(recurse=False))
            for layer in problem.layers
        ])  # fmt: skip
        for p in net.parameters():
            p.grad = None
    return torch.tensor(found, dtype=torch.float64)


def methods(problem: Problem) -> list[Method]:
    there = importlib.util.find_spec
    # Elsewhere the Gauss–Newton trace is another number; here split has nothing left to split.
    own = [name for name in OURS if name != ("split" if problem.linear else "gauss_newton")]
    found = []

    def add(name: str, run: Callable[[int, int], Tensor], probes: int, estimator: str) -> None:
        every = [estimator] * len(problem.layers)
        found.append(Method(name, run, probes, _chosen(problem) if name == "lwkd auto" else every))

    for name in own:
        add(f"lwkd {name}", partial(ours, problem, name), 16, name)
    several = partial(ours, problem, "block", chunk=AT_ONCE)
    add(f"lwkd block, chunk={AT_ONCE}", several, 16, "block")
    if problem.linear:
        add("lwkd exact", lambda *_: _exact(problem)[None], 0, "exact")
    add("joint probes (PyHessian)", partial(joint, problem), 16, "hutchinson")
    if there("curvlinops"):
        probes = 4 if problem.linear else 16  # as long as ours where that is the comparison
        add("curvlinops, a block a layer", partial(curvlinops, problem), probes, "block")
    if there("backpack"):
        add("BackPACK DiagHessian", partial(backpack, problem, "diag_h"), 0, "exact")
        if problem.linear:
            run = partial(backpack, problem, "diag_ggn_mc")
            add("BackPACK DiagGGN-MC", run, 16, "gauss_newton by classes")
    return found


def _chosen(problem: Problem) -> list[str]:
    return hessian_trace(
        problem.net, F.cross_entropy, problem.batch, problem.layers, probes=1
    ).estimator  # fmt: skip


def _exact(problem: Problem) -> Tensor:
    return hessian_trace(
        problem.net, F.cross_entropy, problem.batch, problem.layers, exact=True
    ).mean  # fmt: skip


# --- the study -----------------------------------------------------------------------------------


def study(seeds: int) -> Iterator[rows.Row]:
    """A row a network and method; ``seeds``: how many times every method draws its probes."""
    for network in NETWORKS:
        problem = problem_of(*network)
        want = _exact(problem) if problem.linear else ours(problem, "auto", 32, 99).mean(0)
        for method in methods(problem):
            try:
                method.run(min(method.probes, 1), 0)  # warm
                one = _timed([partial(method.run, min(method.probes, 1), 0)] * ROUNDS)[0]
                every = [partial(method.run, method.probes, seed) for seed in range(seeds)]
                many, samples = _timed(every)
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                yield {"network": problem.title, "arm": method.name, "why": why}
                continue
            yield {"model": _processor(), "threads": torch.get_num_threads()} | _row(
                problem, method, torch.cat(samples), one, many, want
            )


def _timed(calls: list[Callable[[], Tensor]]) -> tuple[float, list[Tensor]]:
    """The median of their seconds, and what they return."""
    times, found = [], []
    for call in calls:
        start = time.perf_counter()
        found.append(call())
        times.append(time.perf_counter() - start)
    return median(times), found


def _row(
    problem: Problem, method: Method, samples: Tensor, one: float, many: float, want: Tensor
) -> rows.Row:
    """``one``, ``many``: seconds of one probe and of all, with what comes before the first."""
    off = ((samples.mean(0) - want).abs() / want.abs()).tolist()
    if method.probes == 0:
        spread, each, before = [0.0] * len(want), one, 0.0
    else:
        spread = (samples.std(0) / want.abs()).tolist()
        each = (many - one) / (method.probes - 1)
        before = max(one - each, 0.0)
    return {
        "network": problem.title, "arm": method.name, "seconds_before": before,
        "seconds_a_probe": each, "estimator": method.estimator, "draws": len(samples),
        "spread": [round(s, 4) for s in spread], "off": [round(o, 4) for o in off],
    }  # fmt: skip


class Time(NamedTuple):
    """To 5 % on every layer."""

    seconds: float
    probes: float
    spread: list[float]  # of every layer, pooled


def times(own: list[rows.Row]) -> dict[str, Time]:
    """How long each method of one network takes, of those that run."""
    ran = [r for r in own if "why" not in r]
    squares: dict[tuple[int, str], float] = {}
    draws: dict[tuple[int, str], int] = {}
    for r in ran:
        for key, s in zip(enumerate(r["estimator"]), r["spread"], strict=True):
            squares[key] = squares.get(key, 0.0) + (r["draws"] - 1) * s**2
            draws[key] = draws.get(key, 0) + r["draws"] - 1
    found = {}
    for r in ran:
        spread = [sqrt(squares[k] / max(draws[k], 1)) for k in enumerate(r["estimator"])]
        probes = max(1.0, (max(spread) / WANTED) ** 2)
        seconds = r["seconds_before"] + probes * r["seconds_a_probe"]
        found[r["arm"]] = Time(seconds, probes, spread)
    return found


def table(found: list[rows.Row]) -> str:
    """Return the times as Markdown; the last column: how many times as long as lwkd's auto."""
    lines = [
        "| network | method | ms before | ms a probe | "
        "relative std of a probe, best to worst layer | probes | "
        "time to 5 % on every layer | against `auto` |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for network in dict.fromkeys(r["network"] for r in found):
        own = [r for r in found if r["network"] == network]
        taken = times(own)
        for r in own:
            start = f"| {network} | {r['arm']} |"
            if "why" in r:
                why = r["why"].split(":")[0]
                lines.append(f"{start} – | – | – | – | does not run ({why}) | – |")
                continue
            t = taken[r["arm"]]
            lines.append(
                f"{start} {1e3 * r['seconds_before']:.0f} | {1e3 * r['seconds_a_probe']:.1f} | "
                f"{min(t.spread):.2f} to {max(t.spread):.2f} | {t.probes:,.0f} | "
                f"{_time(t.seconds)} | {t.seconds / taken['lwkd auto'].seconds:,.3g} × |"
            )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def main(arguments: Any = None) -> None:
    rows.main(__doc__.split("\n")[0], 3, study, table)


if __name__ == "__main__":
    main()
