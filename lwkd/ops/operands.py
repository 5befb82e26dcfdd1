"""What every kind asks of its operands, checked before any kernel is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.ops.checks import message

DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def check_list(op: str, argument: str, xs: Sequence[Tensor]) -> None:
    """Raise unless ``xs`` is a non-empty list of dense floating-point tensors on one device."""
    if not isinstance(xs, (list, tuple)):
        expected = "a list of tensors, one a layer"
        raise TypeError(message(op, argument, expected, type(xs).__name__))
    if not xs:
        raise ValueError(message(op, argument, "at least one tensor", "an empty list"))
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(message(op, argument, "a tensor", type(x).__name__, layer=i))
        if x.dtype not in DTYPES:
            expected = "float64, float32, float16 or bfloat16"
            raise TypeError(message(op, argument, expected, x.dtype, layer=i))
        if x.layout != torch.strided:
            raise TypeError(message(op, argument, "a dense tensor", x.layout, layer=i))
        if x.device != xs[0].device:
            expected = f"a tensor on {xs[0].device}, as layer 0"
            raise ValueError(message(op, argument, expected, x.device, layer=i))


def check_pairs(op: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raise unless the two lists pair up: same length, one device, one batch size."""
    check_list(op, "student", student)
    check_list(op, "teacher", teacher)
    if len(student) != len(teacher):
        expected = f"{len(student)} tensors, as many as student"
        raise ValueError(message(op, "teacher", expected, len(teacher)))
    if student[0].device != teacher[0].device:
        expected = f"tensors on {student[0].device}, as student's"
        raise ValueError(message(op, "teacher", expected, teacher[0].device))
    for argument, xs in (("student", student), ("teacher", teacher)):
        for i, x in enumerate(xs):
            if x.dim() == 0 or x.shape[0] != student[0].shape[0]:
                n = student[0].shape[0] if student[0].dim() else "N"
                expected = f"batch size {n}, as student's layer 0"
                raise ValueError(message(op, argument, expected, list(x.shape), layer=i))
