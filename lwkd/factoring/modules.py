"""How each module's parameters factor: the one place that knows.

Of a module that was called with ``inputs`` and whose output has the gradient d, every parameter's
gradient is, sample by sample, Σ_t d[t] a[t]ᵀ for some a: the input of a linear layer, the patches
of a convolution, the normalised input of a norm, ones for a bias. The projections of multi-head
attention, which no module of their own calls, are found from its inputs. Modules that are not known
here give their per-sample gradients themselves, by torch.func, as one row: right, and as large as
their parameters times the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lwkd.factoring import attention
from lwkd.factoring.sums import bias
from lwkd.ops.checks import message
from lwkd.ops.factors import ConvFactors, Factors, Item

_Batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_Instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def supports(module: nn.Module) -> bool:
    """Whether the module's parameters factor; else they take torch.func.

    A parametrization (weight_norm, spectral_norm) has other parameters than the weight that
    factors, and a module with a forward of its own does what nobody here knows.

    >>> supports(nn.Conv2d(3, 8, 3)), supports(nn.Bilinear(2, 3, 4))
    (True, False)
    """
    if isinstance(module, nn.MultiheadAttention):
        return attention.supports(module)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if hasattr(module, "parametrizations") or not own <= {"weight", "bias"}:
        return False
    kind = _kind(module)
    if kind is None or "forward" in vars(module):
        return False
    own_way = getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    return own_way and type(module).forward is kind.forward


def exact_kind(module: nn.Module) -> bool:
    """Whether the module factors and is of torch's own class: it does what that says, and no more.

    Multi-head attention is not: the weights that it returns besides count for nothing here.

    >>> exact_kind(nn.Linear(4, 2)), exact_kind(nn.MultiheadAttention(4, 2))
    (True, False)
    """
    return type(module) in _TABLE and supports(module)


def whole(module: nn.Module) -> bool:
    """Whether the module stands for everything inside it: its children are not called, or unknown.

    >>> whole(nn.MultiheadAttention(4, 2)), whole(nn.Linear(4, 2))
    (True, False)
    """
    return isinstance(module, nn.MultiheadAttention) or not supports(module)


def container(module: nn.Module) -> bool:
    """Whether the module does not factor, and its children may be modules that are called.

    >>> container(nn.Sequential(nn.Linear(4, 2))), container(nn.MultiheadAttention(4, 2))
    (True, False)
    """
    known = isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations")
    return not (known or supports(module)) and any(True for _ in module.children())


def _kind(module: nn.Module) -> Any:
    return next((kind for kind in _TABLE if isinstance(module, kind)), None)


def factor(
    op: str,
    name: str,
    module: nn.Module,
    inputs: Sequence[Any],
    gradient: Tensor,
    *,
    keywords: Mapping[str, Any] | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Item]:
    """Return the items of a module's parameters, by their names in the module.

    Args:
        op: Who asks, for errors.
        name: What the module is called, for errors.
        module: The module; it was called once with ``inputs``.
        inputs: Its positional arguments, samples first (multi-head attention: as it has them).
        gradient: The gradient of a scalar by its output, or the first of its outputs.
        keywords: Its keyword arguments, of multi-head attention alone with tensors among them.
        wanted: Names of parameters; None means those that require a gradient.

    Returns:
        An item a parameter: of ``ops.Factors`` or ``ops.ConvFactors``.

    Raises:
        ValueError: Samples are coupled (BatchNorm in train mode), or the output's gradient has not
            the batch first.
        RuntimeError: The module does not factor and torch.func cannot take it sample by sample.

    >>> linear = nn.Linear(3, 2)
    >>> items = factor("example", "fc", linear, [torch.rand(4, 3)], torch.rand(4, 2))
    >>> items["weight"].a.shape, items["bias"].d.shape
    (torch.Size([4, 1, 3]), torch.Size([4, 1, 2]))
    """
    refuse_coupled(op, name, module)
    if wanted is None:
        wanted = {n for n, p in parameters(module).items() if p.requires_grad}
    if isinstance(module, nn.MultiheadAttention) and supports(module):
        items = attention.factor(op, name, module, gradient.detach(), *inputs, **(keywords or {}))
        return {n: item for n, item in items.items() if n in wanted}
    for key, value in (keywords or {}).items():
        if isinstance(value, Tensor):
            expected = "a call without tensors by keyword: whose dimension the batch is, is unknown"
            raise RuntimeError(message(op, "module", expected, repr(key), layer=name))
    if not supports(module):
        return _per_sample(op, name, module, inputs, keywords or {}, gradient, wanted)
    x = inputs[0]
    if gradient.dim() < 1 or len(gradient) != len(x):
        expected = f"an output with the batch, {len(x)}, first"
        raise ValueError(message(op, "output", expected, list(gradient.shape), layer=name))
    with torch.no_grad():
        items = _TABLE[_kind(module)](module, x.detach(), gradient.detach())
    return {n: item for n, item in items.items() if n in wanted}


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that `factor` speaks of: the module's own, or all inside one that stands for them."""
    return dict(module.named_parameters(recurse=whole(module)))


def refuse_coupled(op: str, name: str, module: nn.Module) -> None:
    """Raise where a sample's output depends on the other samples."""
    if isinstance(module, _Batch) and (module.training or module.running_mean is None):
        expected = "BatchNorm in eval mode, with running statistics"
        got = f"{type(module).__name__} that normalises by the batch: its samples are coupled"
        raise ValueError(message(op, "module", expected, got, layer=name))


# --- the table ---------------------------------------------------------------------------------


