"""Which parameters of two networks count, and the modules that own them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lwkd import factoring
from lwkd.layers import LayerPairs
from lwkd.meters.blocks import SIDES
from lwkd.ops.checks import message, suggest
from lwkd.ops.factors import Item


class Owner(NamedTuple):
    """A module with parameters inside a layer, and which of them count."""

    path: str  # within the layer, "" for the layer itself
    name: str  # within the network, for errors
    module: nn.Module
    wanted: frozenset[str]


def owners(
    layer: str, module: nn.Module, counts: Callable[[str, nn.Parameter], bool]
) -> list[Owner]:
    """The modules of a layer that have parameters that count, in order.

    Some stand for everything inside them: multi-head attention, and what does not factor.

    Args:
        layer: The layer's name.
        module: The layer.
        counts: Whether a parameter counts, by its name within the layer.
    """
    found: list[Owner] = []

    def visit(path: str, m: nn.Module) -> None:
        own = dict(m.named_parameters(recurse=False))
        inside = factoring.parameters(m) if own or hasattr(m, "parametrizations") else {}
        start = f"{path}." if path else ""
        wanted = frozenset(n for n, p in inside.items() if counts(start + n, p))
        if wanted:
            name = ".".join(part for part in (layer, path) if part)
            found.append(Owner(path, name, m, wanted))
        if not inside or not factoring.whole(m):
            for child, inner in m.named_children():
                visit(start + child, inner)

    visit("", module)
    return found


def _excluded(op: str, pairs: LayerPairs, exclude: Any) -> Callable[[str], bool]:
    """Whether a parameter is left out, by its name in its network."""
    good = isinstance(exclude, Collection) and not isinstance(exclude, str)
    if not good or not all(isinstance(name, str) for name in exclude):
        expected = "a list of names of modules or parameters"
        raise TypeError(message(op, "exclude", expected, repr(exclude)))
    starts = tuple(f"{name}." for name in exclude)
    known: set[str] = set()
    for net in (pairs.student, pairs.teacher):
        known.update(n for named in (net.named_modules(), net.named_parameters()) for n, _ in named)
    for name in exclude:
        if name not in known - {""}:
            expected = "names of modules or parameters of the student or the teacher"
            got = f"{name!r}{suggest(name, known)}"
            raise ValueError(message(op, "exclude", expected, got))
    return lambda name: f"{name}.".startswith(starts)


def paired(
    op: str, pairs: LayerPairs, exclude: Collection[str], *, norms: bool
) -> tuple[list[list[Owner]], list[list[Owner]]]:
    """The modules of every layer that have parameters that count, student's and teacher's.

    Those of the student count that are trained and not excluded, and the teacher's of their names.

    Args:
        op: The public name of the caller, for errors.
        pairs: The layers.
        exclude: Names of modules or parameters, of the student or the teacher.
        norms: The teacher's count whatever their names, unless excluded.

    Raises:
        TypeError: ``exclude`` is no list of strings.
        ValueError: An unknown name, a layer without parameters that count, or, without ``norms``,
            one whose parameters differ.
    """
    excluded = _excluded(op, pairs, exclude)
    sides: tuple[list[list[Owner]], list[list[Owner]]] = ([], [])

    def of_student(n: str, p: nn.Parameter) -> bool:
        left_out = excluded(f"{s_name}.{n}") or (not norms and excluded(f"{t_name}.{n}"))
        return p.requires_grad and not left_out

    def of_teacher(n: str, _: nn.Parameter) -> bool:
        return not excluded(f"{t_name}.{n}") if norms else n in wanted

    layers = zip(pairs.student_layers, pairs.teacher_layers, strict=True)
    for (s_name, student), (t_name, teacher) in layers:
        mine = owners(s_name, student, of_student)
        if not mine:
            expected = "a layer with parameters that are trained and not excluded"
            raise ValueError(message(op, "student", expected, "none", layer=s_name))
        wanted = names(mine)
        theirs = owners(t_name, teacher, of_teacher)
        if not theirs or (not norms and names(theirs) != wanted):
            expected = f"the student's parameters, {', '.join(sorted(wanted))}"
            got = ", ".join(n for n, _ in teacher.named_parameters()) or "none"
            raise ValueError(
                message(op, "teacher", f"{expected} (compare='norms' takes any)", got, layer=t_name)
            )
        sides[0].append(mine)
        sides[1].append(theirs)
    return sides


def say_what_does_not_factor(op: str, sides: Sequence[list[list[Owner]]]) -> None:
    """Warn of the modules whose gradients torch.func builds."""
    found = [
        f"{side}'s {owner.name!r} ({type(owner.module).__name__})"
        for side, layers in zip(SIDES, sides, strict=True)
        for owner in flat(layers)
        if not factoring.supports(owner.module)
    ]
    if found:
        expected = "modules that factor, or that exclude= leaves out"
        got = f"{', '.join(found)}, whose gradients torch.func builds: parameters × batch numbers"
        warnings.warn(message(op, "pairs", expected, got), UserWarning, stacklevel=3)


def flat(layers: Sequence[Sequence[Owner]]) -> list[Owner]:
    """All modules of all layers."""
    return [owner for layer in layers for owner in layer]


def by_parameter(modules: Sequence[Owner], items: Sequence[Mapping[str, Item]]) -> dict[str, Item]:
    """The items of one layer by parameter, what is tied within the layer added together."""
    shared: dict[int, tuple[str, list[Item]]] = {}
    for owner, found in zip(modules, items, strict=True):
        own = factoring.parameters(owner.module)
        for n, item in found.items():
            name = f"{owner.path}.{n}" if owner.path else n
            shared.setdefault(id(own[n]), (name, []))[1].append(item)
    return {name: factoring.add(parts) for name, parts in shared.values()}


def names(modules: Collection[Owner]) -> set[str]:
    """The parameters that count, by their names within the layer."""
    return {f"{o.path}.{n}" if o.path else n for o in modules for n in o.wanted}
