"""What `bench` times: shapes of common networks, and two ways of writing each distance.

``fused`` is the op; ``plain`` is what one writes first with PyTorch's own operations. Teachers of
the Jacobian kind are a tenth of a norm away from their students.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd import ops
from lwkd.ops.factors import Item

Shapes = Sequence[tuple[int, ...]]
Sides = tuple[list[Tensor], list[Tensor]]  # student, teacher


class Workload(Protocol):
    """One call of an op.

    Attributes:
        op: Its name in ``torch.ops.lwkd``.
        gradients: Whether it has a gradient.
    """

    op: ClassVar[str]
    gradients: ClassVar[bool]

    @property
    def name(self) -> str:
        """What it stands for."""

    def tensors(self, device: str) -> Sides:
        """Return random float32 operands; the student's need gradients where the op has one."""

    def fused(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] by the op."""

    def plain(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] the way one writes them with PyTorch's own operations."""


@dataclass(frozen=True)
class Attention:
    """Activations [N, C, H, W], or tokens [N, 1 + h·w, D] where ``fold`` says h and w."""

    op: ClassVar[str] = "attention"
    gradients: ClassVar[bool] = True
    name: str
    batch: int
    student: Shapes
    teacher: Shapes
    fold: tuple[int, int] | None = None

    def tensors(self, device: str) -> Sides:
        """Return random activations."""
        g = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, device=device, generator=g)
        student = [make((self.batch, *s), requires_grad=True) for s in self.student]
        return student, [make((self.batch, *s)) for s in self.teacher]

    def fused(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] by the op."""
        if self.fold is None:
            return ops.layer_discrepancy(student, teacher)
        return ops.layer_discrepancy(student, teacher, tokens=((*self.fold, 1), (*self.fold, 1)))

    def plain(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L]: squares summed over channels, pooled, scaled, subtracted."""
        out = []
        for s, t in zip(student, teacher, strict=True):
            if self.fold is None:
                maps = [s.square().sum(1), t.square().sum(1)]
            else:
                maps = [x[:, 1:].square().sum(2).unflatten(1, self.fold) for x in (s, t)]
            (h, w), (other_h, other_w) = (m.shape[1:] for m in maps)
            size = (min(h, other_h), min(w, other_w))
            maps = [m if m.shape[1:] == size else F.adaptive_avg_pool2d(m, size) for m in maps]
            out.append(_apart(*maps))
        return torch.stack(out)


@dataclass(frozen=True)
class Rows:
    """Gradients by the input, each of one of the ``shapes`` behind the batch."""

    op: ClassVar[str] = "jacobian_rows"
    gradients: ClassVar[bool] = True
    name: str
    batch: int
    shapes: Shapes

    def tensors(self, device: str) -> Sides:
        """Return random rows."""
        return _near([(self.batch, *s) for s in self.shapes], device, gradients=True)

    def fused(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] by the op."""
        return ops.layer_discrepancy(student, teacher, kind="jacobian")

    def plain(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L]: scaled, subtracted."""
        return torch.stack([_apart(s, t) for s, t in zip(student, teacher, strict=True)])


@dataclass(frozen=True)
class Factors:
    """Gradients by the weights of layers, from inputs and output gradients.

    Each layer is (d_in, d_out, T): a linear layer over T tokens, or, where ``conv``, a convolution
    by 3×3 at T×T positions. ``plain`` builds every sample's gradient.
    """

    op: ClassVar[str] = "jacobian_factors"
    gradients: ClassVar[bool] = False
    name: str
    batch: int
    layers: Sequence[tuple[int, int, int]]
    conv: bool = False

    def tensors(self, device: str) -> Sides:
        """Return random factors: of each layer the inputs, then the output gradients."""
        shapes: list[tuple[int, ...]] = []
        for inputs, outputs, size in self.layers:
            for c in (inputs, outputs):
                shape = (self.batch, c, size, size) if self.conv else (self.batch, size, c)
                shapes.append(shape)
        return _near(shapes, device, gradients=False)

    def fused(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] by the op."""
        sides = [[self._item(*x) for x in _pairs(side)] for side in (student, teacher)]
        return ops.layer_discrepancy(sides[0], sides[1], kind="jacobian")

    def plain(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L]: gradients built, scaled, subtracted."""
        sides = zip(_pairs(student), _pairs(teacher), strict=True)
        return torch.stack([_apart(self._gradient(*s), self._gradient(*t)) for s, t in sides])

    def _item(self, a: Tensor, d: Tensor) -> Item:
        if self.conv:
            return ops.ConvFactors(a, d, (3, 3), (1, 1), (1, 1), (1, 1), 1, False)
        return ops.Factors(a, d)

    def _gradient(self, a: Tensor, d: Tensor) -> Tensor:
        if self.conv:
            return d.flatten(2) @ F.unfold(a, 3, padding=1).mT
        return d.mT @ a


