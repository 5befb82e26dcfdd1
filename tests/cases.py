"""All inputs of the battery: shapes × dtypes × layouts × options, one list for every backend."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lwkd
from lwkd.ops import backends

Shape = tuple[int, ...]

# --- backends ------------------------------------------------------------------------------------


class Target(NamedTuple):
    """One backend on one device. Where it should be live and is not, its tests fail."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def slow(self) -> bool:
        """Triton's interpreter: a thousandth of the speed."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def namespace(self) -> Any:
        names = {"reference": "lwkd_reference", "triton": "lwkd_triton"}
        return getattr(torch.ops, names.get(self.backend, "lwkd"))

    def require(self) -> None:
        reason = backends.unavailable(self.backend, self.device)
        if reason:
            pytest.fail(f"{self} should be live here and is not: {reason}")

    def distance(self, student: Any, teacher: Any, **options: Any) -> Tensor:
        self.require()
        return lwkd.ops.layer_discrepancy(student, teacher, backend=self.backend, **options)

    def maps(self, xs: Any, *, p: float = 2.0, channel_dim: Any = None) -> list[Tensor]:
        """attention_maps of this backend: the public function has no such choice."""
        self.require()
        dims = channel_dim if isinstance(channel_dim, list) else [channel_dim] * len(xs)
        dims = [1 if d is None else d % x.dim() for d, x in zip(dims, xs, strict=True)]
        return self.namespace.attention_maps(xs, dims, float(p))


def why_not(target: Target) -> str:
    """Why nobody can expect this backend here, or nothing."""
    if target.backend == "compiled" and target.device == "cpu":
        built = any(Path(lwkd.__file__).parent.glob("_C.*"))
        return "" if built or shutil.which("c++") else "no C++ compiler, and lwkd._C is not built"
    if target.backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if target.device == "cpu" and torch.cuda.is_available():
            return "the interpreter is off where there is a GPU"
    return ""


def _param(backend: str, device: str) -> Any:
    target = Target(backend, device)
    reason = why_not(target)
    marks = [pytest.mark.gpu] if device == "cuda" else []
    marks += [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(target, id=str(target), marks=marks)


NAMES = ("reference", "compiled", "triton")
TARGETS = [_param(b, d) for d in ("cpu", "cuda") for b in NAMES]
each_target = pytest.mark.parametrize("target", TARGETS)
cpu_target = pytest.mark.parametrize("target", TARGETS[: len(NAMES)])
fast_target = pytest.mark.parametrize("target", [t for t in TARGETS if not t.values[0].slow])

# --- dtypes --------------------------------------------------------------------------------------

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# (student, teacher) of even layers, and swapped for odd ones.
DTYPES = {
    "f64": (F64, F64),
    "f32": (F32, F32),
    "f16": (F16, F16),
    "bf16": (B16, B16),
    "bf16/f32": (B16, F32),
    "f64/f16": (F64, F16),
}

# --- layouts: the same values, other strides -----------------------------------------------------


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    """Memory in the given order of dimensions."""
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def _inside(x: Tensor, before: int, after: int, step: int) -> Tensor:
    """Cut out of a larger tensor whose other entries are NaN: reading one shows."""
    size = [before + s * step + after for s in x.shape]
    big = torch.full(size, float("nan"), dtype=x.dtype, device=x.device)
    view = big[tuple(slice(before, before + s * step, step) for s in x.shape)]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    return flat[1:].view(x.shape).copy_(x)


def _odd_ones(x: Tensor) -> Tensor:
    """A dimension of one element may have any stride at all."""
    x = x.contiguous()
    strides = [s if n != 1 else 7919 for s, n in zip(x.stride(), x.shape, strict=True)]
    return x.as_strided(x.shape, strides)


def _expanded(x: Tensor, d: int) -> Tensor:
    return x.narrow(d, 0, min(1, x.shape[d])).expand(x.shape) if x.shape[d] else x


def _overlapping(x: Tensor) -> Tensor:
    """Neighbours along the last dimension are neighbours along the channels too."""
    strides = [*([3] * (x.dim() - 1)), 2]
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    if x.numel() == 0:
        return x
    flat = torch.randn(length, generator=torch.Generator().manual_seed(3), dtype=F64)
    return flat.to(x).as_strided(x.shape, strides)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: _permuted(x, [0, *range(2, x.dim()), 1]),
    "permuted": lambda x: _permuted(x, [*reversed(range(x.dim()))]),
    "batch_inside": lambda x: _permuted(x, [*range(1, x.dim()), 0]),
    "strided": lambda x: _inside(x, 0, 0, 2),
    "cropped": lambda x: _inside(x, 1, 2, 1),
    "offset": _offset,
    "odd_ones": _odd_ones,
    "expanded": lambda x: _expanded(x, x.dim() - 1),
    "expanded_channels": lambda x: _expanded(x, 1),
    "expanded_batch": lambda x: _expanded(x, 0),
    "overlapping": _overlapping,
}
# These repeat values: the oracle has to see them.
ALTERING = ("expanded", "expanded_channels", "expanded_batch", "overlapping")

# --- cases ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Pairs of shapes [N, C, *space] (or tokens [N, T, D]) and how they are to be read."""

    name: str
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    channel_dim: Any = None
    tokens: Any = None
    mask: str = ""  # "some": random; "rows": sample 0 keeps nothing; "few": not in every layer
    fill: str = "normal"

    def options(self) -> dict[str, Any]:
        out = {"channel_dim": self.channel_dim, "tokens": self.tokens}
        return {k: v for k, v in out.items() if v is not None}


