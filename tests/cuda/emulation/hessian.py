"""Calls the host emulation of the CUDA kernels of the Hessian kind with the ops' own arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda.emulation import DTYPES


def _job(x: Tensor, seed: int, layer: int, probe: int) -> list[int]:
    shape = [x.dim(), *x.shape, x.dim(), *x.stride()]
    return [x.data_ptr(), DTYPES[x.dtype], *shape, seed, layer, probe]


class EmulatedProbes:
    """The ops of the Hessian kind with the signatures of torch.ops.lwkd."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._emulate, self._seed = ctypes.CDLL(str(path)).emulate_hessian, seed

    def _run(self, head: list[int], ints: list[int]) -> None:
        self._emulate((ctypes.c_int64 * 4)(*head, self._seed), (ctypes.c_int64 * len(ints))(*ints))

    def rademacher(self, like: Tensor, seed: int, layer: int, probe: int) -> Tensor:
        out = torch.empty_like(like).fill_(torch.nan)
        self._run([0, 1, 0], _job(out, seed, layer, probe))
        return out

    def probe_dot(
        self, hvps: Sequence[Tensor], layers: Sequence[int], seed: int, probe: int, probes: int
    ) -> Tensor:
        wide = any(h.dtype == torch.float64 for h in hvps)
        dtype = torch.float64 if wide else torch.float32
        shape = (len(hvps), probes) if probes else (len(hvps),)
        out = torch.full(shape, torch.nan, dtype=dtype)
        ints = [out.data_ptr()]
        for h, layer in zip(hvps, layers, strict=True):
            for k in range(max(probes, 1)):
                ints += _job(h[k] if probes else h, seed, layer, probe + k)
        self._run([1, len(hvps) * max(probes, 1), wide], ints)
        return out
