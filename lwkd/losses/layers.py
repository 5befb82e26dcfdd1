"""The layers that a loss compares, for `pair_layers` and for its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lwkd.ops.checks import message

Layers = list[str] | dict[str, str] | None


def layers_of(op: str, layers: Any) -> Layers:
    """Check the argument ``layers`` of a loss.

    Args:
        op: The public name of the loss.
        layers: None, names, or a mapping from the student's names to the teacher's.

    Raises:
        ValueError: No name at all.
        TypeError: None of these.

    >>> layers_of("losses.AttentionTransfer", ("layer3", "layer4"))
    ['layer3', 'layer4']
    """
    if layers is None:
        return None
    expected = "names of layers, or a dict from the student's to the teacher's"
    if isinstance(layers, str) or not isinstance(layers, (Mapping, Sequence)):
        raise TypeError(message(op, "layers", expected, repr(layers)))
    names = [*layers, *layers.values()] if isinstance(layers, Mapping) else list(layers)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(message(op, "layers", expected, repr(layers)))
    if not names:
        raise ValueError(message(op, "layers", "one name at least", repr(layers)))
    return dict(layers) if isinstance(layers, Mapping) else names


def check_count(op: str, layers: Layers, **sides: Any) -> None:
    """Raise unless every side is a list of as many activations as there are layers.

    Args:
        op: The public name of the loss.
        layers: From `layers_of`; None: any number.
        **sides: What came, by the argument's name.

    Raises:
        ValueError: A list of another length, or no list.

    >>> check_count("losses.DELTA", ["layer4"], student=[])
    Traceback (most recent call last):
    ValueError: lwkd.losses.DELTA: student: expected a list of 1, one for each of ['layer4'], got 0
    """
    if layers is None:
        return
    for side, xs in sides.items():
        if not isinstance(xs, (list, tuple)) or len(xs) != len(layers):
            got = len(xs) if isinstance(xs, (list, tuple)) else type(xs).__name__
            expected = f"a list of {len(layers)}, one for each of {list(layers)}"
            raise ValueError(message(op, side, expected, got))
