"""What a trace is asked of: layers by name, their parameters, and the modules that own these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


Numbers = Callable[[str, str], int]


def targets_of(
    op: str, network: nn.Module, layers: Sequence[str] | None, numbers: Numbers | None = None
) -> list[Target]:
    """The layers by name, or all modules that have trained parameters of their own.

    Args:
        op: The public name of the caller, for errors.
        network: Without wrappers.
        layers: Names of modules (everything inside them counts) or of parameters.
        numbers: The index of a parameter's signs, by the layer and its name in it; None: in order.

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
        layers = _default(modules)
    elif isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(message(op, "layers", "None or a list of names", repr(layers)))
    if not layers:
        raise ValueError(message(op, "layers", "a network with trained parameters", "none"))
    owning = owners("", network, lambda _, p: p.requires_grad, apart=True)
    every = [(owner, parameters(owner.module)) for owner in owning]
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
        for n, p in inside.items():
            if id(p) not in counter:
                counter[id(p)] = len(counter) if numbers is None else numbers(asked, n)
        own = _owning(every, {id(p) for p in inside.values()})
        indices = tuple(counter[id(p)] for p in inside.values())
        found.append(Target(name, tuple(inside.values()), indices, tuple(own)))
    return found


def _default(modules: dict[str, nn.Module]) -> list[str]:
    """Every module with trained parameters of its own, and no parameter twice.

    Multi-head attention and parametrized modules are one layer each. Of a module that has others
    with parameters inside (a transformer with a class token), its own are layers by their names.
    """
    found: list[str] = []
    covered: tuple[str, ...] = ()
    for name, module in modules.items():
        if name.startswith(covered):
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations"):
            covered += (f"{name}." if name else "",)
            found += [name] if trained else []
        elif own:
            found += (
                [name] if len(own) == len(trained) else [f"{name}.{n}".lstrip(".") for n in own]
            )
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
) -> dict[str, nn.Parameter]:
    """The trained parameters of a layer by their names in it, each once."""
    if name in known:
        return {"": known[name]} if known[name].requires_grad else {}
    if name not in modules:
        hint = suggest(name, [*modules, *known]) if isinstance(name, str) else ""
        expected = "names of modules or parameters"
        raise ValueError(message(op, "layers", expected, f"{name!r}{hint}"))
    return {n: p for n, p in modules[name].named_parameters() if p.requires_grad}


def every_parameter(targets: Sequence[Target]) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters of all layers, each once, and the layer indices of their signs."""
    by_index = {i: p for t in targets for i, p in zip(t.indices, t.parameters, strict=True)}
    return [by_index[i] for i in sorted(by_index)], sorted(by_index)
