"""How the projections of multi-head attention factor, which no module of their own calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.factoring.sums import bias
from lwkd.ops.checks import message
from lwkd.ops.factors import Factors, Item


def supports(module: nn.MultiheadAttention) -> bool:
    """Whether attention can be run again from its projections: nothing random, nothing appended."""
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and not any(hasattr(m, "parametrizations") for m in module.modules())
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module.training and module.dropout)
    )


def factor(
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
        items["in_proj_bias"] = bias(both)
    items["out_proj.weight"] = Factors(mixed.detach(), d)
    if out.bias is not None:
        items["out_proj.bias"] = bias(d)
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
