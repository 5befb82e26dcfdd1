"""Builds the host emulation of the CUDA kernels and calls it with the ops' own arguments."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def compile_driver(out: Path, *flags: str, driver: str = "driver.cpp") -> Path:
    """Compile csrc/cuda for the host; the kernels' own sources, unchanged."""
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLWKD_EMULATE"]
    command += [f"-I{ROOT / 'csrc/cuda'}", f"-I{HERE}", *flags, str(HERE / driver)]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


class Call:
    """One call of the driver: integers, and the storages that its pointers refer to."""

    def __init__(self) -> None:
        self.ints: list[int] = []
        self.storages: list[torch.UntypedStorage] = []
        self.index: dict[int, int] = {}

    def pointer(self, x: Tensor | None, byte_offset: int = 0) -> None:
        if x is None:
            self.ints += [-1, 0]
            return
        storage = x.untyped_storage()
        key = storage.data_ptr() or id(x)
        if key not in self.index:
            self.index[key] = len(self.storages)
            self.storages.append(storage)
        offset = x.storage_offset() * x.element_size() + byte_offset
        self.ints += [self.index[key], offset]

    def view(self, x: Tensor, layout: Sequence[int], prefix: bool = False) -> None:
        """As csrc/operand.h reads a tensor; `prefix`: its dropped tokens instead."""
        channel, dropped, h, w = layout
        size, stride, skip = [1, 1, 1], [0, 0, 0], 0
        channels = x.shape[channel]
        if h:
            step = x.stride(3 - channel)
            if prefix:
                size[2], stride[2], channels = dropped, step, channels if dropped else 0
            else:
                size[1:], stride[1:] = [h, w], [step * w, step]
                skip = dropped * step * x.element_size()
        else:
            rest = [d for d in range(1, x.dim()) if d != channel]
            size[3 - len(rest) :] = [x.shape[d] for d in rest]
            stride[3 - len(rest) :] = [x.stride(d) for d in rest]
            channels = 0 if prefix else channels
        self.pointer(x, skip)
        self.ints += [DTYPES[x.dtype], x.shape[0], channels, *size]
        self.ints += [x.stride(0), x.stride(channel), *stride]

    def mask(self, mask: Sequence[Tensor], layer: int) -> None:
        if not mask or mask[layer].dim() < 2:
            self.pointer(None)
            self.ints += [0, 0, 0, 0]
            return
        strides = list(mask[layer].stride())
        self.pointer(mask[layer])
        self.ints += [strides[0], *[0] * (4 - len(strides)), *strides[1:]]


class Library:
    """Calls the driver in this process, on the tensors' own memory."""

    def __init__(self, path: Path) -> None:
        self.emulate = ctypes.CDLL(str(path)).emulate

    def run(self, head: list[int], reals: list[float], call: Call) -> None:
        self.emulate(
            (ctypes.c_int64 * 5)(*head),
            (ctypes.c_double * 2)(*reals),
            (ctypes.c_int64 * len(call.ints))(*call.ints),
            (ctypes.c_void_p * len(call.storages))(*[s.data_ptr() for s in call.storages]),
        )


