"""What every Triton kernel of lwkd shares: the table of operands, launches, tiles, powers.

A call covers all its layers in a few launches. What a program works on stands in one table of
int64 words on the device: addresses, sizes, strides. Kernel arguments carry it there, 64 or 256
words a launch of ``write_table``: a copy from the host would either wait for the device or read
memory that a captured graph no longer owns, and operands passed as kernel arguments would compile
once more for every other list of layers. Addresses are read from the table, so whoever adds a row
keeps its tensors alive until ``Plan.run`` has returned; after that the order of the stream does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter was on when the kernels of this package were decorated."""

_INTERPRET = tl.constexpr(INTERPRET)


def _plain(function: Any) -> Any:
    return function


# A kernel's integers say where its rows are: no value of theirs may compile it once more.
kernel = triton.jit(do_not_specialize=("base", "items", "grad_stride", "start", "words"))
# What kernels call: the interpreter would patch the whole language anew at every single call.
helper: Any = _plain if INTERPRET else triton.jit

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

# How a tensor lies in memory: positions of a sample side by side, channels side by side, neither.
PLANE, ROWS, ANY = 0, 1, 2
_PLANE = tl.constexpr(PLANE)

# --- the table ------------------------------------------------------------------------------------

# Triton compiles an argument's size, and whether 16 divides it, into the kernel. Words lie in
# [0, 2^59): addresses, sizes, strides; encoded they are all large and odd, and one compiled writer
# serves every table.
_CODE = tl.constexpr(2**61 + 1)
FEW, MANY = 64, 256  # words of one launch; a launch takes at most 4 KB of arguments
ITEMS = (16, 128, 1024)  # rows that one launch can search
# Without fusion a product rounds alike in every expression: equal maps are at a distance of 0.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def encode(words: Sequence[int]) -> tuple[int, ...]:
    """The words as ``write_table`` takes them."""
    return tuple(2 * w + 2**61 + 1 for w in words)


@kernel
def write_table(table, start: tl.int64, words, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table + start + i, (words[i] - _CODE) >> 1)


@helper
def locate(table, base, items, WIDTH: tl.constexpr, ITEMS: tl.constexpr):
    """The row that this program belongs to, and its number within the row."""
    program = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, ITEMS)
    first = tl.load(table + base + ids * WIDTH, mask=ids < items, other=2**62)
    row = table + base + (tl.sum((first <= program).to(tl.int64)) - 1) * WIDTH
    return row, program - tl.load(row)


