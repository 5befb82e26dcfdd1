"""Calls the host emulation of the CUDA kernels of Jacobian factors with the op's own arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lwkd.ops.factors_reference import FORM, GRAM, NORMS
from tests.cuda.emulation import DTYPES


def _tensor(x: Tensor) -> list[int]:
    dtype = DTYPES.get(x.dtype, 0)
    return [x.data_ptr(), dtype, x.dim(), *x.shape, x.dim(), *x.stride()]


class EmulatedFactors:
    """The op of Jacobian factors with the signature of torch.ops.lwkd."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._emulate, self._seed = ctypes.CDLL(str(path)).emulate_factors, seed

    def jacobian_factors(
        self,
        student_a: Sequence[Tensor],
        student_d: Sequence[Tensor],
        teacher_a: Sequence[Tensor],
        teacher_d: Sequence[Tensor],
        layers: Sequence[int],
        forms: Sequence[int],
        contractions: Sequence[int],
        how: int,
        mean: bool,
    ) -> Tensor:
        every = (*student_a, *student_d, *teacher_a, *teacher_d)
        wide = any(x.dtype == torch.float64 for x in every)
        count, n = layers[-1] + 1, len(student_d[0])
        dtype = torch.float64 if wide else torch.float32
        out = torch.full((count,) if mean else (count, n), torch.nan, dtype=dtype)
        ints, items = [out.data_ptr()], 0
        both = ((student_a, student_d), (teacher_a, teacher_d))
        for i, layer in enumerate(layers):
            for sides in ((0,), (1,)) if how == NORMS else ((0, 1),):
                begin = (2 * i + sides[0]) * FORM
                side = sides[0] if len(sides) == 1 else 0
                ints += [layer, side, contractions[i] == GRAM, len(sides)]
                ints += [FORM, *forms[begin : begin + FORM]]
                for k in sides:
                    ints += [*_tensor(both[k][0][i]), *_tensor(both[k][1][i])]
                items += 1
        head = [items, count, n, how, mean, self._seed, wide]
        self._emulate((ctypes.c_int64 * 7)(*head), (ctypes.c_int64 * len(ints))(*ints))
        return out
