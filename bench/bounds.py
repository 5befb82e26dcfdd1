"""What bounds the rows that miss their goal, on this CPU.

    python -m bench.bounds jacobian > bench/results/jacobian-bounds.txt
    python -m bench.bounds hessian > bench/results/hessian-bounds.txt

Of Jacobians, rows f+b and the small ViT; of Hessians, joint probes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import traces
from bench.cases import METER_CASES, ROWS_CASES
from bench.test_jacobian import _network, _passes, _per_sample
from lwkd import JacobianMeter, pair_layers
from lwkd.ops import layer_discrepancy, probe_dot, rademacher


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """The median, after one call that is not timed."""
    times = []
    run()
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def show(indent: int, what: str, value: float) -> None:
    print(f"{'  ' * indent}{what:<{76 - 2 * indent}}{value:8.2f} ms")


def rows() -> None:
    """A backward must read both rows and write a fresh one; the floor reads one, writes a kept."""
    case = next(c for c in ROWS_CASES if c.name == "rows")
    (s,), (t,) = case.draw(0)
    s.requires_grad_()
    kept = torch.empty_like(s)
    op = partial(layer_discrepancy, [s], [t], kind="jacobian")
    plain, other = s.detach(), t
    print(f"{case.title}, {torch.get_num_threads()} thread(s)")
    with torch.no_grad():
        show(1, "forward: both read", milliseconds(op, 31))
    show(1, "forward and backward", milliseconds(lambda: torch.autograd.grad(op().sum(), s), 31))
    show(2, "the floor's backward: one read, a kept one written",
         milliseconds(lambda: torch.mul(plain, 2.0, out=kept), 31))  # fmt: skip
    show(2, "a backward's traffic: both read, a kept one written",
         milliseconds(lambda: torch.add(plain, other, out=kept), 31))  # fmt: skip
    show(2, "the same, a fresh one written", milliseconds(lambda: torch.add(plain, other), 31))


def meter() -> None:
    """Both networks' passes are needed by any method."""
    case = next(c for c in METER_CASES if c.name == "meter-vit")
    torch.manual_seed(0)
    nets = [_network(case.network) for _ in "st"]
    names = [n for n, m in nets[0].named_modules() if list(m.parameters(recurse=False))]
    x = torch.randn(case.samples, 3, 32, 32)
    measure = JacobianMeter(pair_layers(*nets, names))
    compare, spent = measure._compare, [0.0]

    def timed(*args: Any) -> torch.Tensor:
        start = time.perf_counter()
        out = compare(*args)
        spent.append(time.perf_counter() - start)
        return out

    measure._compare = timed  # type: ignore[assignment]
    print(f"{case.title}, {torch.get_num_threads()} thread(s)")
    show(1, "torch.func, per-sample gradients of both", milliseconds(
        partial(_per_sample, nets, names, x, 4), 5))  # fmt: skip
    show(1, "measure", milliseconds(partial(measure.measure, x), 9))
    show(2, "a forward and a backward of each network, by the activations: not to be spared",
         milliseconds(partial(_passes, nets, x), 9))  # fmt: skip
    show(2, f"the comparison of {len(names)} layers", 1e3 * statistics.median(spent[1:]))


def probes() -> None:
    """A joint probe beside its product: what else there is, and what of it memory alone costs."""
    for title, n, shape in traces.NETWORKS:
        problem = traces.problem_of(title, n, shape)
        grads, params = traces.first_order(problem)
        indices = list(range(len(params)))

        def draw(params: list[Tensor] = params) -> list[Tensor]:
            return [rademacher(p.detach(), seed=0, layer=i) for i, p in enumerate(params)]

        vs = draw()

        def product(grads: Any = grads, params: Any = params, vs: Any = vs) -> Any:
            return torch.autograd.grad(grads, params, vs, retain_graph=True)

        found = [h.detach() for h in product()]
        way = {}
        for k in (1, 9):
            way[k] = milliseconds(
                partial(traces.ours, problem, "hutchinson", k, 0), 9 if n == 64 else 5
            )
        print(f"{title}, {sum(p.numel() for p in params) / 1e6:.1f} M parameters in {len(indices)} "
              f"tensors, N={n}, {torch.get_num_threads()} thread(s)")  # fmt: skip
        show(1, "a joint probe of hessian_trace, 8 more of them", (way[9] - way[1]) / 8)
        show(2, "its Hessian-vector product", milliseconds(product, 9))
        show(2, "its signs, in fresh memory", milliseconds(draw, 31))
        kept = [torch.empty_like(p) for p in params]
        show(3, "as much fresh memory filled", milliseconds(
            lambda like=params: [torch.ones_like(p) for p in like], 31))  # fmt: skip
        show(3, "as much kept memory filled", milliseconds(
            lambda own=kept: [x.fill_(1) for x in own], 31))  # fmt: skip
        show(2, "its inner products", milliseconds(partial(probe_dot, found, seed=0), 31))
        show(3, "as much memory read once", milliseconds(
            lambda own=found: [h.sum() for h in own], 31))  # fmt: skip
        show(1, "what comes before the first probe: the graph", way[1] - (way[9] - way[1]) / 8)


WHAT = {"jacobian": (rows, meter), "hessian": (probes,)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=WHAT)
    for part in WHAT[parser.parse_args().kind]:
        part()
