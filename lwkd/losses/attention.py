"""Attention transfer: the distances of attention maps as a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.losses.layers import check_count, layers_of
from lwkd.losses.terms import LossTerms
from lwkd.ops.attention import check_options, discrepancy
from lwkd.ops.backends import check_name
from lwkd.ops.checks import message, number, suggest

_OP = "losses.AttentionTransfer"
_CONVENTIONS = ("code", "paper")
Fold = tuple[int, int, int]


class AttentionTransfer(nn.Module):
    """Draw the student's attention maps to the teacher's, in one fused call for all layers.

    With the maps m[n,q] = Σ_c |x[n,c,q]|^p on the pair's P common positions, q = m/‖m‖₂ and
    D_l[n] = Σ_q (q_S − q_T)² as in ``lwkd.ops.layer_discrepancy``:

    * ``"code"``: ``total = β·Σ_l mean_n D_l[n] / P_l``, what the authors' code computes;
    * ``"paper"``: ``total = β·Σ_l mean_n ½·√D_l[n]``, what the paper writes; where D is 0 the root
      has no derivative and the gradient is 0.

    The two differ by more than a constant: "paper" pulls with equal force at any distance. The β
    of the one is not that of the other; 1e3 is the authors', for "code".
    Source: Zagoruyko & Komodakis 2017.

    Args:
        beta: β ≥ 0, the weight of the sum.
        convention: "code" or "paper".
        p: Power of the maps, ≥ 1.
        channel_dim: An int, a (student, teacher) tuple, or a list of L of these. None means 1 for
            four or more dimensions; three dimensions must say (1: [N, C, T], 2: [N, T, D]).
        tokens: A (student, teacher) pair, each None or (h, w, prefix): drops leading tokens and
            folds the rest to an h×w grid.
        layers: Names of the L layers, or a dict from the student's names to the teacher's; None:
            as many as come.
        backend: None, "reference", "compiled" or "triton".

    Attributes:
        layers: As given, for ``pair_layers(student, teacher, loss.layers)``.

    Raises:
        ValueError: beta, convention, p, layers or backend out of its range.
        TypeError: beta is no number, layers no names.

    >>> loss = AttentionTransfer(beta=1e3)
    >>> student = torch.rand(8, 16, 4, 4, requires_grad=True)
    >>> teacher = torch.rand(8, 64, 8, 8)  # other channels, other resolution
    >>> terms = loss([student], [teacher])
    >>> terms.total.backward()
    >>> terms.per_layer.shape  # for LayerwiseLR: rates.update(terms.per_layer.detach())
    torch.Size([1])
    """

    def __init__(
        self,
        beta: float = 1e3,
        *,
        convention: str = "code",
        p: float = 2.0,
        channel_dim: int | Sequence[Any] | None = None,
        tokens: Sequence[Fold | None] | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        number(_OP, "beta", beta, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        if convention not in _CONVENTIONS:
            got = repr(convention) + suggest(str(convention), _CONVENTIONS)
            raise ValueError(message(_OP, "convention", f"one of {_CONVENTIONS}", got))
        check_name(_OP, backend)
        check_options(_OP, p, "l2", 0.5)
        self.beta, self.convention, self.p = float(beta), convention, float(p)
        self.channel_dim, self.tokens, self.backend = channel_dim, tokens, backend
        self.layers = layers_of(_OP, layers)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        *,
        mask: Sequence[Tensor | None] | None = None,
    ) -> LossTerms:
        """Compute the loss of L pairs of activations.

        Args:
            student: L tensors, graph attached: [N, C, *space] or tokens [N, T, D].
            teacher: L tensors, constant: no gradient flows into them. Channels and space may
                differ from the student's.
            mask: L items, each None or bool [N, *common space]; positions that are False are left
                out of the maps. P_l still counts all positions.

        Returns:
            ``total``, and ``per_layer`` [L]: mean_n D_l[n], in [0, 2], in either convention: not
            divided by P_l, not weighted by β, so that layers of different resolution compare, and
            the same number that ``lwkd.ops.layer_discrepancy`` and ``lwkd.AttentionMeter`` give.
            Both are float32, float64 when an input is. An empty batch has loss 0.

        Raises:
            ValueError: A wrong shape, length or device; the message names argument and layer.
            TypeError: An item that is no dense floating-point tensor.
            RuntimeError: ``backend`` is not available here.
        """
        check_count(_OP, self.layers, student=student, teacher=teacher)
        mean = self.convention == "code"
        if isinstance(teacher, (list, tuple)):  # anything else the op refuses
            teacher = [t.detach() if isinstance(t, Tensor) else t for t in teacher]
        d = discrepancy(  # that of ops.layer_discrepancy, its errors signed with our name
            _OP, student, teacher, "mean" if mean else "none", self.backend, p=self.p,
            channel_dim=self.channel_dim, tokens=self.tokens, mask=mask,
        )  # fmt: skip
        if mean:
            # Filled rather than copied from the host, which would be a synchronisation.
            share = [d.new_full((1,), 1 / max(p, 1)) for p in self._positions(student, teacher)]
            return LossTerms(self.beta * (d * torch.cat(share)).sum(), d)
        n = max(d.shape[1], 1)
        return LossTerms(self.beta * 0.5 * _root(d).sum() / n, d.sum(1) / n)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        shown = "" if self.layers is None else f"{self.layers}, "
        return f"{shown}beta={self.beta}, convention={self.convention!r}, p={self.p}"

    def _positions(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[int]:
        """Return P_l, the number of positions that the maps of a pair have in common."""
        folds = self.tokens or (None, None)
        counts = []
        for i, pair in enumerate(zip(student, teacher, strict=True)):
            dims = self.channel_dim[i] if isinstance(self.channel_dim, list) else self.channel_dim
            both = dims if isinstance(dims, tuple) else (dims, dims)
            s, t = [_space(x, d, f) for x, d, f in zip(pair, both, folds, strict=True)]
            count = 1  # not math.prod, nor a generator: neither can be compiled
            for a, b in zip(s, t, strict=True):
                count *= min(a, b)
            counts.append(count)
        return counts


def _space(x: Tensor, channel_dim: int | None, fold: Fold | None) -> list[int]:
    if fold is not None:
        return [fold[0], fold[1]]
    channels = 1 if channel_dim is None else channel_dim % x.dim()
    return [size for d, size in enumerate(x.shape) if d not in (0, channels)]


def _root(d: Tensor) -> Tensor:
    """√d, with derivative 0 at 0."""
    zero = d == 0
    return torch.where(zero, d, torch.where(zero, torch.ones_like(d), d).sqrt())
