"""The error vocabulary: every message names the op, the argument, the layer, expected and got."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def message(op: str, argument: str, expected: object, got: object, *, layer: object = None) -> str:
    """Build the one form that every error of lwkd has.

    Args:
        op: The public name of what was called, without the package.
        argument: The argument that is wrong, as the caller wrote it.
        expected: What would have been right.
        got: What came instead.
        layer: Name or index of the layer concerned, if one is.

    Returns:
        One line of text.

    >>> message("ops.layer_discrepancy", "student", "4 tensors", "3", layer=2)
    'lwkd.ops.layer_discrepancy: student (layer 2): expected 4 tensors, got 3'
    """
    where = "" if layer is None else f" (layer {layer!r})"
    return f"lwkd.{op}: {argument}{where}: expected {expected}, got {got}"


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the names closest to ``name``, or nothing.

    >>> suggest("layer1.0.con1", ["layer1.0.conv1", "fc"])
    "; did you mean 'layer1.0.conv1'?"
    """
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def number(
    op: str, argument: str, value: object, expected: str, fits: Callable[[float], bool]
) -> None:
    """Raise unless ``value`` is a number of the range that ``expected`` describes.

    Args:
        op: As in `message`.
        argument: As in `message`.
        value: What came.
        expected: The range in words.
        fits: The range itself.

    Raises:
        TypeError: Not a number.
        ValueError: A number out of range; NaN is out of every range.

    >>> number("ops.layer_discrepancy", "p", "2", "a finite number ≥ 1", lambda v: v >= 1)
    Traceback (most recent call last):
    TypeError: lwkd.ops.layer_discrepancy: p: expected a finite number ≥ 1, got '2'
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(message(op, argument, expected, repr(value)))
    if not fits(value):
        raise ValueError(message(op, argument, expected, value))


def choice(op: str, argument: str, value: object, names: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``names``.

    Args:
        op: As in `message`.
        argument: As in `message`.
        value: What came.
        names: What it may be.

    Raises:
        ValueError: It is none of them.

    >>> choice("ops.layer_discrepancy", "reduction", "sum", ("mean", "none"))
    Traceback (most recent call last):
    ValueError: lwkd.ops.layer_discrepancy: reduction: expected one of ('mean', 'none'), got 'sum'
    """
    if not isinstance(value, str) or value not in names:
        raise ValueError(message(op, argument, f"one of {names}", repr(value)))


def flag(op: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is True or False.

    Args:
        op: As in `message`.
        argument: As in `message`.
        value: What came.

    Raises:
        TypeError: It is neither.

    >>> flag("ops.layer_discrepancy", "normalize", "no")
    Traceback (most recent call last):
    TypeError: lwkd.ops.layer_discrepancy: normalize: expected True or False, got 'no'
    """
    if not isinstance(value, bool):
        raise TypeError(message(op, argument, "True or False", repr(value)))
