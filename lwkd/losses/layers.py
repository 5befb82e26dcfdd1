"""The layers that a loss compares, for `pair_layers` and for its errors, and their channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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


def check_channel_dim(op: str, channel_dim: object) -> None:
    """Raise unless ``channel_dim`` is None or an int other than 0, the batch's.

    >>> check_channel_dim("losses.DELTA", 0)
    Traceback (most recent call last):
    ValueError: lwkd.losses.DELTA: channel_dim: expected None or an int but 0, got 0
    """
    if channel_dim is not None and (type(channel_dim) is not int or channel_dim == 0):
        raise ValueError(message(op, "channel_dim", "None or an int but 0", repr(channel_dim)))


def channel_axis(
    op: str, argument: str, x: Tensor, channel_dim: int | None, layer: object = None
) -> int:
    """Return the dimension of an activation's channels, counted from the front.

    Args:
        op: The public name of the loss.
        argument: Whose activation it is, for errors.
        x: [N, C], [N, C, *space] or tokens [N, T, C].
        channel_dim: As the caller has said; None: 1, where x has not three dimensions.
        layer: Whose output it is, for errors.

    Raises:
        ValueError: Three dimensions, of which nothing was said, or no such dimension.

    >>> import torch
    >>> channel_axis("losses.DELTA", "student", torch.rand(2, 7, 4), -1)
    2
    """
    if channel_dim is None and x.dim() == 3:
        expected = "an int for three-dimensional activations (1: [N, C, L], -1: tokens [N, T, C])"
        raise ValueError(message(op, "channel_dim", expected, None, layer=layer))
    dim = 1 if channel_dim is None else channel_dim
    if not -x.dim() < dim < x.dim():
        expected = f"a tensor with a batch, and channels in dimension {dim}"
        raise ValueError(message(op, argument, expected, list(x.shape), layer=layer))
    return dim % x.dim()
