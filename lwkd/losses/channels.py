"""How much every channel of a network matters: what its loss would be without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.parametrize import type_before_parametrizations

from lwkd.batches import batches_of, size_of
from lwkd.hooks import first_tensor, run, untouched
from lwkd.losses.layers import channel_axis, check_channel_dim
from lwkd.losses.replay import Recording
from lwkd.names import find_layers, unwrap
from lwkd.ops.checks import choice, message, number

_OP = "losses.channel_importance"
_ROOM = 1 << 26  # bytes of a layer's outputs for the channels that are left out together
# Layers with a filter a channel, and where their channels are. Not their subclasses, which may have
# them elsewhere, as a LayerNorm2d has.
_FILTERS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.LayerNorm, nn.RMSNorm), -1),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm), 1),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1),
}


class ChannelImportance(NamedTuple):
    """What :func:`channel_importance` returns; every mapping has the layers by name.

    Attributes:
        weights: [C], their sum is 1: for :class:`lwkd.losses.DELTA`.
        rise: [C] float64, how much the loss rises without each channel.
        loss: The loss with all of them.
    """

    weights: dict[str, Tensor]
    rise: dict[str, Tensor]
    loss: float


def channel_importance(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str],
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    method: str = "ablation",
    batches: int | None = None,
    chunk: int | None = None,
    temperature: float = 5.0,
    channel_dim: int | None = None,
) -> ChannelImportance:
    """Weigh the channels of some layers by how much the loss rises without them.

    Without channel c: the weights of its filter are 0, so that its output is its bias (torch's
    linear layers, convolutions, and batch, group, layer and RMS norms), or its output is 0 (any
    other module, also of a subclass). With the rise r_c, ``w = softmax(z/5)``,
    z = (r − mean r)/std r by layer; where all rises are equal, 1/C.

    * "ablation": r_c is measured, a forward pass a channel, as in the paper. ``chunk`` channels go
      through what is above the layer together. What is below it does not run again for every
      chunk, for its outputs are kept, unless the loss would not be the same that way;
    * "first_order": r_c ≈ −∂loss/∂s_c, s_c a factor on the channel at 1: one backward pass for all
      channels of all layers [Molchanov et al. 2017].

    The model is the source network, with a head that was freshly trained on the target classes. It
    runs in eval mode; its weights are never changed, and modes, buffers, ``.grad``, generators and
    hooks are left as they were, also after an exception.
    Source: Li et al. 2019 (DELTA).

    Args:
        model: The network; wrappers are looked through.
        loader: Batches (inputs, target); inputs: a tensor, a tuple of positional or a dict of
            keyword arguments.
        layers: Names of modules, as for DELTA.
        loss_fn: ``loss_fn(output, target)``, a scalar: the mean over the batch.
        method: As above.
        batches: How many to take; None: all.
        chunk: Channels at once, which takes that many times the memory of what is above the layer;
            None: as many as keep the layer's outputs below 64 MiB.
        temperature: 5 in the authors' code.
        channel_dim: Where the channels are in the layers' outputs. None means 1 for [N, C] and for
            four or more dimensions; three dimensions must say (1: [N, C, L], −1: tokens [N, T, C]).
            Of the layers named above it is known: of linear layers, layer and RMS norms they are
            last, else 1.

    Returns:
        A :class:`ChannelImportance`, on the network's device.

    Raises:
        ValueError: Unknown layers, an argument out of range, no batches, a loss that is no scalar
            or not finite, a layer that does not run, or whose channels are elsewhere.
        TypeError: Layers that are no list, a layer that returns no tensor, batches of another kind.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> batches = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 3)]
    >>> found = channel_importance(net, batches, ["0"])
    >>> found.weights["0"].shape, round(float(found.weights["0"].sum()), 4)
    (torch.Size([4]), 1.0)
    """
    choice(_OP, "method", method, ("ablation", "first_order"))
    number(_OP, "temperature", temperature, "a finite number > 0", lambda v: 0 < v < float("inf"))
    for name, value in (("chunk", chunk), ("batches", batches)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(message(_OP, name, "an int ≥ 1", repr(value)))
    check_channel_dim(_OP, channel_dim)
    network = unwrap(model)
    modules = find_layers(_OP, "layers", network, layers)
    if not modules:
        raise ValueError(message(_OP, "layers", "one name at least", "none"))
    measure = _ablations if method == "ablation" else _slopes
    total: list[Tensor] = []
    loss, count = 0.0, 0
    with untouched(network):
        for inputs, target in islice(batches_of(_OP, loader, "loader"), batches):
            n = size_of(inputs)
            if not n:
                continue
            problem = _Problem(network, loss_fn, inputs, target, channel_dim)
            base, shapes = problem.base(modules)
            rises = measure(problem, modules, shapes, base, chunk)
            own = [n * rise for rise in rises]
            total = [a + b for a, b in zip(total, own, strict=True)] if total else own
            loss, count = loss + n * float(base), count + n
    if not count:
        raise ValueError(message(_OP, "loader", "one batch at least, not empty", "none"))
    rise = {name: t / count for name, t in zip(modules, total, strict=True)}
    weights = {name: _softmax(r, temperature) for name, r in rise.items()}
    return ChannelImportance(weights, rise, loss / count)


def _softmax(rise: Tensor, temperature: float) -> Tensor:
    std = rise.std(correction=0)
    z = (rise - rise.mean()) / torch.where(std > 0, std, 1.0)
    return (z / temperature).softmax(0).float()


class _Shape(NamedTuple):
    """Of a layer's output."""

    channels: int
    bytes: int


