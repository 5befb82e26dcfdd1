"""Which parameters of two networks count, and the modules that own them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from lwkd.factoring import Owner, flat, names, owners, supports
from lwkd.layers import LayerPairs
from lwkd.meters.blocks import SIDES
from lwkd.ops.checks import message, suggest


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
        if not supports(owner.module)
    ]
    if found:
        expected = "modules that factor, or that exclude= leaves out"
        got = f"{', '.join(found)}, whose gradients torch.func builds: parameters × batch numbers"
        warnings.warn(message(op, "pairs", expected, got), UserWarning, stacklevel=3)