def _widths(sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    """1-d layers whose channels and positions both straddle a width."""
    return tuple((2, c, q) for c, q in zip(sizes, reversed(sizes), strict=True))


EDGES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)  # around the widths of vectors
CASES = [
    Case("plain", ((3, 5, 4, 6), (3, 2, 3, 3)), ((3, 7, 4, 6), (3, 2, 3, 3))),
    Case("pooled", ((2, 4, 3, 5), (2, 3, 7, 7)), ((2, 6, 7, 8), (2, 3, 2, 3))),
    Case("pooled both ways", ((2, 3, 8, 3),), ((2, 4, 5, 7),)),
    Case("1-d", ((3, 6, 11), (3, 1, 4)), ((3, 4, 11), (3, 9, 4)), 1),
    Case("1-d pooled", ((2, 5, 17), (2, 3, 4)), ((2, 3, 5), (2, 3, 9)), 1),
    Case("3-d", ((2, 3, 2, 3, 4),), ((2, 4, 2, 3, 4),)),
    Case("3-d pooled", ((2, 3, 4, 3, 5),), ((2, 2, 3, 5, 2),)),
    Case("tokens", ((2, 10, 8), (2, 5, 40)), ((2, 10, 5), (2, 5, 3)), 2),
    Case("tokens pooled", ((2, 10, 8),), ((2, 7, 5),), -1),
    Case("channels last or first", ((2, 4, 5, 6),), ((2, 7, 4, 5),), (-1, 1)),
    Case("a pair each", ((2, 4, 5, 6), (2, 3, 5)), ((2, 3, 4, 5), (2, 4, 5)), [(3, 1), (1, -2)]),
    Case("ViT and CNN", ((2, 10, 8),), ((2, 6, 5, 5),), tokens=((3, 3, 1), None)),
    Case("CNN and ViT", ((2, 6, 2, 3),), ((2, 14, 5),), tokens=(None, (4, 3, 2))),
    Case("ViT and ViT", ((2, 8, 33),), ((2, 11, 8),), tokens=((2, 4, 0), (3, 3, 2))),
    Case("tokens first", ((2, 8, 12),), ((2, 9, 8),), (1, 2), tokens=((3, 4, 0), (2, 4, 1))),
    Case("masked", ((3, 5, 4, 6),), ((3, 7, 4, 6),), mask="some"),
    Case("masked, pooled", ((3, 4, 5, 3), (3, 2, 3)), ((3, 4, 3, 4), (3, 1, 3)),
         [1, 1], mask="few"),
    Case("rows masked out", ((3, 5, 3, 3),), ((3, 2, 3, 3),), mask="rows"),
    Case("ones", ((1, 1, 1, 1), (1, 3, 1, 1)), ((1, 1, 1, 1), (1, 2, 2, 1))),
    Case("narrow widths", _widths(EDGES[:5]), _widths(EDGES[4::-1]), 1),
    Case("wide widths", _widths(EDGES[5:]), _widths(EDGES[:4:-1]), 1),
    Case("after ReLU", ((3, 4, 4, 4), (3, 3, 5)), ((3, 2, 4, 4), (3, 3, 5)),
         [1, 1], fill="relu"),
    Case("near", ((3, 4, 5, 5), (3, 3, 7)), ((3, 4, 5, 5), (3, 3, 7)), [1, 1], fill="near"),
]  # fmt: skip
TILES = Case("tiles", ((1, 2, 4095), (1, 3, 4096), (1, 1, 4097)),
             ((1, 1, 4095), (1, 2, 4096), (1, 2, 4097)), 1)  # fmt: skip