class Program:
    """Runs the driver as a program of its own, every buffer allocated to its exact size."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def run(self, head: list[int], reals: list[float], call: Call) -> None:
        source, target = self.folder / "in.bin", self.folder / "out.bin"
        views = [torch.tensor([], dtype=torch.uint8).set_(s) for s in call.storages]
        with source.open("wb") as file:
            file.write(struct.pack(f"<5q2dq{len(call.ints)}q", *head, *reals, len(call.ints),
                                   *call.ints))  # fmt: skip
            file.write(struct.pack("<q", len(views)))
            for view in views:
                file.write(struct.pack("<q", view.numel()) + view.numpy().tobytes())
        done = subprocess.run([self.path, source, target], capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        data = bytearray(target.read_bytes())
        for view in views:
            if view.numel():
                view.copy_(torch.frombuffer(data[: view.numel()], dtype=torch.uint8))
            del data[: view.numel()]


class Emulated:
    """The three ops of the attention kind with the signatures of torch.ops.lwkd."""

    def __init__(self, runner: Library | Program, seed: int = 0) -> None:
        self.runner, self.seed = runner, seed

    def _run(self, op: int, wide: bool, js: bool, mean: bool, reals: list[float], call: Call):
        self.runner.run([op, wide, js, mean, self.seed], reals, call)

    def attention(
        self, student, teacher, mask, s_layout, t_layout, p, divergence, beta, mean
    ) -> tuple[Tensor, Tensor]:
        wide = any(x.dtype == torch.float64 for x in [*student, *teacher])
        dtype = torch.float64 if wide else torch.float32
        n, call, spaces = student[0].shape[0], Call(), []
        for i, pair in enumerate(zip(student, teacher, strict=True)):
            sizes = [
                [h, w] if h else [s for d, s in enumerate(x.shape) if d not in (0, c)]
                for x, (c, _, h, w) in zip(
                    pair, (s_layout[4 * i : 4 * i + 4], t_layout[4 * i : 4 * i + 4]), strict=True
                )
            ]
            space = [min(a, b) for a, b in zip(*sizes, strict=True)]
            spaces.append([1] * (3 - len(space)) + space)
        cells = sum(a * b * c for a, b, c in spaces)
        out = torch.full((len(student),) if mean else (len(student), n), torch.nan, dtype=dtype)
        maps = torch.full((2 * n * cells,), torch.nan, dtype=dtype)
        call.ints.append(len(student))
        call.pointer(maps)
        call.pointer(out)
        for i, space in enumerate(spaces):
            call.view(student[i], s_layout[4 * i : 4 * i + 4])
            call.view(teacher[i], t_layout[4 * i : 4 * i + 4])
            call.ints += space
            call.mask(mask, i)
        self._run(0, wide, divergence == 1, mean, [p, beta], call)
        return out, maps

    def attention_backward(
        self, grad, xs, mask, maps, layers, sides, layout, space, p, divergence, beta, out=None
    ) -> list[Tensor]:
        call, n = Call(), xs[0].shape[0]
        if out is None:
            out = [torch.full_like(x, torch.nan) for x in xs]
        sizes = [space[i : i + 3] for i in range(0, len(space), 3)]
        cells = [a * b * c for a, b, c in sizes]
        call.ints.append(len(xs))
        for i, (x, dx) in enumerate(zip(xs, out, strict=True)):
            layer, side, how = layers[i], sides[i], layout[4 * i : 4 * i + 4]
            call.view(x, how)
            call.view(dx, how)
            call.view(dx, how, prefix=True)
            start = 2 * n * sum(cells[:layer])
            for s in (side, 1 - side):
                call.pointer(maps, (start + s * n * cells[layer]) * maps.element_size())
            call.ints += sizes[layer]
            call.mask(mask, layer)
            call.pointer(grad, layer * grad.stride(0) * grad.element_size())
            call.ints += [0 if grad.dim() == 1 else grad.stride(1), side]
        wide = maps.dtype == torch.float64
        self._run(1, wide, divergence == 1, grad.dim() == 1, [p, beta], call)
        return out

    def attention_maps(self, xs, channel_dims, p) -> list[Tensor]:
        out = []
        for wide in (False, True):
            call, chosen = Call(), []
            for x, d in zip(xs, channel_dims, strict=True):
                if (x.dtype == torch.float64) == wide:
                    size = [s for i, s in enumerate(x.shape) if i != d]
                    dtype = torch.float64 if wide else torch.float32
                    chosen.append((x, d, torch.full(size, torch.nan, dtype=dtype)))
            call.ints.append(len(chosen))
            for x, d, m in chosen:
                call.view(x, (d, 0, 0, 0))
                call.pointer(m)
            self._run(2, wide, False, False, [p, 0.5], call)
            out.append(iter([m for _, _, m in chosen]))
        return [next(out[x.dtype == torch.float64]) for x in xs]
