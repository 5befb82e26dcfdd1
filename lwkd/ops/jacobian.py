"""The Jacobian kind: how far a student's Jacobian is from its teacher's, row by row.

Rows are given as they are, or (lwkd.ops.factors) by the factors of the gradient of a layer.

For layer l and sample n, with s and t the operands [N, ...] flattened behind the batch and
eps = 1e-12, every sum in float64:

    compare="difference", normalize=False    D[n] = Σ (s − t)²
    compare="difference", normalize=True     D[n] = ‖ s/max(‖s‖, eps) − t/max(‖t‖, eps) ‖²
                                                  = 2 − 2·Σst / (‖s‖‖t‖)    from eps on
    compare="norms"                          D[n] = ((‖s‖ − ‖t‖)/(‖s‖ + ‖t‖))²

A student starts as a copy of its teacher: in float32 the middle line is wrong by a factor of 300
where the two are 1e-4 apart. In float64 the products of float32 numbers are exact, and what is left
of 2 − 2cos at 1e-6 apart is good to about 1e-3. A row whose norm is below eps gets the gradient 0.
Source: Srinivas & Fleuret 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.ops import backends, factors, operands
from lwkd.ops import jacobian_reference as reference
from lwkd.ops.checks import choice, flag, message

# --- the boundary: every argument is checked here, once ----------------------------------------


def discrepancy(
    op: str,
    student: Sequence[Any],
    teacher: Sequence[Any],
    reduction: str,
    backend: str | None,
    *,
    normalize: bool = True,
    compare: str = "difference",
) -> Tensor:
    """Check the arguments of kind="jacobian" and call the op; see ops.layer_discrepancy."""
    if any(map(factors.is_item, (*_items(student), *_items(teacher)))):
        return factors.discrepancy(
            op, student, teacher, reduction, backend, normalize=normalize, compare=compare
        )
    flag(op, "normalize", normalize)
    choice(op, "compare", compare, tuple(reference.COMPARISONS))
    s_shapes, t_shapes = operands.check_pairs(op, student, teacher)
    for i, (s, t) in enumerate(zip(s_shapes, t_shapes, strict=True)):
        for argument, shape in (("student", s), ("teacher", t)):
            if len(shape) < 2:
                raise ValueError(
                    message(op, argument, "rows [N, ...]", f"shape {list(shape)}", layer=i)
                )
        if s != t and compare != "norms":
            expected = f"shape {list(s)}, as the student's (compare='norms' takes any)"
            raise ValueError(message(op, "teacher", expected, list(t), layer=i))
    namespace = ROWS.choose(op, backend, student[0].device)
    how = reference.how(normalize, compare)
    distance: Tensor = ROWS(namespace, student, teacher, how, reduction == "mean")[0]
    return distance


def _items(items: Any) -> Sequence[Any]:
    """What is in a list of items; nothing where it is none, which the checks will say."""
    return items if isinstance(items, (list, tuple)) and not factors.is_item(items) else ()


# --- fake, autograd ----------------------------------------------------------------------------


def _fake(
    student: Sequence[Tensor], teacher: Sequence[Tensor], how: int, mean: bool
) -> tuple[Tensor, Tensor]:
    x, length = student[0], len(student)
    shape = (length,) if mean else (length, x.shape[0])
    dtype = operands.compute_dtype(student, teacher)
    return x.new_empty(shape, dtype=dtype), x.new_empty(
        (length, x.shape[0], 3), dtype=torch.float64
    )


def _fake_backward(grad: Tensor, xs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


def _inputs(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [*student, *teacher]


def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, how, _ = args
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    sides = [(0, i) for i, x in enumerate(student) if x.requires_grad]
    sides += [(1, i) for i, x in enumerate(teacher) if x.requires_grad]
    both = (student, teacher)
    ctx.count = len(sides)
    ctx.options = ([i for _, i in sides], [side for side, _ in sides], how)
    # By "norms" the gradient of a row does not see the other row.
    others = [] if how == reference.NORMS else [both[1 - side][i] for side, i in sides]
    ctx.save_for_backward(output[1], *(both[side][i] for side, i in sides), *others)


def _backward(ctx: Any, namespace: str, grad: Tensor | None, _: None) -> Sequence[Tensor | None]:
    sums, *xs = ctx.saved_tensors
    if grad is None:
        return [None] * ctx.count
    grads: list[Tensor] = ROWS_BACKWARD(
        namespace, grad, xs[: ctx.count], xs[ctx.count :], sums, *ctx.options
    )
    return grads


def _backward_inputs(
    grad: Tensor, xs: Sequence[Tensor], others: Sequence[Tensor], sums: Tensor, *_: Any
) -> list[Tensor]:
    return [grad, *xs, *others, sums]


def _no_second_derivative(*_: Any) -> Sequence[Tensor | None]:
    raise RuntimeError(
        "lwkd.ops.layer_discrepancy: kind='jacobian' has no second derivative of its own; a loss "
        "that trains through Jacobian rows needs only its first: make the rows with "
        "torch.autograd.grad(..., create_graph=True)"
    )


ROWS = backends.Op(
    backends.Formula(
        "jacobian_rows(Tensor[] student, Tensor[] teacher, int how, bool mean) "
        "-> (Tensor distance, Tensor sums)",
        reference.rows, _fake, "jacobian.rows", _inputs, _save, _backward,
    )
)  # fmt: skip
ROWS_BACKWARD = backends.Op(
    backends.Formula(
        "jacobian_rows_backward(Tensor grad, Tensor[] xs, Tensor[] others, Tensor sums, "
        "int[] layers, int[] sides, int how) -> Tensor[]",
        reference.rows_backward, _fake_backward, "jacobian.rows_backward",
        _backward_inputs, lambda *_: None, _no_second_derivative,
    )
)  # fmt: skip
