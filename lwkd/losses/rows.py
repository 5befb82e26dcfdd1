"""Rows of Jacobians by the input, for the losses that are differentiated a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.ops.checks import message


def check_inputs(op: str, inputs: Any) -> None:
    """Raise unless this is a floating tensor [N, ...] that requires a gradient."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs)
        raise TypeError(message(op, "inputs", "a floating tensor [N, ...]", got))
    if not inputs.requires_grad:
        expected = "a tensor that requires a gradient (inputs.requires_grad_() before the forward)"
        raise RuntimeError(message(op, "inputs", expected, "one that does not"))


def input_rows(
    op: str, argument: str, value: Tensor, inputs: Tensor, *, graph: bool, layer: int | None = None
) -> Tensor:
    """Return ∂value/∂inputs, [N, ...]; its graph is kept only where it will be differentiated."""
    row = None
    if value.requires_grad:
        with torch.autocast(inputs.device.type, enabled=False):  # in the dtypes of the forward
            (row,) = torch.autograd.grad(
                value, inputs, create_graph=graph, retain_graph=True, allow_unused=True
            )
    if row is None:
        expected = "what was computed from inputs, with gradients on"
        got = "a tensor that does not come from it"
        raise RuntimeError(message(op, argument, expected, got, layer=layer))
    return row


def check_twice(op: str, argument: str, rows: Sequence[Tensor]) -> None:
    """Raise where the rows have no derivative, which torch would say in the backward pass only."""
    if torch.compiler.is_compiling():
        return
    seen: set[Any] = set()
    left = [row.grad_fn for row in rows]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    got = ""
    if "CompiledFunctionBackwardBackward" in names:
        got = "one that torch.compile has compiled"
    elif names & {"torch::autograd::NotImplemented", "torch::autograd::Error"}:
        fused = any("ScaledDotProduct" in name for name in names)
        got = "fused attention" if fused else "an operation whose derivative has none"
    if got:
        expected = "a network that can be differentiated twice (attention can in a forward under "
        expected += "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        raise RuntimeError(message(op, argument, expected, got))


def checked_target(op: str, target: Any, outputs: Tensor) -> Tensor:
    """Return class indices [N] of outputs [N, C], or raise where they are none."""
    n, classes = outputs.shape
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or list(target.shape) != [n]:
        shown = isinstance(target, Tensor)
        got = f"{target.dtype} {list(target.shape)}" if shown else repr(target)
        raise ValueError(message(op, "target", f"class indices int64 [{n}]", got))
    if target.device != outputs.device:
        expected = f"a tensor on {outputs.device}, as the outputs"
        raise ValueError(message(op, "target", expected, target.device))
    if target.device.type == "cpu" and n and not torch.compiler.is_compiling():
        low, high = int(target.min()), int(target.max())  # a GPU would have to be waited for
        if low < 0 or high >= classes:
            expected = f"class indices in [0, {classes})"
            raise ValueError(message(op, "target", expected, f"{low} to {high}"))
    return target
