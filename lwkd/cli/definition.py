"""What `doctor` holds the backends against: the definition in float64, and cases to try it on.

Nothing here is shared with the ops: every formula is written a second time, as plainly as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]
Sides = tuple[list[Tensor], list[Tensor]]  # student, teacher


def distance(
    student: Tensor,
    teacher: Tensor,
    p: float = 2.0,
    divergence: str = "l2",
    beta: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Return D [N] of one pair [N, C, *space], float64, differentiable.

    >>> x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    >>> distance(x, x.flip(2), p=1.0)  # (3/5 − 4/5)² twice
    tensor([0.0800], dtype=torch.float64)
    """
    maps = [x.abs().pow(p).sum(1) for x in (student, teacher)]
    for d in range(1, maps[0].dim()):
        size = min(m.shape[d] for m in maps)
        maps = [_average(m, d, size) for m in maps]
    keep = torch.ones_like(maps[0], dtype=torch.bool) if mask is None else mask
    keep = keep.flatten(1)
    a, b = (torch.where(keep, m.flatten(1), 0.0) for m in maps)
    if divergence == "l2":
        return (_unit(a) - _unit(b)).square().sum(1)
    a, b = _share(a, keep), _share(b, keep)
    return _entropy(beta * a + (1 - beta) * b) - beta * _entropy(a) - (1 - beta) * _entropy(b)


def _average(m: Tensor, d: int, size: int) -> Tensor:
    """Adaptive average pooling of one dimension: window i is [⌊i·n/size⌋, ⌈(i+1)·n/size⌉)."""
    n = m.shape[d]
    windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return torch.stack([m.narrow(d, lo, hi - lo).mean(d) for lo, hi in windows], d)


def _unit(m: Tensor) -> Tensor:
    return m / m.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()


def _share(m: Tensor, keep: Tensor) -> Tensor:
    total = m.sum(1, keepdim=True)
    uniform = keep / keep.sum(1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, m / torch.where(total > 0, total, 1.0), uniform)


def _entropy(q: Tensor) -> Tensor:
    return -(q * torch.where(q > 0, q, 1.0).log()).sum(1)


# --- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How values [N, C, *space] lie in memory: ``store`` makes the operand, ``view`` reads it."""

    store: View
    view: View


@dataclass(frozen=True)
class Case:
    """Shapes [N, C, *space] of L pairs, how they are stored, and the options of the op."""

    name: str
    student: Sequence[Sequence[int]]
    teacher: Sequence[Sequence[int]]
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    zeros: bool = False

    @property
    def power(self) -> float:
        """The power p of the maps."""
        return float(self.options.get("p", 2.0))

    def values(self) -> Sides:
        """Return student and teacher, always the same, in float64 on the CPU."""
        g = torch.Generator().manual_seed(1)
        sides: Sides = ([], [])
        for side, shapes in enumerate((self.student, self.teacher)):
            for shape in shapes:
                x = torch.randn(list(shape), generator=g, dtype=torch.float64)
                if self.zeros:  # many exact zeros, and a sample that is nothing else
                    x = torch.where(x > 0.3, x, 0.0)
                    x[0] = 0
                sides[side].append(x)
        return sides

    def masks(self) -> list[Tensor | None] | None:
        """Return one mask a layer, but none for the first; the last sample keeps no position."""
        if not self.masked:
            return None
        g = torch.Generator().manual_seed(2)
        masks: list[Tensor | None] = [None]
        for s, t in zip(self.student[1:], self.teacher[1:], strict=True):
            space = [min(a, b) for a, b in zip(s[2:], t[2:], strict=True)]
            mask = torch.rand(s[0], *space, generator=g) > 0.4
            mask[-1] = False
            masks.append(mask)
        return masks


def _same(x: Tensor) -> Tensor:
    return x


def _sliced(x: Tensor) -> Tensor:
    """Every second channel of a larger tensor, its data one element past an aligned address."""
    n, c, *space = x.shape
    flat = x.new_zeros(2 * x.numel() + 1)[1:]
    out = flat.view(n, 2 * c, *space)[:, ::2]
    return out.copy_(x)


def _tokens(x: Tensor) -> Tensor:
    """[N, 2 + h·w, C]: two leading tokens, then the positions."""
    tokens = x.flatten(2).mT
    return torch.cat([torch.full_like(tokens[:, :1], 7.0)] * 2 + [tokens], 1)


def layout(name: str, value: Tensor) -> Layout:
    """Return one of the layouts that `CASES` names, for a value [N, C, *space]."""
    space = tuple(value.shape[2:])
    last = torch.channels_last
    known = {
        "contiguous": Layout(_same, _same),
        "channels last": Layout(lambda x: x.contiguous(memory_format=last), _same),
        "sliced": Layout(_sliced, _same),
        "permuted": Layout(lambda x: x.mT.contiguous().mT, _same),
        "last": Layout(lambda x: x.movedim(1, -1).contiguous(), lambda x: x.movedim(-1, 1)),
        "tokens": Layout(_tokens, lambda x: x[:, 2:].mT.unflatten(2, space)),
    }
    return known[name]


_PLAIN = ((3, 5, 7, 7), (3, 8, 4, 4), (3, 64, 1, 3))
CASES = (
    Case("contiguous", _PLAIN, ((3, 9, 7, 7), (3, 8, 4, 4), (3, 3, 1, 3))),
    Case("pooled, p=1", _PLAIN, ((3, 4, 9, 8), (3, 8, 2, 9), (3, 3, 5, 2)), options={"p": 1.0}),
    Case(
        "channels last", ((2, 16, 6, 6),), ((2, 12, 6, 6),), ("channels last", "channels last")
    ),
    Case("sliced, permuted", _PLAIN, _PLAIN, ("sliced", "permuted"), {"p": 1.5}),
    Case(
        "tokens and image", ((3, 6, 4, 5),), ((3, 4, 8, 8),), ("tokens", "sliced"),
        {"tokens": ((4, 5, 2), None)},
    ),
    Case("sequence", ((3, 7, 33),), ((3, 5, 20),), ("last", "last"), {"channel_dim": 2}),
    Case("volume", ((2, 3, 4, 3, 5),), ((2, 4, 3, 3, 3),)),
    Case("masked", _PLAIN, ((3, 4, 9, 8), (3, 8, 4, 4), (3, 2, 1, 3)), masked=True),
    Case("zeros", _PLAIN, ((3, 4, 9, 8), (3, 8, 4, 4), (3, 2, 1, 3)), zeros=True),
    Case("large map", ((2, 3, 65, 33),), ((2, 40, 65, 33),)),
)  # fmt: skip