@dataclass(frozen=True)
class Probes:
    """Hessian-vector products by parameters of these ``shapes``, each with its stored signs.

    ``plain`` reads the signs; the op makes them again.
    """

    op: ClassVar[str] = "probe_dot"
    gradients: ClassVar[bool] = False
    name: str
    batch: int  # probes
    shapes: Shapes

    def tensors(self, device: str) -> Sides:
        """Return products of a Hessian that is nearly diagonal: of each layer h, then v."""
        g = torch.Generator(device).manual_seed(0)
        sides: Sides = ([], [])
        for side, scale in zip(sides, (1.0, 1.5), strict=True):
            for layer, shape in enumerate(self.shapes):
                like = torch.empty(shape, device=device)
                v = torch.stack(
                    [ops.rademacher(like, seed=0, layer=layer, probe=k) for k in range(self.batch)]
                )
                noise = torch.randn(v.shape, device=device, generator=g)
                side += [scale * v + 0.1 * noise, v]
        return sides

    def fused(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L] by the op."""
        return ops.layer_discrepancy(list(student[::2]), list(teacher[::2]), kind="hessian")

    def plain(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the distances [L]: products, summed, their means compared."""
        traces = [
            torch.stack([(h * v).flatten(1).sum(1).mean() for h, v in _pairs(side)])
            for side in (student, teacher)
        ]
        s, t = traces
        return (s - t).abs() / (s.abs() + t.abs())


def _near(shapes: Shapes, device: str, gradients: bool) -> Sides:
    g = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, device=device, generator=g)
    student = [make(s) for s in shapes]
    teacher = [s + 0.1 * make(s.shape) for s in student]
    return [s.requires_grad_(gradients) for s in student], teacher


def _pairs(flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _apart(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(x.flatten(1), dim=1, eps=1e-12) for x in (s, t))
    return (a - b).square().sum(1).mean()


def _stages(widths: Sequence[int], size: int) -> Shapes:
    return [(c, size >> i, size >> i) for i, c in enumerate(widths)]


FULL: dict[str, tuple[Workload, ...]] = {
    "attention": (
        Attention(
            "ResNet-50 to ResNet-18, 224²", 32,
            _stages((64, 128, 256, 512), 56), _stages((256, 512, 1024, 2048), 56),
        ),
        Attention(
            "ResNet-18 to half of it, CIFAR", 128,
            _stages((32, 64, 128, 256), 32), _stages((64, 128, 256, 512), 32),
        ),
        Attention("ViT-B to ViT-Ti, 4 blocks", 32, [(197, 192)] * 4, [(197, 768)] * 4, (14, 14)),
        Attention("64 tiny layers", 8, [(8, 4, 4)] * 64, [(16, 4, 4)] * 64),
    ),
    "jacobian": (
        Rows("by images of 224², 4 layers", 32, [(3, 224, 224)] * 4),
        Rows("by images of CIFAR, 8 layers", 128, [(3, 32, 32)] * 8),
        Rows("by 64 tiny images", 8, [(1, 8, 8)] * 64),
        Factors("by weights, ViT-S, 2 MLPs", 16, [(384, 1536, 197), (1536, 384, 197)] * 2),
        Factors(
            "by weights, ResNet-18, 3 convolutions", 16,
            [(128, 128, 28), (256, 256, 14), (512, 512, 7)], conv=True,
        ),
        Factors("by weights, 16 tiny layers", 8, [(32, 32, 4)] * 16),
    ),
    "hessian": (
        Probes("4 probes of 4 large layers", 4, [(512, 512, 3, 3)] * 4),
        Probes("4 probes, ViT-S, 2 blocks", 4, [(1152, 384), (384, 384), (1536, 384)] * 2),
        Probes("64 tiny layers", 1, [(8, 8, 3, 3)] * 64),
    ),
}  # fmt: skip
QUICK: dict[str, tuple[Workload, ...]] = {
    "attention": (
        Attention("two stages", 4, _stages((8, 16), 8), _stages((16, 32), 8)),
        Attention("tokens", 4, [(17, 8)] * 2, [(17, 16)] * 2, (4, 4)),
    ),
    "jacobian": (
        Rows("rows", 4, [(3, 8, 8)] * 2),
        Factors("linear", 4, [(8, 6, 5)] * 2),
        Factors("convolutions", 4, [(3, 4, 6), (4, 5, 3)], conv=True),
    ),
    "hessian": (Probes("probes", 2, [(5, 7), (300,)]),),
}
