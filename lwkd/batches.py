"""What a batch may be: (inputs, target), or an iterable of such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lwkd.ops.checks import message


def batches_of(op: str, batch: Any, argument: str = "batch") -> Iterator[tuple[Any, Any]]:
    """(inputs, target), of one batch or of an iterable of such.

    A tuple of two is one batch, and so is a list of two that are not both tuples or lists: what a
    DataLoader makes.

    Raises:
        TypeError: Neither.
    """
    if _is_batch(batch):
        yield batch[0], batch[1]
        return
    expected = "(inputs, target) or an iterable of such"
    if isinstance(batch, (Tensor, str, dict)) or not hasattr(batch, "__iter__"):
        raise TypeError(message(op, argument, expected, type(batch).__name__))
    for item in batch:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(message(op, argument, expected, f"an item {type(item).__name__}"))
        yield item[0], item[1]


def _is_batch(batch: Any) -> bool:
    if isinstance(batch, tuple):
        return len(batch) == 2
    pair = isinstance(batch, list) and len(batch) == 2
    return pair and not all(isinstance(x, (tuple, list)) for x in batch)


def size_of(inputs: Any) -> int:
    """How many samples a batch has: the first tensor's length."""
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else 1
    values = inputs.values() if isinstance(inputs, dict) else inputs
    if isinstance(values, (tuple, list)) or not isinstance(inputs, (int, float, str)):
        for value in values:
            if isinstance(value, Tensor) and value.dim():
                return len(value)
    return 1
