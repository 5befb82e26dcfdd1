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

from lwkd.ops.checks import message
from lwkd.ops.convolution import patches_of
from lwkd.ops.factors import ConvFactors, Factors, Item, form_of

_Batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_Instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def supports(module: nn.Module) -> bool:
    """Whether the module's parameters factor; else they take torch.func.

    A parametrization (weight_norm, spectral_norm) has other parameters than the weight that
    factors, and a subclass with a forward of its own does what nobody here knows.

    >>> supports(nn.Conv2d(3, 8, 3)), supports(nn.Bilinear(2, 3, 4))
    (True, False)
    """
    if isinstance(module, nn.MultiheadAttention):
        return _attention_factors(module)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if hasattr(module, "parametrizations") or not own <= {"weight", "bias"}:
        return False
    kind = _kind(module)
    return kind is not None and type(module).forward is kind.forward


def whole(module: nn.Module) -> bool:
    """Whether the module stands for everything inside it: its children are not called, or unknown.

    >>> whole(nn.MultiheadAttention(4, 2)), whole(nn.Linear(4, 2))
    (True, False)
    """
    return isinstance(module, nn.MultiheadAttention) or not supports(module)


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
        items = _attention(op, name, module, gradient.detach(), *inputs, **(keywords or {}))
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


def _bias(d: Tensor) -> Factors:
    """Of what is added to d [N, T, K], or [N, G, T, K], at every t."""
    return Factors(d.new_ones(1).expand(*d.shape[:-1], 1), d)


def _linear(module: nn.Linear, x: Tensor, d: Tensor) -> dict[str, Item]:
    x, d = _tokens(x), _tokens(d)
    return {"weight": Factors(x, d), "bias": _bias(d)}


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
    return {"weight": weight, "bias": _bias(d.flatten(2).mT)}


def _elementwise(normal: Tensor, d: Tensor) -> dict[str, Item]:
    """Of a scale and a shift of K channels, [N, T, K]: a group a channel, of one number each."""
    groups = [z.mT.unsqueeze(3) for z in (normal, d)]
    return {"weight": Factors(groups[0], groups[1]), "bias": _bias(d)}


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

# --- multi-head attention ------------------------------------------------------------------------


def _attention_factors(module: nn.MultiheadAttention) -> bool:
    """Whether attention can be run again from its projections: nothing random, nothing appended."""
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and not any(hasattr(m, "parametrizations") for m in module.modules())
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module.training and module.dropout)
    )


def _attention(
    op: str,
    name: str,
    module: nn.MultiheadAttention,
    d: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> dict[str, Item]:
    """Of the projections of a call; they are computed once more, in the parameters' dtype.

    The arguments are those of the module's forward. The attention weights that it may return count
    for nothing.
    """
    if query.dim() != 3 or d.shape != (*query.shape[:2], module.embed_dim):
        expected = f"a query of three dimensions and an output like it, {list(d.shape)}"
        raise ValueError(message(op, "query", expected, list(query.shape), layer=name))
    out, dtype = module.out_proj, module.out_proj.weight.dtype
    weights: Sequence[Tensor]
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    shifts: Sequence[Tensor | None] = (None, None, None)
    if module.in_proj_bias is not None:
        shifts = module.in_proj_bias.detach().chunk(3)
    *xs, d = (
        (x.detach() if module.batch_first else x.detach().transpose(0, 1)).to(dtype)
        for x in (query, key, value, d)
    )
    mask = _additive(attn_mask, key_padding_mask, module.num_heads, dtype)
    with torch.enable_grad(), torch.autocast(d.device.type, enabled=False):
        projected = [
            F.linear(x, weight.detach(), shift).requires_grad_()
            for x, weight, shift in zip(xs, weights, shifts, strict=True)
        ]
        q, k, v = (z.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for z in projected)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        ds = torch.autograd.grad(mixed, projected, d @ out.weight.detach())
    packed = query.is_set_to(key) and query.is_set_to(value)
    both = torch.cat(ds, 2) if packed else _groups(ds)
    items: dict[str, Item]
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        items = {n: Factors(x, dx) for n, x, dx in zip(names, xs, ds, strict=True)}
    else:
        items = {"in_proj_weight": Factors(xs[0] if packed else _groups(xs), both)}
    if module.in_proj_bias is not None:
        items["in_proj_bias"] = _bias(both)
    items["out_proj.weight"] = Factors(mixed.detach(), d)
    if out.bias is not None:
        items["out_proj.bias"] = _bias(d)
    return items


def _groups(parts: Sequence[Tensor]) -> Tensor:
    """[N, T, K] each, T its own, as [N, G, longest T, K], zeros behind."""
    longest = max(x.shape[1] for x in parts)
    return torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in parts], 1)


def _additive(
    attention: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks of multi-head attention as one that is added, [N or 1, heads or 1, T or 1, S]."""
    masks = []
    if attention is not None:
        masks.append(attention if attention.dim() == 2 else attention.unflatten(0, (-1, heads)))
    if padding is not None:
        masks.append(padding[:, None, None])
    total: Tensor | None = None
    for mask in masks:
        added = mask.to(dtype)
        if mask.dtype == torch.bool:
            added = torch.zeros_like(added).masked_fill_(mask, -torch.inf)
        total = added if total is None else total + added
    return total


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


# --- a parameter that is used more than once -----------------------------------------------------


def add(items: Sequence[Item]) -> Item:
    """Return the item of the sum of gradients: a weight's that was used several times.

    Factors are put one behind the other along T; convolutions are unfolded for that.

    >>> a, d = torch.rand(2, 4, 3), torch.rand(2, 4, 5)
    >>> add([Factors(a, d), Factors(a, d)]).a.shape
    torch.Size([2, 8, 3])
    """
    if len(items) == 1:
        return items[0]
    dense = [_dense(item) for item in items]
    if len({item.a.dtype == torch.int64 for item in dense}) > 1:  # an embedding's and a Linear's
        linear = next(item for item in dense if item.a.dtype != torch.int64)
        dense = [_transposed_rows(item, linear.d.shape[-1]) for item in dense]
    dtype = dense[0].d.dtype
    for item in dense[1:]:
        dtype = torch.promote_types(dtype, item.d.dtype)
    rows = dense[0].a.dtype == torch.int64
    a = torch.cat([item.a if rows else item.a.to(dtype) for item in dense], 1 if rows else -2)
    return Factors(a, torch.cat([item.d.to(dtype) for item in dense], -2))


def _dense(item: Item) -> Factors:
    if isinstance(item, Factors):
        return item
    a, d = patches_of(item.x, item.d, form_of(item))
    return Factors(a, d)


def _transposed_rows(item: Factors, rows: int) -> Factors:
    """An embedding's gradient as that of the Linear it is tied to: d of ones at its rows."""
    if item.a.dtype != torch.int64:
        return item
    return Factors(item.d, F.one_hot(item.a, rows).to(item.d.dtype))