class Plan:
    """The launches of one call, in the order in which they were asked for."""

    def __init__(self, device: torch.device) -> None:
        if INTERPRET and device.type != "cpu":
            raise RuntimeError(
                f"lwkd.kernels: tensors: expected on cpu under Triton's interpreter, got {device}"
            )
        self.device = device
        self.words: list[int] = []
        self._known: dict[tuple[int, ...], int] = {}
        self._launches: dict[Any, list[tuple[int, tuple[int, ...]]]] = {}

    def share(self, words: tuple[int, ...]) -> int:
        """The place of ``words`` in the table; equal ones stand there once."""
        if words not in self._known:
            self._known[words] = len(self.words)
            self.words += words
        return self._known[words]

    def launch(self, kernel: Any, stage: int = 0, **constants: Any) -> list[tuple[int, Any]]:
        """The one launch of ``kernel`` with these constants, and stage: append (programs, row).

        Of OPTIONS what a kernel wants otherwise is among the constants.
        """
        return self._launches.setdefault((kernel, tuple(constants.items()), stage), [])

    def launches(self) -> list[tuple[Any, int, dict[str, Any]]]:
        """(kernel, programs, its arguments but for the table), once: writes rows to ``words``."""
        out = []
        for (kernel, constants, _), every in self._launches.items():
            rows = [row for row in every if row[0]]
            for start in range(0, len(rows), ITEMS[-1]):
                part = rows[start : start + ITEMS[-1]]
                words: list[int] = []
                first = 0
                for programs, row in part:
                    words += (first, *row)
                    first += programs
                arguments = {
                    "base": self.share(tuple(words)),
                    "items": len(part),
                    "WIDTH": len(part[0][1]) + 1,
                    "ITEMS": next(i for i in ITEMS if i >= len(part)),
                }
                out.append((kernel, first, arguments | dict(constants)))
        return out

    def run(self) -> None:
        """Write the table, then launch everything on the current stream of the device."""
        launches = self.launches()
        if not launches:
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            table = self.upload()
            for kernel, programs, arguments in launches:
                kernel[(programs,)](table, **(OPTIONS | arguments))

    def upload(self) -> Tensor:
        """The table on the device; ``launches`` has written its rows."""
        if INTERPRET:  # host memory: there is nothing to carry anywhere
            return torch.tensor(self.words, dtype=torch.int64)
        room = -(-len(self.words) // FEW) * FEW
        table = torch.empty(room, dtype=torch.int64, device=self.device)
        words = encode(self.words + [0] * (room - len(self.words)))
        start = 0
        while start < room:
            count = MANY if room - start >= MANY else FEW
            part = words[start : start + count]
            write_table[(1,)](table, start, part, count, **(OPTIONS | {"num_warps": 1}))
            start += count
        return table


# --- tensors, as kernels read them ----------------------------------------------------------------


class View(NamedTuple):
    """How one activation is read in place as [N, C, d0, d1, d2]; strides in elements."""

    dtype: torch.dtype
    n: int
    c: int
    size: tuple[int, int, int]  # space, padded with leading ones
    stride_n: int
    stride_c: int
    stride: tuple[int, int, int]
    start: int  # of what is read, in elements
    lead: int  # positions that have no slope

    @property
    def positions(self) -> int:
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Space in as few dimensions as memory allows."""
        return merge(self.size, self.stride)

    @property
    def all_runs(self) -> list[tuple[int, int]]:
        """Samples and space in as few dimensions as memory allows."""
        return merge((self.n, *self.size), (self.stride_n, *self.stride))


def view_of(x: Tensor, layout: tuple[int, ...], lead: bool = False) -> View:
    """View x as its layout says, less the leading tokens; ``lead``: with them, space unfolded."""
    channel, prefix, h, w = layout
    sizes, strides, size, stride, start = x.shape, x.stride(), [1, 1, 1], [0, 0, 0], 0
    if h:
        step = strides[3 - channel]
        if lead:
            size[2], stride[2] = prefix + h * w, step
        else:
            size[1:], stride[1:], start = (h, w), (w * step, step), prefix * step
    else:
        dims = [d for d in range(1, x.dim()) if d != channel]
        size[3 - len(dims) :] = [sizes[d] for d in dims]
        stride[3 - len(dims) :] = [strides[d] for d in dims]
    return View(
        x.dtype, sizes[0], sizes[channel], tuple(size), strides[0], strides[channel],
        tuple(stride), start, prefix if h and lead else 0,
    )  # fmt: skip


def merge(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of dimensions joined where they lie behind each other, innermost first."""
    out: list[tuple[int, int]] = []
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if out and size > 1 and stride == out[-1][0] * out[-1][1]:
            out[-1] = (size * out[-1][0], out[-1][1])
        elif size > 1:
            out.append((size, stride))
    return out or [(1, 1)]


def place_words(runs: list[tuple[int, int]]) -> tuple[int, ...]:
    """What ``place`` reads: stride and size of four dimensions, innermost first."""
    runs = runs + [(1, 0)] * (4 - len(runs))
    return tuple(w for size, stride in runs for w in (stride, size))


def element_size(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4 if dtype == torch.float32 else 2


def index_of(count: int) -> tl.dtype:
    """The integers that number ``count`` things: a 64-bit division costs four 32-bit ones."""
    return tl.int32 if count < 2**31 - 2**16 else tl.int64


_SMALL = 2048  # elements of a tile: 16 a thread


class Walk:
    """How tensors of one shape are cut into tiles: an activation, and its gradient if it has one.

    It follows from shapes and strides, never from addresses: equal layouts are summed in equal
    order. ``fold``: so many channels, contiguous with their positions, are read as one, because a
    row of 7×7 positions begins at 16 bytes only every 8 channels. ``parts``: sums that a position
    is left with, since programs share the channels. ``small``: small tiles, since an element takes
    two registers or much code. ``target``: programs wanted at the least;
    ``longest``: tiles of channels that one program takes at the most.
    """

    def __init__(self, views: list[View], small: bool, target: int, longest: int) -> None:
        x = self.view = views[0]
        self._views = views
        self._cut(small)
        c, p = x.c // self.fold, x.positions * self.fold
        samples, positions = (x.n, p) if self.order == PLANE else (1, x.n * p)
        tiles = -(-positions // self.positions)
        steps = max(-(-c // self.channels), 1)
        splits = min(max(-(-target // max(samples * tiles, 1)), -(-steps // longest), 1), steps)
        chunk = -(-steps // splits)
        splits = -(-steps // chunk)
        self.programs, self.parts = samples * splits * tiles, splits * self.fold
        self.words = (
            tiles, splits, chunk * self.channels, c, positions, x.n, x.positions, x.lead,
        )  # fmt: skip
        for v in views:
            runs = [(1, v.stride_n)] if self.order == PLANE else v.all_runs
            self.words += (v.stride_c * self.fold, *place_words(runs))
        self._vector = self._widest()

    def _cut(self, small: bool) -> None:
        x, views, p = self.view, self._views, self.view.positions
        size = max(element_size(v.dtype) for v in views)
        tile = _SMALL if small else 16384 // size
        unit = all(len(r) == 1 and r[0][1] == 1 for r in (v.runs for v in views))
        self.order, self.fold = ANY, 1
        if x.c > 1 and all(v.stride_c == 1 for v in views) and not (unit and p >= 8):
            self.order, self.channels = ROWS, 64 if x.c <= 128 else 256
        else:
            fold = 1
            if unit and x.c > 1 and p > 0 and all(v.stride_c == p for v in views):
                fold = _fold(x.c, p, size, tile // 128)
            self.channels = 4 if x.c // fold <= 8 else tile // 128
            if unit and p * fold >= 32:
                self.order, self.fold = PLANE, fold
        self.positions = tile // self.channels

    def _widest(self) -> int:
        """Elements of a 16-byte load where strides allow it, else 1."""
        vector = 16 // max(element_size(v.dtype) for v in self._views)
        if self.order == ANY:
            return 1
        for v in self._views:
            steps = [v.start]
            if self.order == PLANE:
                steps += [v.positions * self.fold, v.stride_c * self.fold if v.c > 1 else 0]
                steps.append(v.stride_n if v.n > 1 else 0)
            else:
                steps += [v.c, *(stride for _, stride in v.all_runs)]
            if any(s % vector for s in steps):
                return 1
        return vector

    def constants(self, *addresses: int) -> dict[str, Any]:
        """The constants of a kernel that walks so over tensors at these addresses."""
        x, plane = self.view, self.order == PLANE
        vector = 1 if any(a % 16 for a in addresses) else self._vector
        channels = self.channels
        if vector == 1:  # an address for every element: fewer elements, or registers run out
            channels = min(channels, max(_SMALL // self.positions, 1))
        return {
            "DTYPE": DTYPES[x.dtype],
            "ORDER": self.order,
            "VECTOR": vector,
            "CB": channels,
            "QB": self.positions,
            "RUNS": 1 if plane else max(len(v.all_runs) for v in self._views),
            "INDEX": index_of(x.positions * self.fold if plane else x.n * x.positions),
        }


def _fold(c: int, p: int, size: int, rows: int) -> int:
    fold = 16 // gcd(16, p * size)
    if c % fold or c // fold < 16:
        fold = 1
    while fold * p < 128 and c % (2 * fold) == 0 and c // (2 * fold) >= rows:
        fold *= 2
    return fold


# --- tiles, as kernels see them -------------------------------------------------------------------
# The words of a shape: tiles, splits, channels of a split, channels, positions to be tiled (of a
# sample if the order is PLANE, else of all), samples, positions of a sample without fold, lead;
# then for each view: channel stride, and what ``place`` reads (PLANE: the sample stride).
# VECTOR tells the compiler what divides numbers that it cannot know. Such a hint holds for the
# result of an operation in the same function: not for a parameter, not for what a loop carries.


@helper
def place(dims, q, RUNS: tl.constexpr, VECTOR: tl.constexpr):
    """Where position q lies, from the words of ``place_words``."""
    at = q.to(tl.int64) * 0
    for i in tl.static_range(RUNS - 1):
        size = tl.load(dims + 2 * i + 1).to(q.dtype)
        at += (q % size).to(tl.int64) * tl.multiple_of(tl.load(dims + 2 * i), VECTOR)
        q = q // size
    return at + q.to(tl.int64) * tl.multiple_of(tl.load(dims + 2 * (RUNS - 1)), VECTOR)


@helper
def tile_of(
    shape, program,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, QB: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(sample, positions, whether they exist, split) of a tile; sample 0 unless PLANE."""
    program = program.to(tl.int32)
    tiles, splits = tl.load(shape).to(tl.int32), tl.load(shape + 1).to(tl.int32)
    part = program // tiles
    q = (program % tiles).to(INDEX) * QB + tl.arange(0, QB)
    positions = tl.load(shape + 4).to(INDEX)
    if ORDER == _PLANE:
        positions = tl.multiple_of(positions, VECTOR)
    return (part // splits).to(tl.int64), q, q < positions, (part % splits).to(tl.int64)


@helper
def offsets(dims, n, q, ORDER: tl.constexpr, VECTOR: tl.constexpr, RUNS: tl.constexpr):
    """Where the tile's positions lie, in elements."""
    if ORDER == _PLANE:
        at = n * tl.multiple_of(tl.load(dims), VECTOR) + q
    else:
        at = place(dims, q, RUNS, VECTOR)
    return at


# --- powers ---------------------------------------------------------------------------------------


@helper
def widen(x, ACC: tl.constexpr):
    """x in ACC; through its bits where the interpreter would get bfloat16 wrong."""
    if x.dtype == ACC:
        y = x
    elif _INTERPRET and x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        y = bits.to(tl.float32, bitcast=True).to(ACC)
    else:
        y = x.to(tl.float32).to(ACC)
    return y


@helper
def narrow(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even: the interpreter cuts bfloat16 off."""
    if x.dtype == DTYPE:
        y = x
    elif _INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, even, (bits >> 16) | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.float32).to(DTYPE)
    return y


@helper
def power(x, p, POWER: tl.constexpr):
    """|x|^p; POWER is 1, 2 or, for any p, 0."""
    if POWER == 2:
        y = x * x
    elif POWER == 1:
        y = tl.abs(x)
    elif _INTERPRET:  # the interpreter knows no library
        a = tl.abs(x)
        zero = a == 0
        y = tl.where(zero, 0.0, tl.exp2(p * tl.log2(tl.where(zero, 1.0, a)))).to(x.dtype)
    else:
        y = libdevice.pow(tl.abs(x), tl.full(x.shape, p, x.dtype))
    return y


@helper
def log1p(u):
    """log(1 + u) in float64, for u ≥ −1: the rounding of 1 + u is divided out again."""
    w = 1.0 + u
    d = w - 1.0
    return tl.where(d == 0, u, tl.log(w) * (u / tl.where(d == 0, 1.0, d)))


def power_of(p: float) -> int:
    """The POWER that serves p."""
    return int(p) if p in (1, 2) else 0


# --- over the batch ------------------------------------------------------------------------------


@kernel
def mean_kernel(
    table, base: tl.int64, items: tl.int64,
    OUT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: each [N] in float64, out [1], N."""
    row, _ = locate(table, base, items, WIDTH, ITEMS)
    each, samples = tl.load(row + 1).to(tl.pointer_type(tl.float64)), tl.load(row + 3)
    total = tl.full([BLOCK], 0, tl.float64)
    begin = samples * 0
    while begin < samples:
        n = begin + tl.arange(0, BLOCK)
        total += tl.load(each + n, mask=n < samples, other=0)
        begin += BLOCK
    mean = tl.sum(total, 0) / samples.to(tl.float64)
    tl.store(tl.load(row + 2).to(tl.pointer_type(OUT)), mean.to(OUT))
