"""The Hessian kind in Triton; lwkd/ops/hessian.py states the formulas.

    signs_kernel   ±1, a tile of elements
    dot_kernel     Σ ±h of a tile: h is read once, the signs are made in registers
    total_kernel   the tiles of an item added up

All items of a call share these launches (one more for every further dtype, or way of loading).
Sums are in float64 and in an order that follows from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .common import DTYPES, Plan, element_size, helper, kernel, locate, widen

__all__ = ["probe_dot", "rademacher"]

_BLOCKS = 32  # of 128 elements, in a tile
_TILE = 128 * _BLOCKS
_WORD = 2**32

# The words of an item's row: its first element, where it writes, its elements, then whose signs:
# seed (low, high), layer, probe.


@helper
def words_of(row, block):
    """The four words of every block's signs."""
    seed = tl.load(row + 4) | (tl.load(row + 5) << 32)
    layer, probe = tl.load(row + 6).to(tl.uint32), tl.load(row + 7).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, layer, probe)


@kernel
def signs_kernel(
    table, base: tl.int64, items: tl.int64,
    DTYPE: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    out = tl.load(row + 2).to(tl.pointer_type(DTYPE))
    count = tl.load(row + 3)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    a, b, c, d = words_of(row, block)
    bit = tl.arange(0, 32)[None, :]
    for w in tl.static_range(4):
        word = a if w == 0 else b if w == 1 else c if w == 2 else d
        at = block[:, None] * 128 + w * 32 + bit
        sign = tl.where((word[:, None] >> bit.to(tl.uint32)) & 1 == 1, 1.0, -1.0)
        tl.store(out + at, sign.to(DTYPE), mask=at < count)


@kernel
def dot_kernel(
    table, base: tl.int64, items: tl.int64,
    DTYPE: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
):  # fmt: skip
    row, program = locate(table, base, items, WIDTH, ITEMS)
    aligned: tl.constexpr = 16 if VECTOR > 1 else 1
    h = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), aligned)
    count = tl.load(row + 3)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    a, b, c, d = words_of(row, block)
    bit = tl.arange(0, 32)[None, :]
    total = tl.full([BLOCKS, 32], 0, tl.float64)
    whole = (program + 1) * BLOCKS * 128 <= count
    for w in tl.static_range(4):
        word = a if w == 0 else b if w == 1 else c if w == 2 else d
        at = block[:, None] * 128 + w * 32 + bit
        # Whole but for the last tile: a mask that may end anywhere would be one load an element.
        if whole:
            x = widen(tl.load(h + at), tl.float64)
        else:
            x = widen(tl.load(h + at, mask=at < count, other=0), tl.float64)
        total += tl.where((word[:, None] >> bit.to(tl.uint32)) & 1 == 1, x, -x)
    out = tl.load(row + 2).to(tl.pointer_type(tl.float64))
    tl.store(out + program, tl.sum(tl.sum(total, 1), 0))


@kernel
def total_kernel(
    table, base: tl.int64, items: tl.int64,
    OUT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Row: partial sums, out, how many."""
    row, _ = locate(table, base, items, WIDTH, ITEMS)
    partial, count = tl.load(row + 1).to(tl.pointer_type(tl.float64)), tl.load(row + 3)
    total = tl.full([BLOCK], 0, tl.float64)
    begin = count * 0
    while begin < count:
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < count, other=0)
        begin += BLOCK
    tl.store(tl.load(row + 2).to(tl.pointer_type(OUT)), tl.sum(total, 0).to(OUT))


# --- on the host ----------------------------------------------------------------------------------


def _counter(seed: int, layer: int, probe: int) -> tuple[int, ...]:
    return seed % _WORD, (seed >> 32) % _WORD, layer, probe


def _vector(x: Tensor) -> int:
    """Elements of a 16-byte load; tiles begin at multiples of that."""
    return 1 if x.data_ptr() % 16 else 16 // element_size(x.dtype)


def rademacher(like: Tensor, seed: int, layer: int, probe: int) -> Tensor:
    """lwkd::rademacher: ±1 in the shape, dtype and layout of ``like``."""
    out = torch.empty_like(like)
    flat = out if out.is_contiguous() else out.new_empty(out.shape)
    plan = plan_rademacher(flat, seed, layer, probe)
    plan.run()
    return out if flat is out else out.copy_(flat)


def plan_rademacher(out: Tensor, seed: int, layer: int, probe: int) -> Plan:
    """Plan :func:`rademacher` into a contiguous tensor."""
    plan, count = Plan(out.device), out.numel()
    constants = {"DTYPE": DTYPES[out.dtype], "BLOCKS": _BLOCKS, "VECTOR": 1}
    plan.launch(signs_kernel, **constants).append(
        (-(-count // _TILE), (0, out.data_ptr(), count, *_counter(seed, layer, probe)))
    )
    return plan


def probe_dot(*args: Any) -> Tensor:
    """lwkd::probe_dot: Σ v·h of every item, or of every probe's part of it."""
    plan, out, _ = plan_probe_dot(*args)
    plan.run()
    return out


def plan_probe_dot(
    hvps: Sequence[Tensor], layers: Sequence[int], seed: int, probe: int, probes: int
) -> tuple[Plan, Tensor, Any]:
    """Plan :func:`probe_dot`, allocate its result; the last item keeps what it needs alive."""
    like, each = hvps[0], max(probes, 1)
    wide = any(h.dtype == torch.float64 for h in hvps)
    dtype = torch.float64 if wide else torch.float32
    out = like.new_empty((len(hvps), probes) if probes else (len(hvps),), dtype=dtype)
    plan, end = Plan(like.device), out.data_ptr()
    counts = [h.numel() // each for h in hvps]
    tiles = [-(-count // _TILE) for count in counts]
    partial = like.new_empty(sum(tiles) * each, dtype=torch.float64)
    keep_alive: list[Any] = [partial]
    at, totals = partial.data_ptr(), []
    for i, h in enumerate(hvps):
        dense = h.contiguous()
        keep_alive.append(dense)
        for k in range(each):
            part = dense[k] if probes else dense
            plan.launch(
                dot_kernel, DTYPE=DTYPES[h.dtype], BLOCKS=_BLOCKS, VECTOR=_vector(part)
            ).append((tiles[i], (
                part.data_ptr(), at, counts[i], *_counter(seed, layers[i], probe + k),
            )))  # fmt: skip
            place = end + (i * each + k) * out.element_size()
            totals.append((1, (at, place, tiles[i])))
            at += 8 * tiles[i]
    plan.launch(total_kernel, OUT=DTYPES[dtype], BLOCK=1024).extend(totals)
    return plan, out, keep_alive
