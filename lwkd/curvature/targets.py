"""What a trace is asked of: layers by name, their parameters, and the modules that own these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from lwkd.factoring import Owner, owners, parameters
from lwkd.names import named_layers, plain_name
from lwkd.ops.checks import message, suggest


class Target(NamedTuple):
    """A layer, its trained parameters, and every module of the network that has one of them."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    indices: tuple[int, ...]  # of the parameters' signs
    owners: tuple[Owner, ...]


def targets_of(op: str, network: nn.Module, layers: Sequence[str] | None) -> list[Target]:
    """The layers by name, or all modules that have trained parameters of their own.

    Args:
        op: The public name of the caller, for errors.
        network: Without wrappers.
        layers: Names of modules (everything inside them counts) or of parameters.

    Raises:
        TypeError: No list of names.
        ValueError: A name that is unknown or twice there, or a layer without trained parameters.
    """
    modules = {"": network, **named_layers(network)}
    known = {
        f"{name}.{n}".lstrip("."): p
        for name, module in modules.items()
        for n, p in module.named_parameters(recurse=False)
    }
    if layers is None:
        layers = [name for name, module in modules.items()
                  if any(p.requires_grad for p in module.parameters(recurse=False))]  # fmt: skip
    elif isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(message(op, "layers", "None or a list of names", repr(layers)))
    if not layers:
        raise ValueError(message(op, "layers", "a network with trained parameters", "none"))
    every = [(owner, parameters(owner.module))
             for owner in owners("", network, lambda _, p: p.requires_grad)]  # fmt: skip
    counter: dict[int, int] = {}
    found: list[Target] = []
    for asked in layers:
        name = plain_name(asked, [*modules, *known]) if isinstance(asked, str) else asked
        inside = _inside(op, name, modules, known)
        if not inside:
            expected = "a layer with trained parameters"
            raise ValueError(message(op, "layers", expected, "none", layer=asked))
        if name in [target.name for target in found]:
            raise ValueError(message(op, "layers", "every layer once", "twice", layer=asked))
        indices = tuple(counter.setdefault(id(p), len(counter)) for p in inside)
        own = _owning(every, {id(p) for p in inside})
        found.append(Target(name, tuple(inside), indices, tuple(own)))
    return found


def _owning(
    every: Sequence[tuple[Owner, dict[str, nn.Parameter]]], wanted: set[int]
) -> Iterator[Owner]:
    """The modules that have one of these parameters, each with those that it has."""
    for owner, named in every:
        own = frozenset(n for n in owner.wanted if id(named[n]) in wanted)
        if own:
            yield owner._replace(wanted=own)


def _inside(
    op: str, name: Any, modules: dict[str, nn.Module], known: dict[str, nn.Parameter]
) -> list[nn.Parameter]:
    """The trained parameters of a layer, each once."""
    if name in known:
        return [known[name]] if known[name].requires_grad else []
    if name not in modules:
        hint = suggest(name, [*modules, *known]) if isinstance(name, str) else ""
        expected = "names of modules or parameters"
        raise ValueError(message(op, "layers", expected, f"{name!r}{hint}"))
    return [p for p in modules[name].parameters() if p.requires_grad]


def every_parameter(targets: Sequence[Target]) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters of all layers, each once, and the layer indices of their signs."""
    by_index = {i: p for t in targets for i, p in zip(t.indices, t.parameters, strict=True)}
    return [by_index[i] for i in sorted(by_index)], sorted(by_index)
