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
            left += [before for before, _ in node.next_functions]


def after_their_inputs(output: Tensor) -> Iterator[Any]:
    """Every node of a graph, once, after all that it reads from."""
    seen, left = set(), [(output.grad_fn, False)]
    while left:
        node, ready = left.pop()
        if ready:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            left.append((node, True))
            left += [(before, False) for before, _ in node.next_functions]


def uses(output: Tensor, wanted: set[int]) -> dict[int, int]:
    """How often each parameter enters the graph of the output."""
    found: dict[int, int] = {}
    for node in nodes(output):
        for before, _ in node.next_functions:
            key = id(getattr(before, "variable", None))
            if key in wanted:
                found[key] = found.get(key, 0) + 1
    return found
