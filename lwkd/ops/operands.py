"""What every kind asks of its operands, checked before any kernel is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lwkd.ops.checks import message

DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def check_list(op: str, argument: str, xs: Sequence[Tensor]) -> list[torch.Size]:
    """Raise unless ``xs`` is a non-empty list of dense floating-point tensors on one device.

    Returns:
        Their shapes: asking a tensor for its shape once a call is what 64 layers can afford.
    """
    if not isinstance(xs, (list, tuple)):
        expected = "a list of tensors, one a layer"
        raise TypeError(message(op, argument, expected, type(xs).__name__))
    if not xs:
        raise ValueError(message(op, argument, "at least one tensor", "an empty list"))
    strided, device = torch.strided, getattr(xs[0], "device", None)
    for i, x in enumerate(xs):
        good = isinstance(x, Tensor) and x.dtype in DTYPES and x.layout is strided
        if not (good and x.device == device) or x.is_nested:
            _refuse(op, argument, x, i, device)
    return [x.shape for x in xs]


def _refuse(op: str, argument: str, x: object, layer: int, device: object) -> NoReturn:
    """Say what is wrong with one operand."""
    if not isinstance(x, Tensor):
        raise TypeError(message(op, argument, "a tensor", type(x).__name__, layer=layer))
    if x.dtype not in DTYPES:
        expected = "float64, float32, float16 or bfloat16"
        raise TypeError(message(op, argument, expected, x.dtype, layer=layer))
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(message(op, argument, "a dense tensor", got, layer=layer))
    expected = f"a tensor on {device}, as layer 0"
    raise ValueError(message(op, argument, expected, x.device, layer=layer))


def check_pairs(
    op: str, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Raise unless the two lists pair up: same length, one device, one batch size.

    Returns:
        The shapes of both.
    """
    shapes = check_list(op, "student", student), check_list(op, "teacher", teacher)
    if len(student) != len(teacher):
        expected = f"{len(student)} tensors, as many as student"
        raise ValueError(message(op, "teacher", expected, len(teacher)))
    if student[0].device != teacher[0].device:
        expected = f"tensors on {student[0].device}, as student's"
        raise ValueError(message(op, "teacher", expected, teacher[0].device))
    n = shapes[0][0][0] if shapes[0][0] else "N"
    for argument, sizes in zip(("student", "teacher"), shapes, strict=True):
        for i, size in enumerate(sizes):
            if not size or size[0] != n:
                expected = f"batch size {n}, as student's layer 0"
                raise ValueError(message(op, argument, expected, list(size), layer=i))
    return shapes


def compute_dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    """float64 where any operand is, else float32."""
    wide = any(x.dtype == torch.float64 for xs in lists for x in xs)
    return torch.float64 if wide else torch.float32
