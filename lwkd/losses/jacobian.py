"""Jacobian matching and gradient-based attention transfer: losses on derivatives by the input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.losses.layers import check_count, layers_of
from lwkd.losses.rows import check_inputs, check_twice, checked_target, input_rows
from lwkd.losses.terms import LossTerms
from lwkd.ops import operands
from lwkd.ops.attention import channel_dims, folds, maps
from lwkd.ops.attention_reference import pool
from lwkd.ops.backends import check_name
from lwkd.ops.checks import flag, message, number
from lwkd.ops.jacobian import discrepancy

_OUTPUTS = ("label", "top", "map")
Fold = tuple[int, int, int]


class JacobianMatching(nn.Module):
    """Match the student's outputs, and its Jacobian by the input, to the teacher's.

    With outputs z [N, C], inputs x and one output y[n] of each sample, the rows are
    J[n] = ∂z[n, y[n]]/∂x[n], and

    ``total = α·mean_n ‖z_S[n] − z_T[n]‖² + β·mean_n D[n]``,

    D the distance of the rows as in ``lwkd.ops.layer_discrepancy(kind="jacobian")``: of their
    directions, ‖J_S/‖J_S‖ − J_T/‖J_T‖‖², or, not normalised, ‖J_S − J_T‖². Its ground: with noise
    ξ ~ N(0, σ²I) on the inputs the first term alone would become ‖z_S − z_T‖² + σ²‖J_S − J_T‖² and
    terms of second derivatives. The gradient of D by the student's weights is a double backward;
    where samples see each other (BatchNorm in train mode), J[n] is of the sum over the batch.

    ``of="map"`` is the form for transfer, where the classes differ: z[n] is the entry of a layer's
    attention map Σ_c |a[n,c,q]|^p at the position q where the teacher's is largest, on the grid
    that the pair has in common. There are no outputs to match and ``total = β·Σ_l mean_n D_l[n]``.
    Source: Srinivas & Fleuret 2018.

    A student with fused attention, or compiled by torch.compile, cannot be differentiated twice:
    run the one's forward under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, the other's
    uncompiled. Compiled itself, the loss breaks the graph, or raises under fullgraph=True; a step
    with both networks in it compiles where ``torch._dynamo.config.trace_autograd_ops`` is on.

    Args:
        beta: β ≥ 0, of the Jacobians.
        alpha: α ≥ 0, of the outputs; of no effect for ``of="map"``.
        of: "label" (y is the target), "top" (the teacher's largest output, for both), an int k (the
            teacher's k largest outputs, D the mean over them), or "map".
        normalize: Match directions only.
        p: Power of the maps, ≥ 1.
        channel_dim: Of the activations whose maps are taken: an int, a (student, teacher) tuple, or
            a list of L of these. None means 1 for four or more dimensions; three must say.
        tokens: A (student, teacher) pair, each None or (h, w, prefix): drops leading tokens of
            [N, T, D] and folds the rest to an h×w grid; channel_dim None means −1.
        layers: For ``of="map"``, names of the L layers, or a dict from the student's names to the
            teacher's; None: as many as come.
        backend: None, "reference", "compiled" or "triton".

    Attributes:
        layers: As given, for ``pair_layers(student, teacher, loss.layers)``.

    Raises:
        ValueError: alpha, beta, of, p, tokens, layers or backend out of its range.
        TypeError: alpha or beta is no number, normalize no bool, layers no names.

    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> x = torch.rand(8, 4, requires_grad=True)
    >>> terms = JacobianMatching(of="top")(student(x), teacher(x), x)
    >>> terms.total.backward()
    >>> student.weight.grad.shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        beta: float = 1.0,
        *,
        alpha: float = 1.0,
        of: str | int = "label",
        normalize: bool = True,
        p: float = 2.0,
        channel_dim: int | Sequence[Any] | None = None,
        tokens: Sequence[Fold | None] | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "losses.JacobianMatching"
        for name, value in (("beta", beta), ("alpha", alpha)):
            number(op, name, value, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        if not (of in _OUTPUTS or (type(of) is int and of >= 1)):
            raise ValueError(message(op, "of", f"one of {_OUTPUTS} or an int ≥ 1", repr(of)))
        flag(op, "normalize", normalize)
        number(op, "p", p, "a finite number ≥ 1", lambda v: 1 <= v < math.inf)
        check_name(op, backend)
        self.layers = layers_of(op, layers)
        if self.layers is not None and of != "map":
            expected = "None: outputs are compared, and layers with of='map'"
            raise ValueError(message(op, "layers", expected, repr(layers)))
        self._op = op
        self.beta, self.alpha, self.of, self.normalize = float(beta), float(alpha), of, normalize
        self.p, self.channel_dim, self.backend = float(p), channel_dim, backend
        self._folds = folds(op, tokens)

    def forward(
        self, student: Any, teacher: Any, inputs: Tensor, target: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss.

        Args:
            student: Outputs [N, C] computed from ``inputs``; for ``of="map"`` a list of L
                activations [N, C, *space] or tokens.
            teacher: The teacher's, computed from the same ``inputs`` with gradients on (its
                parameters need none). No gradient flows into it.
            inputs: The tensor [N, ...] that both were computed from, with ``requires_grad``.
            target: Class indices int64 [N], for ``of="label"``; none is left out.

        Returns:
            ``total``, and ``per_layer``: for ``of="map"`` mean_n D_l[n] [L], else None. Both are
            float32, float64 where an output is.

        Raises:
            ValueError: Outputs that are not [N, C] or of different shape, a wrong target (one out
                of range on a GPU torch finds, later), lists of different length.
            TypeError: Not tensors.
            RuntimeError: ``inputs`` does not require a gradient, an output does not come from it,
                or the student cannot be differentiated twice; the message says which.
        """
        check_inputs(self._op, inputs)
        if self.of == "map":
            rows = self._map_rows(student, teacher, inputs)
        else:
            rows = self._output_rows(student, teacher, inputs, target)
        check_twice(self._op, "student", rows[0])
        d = discrepancy(
            self._op, *rows, "mean", self.backend, normalize=self.normalize, compare="difference"
        )
        if self.of == "map":
            return LossTerms(self.beta * d.sum(), d)
        dtype = operands.compute_dtype([student], [teacher])
        gap = (student.to(dtype) - teacher.detach().to(dtype)).square().sum(1)
        outputs = gap.sum() / max(len(gap), 1)
        return LossTerms(self.alpha * outputs + self.beta * d.mean(), None)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"beta={self.beta}, alpha={self.alpha}, of={self.of!r}, normalize={self.normalize}"

    def _output_rows(
        self, student: Tensor, teacher: Tensor, inputs: Tensor, target: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        for name, z in (("student", student), ("teacher", teacher)):
            if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(inputs):
                got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(message(self._op, name, f"outputs [{len(inputs)}, C]", got))
        if student.shape != teacher.shape:
            expected = f"{list(student.shape)}, as student: heads over the same classes"
            raise ValueError(message(self._op, "teacher", expected, list(teacher.shape)))
        index = self._outputs(teacher, target)
        sides = [
            [
                input_rows(self._op, name, z.gather(1, y[:, None]).sum(), inputs, graph=graph)
                for y in index.unbind(1)
            ]
            for name, z, graph in (("student", student, True), ("teacher", teacher, False))
        ]
        return sides[0], sides[1]

    def _outputs(self, teacher: Tensor, target: Tensor | None) -> Tensor:
        """Which outputs of each sample, [N, k]."""
        if self.of == "label":
            return checked_target(self._op, target, teacher)[:, None]
        k, classes = 1 if self.of == "top" else int(self.of), teacher.shape[1]
        if k > classes:
            raise ValueError(message(self._op, "of", f"at most {classes} outputs", k))
        return teacher.detach().topk(k, dim=1).indices

    def _map_rows(
        self, student: Any, teacher: Any, inputs: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        check_count(self._op, self.layers, student=student, teacher=teacher)
        operands.check_pairs(self._op, student, teacher)
        names = ("student", "teacher")
        dims = channel_dims(self._op, self.channel_dim, len(student))
        both = map(self._maps, names, (student, teacher), dims, self._folds)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, pair in enumerate(zip(*both, strict=True)):
            pair = common_grid(self._op, *pair, layer=i)
            top = pair[1].detach().argmax(1, keepdim=True)
            for rows, name, m in zip(sides, names, pair, strict=True):
                value, graph = m.gather(1, top).sum(), name == "student"
                rows.append(input_rows(self._op, name, value, inputs, graph=graph, layer=i))
        return sides

    def _maps(
        self, name: str, xs: Sequence[Tensor], dims: Sequence[int | None], fold: Fold | None
    ) -> list[Tensor]:
        """The maps [N, *space] of one side."""
        for i, x in enumerate(xs):
            expected = "[N, C, *space] with one to three space dimensions"
            fits = 3 <= x.dim() <= 5
            if fold is not None:
                h, w, prefix = fold
                expected = f"tokens [N, {prefix + h * w}, D] (prefix {prefix} + {h}×{w})"
                t = 1 if dims[i] in (None, -1, 2) else 2
                fits = x.dim() == 3 and x.shape[t] == prefix + h * w
            if not fits:
                raise ValueError(message(self._op, name, expected, list(x.shape), layer=i))
        if fold is None:
            return maps(self._op, xs, self.p, list(dims))
        last = [-1 if d is None else d for d in dims]
        return [m[:, prefix:].unflatten(1, (h, w)) for m in maps(self._op, xs, self.p, last)]


class GradientAttentionTransfer(nn.Module):
    """Draw the student's gradient by the input to the teacher's.

    With the loss ℓ[n] of each sample and J[n] = ∂ℓ[n]/∂x[n],

    ``total = ½·β·mean_n ‖J_S[n] − J_T[n]‖₂``,

    whose gradient by the student's weights is a double backward; where the two are equal the root
    has no derivative and the gradient is 0. Source: Zagoruyko & Komodakis 2017, §3.2.

    A student with fused attention, or compiled by torch.compile, cannot be differentiated twice:
    see :class:`JacobianMatching`, also for training steps that are compiled.

    Args:
        beta: β ≥ 0.
        backend: None, "reference", "compiled" or "triton".

    Raises:
        ValueError: beta or backend out of its range.
        TypeError: beta is no number.

    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> x, y = torch.rand(8, 4, requires_grad=True), torch.arange(8) % 3
    >>> losses = [nn.functional.cross_entropy(net(x), y) for net in (student, teacher)]
    >>> terms = GradientAttentionTransfer(beta=1.0)(*losses, x)
    >>> (losses[0] + terms.total).backward()
    """

    def __init__(self, beta: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        op = "losses.GradientAttentionTransfer"
        number(op, "beta", beta, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        check_name(op, backend)
        self._op, self.beta, self.backend = op, float(beta), backend
        self.layers = None  # it compares none

    def forward(self, student_loss: Tensor, teacher_loss: Tensor, inputs: Tensor) -> LossTerms:
        """Compute the loss.

        Args:
            student_loss: The mean over the batch of the student's loss, a scalar computed from
                ``inputs``.
            teacher_loss: The teacher's, likewise, with gradients on. No gradient flows into it.
            inputs: The tensor [N, ...] that both were computed from, with ``requires_grad``.

        Returns:
            ``total`` and ``per_layer=None``.

        Raises:
            ValueError: A loss that is not a scalar.
            RuntimeError: ``inputs`` does not require a gradient, a loss does not come from it, or
                the student cannot be differentiated twice.
        """
        check_inputs(self._op, inputs)
        sides = (("student_loss", student_loss, True), ("teacher_loss", teacher_loss, False))
        rows = []
        for name, loss, graph in sides:
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
                raise ValueError(message(self._op, name, "a scalar, the mean over the batch", got))
            row = input_rows(self._op, name, loss, inputs, graph=graph)
            rows.append([row * len(inputs)])
        check_twice(self._op, "student_loss", rows[0])
        d = discrepancy(self._op, rows[0], rows[1], "none", self.backend, normalize=False)[0]
        zero = d == 0
        root = torch.where(zero, d, torch.where(zero, torch.ones_like(d), d).sqrt())
        return LossTerms(0.5 * self.beta * root.sum() / max(len(d), 1), None)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"beta={self.beta}"


def common_grid(op: str, s: Tensor, t: Tensor, *, layer: object) -> tuple[Tensor, Tensor]:
    """Pool both maps [N, *space] to the smaller size in each dimension, and flatten them."""
    if s.dim() != t.dim():
        expected, got = f"{s.dim() - 1} space dimension(s), as the student's", t.dim() - 1
        raise ValueError(message(op, "teacher", expected, got, layer=layer))
    grid = [min(pair) for pair in zip(s.shape[1:], t.shape[1:], strict=True)]
    return pool(s, grid).flatten(1), pool(t, grid).flatten(1)
