"""Where the time of 64 tiny layers goes: the profile behind that row.

    python -m bench.overhead

Microseconds a call, the best of several batches. "Bare" is what torch takes by itself: an
autograd.Function over as many tensors whose forward and backward do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import CPU_CASES, draw
from lwkd.ops import layer_discrepancy, operands

CASE = next(case for case in CPU_CASES if case.small)


def best(call: Callable[[], object], calls: int = 200, batches: int = 15) -> float:
    """Microseconds a call."""
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * min(times)


def bare(kept: Tensor, grads: list[Tensor]) -> Any:
    """An autograd.Function that keeps one tensor and hands out ready gradients."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Tensor) -> Tensor:
            ctx.save_for_backward(kept, *xs)
            return torch.zeros(len(xs))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            assert ctx.saved_tensors
            return tuple(grads)

    return Bare


def rows() -> list[tuple[str, float]]:
    """(what, microseconds)."""
    student, teacher = draw(CASE, 0)
    leaves = [x.clone().requires_grad_() for x in student]
    nothing = [x[:, :, :0] for x in student]
    length = len(student)
    layout, space = [1, 0, 0, 0] * length, [1, 8, 8] * length
    op, back = torch.ops.lwkd.attention.default, torch.ops.lwkd.attention_backward.default

    def forward(s: list[Tensor], t: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return op(s, t, [], layout, layout, 2.0, 0, 0.5, True)

    _, maps = forward(student, teacher)
    grad, layers, sides = torch.ones(length), list(range(length)), [0] * length

    def backward() -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return back(grad, student, [], maps, layers, sides, layout, space, 2.0, 0, 0.5)

    function = bare(maps, [torch.empty_like(x) for x in student])

    def trained(f: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f().sum(), leaves)

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: layer_discrepancy(student, teacher),
        "  of it: checks of 128 operands": lambda: operands.check_pairs("", student, teacher),
        "  of it: the op, its kernels included": lambda: forward(student, teacher),
        "    of it: to C++ and back, with nothing to do": lambda: forward(nothing, nothing),
        "forward and backward": trained(lambda: layer_discrepancy(leaves, teacher)),
        "  of it: bare autograd, 64 leaves": trained(lambda: function.apply(*leaves)),
        "  of it: the op's backward, 64 gradients allocated, kernels included": backward,
    }
    return [(what, best(call)) for what, call in calls.items()]


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"{CASE.title}, {threads} thread(s)")
        for what, microseconds in rows():
            print(f"  {what:<72}{microseconds:7.0f} µs")