BY_NAME = {case.name: case for case in [*CASES, TILES]}


def draw(shape: Shape, dtype: torch.dtype, seed: int, fill: str = "normal") -> Tensor:
    """Values already rounded to ``dtype``; the same on every call and device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=F64)
    if fill == "relu":  # many exact zeros, and one sample that is all of them
        x = x.relu()
        x[-1] = 0
    elif fill == "integer":
        x = torch.randint(-4, 5, shape, generator=g).to(F64)
    return x.to(dtype)


def masks(case: Case, spaces: list[list[int]], n: int) -> list[Tensor | None] | None:
    if not case.mask:
        return None
    g = torch.Generator().manual_seed(11)
    out: list[Tensor | None] = []
    for i, space in enumerate(spaces):
        m = torch.rand(n, *space, generator=g) < 0.6
        if case.mask == "rows":
            m[0] = False
        # Strided on purpose: every second element of a larger tensor.
        m = torch.stack([m, ~m], dim=-1)[..., 0]
        out.append(None if case.mask == "few" and i == 1 else m)
    return out


def common_space(case: Case) -> list[list[int]]:
    """The smaller size of each dimension, from the shapes alone."""
    from tests import oracle

    empty = [[torch.empty(s) for s in shapes] for shapes in (case.student, case.teacher)]
    return [o[2] for o in oracle.operands(*empty, case.channel_dim, case.tokens, None)]


class Inputs(NamedTuple):
    student: list[Tensor]
    teacher: list[Tensor]
    options: dict[str, Any]
    weight: Tensor  # [L, N], of the gradient


def make(case: Case, dtype: str, layout: str, device: str = "cpu") -> Inputs:
    """Inputs of a case. The teacher is laid out another way than the student."""
    names = list(LAYOUTS)
    other = layout if layout in ALTERING else names[(names.index(layout) + 3) % 8]
    lists: list[list[Tensor]] = [[], []]
    for i, shapes in enumerate(zip(case.student, case.teacher, strict=True)):
        for side, shape in enumerate(shapes):
            kind = DTYPES[dtype][(side + i) % 2]
            x = draw(shape, kind, 100 * i + side, case.fill)
            if case.fill == "near" and side == 1:
                noise = 1 + 1e-2 * draw(shape, F64, 7 * i)
                x = (draw(shape, F64, 100 * i) * noise).to(kind)
            x = LAYOUTS[(layout, other)[side]](x.to(device))
            lists[side].append(x)
    n = case.student[0][0]
    mask = masks(case, common_space(case), n)
    options = case.options()
    if mask is not None:
        options["mask"] = [m if m is None else m.to(device) for m in mask]
    weight = draw((len(case.student), n), F64, 5) + 2
    return Inputs(*lists, options, weight.to(torch.float32).to(device))


# --- options -------------------------------------------------------------------------------------

POWERS = (1.0, 1.5, 2.0, 3.0)
SIDES = ((True, False), (False, True), (True, True))


class Option(NamedTuple):
    p: float
    divergence: str
    beta: float
    reduction: str
    sides: tuple[bool, bool]  # which of student, teacher want a gradient

    def formula(self) -> dict[str, Any]:
        return {"p": self.p, "divergence": self.divergence, "beta": self.beta}


@functools.cache
def options(turn: int) -> tuple[Option, ...]:
    """Two of the eight (p, divergence), one each; four turns see all, 24 all else too."""
    out = []
    for i, divergence in enumerate(("l2", "js")):
        p = POWERS[(turn + i) % 4]
        beta = (0.5, 0.3, 0.9)[turn % 3]
        reduction = ("mean", "none")[(turn // 12 + i) % 2]
        out.append(Option(p, divergence, beta, reduction, SIDES[(turn + i) % 3]))
    return tuple(out)


def samples(dtype: str, layout: str) -> Iterator[tuple[Case, Option]]:
    """What the battery runs for one dtype and layout."""
    turn = 2 * list(DTYPES).index(dtype) + list(LAYOUTS).index(layout) % 3
    for i, case in enumerate(CASES):
        for option in options((turn + i) % 24):
            yield case, option


def thinned(target: Target, dtype: str, layout: str) -> Iterator[tuple[Case, Option]]:
    """The same, but for the interpreter only every so many."""
    step = 89 if target.slow else 1
    start = (list(DTYPES).index(dtype) * 5 + list(LAYOUTS).index(layout) * 7) % step
    for i, sample in enumerate(samples(dtype, layout)):
        if i % step == start:
            yield sample
