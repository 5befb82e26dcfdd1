"""What is measured: shapes, layouts and sizes, the inputs drawn for them, and two networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORWARD, TRAINING = "f", "f+b"
STEP, GRAPH = "step", ", graph"


@dataclass(frozen=True)
class Case:
    """One row: the activations of one network, layer by layer; the teacher's have the same shapes.

    ``small`` marks a case whose cost is the calls and not the bytes: its floor is one pass over
    one buffer of the same size, for a call per layer would be measured otherwise.
    """

    name: str
    title: str
    device: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    channel_dim: int = 1
    channels_last: bool = False
    divergence: str = "l2"
    small: bool = False
    modes: tuple[str, ...] = (FORWARD, TRAINING)

    @property
    def samples(self) -> int:
        return self.shapes[0][0]

    @property
    def side_bytes(self) -> int:
        return sum(prod(s) for s in self.shapes) * self.dtype.itemsize

    def bytes(self, mode: str) -> int:
        """The fewest bytes to move: S and T read; with a backward S read again and dS written."""
        return self.side_bytes * (4 if mode.startswith(TRAINING) else 2)

    def quick(self) -> Case:
        """The same kind of case at a size for a smoke test."""
        shapes = tuple((2, *(max(3, d // 8) for d in s[1:])) for s in self.shapes[:3])
        return replace(self, title=f"{self.title} (quick)", shapes=shapes)


def _stages(n: int) -> tuple[tuple[int, ...], ...]:
    """ResNet-50's four stages at 224×224."""
    return tuple((n, 256 << i, 56 >> i, 56 >> i) for i in range(4))


def _cifar(n: int) -> tuple[tuple[int, ...], ...]:
    """ResNet-18's four stages at 32×32."""
    return tuple((n, 64 << i, 32 >> i, 32 >> i) for i in range(4))


_HALF = torch.bfloat16
_TINY = ((8, 16, 8, 8),) * 64

CPU_CASES = (
    Case("resnet50", "ResNet-50 stages, N=32", "cpu", _stages(32)),
    Case(
        "resnet50-channels_last", "ResNet-50 stages, N=32, channels_last", "cpu", _stages(32),
        channels_last=True,
    ),
    Case("resnet18-cifar", "ResNet-18 CIFAR stages, N=128", "cpu", _cifar(128)),
    Case("vit", "ViT tokens [16, 197, 768] × 12", "cpu", ((16, 197, 768),) * 12, channel_dim=2),
    Case("resnet50-js", "ResNet-50 stages, N=32, js", "cpu", _stages(32), divergence="js"),
    Case("tiny64", "64 layers [8, 16, 8, 8]", "cpu", _TINY, small=True),
)  # fmt: skip