def _tokens(x: Tensor) -> Tensor:
    """[N, ..., K] as [N, T, K]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _linear(module: nn.Linear, x: Tensor, d: Tensor) -> dict[str, Item]:
    x, d = _tokens(x), _tokens(d)
    return {"weight": Factors(x, d), "bias": bias(d)}


def _embedding(module: nn.Embedding, x: Tensor, d: Tensor) -> dict[str, Item]:
    rows, d = x.reshape(len(x), -1), d.reshape(len(d), -1, module.embedding_dim)
    if module.padding_idx is not None:
        d = d.masked_fill((rows == module.padding_idx)[..., None], 0)
    return {"weight": Factors(rows.long(), d)}


def _convolution(module: Any, x: Tensor, d: Tensor) -> dict[str, Item]:
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)
        padding = (0,) * len(module.kernel_size)
    weight = ConvFactors(
        x, d, module.kernel_size, module.stride, padding, module.dilation, module.groups,
        isinstance(module, _Transposed),
    )  # fmt: skip
    return {"weight": weight, "bias": bias(d.flatten(2).mT)}


def _elementwise(normal: Tensor, d: Tensor) -> dict[str, Item]:
    """Of a scale and a shift of K channels, [N, T, K]: a group a channel, of one number each."""
    groups = [z.mT.unsqueeze(3) for z in (normal, d)]
    return {"weight": Factors(groups[0], groups[1]), "bias": bias(d)}


def _layer_norm(module: nn.LayerNorm, x: Tensor, d: Tensor) -> dict[str, Item]:
    normal = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    return _behind(normal, d, module.normalized_shape)


def _rms_norm(module: Any, x: Tensor, d: Tensor) -> dict[str, Item]:
    normal = F.rms_norm(x, module.normalized_shape, None, module.eps)
    return _behind(normal, d, module.normalized_shape)


def _behind(normal: Tensor, d: Tensor, shape: Sequence[int]) -> dict[str, Item]:
    """[N, ..., *shape] as [N, T, K]."""
    between = d.shape[1 : d.dim() - len(shape)]
    return _elementwise(*(z.reshape(len(z), prod(between), prod(shape)) for z in (normal, d)))


def _ahead(normal: Tensor, d: Tensor) -> dict[str, Item]:
    """[N, C, *space] as [N, T, C]."""
    return _elementwise(*(z.reshape(*z.shape[:2], -1).mT for z in (normal, d)))


def _group_norm(module: nn.GroupNorm, x: Tensor, d: Tensor) -> dict[str, Item]:
    return _ahead(F.group_norm(x, module.num_groups, None, None, module.eps), d)


def _batch_norm(module: Any, x: Tensor, d: Tensor) -> dict[str, Item]:
    mean, var = module.running_mean, module.running_var
    return _ahead(F.batch_norm(x, mean, var, None, None, False, 0.0, module.eps), d)


def _instance_norm(module: Any, x: Tensor, d: Tensor) -> dict[str, Item]:
    fixed = module.track_running_stats and not module.training
    mean, var = (module.running_mean, module.running_var) if fixed else (None, None)
    return _ahead(F.instance_norm(x, mean, var, None, None, not fixed, 0.0, module.eps), d)


_TABLE: dict[Any, Callable[..., dict[str, Item]]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    **dict.fromkeys((*_Conv, *_Transposed), _convolution),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys(_Batch, _batch_norm),
    **dict.fromkeys(_Instance, _instance_norm),
}

# --- what is not known ---------------------------------------------------------------------------


def _per_sample(
    op: str,
    name: str,
    module: nn.Module,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    gradient: Tensor,
    wanted: Collection[str],
) -> dict[str, Item]:
    """Per-sample gradients by torch.func, each as one row: a of one 1, d the gradient.

    Everything is computed in the parameters' dtype, also where the forward ran under autocast.
    """
    params = {n: p.detach() for n, p in module.named_parameters() if n in wanted}
    fixed = {n: b.detach() for n, b in (*module.named_parameters(), *module.named_buffers())
             if n not in params}  # fmt: skip
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    for x in (*inputs, *keywords.values()):
        inside = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
        if any(isinstance(part, Tensor) for part in inside):
            expected = "tensors as arguments: of those inside another the batch is not known"
            raise RuntimeError(message(op, "module", expected, type(x).__name__, layer=name))
    dtype = next(iter(params.values())).dtype

    def scalar(p: dict[str, Tensor], d: Tensor, *xs: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, x in zip(tensors, xs, strict=True):
            arguments[i] = x[None]
        out = functional_call(module, {**p, **fixed}, tuple(arguments), dict(keywords))
        out = out[0] if isinstance(out, (tuple, list)) else out
        total: Tensor = (out * d[None]).sum()
        return total

    d, *xs = (
        x.detach().to(dtype) if x.is_floating_point() else x.detach()
        for x in (gradient, *(inputs[i] for i in tensors))
    )
    dims = (None, 0, *[0] * len(xs))
    try:
        with torch.autocast(d.device.type, enabled=False):
            grads = vmap(grad(scalar), in_dims=dims)(params, d, *xs)
    except Exception as error:
        expected = "a module that torch.func can run sample by sample, or one that factors"
        got = f"{type(module).__name__}: {str(error).strip().splitlines()[0]}"
        raise RuntimeError(message(op, "module", expected, got, layer=name)) from error
    ones = d.new_ones(len(d), 1, 1)
    return {n: Factors(ones, g.flatten(1)[:, None]) for n, g in grads.items()}
