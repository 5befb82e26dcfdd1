"""What an autograd graph consists of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nodes(*outputs: Tensor) -> Iterator[Any]:
    """Every node of a graph, once."""
    seen, left = set(), [x.grad_fn for x in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            left += [after for after, _ in node.next_functions]


def uses(output: Tensor, wanted: set[int]) -> dict[int, int]:
    """How often each parameter enters the graph of the output."""
    found: dict[int, int] = {}
    for node in nodes(output):
        for after, _ in node.next_functions:
            key = id(getattr(after, "variable", None))
            if key in wanted:
                found[key] = found.get(key, 0) + 1
    return found
