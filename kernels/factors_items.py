"""How the Triton kernels are told of an item of Jacobian factors: its matrices, its tiles.

``form`` are the integers that lwkd/ops/factors.py makes of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import DTYPES, element_size, index_of, merge
from .factors_operands import CONV_WORDS, DENSE_WORDS
from .factors_tiles import direct_kernel, gram_kernel, index_kernel, thin_kernel

DENSE, INDICES, CONVOLUTION = 0, 1, 2  # as lwkd/ops/factors_reference.py tells items apart
FORM = 15
_STEP = 32  # rows, or columns, that go into the matrix units at a time
_THIN = 1024  # elements of a tile without them


class Job(NamedTuple):
    """One parameter, of one network or of both: how it is contracted, and what kernels are told."""

    kernel: Any
    programs: int  # of a sample
    tensors: tuple[Tensor, ...]  # a and d of the student, and of the teacher
    words: tuple[int, ...]
    constants: dict[str, Any]
    side: int = 0


class _Matrices(NamedTuple):
    """The factors of one parameter, a and d by turns: strides as in factors_operands.py."""

    tensors: Sequence[Tensor]
    words: Sequence[Sequence[int]]
    conv: int  # whose columns are patches: nobody's, those of a, those of d too
    groups: int
    rows: int
    inputs: int
    outputs: int


def job_of(
    sides: Sequence[tuple[Tensor, Tensor]], form: Sequence[int], gram: bool, how: int
) -> Job:
    """Of one parameter, of one network or of both; ``form`` is that of the first."""
    indices = form[0] == INDICES
    m = _convolution(sides, form) if form[0] == CONVOLUTION else _dense(sides, indices)
    thin = not indices and (m.outputs == 1 if m.conv else 1 in (m.inputs, m.outputs))
    m = _vectors(m) if thin else m
    types = [DTYPES.get(x.dtype) for x in m.tensors]
    types *= 4 // len(types)
    constants: dict[str, Any] = dict(zip("ADBE", types, strict=True)) | {"CONV": m.conv}
    constants |= _access(m, indices) | {"WAY": how}
    if thin:
        kernel, programs, tiles = _thin_tiles(m, constants["ACROSS"])
    else:
        constants |= _accumulation(m.tensors)
        kernel, programs, tiles = _tiles(m, constants, "index" if indices else gram)
    if indices:
        for name in ("A", "B", "CONV"):
            del constants[name]
    each = CONV_WORDS if m.conv else DENSE_WORDS
    words = [programs, m.groups, m.rows, m.inputs, m.outputs]
    for part in (*m.words, *m.words)[:4]:
        words += [*part, *[0] * (each - len(part))]
    tensors = (*m.tensors, *m.tensors)[:4]
    return Job(kernel, programs, tensors, tuple(words), constants | tiles)


# --- matrices -------------------------------------------------------------------------------------


def _dense(sides: Sequence[tuple[Tensor, Tensor]], indices: bool) -> _Matrices:
    """Of a and d, [N, T, C] or [N, G, T, C], or a [N, T]."""
    a, d = sides[0]
    words = []
    for x in (x for pair in sides for x in pair):
        if x.dtype == torch.int64:
            words.append((x.stride(0), 0, x.stride(1), 0))
        else:
            group = x.stride(1) if x.dim() == 4 else 0
            words.append((x.stride(0), group, x.stride(-2), x.stride(-1)))
    groups = d.shape[1] if d.dim() == 4 else 1
    inputs = 1 if indices else a.shape[-1]
    flat = [x for pair in sides for x in pair]
    return _Matrices(flat, words, 0, groups, d.shape[-2], inputs, d.shape[-1])


def _convolution(sides: Sequence[tuple[Tensor, Tensor]], form: Sequence[int]) -> _Matrices:
    """A transposed convolution's gradient is that of an ordinary one from its output."""
    flat = [x for pair in sides for x in (pair[::-1] if form[2] else pair)]
    x, y, groups = flat[0], flat[1], form[1]
    kernel, stride, padding = form[3:6], form[6:9], form[9:12]
    plain = [_plain(z, groups) for z in flat]
    pointwise = all((*(k == 1 for k in (*kernel, *stride)), not any(padding)))
    if pointwise and x.shape[2:] == y.shape[2:] and all(plain):
        conv, words = 0, plain
    else:
        conv = 1 if all(plain[1::2]) else 2
        words = [
            _patches(z, flat[1], form, k % 2 == 0) if k % 2 == 0 or conv == 2 else plain[k]
            for k, z in enumerate(flat)
        ]
    rows = y.shape[2:].numel()
    inputs = x.shape[1] // groups * kernel[0] * kernel[1] * kernel[2]
    return _Matrices(flat, words, conv, groups, rows, inputs, y.shape[1] // groups)


def _plain(z: Tensor, groups: int) -> tuple[int, ...]:
    """Of positions that lie at one distance from each other, else nothing."""
    runs = merge(z.shape[2:], z.stride()[2:])
    if len(runs) > 1:
        return ()
    return z.stride(0), z.shape[1] // groups * z.stride(1), runs[0][1], z.stride(1)


def _patches(z: Tensor, y: Tensor, form: Sequence[int], patch: bool) -> tuple[int, ...]:
    """Of the patches of z at the positions of y, or of z as patches of one element each."""
    front = 5 - z.dim()
    kernel, stride, padding, dilation = (form[3 + 3 * i : 6 + 3 * i] for i in range(4))
    positions = (1,) * front + tuple(y.shape[2:])
    size, steps = (1,) * front + tuple(z.shape[2:]), (0,) * front + z.stride()[2:]
    words = [z.stride(0), z.shape[1] // form[1] * z.stride(1), 0, z.stride(1), *positions[1:]]
    words += kernel if patch else (1, 1, 1)
    for i in range(3):
        words += [stride[i], dilation[i], padding[i]] if patch else [1, 1, 0]
        words += [size[i], steps[i]]
    return tuple(words)


def _vectors(m: _Matrices) -> _Matrices:
    """As columns that both factors have, some at no distance: gradients that are vectors."""
    single = m.inputs == m.outputs == 1 and not m.conv
    words = []
    for k, (n, g, t, c, *more) in enumerate(m.words):
        width = m.outputs if k % 2 else m.inputs
        column = g if single else c if width > 1 else 0
        words.append((n, 0 if single else g, t, column, *more))
    columns = m.groups if single else max(m.inputs, m.outputs)
    groups = 1 if single else m.groups
    return m._replace(words=words, groups=groups, inputs=columns, outputs=columns)


# --- how they are read, and in what tiles ---------------------------------------------------------


def _access(m: _Matrices, indices: bool) -> dict[str, Any]:
    """Which neighbours are adjacent, how many are read at a time, what numbers them."""
    kept = range(1, len(m.tensors), 2) if indices else range(len(m.tensors))
    words = [m.words[k] for k in kept]
    other = not indices and (m.outputs > m.inputs or words[0][3] == 0)
    wide = words[1] if other else words[0]
    across = wide[3] not in (0, 1)
    v = 16 // max(element_size(m.tensors[k].dtype) for k in kept)
    fits = not m.conv and all(m.tensors[k].data_ptr() % 16 == 0 for k in kept)
    for n, g, row, column, *_ in words:
        near, far = (row, column) if across else (column, row)
        fits = fits and near == 1 and not any(s % v for s in (n, g, far))
    adjacent = (m.rows,) if across else (m.outputs,) if indices else (m.inputs, m.outputs)
    reach = max(_reach(m.tensors[k]) for k in kept)
    return {
        "ACROSS": across,
        "VECTOR": v if fits and not any(size % v for size in adjacent) else 1,
        "INDEX": index_of(max(reach, m.rows, m.inputs, m.outputs)),
    }


def _reach(x: Tensor) -> int:
    """Elements from the first of a sample to its last."""
    sizes, strides = x.shape[1:], x.stride()[1:]
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True) if size)


