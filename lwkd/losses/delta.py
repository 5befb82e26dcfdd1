"""DELTA: keep a fine-tuned network's features near those of the network it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lwkd.losses.layers import channel_axis, check_channel_dim, check_count
from lwkd.losses.terms import LossTerms
from lwkd.ops.checks import choice, message, number

_OP = "losses.DELTA"


class DELTA(nn.Module):
    """Draw the features of a fine-tuned network to those of its source, channel by channel.

    With features F_l[n, c] of HW positions and C channels, F⁰_l those of the source network,

    ``total = α·Σ_l d_l``,  d_l = mean_n ½ Σ_c (C·w_{l,c}/HW)·‖F_l[n,c] − F⁰_l[n,c]‖²,

    w_l the weights of the layer's channels, Σ_c w_{l,c} = 1: how much each matters on the source
    network (:func:`lwkd.losses.channel_importance`), or 1/C. The paper's objective is the
    cross-entropy, this, and :class:`lwkd.losses.L2` of the new head with β = 0.01, trained with
    SGD, lr 0.01, momentum 0.9, batch 64; its code sums over the batch (``reduction="sum"``).
    Source: Li, Xiong, Wang, Rao, Liu, Chen & Huan 2019.

    Args:
        layers: Names of the L layers, as in :func:`lwkd.pair_layers`, with the weights [C] of their
            channels (a mapping), or without (a list: all channels count alike).
        alpha: α ≥ 0.
        reduction: "mean" or "sum" over the batch, of ``total``.
        channel_dim: Where the channels are. None means 1 for [N, C] and for four or more
            dimensions; three dimensions must say (1: [N, C, L], −1: tokens [N, T, C]).

    Attributes:
        layers: The names, for ``pair_layers(student, source, loss.layers)``. In the ``state_dict``
            the weights of layer "a.b" are "weights_a/b".

    Raises:
        ValueError: No layers, alpha, reduction or channel_dim out of range, weights that are not
            [C], not finite or negative.
        TypeError: alpha is no number, layers no names, weights no floating tensors.

    >>> loss = DELTA({"layer4": torch.tensor([0.7, 0.2, 0.1])}, alpha=0.01)
    >>> student = torch.rand(8, 3, 4, 4, requires_grad=True)
    >>> terms = loss([student], [torch.rand(8, 3, 4, 4)])
    >>> terms.total.backward()
    >>> terms.per_layer.shape
    torch.Size([1])
    """

    def __init__(
        self,
        layers: Mapping[str, Tensor] | Sequence[str],
        *,
        alpha: float = 0.01,
        reduction: str = "mean",
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        number(_OP, "alpha", alpha, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        choice(_OP, "reduction", reduction, ("mean", "sum"))
        check_channel_dim(_OP, channel_dim)
        if isinstance(layers, str) or not isinstance(layers, (Mapping, Sequence)):
            expected = "names of layers, or {name: weights [C]}"
            raise TypeError(message(_OP, "layers", expected, repr(layers)))
        if not layers or not all(isinstance(name, str) for name in layers):
            raise ValueError(message(_OP, "layers", "one name at least", repr(layers)))
        self.alpha, self.reduction, self.channel_dim = float(alpha), reduction, channel_dim
        self.layers = list(layers)
        for name in self.layers:
            weights = layers[name] if isinstance(layers, Mapping) else None
            if weights is not None:
                _check_weights(name, weights)
                weights = weights.detach().clone()
            self.register_buffer(_buffer(name), weights)

    def forward(self, student: Sequence[Tensor], source: Sequence[Tensor]) -> LossTerms:
        """Compute the loss of L pairs of activations.

        Args:
            student: L tensors, graph attached: [N, C, *space] or tokens [N, T, C].
            source: L tensors of the same shapes, constant: no gradient flows into them.

        Returns:
            ``total``, and ``per_layer`` [L]: d_l, the mean over the batch, without α. Both are
            float32, float64 when an input is. An empty batch has loss 0.

        Raises:
            ValueError: Other than L tensors, shapes that differ (a source of another architecture),
                weights of another length than the channels, tensors on two devices, three
                dimensions without ``channel_dim``.
            TypeError: An item that is no floating tensor.
        """
        check_count(_OP, self.layers, student=student, source=source)
        d = torch.stack([
            self._layer(*item) for item in zip(self.layers, student, source, strict=True)
        ])  # fmt: skip
        n = len(student[0])
        return LossTerms(self.alpha * d.sum() * (n if self.reduction == "sum" else 1), d)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"{self.layers}, alpha={self.alpha}, reduction={self.reduction!r}"

    def _layer(self, name: str, student: Tensor, source: Tensor) -> Tensor:
        for side, x in (("student", student), ("source", source)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(message(_OP, side, "a floating tensor", got, layer=name))
        dim = channel_axis(_OP, "student", student, self.channel_dim, name)
        if student.shape != source.shape:
            expected = f"{list(student.shape)}, as the student's: networks of one architecture"
            raise ValueError(message(_OP, "source", expected, list(source.shape), layer=name))
        weights = getattr(self, _buffer(name))
        channels = student.shape[dim]
        if weights is not None and len(weights) != channels:
            expected = f"weights of {channels} channels, as the activations have"
            raise ValueError(message(_OP, "layers", expected, len(weights), layer=name))
        for side, x in (("source", source), ("layers", weights)):
            if x is not None and x.device != student.device:
                expected = f"a tensor on {student.device}, as the student's"
                raise ValueError(message(_OP, side, expected, x.device, layer=name))
        wide = torch.float64 in (student.dtype, source.dtype)
        dtype = torch.float64 if wide else torch.float32
        if student.numel() == 0:
            return student.sum().to(dtype) * 0
        squares = (student.to(dtype) - source.detach().to(dtype)).square()
        own = squares.mean([d for d in range(student.dim()) if d != dim])  # [C]
        if weights is not None:  # no matrix product: autocast would make it one of half precision
            own = channels * weights.to(dtype) * own
        return 0.5 * own.sum()


def _buffer(name: str) -> str:
    """What a layer's weights are called in the state: no name of a buffer has a dot."""
    return f"weights_{name.replace('.', '/')}"


def _check_weights(name: str, weights: object) -> None:
    expected = "weights [C], finite and ≥ 0"
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(message(_OP, "layers", expected, got, layer=name))
    if weights.dim() != 1 or not bool((weights.isfinite() & (weights >= 0)).all()):
        got = f"shape {list(weights.shape)}" if weights.dim() != 1 else "others"
        raise ValueError(message(_OP, "layers", expected, got, layer=name))