class _Problem:
    """One batch's loss, with factors on the channels of layers."""

    def __init__(
        self, network: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, target: Any,
        channel_dim: int | None,
    ) -> None:  # fmt: skip
        self._network, self._loss_fn, self._channel_dim = network, loss_fn, channel_dim
        self._inputs = inputs
        device = next((p.device for p in network.parameters()), None)
        self._target = target.to(device) if isinstance(target, Tensor) else target

    def loss(self, modules: Mapping[str, nn.Module], scales: Sequence[Tensor]) -> Any:
        """The loss where every module's channels are scaled, from their biases."""
        with ExitStack() as stack:
            for module, scale in zip(modules.values(), scales, strict=True):
                hook = partial(self._scale, scale)
                stack.callback(module.register_forward_hook(hook).remove)
            return self._run()

    def base(self, modules: Mapping[str, nn.Module]) -> tuple[Tensor, list[_Shape]]:
        """The loss as it is, and what each module puts out; what is below them is recorded."""
        shapes: dict[str, _Shape] = {}
        self.below = Recording(modules.values())
        with self.below.watch(self._network), ExitStack() as stack:
            for name, module in modules.items():
                hook = partial(self._look, shapes, name)
                stack.callback(module.register_forward_hook(hook).remove)
            base = self._run()
        if not isinstance(base, Tensor) or base.dim() or not bool(base.isfinite()):
            got = base if not isinstance(base, Tensor) or not base.dim() else list(base.shape)
            expected = "a scalar, the mean over the batch, finite"
            raise ValueError(message(_OP, "loss_fn", expected, got))
        for name in modules:
            if name not in shapes:
                expected = "a layer that runs in the forward"
                raise ValueError(message(_OP, "layers", expected, "no call", layer=name))
        return base, [shapes[name] for name in modules]

    def _run(self) -> Any:
        output = run(_OP, self._network, self._inputs, "model", "loader")
        return self._loss_fn(_wide(output), _wide(self._target))

    def _look(
        self, shapes: dict[str, _Shape], name: str, module: nn.Module, _: Any, output: Any
    ) -> None:
        x = first_tensor(output)
        if x is None or not x.is_floating_point():
            got = type(output).__name__ if x is None else x.dtype
            expected = "a layer that puts out a floating tensor"
            raise TypeError(message(_OP, "layers", expected, got, layer=name))
        dim, bias = self._dim(module, x, name), _bias(module)
        if bias is not None and list(bias.shape) != [x.shape[dim]]:
            expected = f"a bias of {x.shape[dim]} channels, those of dimension {dim} of its output"
            raise ValueError(message(_OP, "layers", expected, list(bias.shape), layer=name))
        shapes[name] = _Shape(x.shape[dim], x.numel() * x.element_size())

    def _dim(self, module: nn.Module, x: Tensor, name: str | None = None) -> int:
        known = _FILTERS.get(type_before_parametrizations(module), self._channel_dim)
        return channel_axis(_OP, "layers", x, known, name)

    def _scale(self, scale: Tensor, module: nn.Module, _: Any, output: Any) -> Any:
        x = first_tensor(output)
        assert x is not None  # base has seen to it
        shape = [1] * x.dim()
        shape[self._dim(module, x)] = -1
        factor, bias = scale.to(x.dtype).reshape(shape), _bias(module)
        x = x * factor if bias is None else x * factor + bias.reshape(shape) * (1 - factor)
        return x if isinstance(output, Tensor) else type(output)((x, *output[1:]))


