"""Factors of what is added: a bias, and a parameter that is used more than once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd.ops.convolution import patches_of
from lwkd.ops.factors import Factors, Item, form_of


def bias(d: Tensor) -> Factors:
    """Of what is added to d [N, T, K], or [N, G, T, K], at every t."""
    return Factors(d.new_ones(1).expand(*d.shape[:-1], 1), d)


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
