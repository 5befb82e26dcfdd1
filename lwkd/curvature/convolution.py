"""Convolutions whose second backward pass computes what it is asked for, and nothing else.

torch's own also computes, at every convolution above the layer that is asked about, the gradient by
its weight, as a convolution by the gradient: a third of the time or more. With z = conv(x, w) + b
and the first derivatives g_x = convᵀ(g, w), g_w = corr(x, g), g_b = Σ g, those of
⟨v_x, g_x⟩ + ⟨v_w, g_w⟩ + ⟨v_b, g_b⟩ are

    by g    conv(v_x, w) + conv(x, v_w) + v_b
    by x    convᵀ(g, v_w)
    by w    corr(v_x, g)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class _Form(NamedTuple):
    """What torch's convolution takes besides its tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    ids: tuple[int | None, int | None]  # of weight and bias; None where they are computed
    wanted: Collection[int]  # ids of the parameters that a pass is about; may change meanwhile

    def is_about(self, which: int) -> bool:
        return self.ids[which] is None or self.ids[which] in self.wanted

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        zero = [0] * len(self.stride)
        z: Tensor = torch.ops.aten.convolution(
            x, w, b, self.stride, self.padding, self.dilation, False, zero, self.groups
        )
        return z

    def backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Any:
        zero = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            g, x, w, [w.shape[0]], self.stride, self.padding, self.dilation, False, zero,
            self.groups, mask,
        )  # fmt: skip


class LwkdConvolution(torch.autograd.Function):
    """The convolution itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, form: _Form) -> Tensor:
        """As torch's."""
        ctx.save_for_backward(x, w)
        ctx.form = form
        return form.forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """As torch's, through a function that knows its own derivative."""
        x, w = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad
        mask = needs[0], needs[1] and form.is_about(0), needs[2] and form.is_about(1)
        if not torch.is_grad_enabled():  # nobody differentiates this again
            return *form.backward(g, x, w, list(mask)), None
        return *_First.apply(g, x, w, form, mask), None


class _First(torch.autograd.Function):
    """The first derivatives of a convolution."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, form: _Form, mask: tuple[bool, bool, bool]
    ) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return tuple(form.backward(g, x, w, list(mask)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v_x: Tensor | None, v_w: Tensor | None, v_b: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        form, by_g, by_x, by_w = ctx.form, None, None, None
        if v_x is not None:
            by_g = form.forward(v_x, w, v_b)
            if ctx.needs_input_grad[2] and form.is_about(0):
                by_w = form.backward(g, v_x, w, [False, True, False])[1]
        if v_w is not None:
            own = form.forward(x, v_w, v_b if v_x is None else None)
            by_g = own if by_g is None else by_g + own
            if ctx.needs_input_grad[1]:
                by_x = form.backward(g, x, v_w, [True, False, False])[0]
        if by_g is None and v_b is not None:
            by_g = v_b.reshape(1, -1, *[1] * (g.dim() - 2)).expand_as(g)
        return by_g, by_x, by_w, None, None


class Convolutions(TorchFunctionMode):
    """Takes over convolutions for the length of a with-block.

    Args:
        wanted: The ids of the parameters that the next backward pass is asked about.
    """

    def __init__(self, wanted: Collection[int]) -> None:
        super().__init__()
        self._wanted = wanted

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a convolution by LwkdConvolution, all else as it is."""
        if func in _CONVOLUTIONS:
            given = _arguments(_CONVOLUTIONS[func], *args, **(kwargs or {}))
            if given is not None:
                x, w, b, stride, padding, dilation, groups = given
                ids = _id(w), _id(b)
                form = _Form(stride, padding, dilation, groups, ids, self._wanted)
                return LwkdConvolution.apply(x, w, b, form)
        return func(*args, **(kwargs or {}))


def _id(x: Tensor | None) -> int | None:
    """Of a parameter; what is computed from some (weight_norm) leads to any of them."""
    return id(x) if x is None or x.is_leaf else None


def _arguments(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> tuple[Any, ...] | None:  # fmt: skip
    """The arguments as torch.ops.aten.convolution takes them, or None where they are others."""
    if input.dim() != dims + 2 or isinstance(padding, str):
        return None
    lists = [[v] * dims if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    lists = [v * dims if len(v) == 1 else v for v in lists]
    return input, weight, bias, *lists, groups
