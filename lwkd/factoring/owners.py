"""The modules of a network that own parameters, and which of these count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lwkd.factoring import modules as known
from lwkd.factoring.sums import add
from lwkd.ops.factors import Item


class Owner(NamedTuple):
    """A module with parameters inside a layer, and which of them count."""

    path: str  # within the layer, "" for the layer itself
    name: str  # within the network, for errors
    module: nn.Module
    wanted: frozenset[str]


def owners(
    layer: str, module: nn.Module, counts: Callable[[str, nn.Parameter], bool], *,
    apart: bool = False,
) -> list[Owner]:  # fmt: skip
    """The modules of a layer that have parameters that count, in order.

    Some stand for everything inside them: multi-head attention, and what does not factor.

    Args:
        layer: The layer's name.
        module: The layer.
        counts: Whether a parameter counts, by its name within the layer.
        apart: What does not factor stands for its own parameters alone, where it has modules
            inside: for callers that see whether these were called.
    """
    found: list[Owner] = []

    def visit(path: str, m: nn.Module) -> None:
        own = dict(m.named_parameters(recurse=False))
        inside = known.parameters(m) if own or hasattr(m, "parametrizations") else {}
        start = f"{path}." if path else ""
        alone = apart and known.container(m)
        if alone:
            inside = own
        wanted = frozenset(n for n, p in inside.items() if counts(start + n, p))
        if wanted:
            name = ".".join(part for part in (layer, path) if part)
            found.append(Owner(path, name, m, wanted))
        if alone or not inside or not known.whole(m):
            for child, inner in m.named_children():
                visit(start + child, inner)

    visit("", module)
    return found


def flat(layers: Sequence[Sequence[Owner]]) -> list[Owner]:
    """All modules of all layers."""
    return [owner for layer in layers for owner in layer]


def by_parameter(modules: Sequence[Owner], items: Sequence[Mapping[str, Item]]) -> dict[str, Item]:
    """The items of one layer by parameter, what is tied within the layer added together."""
    shared: dict[int, tuple[str, list[Item]]] = {}
    for owner, found in zip(modules, items, strict=True):
        own = known.parameters(owner.module)
        for n, item in found.items():
            name = f"{owner.path}.{n}" if owner.path else n
            shared.setdefault(id(own[n]), (name, []))[1].append(item)
    return {name: add(parts) for name, parts in shared.values()}


def names(modules: Collection[Owner]) -> set[str]:
    """The parameters that count, by their names within the layer."""
    return {f"{o.path}.{n}" if o.path else n for o in modules for n in o.wanted}