def _accumulation(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """As torch multiplies float32 matrices; what has fewer digits loses none in TF32."""
    double = any(x.dtype == torch.float64 for x in tensors)
    floats = [x for x in tensors if x.dtype != torch.int64]
    short = all(x.dtype in (torch.float16, torch.bfloat16) for x in floats)
    exact = double or (torch.get_float32_matmul_precision() == "highest" and not short)
    return {
        "ACC": tl.float64 if double else tl.float32,
        "PREC": "ieee" if exact else "tf32",
        "num_warps": 4 if exact else 8,
    }


def _power(size: int, most: int) -> int:
    """The power of two from 16 that covers size, at the most ``most``."""
    return min(max(16, 1 << max(size - 1, 0).bit_length()), most)


def _tiles(
    m: _Matrices, constants: dict[str, Any], way: bool | str
) -> tuple[Any, int, dict[str, int]]:
    """(kernel, programs, sizes): tiles as large as registers hold them."""
    double = constants["ACC"] == tl.float64
    most = 16 if double else 64 if constants["PREC"] == "tf32" else 32
    step = 16 if double else _STEP
    if way == "index":
        block = _power(m.rows, min(most, 32))
        return index_kernel, (-(-m.rows // block)) ** 2, {"BT": block, "BK": step}
    if way:
        block = _power(m.rows, most)
        blocks = -(-m.rows // block)
        programs = m.groups * blocks * (blocks + 1) // 2
        return gram_kernel, programs, {"BT": block, "BK": step}
    o, i = _power(m.outputs, most), _power(m.inputs, most)
    programs = m.groups * -(-m.outputs // o) * -(-m.inputs // i)
    return direct_kernel, programs, {"BO": o, "BI": i, "BT": step}


def _thin_tiles(m: _Matrices, across: bool) -> tuple[Any, int, dict[str, int]]:
    block = _power(m.inputs, 16 if across else 64)
    tiles = {"BT": _THIN // block, "BJ": block}
    return thin_kernel, m.groups * -(-m.inputs // block), tiles
