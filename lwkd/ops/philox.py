"""Signs from a counter: Philox4x32-10, the same on every machine, nothing of torch's generators.

Key: the 64-bit seed (low word, high word). Counter: (block low, block high, layer, probe) with
block = e // 128 for element e; bit b = e % 128 is bit b % 32 of output word b // 32; a set bit is
+1, a clear one −1. Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUTS = 2**32 - 1  # the layer index of signs for what a network puts out
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def words(key: Sequence[int], counter: Sequence[Tensor]) -> Tensor:
    """Return the four output words of every counter.

    Args:
        key: Two words, as ints.
        counter: Four int64 tensors of one shape, values in [0, 2³²).

    Returns:
        [*shape, 4] int64, values in [0, 2³²).

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{w:08x}" for w in words((0, 0), [zero] * 4).tolist()]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        # An int64 product wraps around, and keeps all 64 bits of the unsigned one.
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((q >> 32) & _WORD) ^ b ^ low, q & _WORD, ((p >> 32) & _WORD) ^ d ^ high, p & _WORD,
        )  # fmt: skip
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return torch.stack([a, b, c, d], -1)


def signs(like: Tensor, seed: int, layer: int, probe: int = 0) -> Tensor:
    """Return ±1 in the shape, dtype and device of ``like``, by its flat logical elements.

    Args:
        like: A floating tensor.
        seed: 64 bits; a negative one counts as its two's complement.
        layer: 32 bits of the counter.
        probe: 32 more.

    >>> signs(torch.empty(2, 3), seed=0, layer=0)
    tensor([[ 1., -1.,  1.],
            [-1.,  1., -1.]])
    """
    count, device = like.numel(), like.device
    blocks = torch.arange(-(-count // 128), dtype=torch.int64, device=device)
    rest = [torch.full_like(blocks, v) for v in (layer, probe)]
    out = words((seed & _WORD, (seed >> 32) & _WORD), [blocks & _WORD, blocks >> 32, *rest])
    shifts = torch.arange(32, dtype=torch.int64, device=device)
    bits = (out[..., None] >> shifts) & 1
    return (2 * bits.flatten()[:count] - 1).to(like.dtype).reshape(like.shape)