GPU_CASES = (
    Case("gpu-resnet50", "ResNet-50 stages, N=256, bf16", "cuda", _stages(256), _HALF),
    Case(
        "gpu-resnet50-channels_last", "ResNet-50 stages, N=256, bf16, channels_last", "cuda",
        _stages(256), _HALF, channels_last=True,
    ),
    Case("gpu-resnet18-cifar", "ResNet-18 CIFAR stages, N=1024, bf16", "cuda", _cifar(1024), _HALF),
    Case(
        "gpu-vit_l", "ViT-L tokens [64, 197, 1024] × 24, bf16", "cuda", ((64, 197, 1024),) * 24,
        _HALF, channel_dim=2,
    ),
    Case(
        "gpu-resnet50-js", "ResNet-50 stages, N=256, bf16, js", "cuda", _stages(256), _HALF,
        divergence="js",
    ),
    Case(
        "gpu-tiny64", "64 layers [8, 16, 8, 8]", "cuda", _TINY, small=True,
        modes=(FORWARD, TRAINING, FORWARD + GRAPH, TRAINING + GRAPH),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class RowsCase:
    """Jacobian rows [N, K] of one layer; the teacher's are ``apart`` of their norm away."""

    name: str
    title: str
    device: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    normalize: bool = True
    apart: float = 1e-2
    small: bool = False
    modes: tuple[str, ...] = (FORWARD, TRAINING)

    @property
    def samples(self) -> int:
        return self.shape[0]

    def bytes(self, mode: str) -> int:
        """As of a Case: with a backward S is read again and dS written."""
        return prod(self.shape) * self.dtype.itemsize * (4 if mode.startswith(TRAINING) else 2)

    def quick(self) -> RowsCase:
        return replace(self, title=f"{self.title} (quick)", shape=(3, 512))

    def draw(self, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        s, noise = (torch.randn(self.shape, generator=generator, device=self.device) for _ in "sn")
        return Inputs([s.to(self.dtype)], [(s + self.apart * noise).to(self.dtype)])


@dataclass(frozen=True)
class FactorsCase:
    """The factors of one layer: a Linear's (rows, inputs, outputs) or a 3×3 convolution's."""

    name: str
    title: str
    device: str
    samples: int
    inputs: int
    outputs: int
    rows: int  # tokens, or the side of a square of positions
    conv: bool = False
    normalize: bool = True
    dtype: torch.dtype = torch.float32
    apart: float = 1e-2
    small: bool = False
    modes: tuple[str, ...] = (FORWARD,)

    def quick(self) -> FactorsCase:
        sizes = dict(samples=2, inputs=8, outputs=6, rows=5)
        return replace(self, title=f"{self.title} (quick)", **sizes)

    def draw(self, seed: int) -> Inputs:
        """[a, d] of the student and of the teacher."""
        g = torch.Generator(self.device).manual_seed(seed)
        if self.conv:
            shapes = [(self.samples, c, self.rows, self.rows) for c in (self.inputs, self.outputs)]
        else:
            shapes = [(self.samples, self.rows, c) for c in (self.inputs, self.outputs)]
        student = [torch.randn(s, generator=g, device=self.device) for s in shapes]
        noise = [torch.randn(s, generator=g, device=self.device) for s in shapes]
        teacher = [x + self.apart * z for x, z in zip(student, noise, strict=True)]
        return Inputs(*([x.to(self.dtype) for x in side] for side in (student, teacher)))

    def flops(self) -> dict[str, float]:
        """Of ‖U‖² by either contraction: 2T rows, and of a gram the three blocks of four."""
        rows = self.rows**2 if self.conv else self.rows
        inputs = self.inputs * (9 if self.conv else 1)
        gram = 3 * 2 * rows * rows * (inputs + self.outputs)
        return {"gram": gram, "direct": 2 * 2 * rows * inputs * self.outputs}


@dataclass(frozen=True)
class MeterCase:
    """JacobianMeter.measure of two networks at 32×32, every layer that has parameters."""

    name: str
    title: str
    device: str
    samples: int
    network: str
    small: bool = False
    modes: tuple[str, ...] = (FORWARD,)

    def quick(self) -> MeterCase:
        return replace(self, title=f"{self.title} (quick)", samples=2)


@dataclass(frozen=True)
class ProbeCase:
    """Hessian-vector products by all parameters of a ResNet, and one probe's signs."""

    name: str
    title: str
    device: str
    blocks: tuple[int, ...]
    width: int
    samples: int = 1  # probes
    modes: tuple[str, ...] = (FORWARD,)

    def quick(self) -> ProbeCase:
        return replace(self, title=f"{self.title} (quick)", blocks=(1, 1, 1, 1), width=8)

    def draw(self) -> list[Tensor]:
        """A random tensor a parameter."""
        net = resnet(self.blocks, bottleneck=True, width=self.width, classes=1000)
        generator = torch.Generator(self.device).manual_seed(0)
        return [torch.randn(p.shape, device=self.device, generator=generator)
                for p in net.parameters()]  # fmt: skip


@dataclass(frozen=True)
class JointCase:
    """Eight joint probes of every layer's trace; the networks are those of bench/traces.py."""

    name: str
    title: str
    device: str
    network: int
    samples: int = 8  # probes
    modes: tuple[str, ...] = (FORWARD,)

    def quick(self) -> JointCase:
        return replace(self, title=f"{self.title} (quick)", network=0, samples=1)


@dataclass(frozen=True)
class ChannelCase:
    """The weights of all channels of the last convolution of each stage of a ResNet-18."""

    name: str
    title: str
    device: str
    samples: int
    width: int = 64
    modes: tuple[str, ...] = (FORWARD,)

    def quick(self) -> ChannelCase:
        return replace(self, title=f"{self.title} (quick)", samples=2, width=8)


@dataclass(frozen=True)
class StepCase:
    """A whole distillation step: ResNet-50 teaches ResNet-18, with autocast to bfloat16."""

    name: str
    title: str
    device: str
    samples: int
    side: int
    classes: int = 1000
    width: int = 64
    modes: tuple[str, ...] = (STEP, STEP + GRAPH)

    def quick(self) -> StepCase:
        title = f"{self.title} (quick)"
        return replace(self, title=title, samples=2, side=64, classes=10, width=8)


ROWS_CASES = tuple(
    RowsCase(
        f"{prefix}rows{'' if normalize else '-difference'}",
        f"Jacobian rows [{shape[0]}, {shape[1]}]{tail}{'' if normalize else ', not normalised'}",
        device, shape, dtype, normalize,
    )
    for prefix, device, shape, dtype, tail in (
        ("", "cpu", (128, 150528), torch.float32, ""),
        ("gpu-", "cuda", (1024, 150528), _HALF, ", bf16"),
    )
    for normalize in (True, False)
)  # fmt: skip
FACTORS_CASES = tuple(
    FactorsCase(
        f"{name}{'' if normalize else '-difference'}",
        f"Jacobian factors, {title}{'' if normalize else ', not normalised'}", device,
        samples, inputs, outputs, rows, conv, normalize, dtype,
    )
    for name, title, device, dtype, samples, inputs, outputs, rows, conv in (
        ("linear", "Linear 768→3072, N=32, T=197", "cpu", torch.float32, 32, 768, 3072, 197, False),
        ("conv14", "conv 256→256 3×3 at 14², N=32", "cpu", torch.float32, 32, 256, 256, 14, True),
        ("conv56", "conv 64→64 3×3 at 56², N=16", "cpu", torch.float32, 16, 64, 64, 56, True),
        ("gpu-linear", "Linear 768→3072, N=256, T=197, bf16", "cuda", _HALF, 256, 768, 3072, 197,
         False),
        ("gpu-linear-float32", "Linear 768→3072, N=256, T=197, float32", "cuda", torch.float32, 256,
         768, 3072, 197, False),
        ("gpu-conv14", "conv 256→256 3×3 at 14², N=256, bf16", "cuda", _HALF, 256, 256, 256, 14,
         True),
    )
    for normalize in (True, False)
)  # fmt: skip
METER_CASES = (
    MeterCase("meter-resnet18", "JacobianMeter, ResNet-18, N=64, 32²", "cpu", 64, "resnet18"),
    MeterCase("meter-vit", "JacobianMeter, ViT d192 × 4, N=64, 32²", "cpu", 64, "vit"),
)
PROBE_CASES = (
    ProbeCase("probes", "Probe of ResNet-50, 25.6 M", "cpu", (3, 4, 6, 3), 64),
    ProbeCase("gpu-probes", "Probe of ResNet-50, 25.6 M", "cuda", (3, 4, 6, 3), 64),
)
JOINT_CASES = tuple(
    JointCase(name, f"8 joint probes, {title}", "cpu", k)
    for k, (name, title) in enumerate(
        (("joint-mlp", "MLP, 2.9 M, N=64"), ("joint-resnet18", "ResNet-18, N=32, 32²"),
         ("joint-vit", "ViT d192 × 4, N=8"))
    )
)  # fmt: skip
CHANNEL_CASE = ChannelCase("channels", "Channel weights, ResNet-18, N=16, 32²", "cpu", 16)
STEP_CASE = StepCase(
    "gpu-distillation", "Distillation step, ResNet-50 → ResNet-18, N=256, bf16", "cuda", 256, 224
)


# --- inputs ------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    student: list[Tensor]
    teacher: list[Tensor]


def draw(case: Case, seed: int) -> Inputs:
    """Draw activations whose energy varies over positions, so that the maps differ plainly."""
    generator = torch.Generator(case.device).manual_seed(seed)
    sides = [[_activation(case, s, generator) for s in case.shapes] for _ in "st"]
    return Inputs(*sides)


def _activation(case: Case, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    options = {"generator": generator, "device": case.device}
    profile = [1 if d == case.channel_dim else size for d, size in enumerate(shape)]
    x = torch.randn(shape, dtype=case.dtype, **options)
    x *= torch.rand(profile, **options).add_(0.5).to(case.dtype)
    return x.contiguous(memory_format=torch.channels_last) if case.channels_last else x


# --- networks ----------------------------------------------------------------------------------

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Residual(nn.Module):
    """A residual block (He et al. 2016), plain or bottleneck, the stride in the 3×3."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        relu = nn.ReLU(inplace=True)
        if bottleneck:
            first, last = [_conv(channels, width, 1), relu], [_conv(width, out, 1)]
            self.body = nn.Sequential(*first, _conv(width, width, 3, stride), relu, *last)
        else:
            self.body = nn.Sequential(_conv(channels, width, 3, stride), relu, _conv(width, out, 3))
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else _conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(blocks: Sequence[int], *, bottleneck: bool, width: int, classes: int) -> nn.Sequential:
    """ResNet-18 is (2, 2, 2, 2) plain, ResNet-50 is (3, 4, 6, 3) bottleneck, both of width 64."""
    stem = nn.Sequential(_conv(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for i, (name, count) in enumerate(zip(STAGES, blocks, strict=True)):
        stage = []
        for j in range(count):
            stride = 2 if i > 0 and j == 0 else 1
            stage.append(Residual(channels, width << i, stride, bottleneck))
            channels = (width << i) * (4 if bottleneck else 1)
        layers[name] = nn.Sequential(*stage)
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)
