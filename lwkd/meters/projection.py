"""Which scalar of a network's outputs its Jacobian is taken of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwkd.ops import rademacher
from lwkd.ops.checks import message
from lwkd.ops.philox import OUTPUTS


class Projection:
    """Makes a network's outputs a scalar, ⟨v, f⟩; the teacher's come first.

    Args:
        op: The public name of the caller, for errors.
        kind: "rademacher", "label", "top" or "loss".
        seed: Of the signs.
        target: As the kind needs it.
        loss_fn: For "loss".
    """

    def __init__(self, op: str, kind: str, seed: int, target: Any, loss_fn: Any) -> None:
        self._op, self._kind, self._seed = op, kind, seed
        self._target, self._loss_fn = target, loss_fn
        self._top: Tensor | None = None
        if kind == "label" and not (isinstance(target, Tensor) and target.dtype == torch.int64):
            expected = "class indices int64 [N], as projection='label' needs"
            raise ValueError(message(self._op, "target", expected, repr(target)))
        if kind == "loss" and not callable(loss_fn):
            expected = "loss_fn(output, target), as projection='loss' needs"
            raise ValueError(message(self._op, "loss_fn", expected, repr(loss_fn)))

    def __call__(self, side: str, output: Tensor | None) -> Tensor:
        """Return the scalar of one side's output."""
        if output is None or output.dim() < 2 or not output.is_floating_point():
            got = "no tensor" if output is None else f"{output.dtype} {list(output.shape)}"
            expected = "a network that puts out a floating tensor [N, ...]"
            raise ValueError(message(self._op, side, expected, got))
        if self._kind == "rademacher":
            return (rademacher(output, seed=self._seed, layer=OUTPUTS) * output).sum()
        if self._kind == "loss":
            target = self._target
            target = target.to(output.device) if isinstance(target, Tensor) else target
            loss: Any = self._loss_fn(output, target)
            if not isinstance(loss, Tensor) or loss.dim():
                got = str(list(loss.shape)) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(message(self._op, "loss_fn", "a scalar", got))
            scalar: Tensor = loss
            return scalar
        index = self._index(side, output).to(output.device)
        return output.flatten(1).gather(1, index[:, None]).sum()

    def _index(self, side: str, output: Tensor) -> Tensor:
        n, count = len(output), output[:1].numel()
        if self._kind == "label":
            index: Tensor = self._target
            if list(index.shape) != [n] or output.dim() != 2:
                expected = f"class indices [{n}] of outputs [N, C]"
                got = f"{list(index.shape)} and {list(output.shape)}"
                raise ValueError(message(self._op, "target", expected, got))
            return index
        if self._top is None:
            self._top = output.detach().flatten(1).argmax(1)
        if int(self._top.max() if n else 0) >= count:
            expected = "as many outputs as the teacher, whose largest is taken"
            raise ValueError(message(self._op, side, expected, list(output.shape)))
        return self._top