def _bias(module: nn.Module) -> Tensor | None:
    """What is left of a layer's output without its filters."""
    filters = type_before_parametrizations(module) in _FILTERS
    return getattr(module, "bias", None) if filters else None


def _wide(x: Any) -> Any:
    """Float32 for half precision, in which few losses are distinct."""
    half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


def _ablations(
    problem: _Problem, modules: Mapping[str, nn.Module], shapes: Sequence[_Shape], base: Tensor,
    chunk: int | None,
) -> list[Tensor]:  # fmt: skip
    """How much the loss rises without each channel, measured."""
    rises = []
    for (name, module), shape in zip(modules.items(), shapes, strict=True):
        loss = partial(_without, problem, {name: module})
        scales = 1 - torch.eye(shape.channels, device=base.device)
        at_once = chunk or max(1, min(shape.channels, _ROOM // max(shape.bytes, 1)))
        below: Callable[[], AbstractContextManager[None]] = partial(problem.below.replay, module)
        if at_once >= shape.channels or not _same(loss, torch.ones_like(scales[0]), base, below):
            below = nullcontext
        with below():
            try:
                losses = vmap(loss, chunk_size=at_once)(scales)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                text = "one channel at a time, for what is above cannot take several at once"
                warnings.warn(f"lwkd.{_OP}: layers (layer {name!r}): {text}: {why}", stacklevel=3)
                losses = torch.stack([loss(scale) for scale in scales])
        rises.append(losses.double() - base.double())
    return rises


def _same(
    loss: Callable[[Tensor], Tensor], ones: Tensor, base: Tensor,
    below: Callable[[], AbstractContextManager[None]],
) -> bool:  # fmt: skip
    """Tell whether the loss stays as it is without what is below: a module may do more than return.

    Such as changing its input in place, or what another one returned.
    """
    try:
        with below():
            found = loss(ones)
    except Exception:  # of whatever kind, from a network that misses something
        return False
    eps = torch.finfo(base.dtype).eps if base.is_floating_point() else 0.0
    return bool((found - base).abs() <= min(16 * eps, 1e-6) * base.abs())


def _without(problem: _Problem, module: Mapping[str, nn.Module], scale: Tensor) -> Tensor:
    loss: Tensor = problem.loss(module, [scale])
    return loss


def _slopes(
    problem: _Problem, modules: Mapping[str, nn.Module], shapes: Sequence[_Shape], base: Tensor,
    chunk: int | None,
) -> list[Tensor]:  # fmt: skip
    """The same to first order."""
    with torch.enable_grad():
        scales = [base.new_ones(shape.channels).requires_grad_() for shape in shapes]
        loss = problem.loss(modules, scales)
        if not loss.requires_grad:  # it uses none of them
            return [torch.zeros_like(scale, dtype=torch.float64) for scale in scales]
        grads = torch.autograd.grad(loss, scales, allow_unused=True, materialize_grads=True)
    return [-g.double() for g in grads]
