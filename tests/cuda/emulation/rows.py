"""Calls the host emulation of the CUDA kernels of Jacobian rows with the ops' own arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda.emulation import DTYPES

NORMS = 2


def _tensor(x: Tensor | None) -> list[int]:
    if x is None:
        return [0, 0, 0, 0]
    return [x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.dim() - 1, *x.stride()[1:]]


def _size(x: Tensor) -> list[int]:
    return [x.dim() - 1, *x.shape[1:]]


class EmulatedRows:
    """The ops of Jacobian rows with the signatures of torch.ops.lwkd."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._emulate, self._seed = ctypes.CDLL(str(path)).emulate_rows, seed

    def _run(self, head: list[int], ints: list[int]) -> None:
        self._emulate((ctypes.c_int64 * 8)(*head, self._seed), (ctypes.c_int64 * len(ints))(*ints))

    def jacobian_rows(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], how: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        wide = any(x.dtype == torch.float64 for x in (*student, *teacher))
        dtype = torch.float64 if wide else torch.float32
        count, n = len(student), len(student[0])
        out = torch.full((count,) if mean else (count, n), torch.nan, dtype=dtype)
        sums = torch.full((count, n, 3), torch.nan, dtype=torch.float64)
        ints = [sums.data_ptr(), out.data_ptr()]
        for s, t in zip(student, teacher, strict=True):
            ints += [*_tensor(s), *_tensor(t), *_size(s), *_size(t)]
        self._run([0, wide, count, n, how, mean, 0], ints)
        return out, sums

    def jacobian_rows_backward(
        self,
        grad: Tensor,
        xs: Sequence[Tensor],
        others: Sequence[Tensor],
        sums: Tensor,
        layers: Sequence[int],
        sides: Sequence[int],
        how: int,
        out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        if out is None:
            out = [torch.full_like(x, torch.nan) for x in xs]
        wide = any(x.dtype == torch.float64 for x in (*xs, *others))
        ints: list[int] = []
        for i, (x, dx) in enumerate(zip(xs, out, strict=True)):
            y = None if how == NORMS else others[i]
            ints += [*_tensor(x), *_tensor(dx), *_tensor(y), *_size(x)]
            ints += [sums[layers[i]].data_ptr()]
            ints += [grad.data_ptr() + layers[i] * grad.stride(0) * grad.element_size()]
            ints += [0 if grad.dim() == 1 else grad.stride(1), sides[i]]
        mean, double = grad.dim() == 1, grad.dtype == torch.float64
        self._run([1, wide, len(xs), sums.shape[1], how, mean, double], ints)
        return out
