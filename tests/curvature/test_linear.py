"""What the graph says of linearity: every operation of the lists, against second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.curvature.linear import CURVED, LINEAR, NORMS, PRODUCTS, SMOOTH, linearity
from lwkd.curvature.nodes import nodes
from tests import cases
from tests.curvature.networks import LAYERS, NETWORKS, X, network

F64 = torch.float64
INDEX = torch.tensor([1, 0])

# Of x [2, 4, 4, 4]; each makes the node that it is listed under.
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "AdaptiveAvgPool2DBackward0": lambda x: F.adaptive_avg_pool2d(x, 2),
    "AddBackward0": lambda x: x + 2 * x,
    "AsStridedBackward0": lambda x: x.as_strided((2, 3), (2, 1)),
    "AvgPool2DBackward0": lambda x: F.avg_pool2d(x, 2),
    "AvgPool3DBackward0": lambda x: F.avg_pool3d(x, 2),
    "CatBackward0": lambda x: torch.cat([x, 2 * x]),
    "CloneBackward0": lambda x: x.transpose(1, 2).contiguous(),
    "Col2ImBackward0": lambda x: F.fold(F.unfold(x, 2), (4, 4), 2),
    "ConstantPadNdBackward0": lambda x: F.pad(x, (1, 1)),
    "CumsumBackward0": lambda x: x.cumsum(1),
    "DiagonalBackward0": lambda x: x.diagonal(),
    "EmbeddingBackward0": lambda x: F.embedding(INDEX, x[0, 0]),
    "ExpandBackward0": lambda x: x[:1].expand(3, 4, 4, 4),
    "FlipBackward0": lambda x: x.flip(1),
    "GatherBackward0": lambda x: x.gather(0, torch.zeros(1, 4, 4, 4, dtype=torch.long)),
    "Im2ColBackward0": lambda x: F.unfold(x, 2),
    "IndexBackward0": lambda x: x[:, INDEX],
    "IndexSelectBackward0": lambda x: x.index_select(1, INDEX),
    "MaskedFillBackward0": lambda x: x.masked_fill(x > 0.5, 0),
    "MeanBackward0": lambda x: x.mean(),
    "MeanBackward1": lambda x: x.mean((2, 3)),
    "MulBackward1": lambda x: torch.ops.aten.mul.Scalar(x, 2.0),
    "NegBackward0": lambda x: -x,
    "PermuteBackward0": lambda x: x.permute(1, 0, 2, 3),
    "PixelShuffleBackward0": lambda x: F.pixel_shuffle(x, 2),
    "PixelUnshuffleBackward0": lambda x: F.pixel_unshuffle(x, 2),
    "ReflectionPad2DBackward0": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "RepeatBackward0": lambda x: x.repeat(2, 1, 1, 1),
    "ReplicationPad2DBackward0": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "ReshapeAliasBackward0": lambda x: torch.ops.aten._reshape_alias(x, (2, 64), (64, 1)),
    "RollBackward0": lambda x: x.roll(1),
    "RsubBackward1": lambda x: 1 - x,
    "SelectBackward0": lambda x: x[0],
    "SliceBackward0": lambda x: x[:1],
    "SplitBackward0": lambda x: x.split(1)[0],
    "SplitWithSizesBackward0": lambda x: x.split([1, 3], 1)[1],
    "SqueezeBackward0": lambda x: x[:1].squeeze(),
    "SqueezeBackward1": lambda x: x[:1].squeeze(0),
    "SqueezeBackward2": lambda x: x[:1].squeeze((0,)),
    "StackBackward0": lambda x: torch.stack([x, 2 * x]),
    "SubBackward0": lambda x: x - 2 * x,
    "SumBackward0": lambda x: x.sum(),
    "SumBackward1": lambda x: x.sum(1),
    "TBackward0": lambda x: x[0, 0].t(),
    "ToCopyBackward0": lambda x: x.float(),
    "TransposeBackward0": lambda x: x.mT,
    "TrilBackward0": torch.tril,
    "TriuBackward0": torch.triu,
    "UnbindBackward0": lambda x: x.unbind()[0],
    "UnfoldBackward0": lambda x: x.unfold(2, 2, 1),
    "UnsafeViewBackward0": lambda x: x.transpose(2, 3).flatten(1),
    "UnsqueezeBackward0": lambda x: x[None],
    "UpsampleBilinear2DBackward0": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "UpsampleNearest2DBackward0": lambda x: F.interpolate(x, scale_factor=2),
    "ViewBackward0": lambda x: x.flatten(),
    "WhereBackward0": lambda x: torch.where(x > 0.5, x, 2 * x),
    "torch::autograd::CopyBackwards": lambda x: torch.empty_like(x).copy_(x),
    # piecewise
    "AbsBackward0": torch.abs,
    "AdaptiveMaxPool2DBackward0": lambda x: F.adaptive_max_pool2d(x, 2),
    "AmaxBackward0": lambda x: x.amax(1),
    "AminBackward0": lambda x: x.amin(1),
    "ClampBackward1": lambda x: x.clamp(0.0, 0.5),
    "ClampMinBackward0": lambda x: x.clamp_min(0.0),
    "HardtanhBackward0": F.relu6,
    "LeakyReluBackward0": F.leaky_relu,
    "MaxBackward0": lambda x: x.max(1)[0],
    "MaxBackward1": torch.max,
    "MaxPool2DWithIndicesBackward0": lambda x: F.max_pool2d(x, 2),
    "MaxPool3DWithIndicesBackward0": lambda x: F.max_pool3d(x, 2),
    "MaximumBackward0": lambda x: torch.maximum(x, 2 * x),
    "MinBackward0": lambda x: x.min(1)[0],
    "MinBackward1": torch.min,
    "MinimumBackward0": lambda x: torch.minimum(x, 2 * x),
    "ReluBackward0": F.relu,
    "ThresholdBackward0": lambda x: F.threshold(x, 0.1, 0.0),
    "TopkBackward0": lambda x: x.topk(2)[0],
}

# Of a and b; linear in either as long as the other has nothing of it, or in b alone.
PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "AddmmBackward0": (lambda a, b: F.linear(a, b, b[:, 0]), (3, 4), (5, 4)),
    "BaddbmmBackward0": (lambda a, b: torch.baddbmm(b, a, b), (2, 4, 4), (2, 4, 4)),
    "BmmBackward0": (torch.bmm, (2, 3, 4), (2, 4, 5)),
    "ConvolutionBackward0": (
        lambda a, b: F.conv2d(a, b, b[:, 0, 0, 0]), (2, 3, 5, 5), (4, 3, 3, 3)
    ),
    "DotBackward0": (torch.dot, (4,), (4,)),
    "MmBackward0": (torch.mm, (3, 4), (4, 5)),
    "MulBackward0": (torch.mul, (3, 4), (4,)),
    "MvBackward0": (torch.mv, (3, 4), (4,)),
    "PreluKernelBackward0": (F.prelu, (3, 4), (4,)),
    "NativeBatchNormBackward0": (
        lambda a, b: F.batch_norm(
            a, cases.draw((4,), F64, 8), cases.draw((4,), F64, 9).square(), b, b
        ),
        (3, 4), (4,),
    ),
    "DivBackward0": (lambda a, b: b / a, (3, 4), (4,)),
    "NativeGroupNormBackward0": (lambda a, b: F.group_norm(a, 2, b, b), (3, 4, 5), (4,)),
    "NativeLayerNormBackward0": (lambda a, b: F.layer_norm(a, (4,), b, b), (3, 4), (4,)),
}  # fmt: skip

SMOOTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "ExpBackward0": torch.exp,
    "GeluBackward0": F.gelu,
    "GluBackward0": F.glu,
    "LogSigmoidBackward0": F.logsigmoid,
    "LogSoftmaxBackward0": lambda x: x.log_softmax(1),
    "MishBackward0": F.mish,
    "RsqrtBackward0": lambda x: x.square().rsqrt(),
    "SafeSoftmaxBackward0": lambda x: torch._safe_softmax(x, -1),
    "SigmoidBackward0": torch.sigmoid,
    "SiluBackward0": F.silu,
    "SoftmaxBackward0": lambda x: x.softmax(1),
    "SqrtBackward0": lambda x: x.abs().sqrt(),
    "TanhBackward0": torch.tanh,
}


def second(output: Tensor, x: Tensor) -> float:
    """|d²⟨w, f⟩/dx²| along a random direction."""
    w = cases.draw(tuple(output.shape), output.dtype, 3)
    (g,) = torch.autograd.grad(output, x, w, create_graph=True)
    if not g.requires_grad:
        return 0.0
    v = cases.draw(tuple(x.shape), x.dtype, 4)
    (h,) = torch.autograd.grad(g, x, v, allow_unused=True, retain_graph=True)
    return 0.0 if h is None else float(h.abs().sum())


def leaf(shape: tuple[int, ...], seed: int) -> Tensor:
    return cases.draw(shape, F64, seed).requires_grad_()


def test_every_operation_of_the_lists_is_here() -> None:
    assert set(OPERATIONS) == LINEAR
    assert set(SMOOTHS) == SMOOTH
    elsewhere = {"CudnnBatchNormBackward0", "LwkdConvolutionBackward"}
    assert set(PAIRS) | elsewhere == {*PRODUCTS, *CURVED, *NORMS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_linear_operation(name: str) -> None:
    x = leaf((2, 4, 4, 4), 1)
    y = OPERATIONS[name](x)
    assert name in [node.name() for node in nodes(y)]
    assert linearity(y, [[x]]) == [True]
    assert second(y, x) == 0
    assert linearity(y.sin(), [[x]]) == [None]


@pytest.mark.parametrize("name", PAIRS)
def test_an_operation_of_two(name: str) -> None:
    run, *shapes = PAIRS[name]
    a, b = (leaf(shape, seed) for seed, shape in enumerate(shapes))
    y = run(a, b)
    assert name in [node.name() for node in nodes(y)]
    found = linearity(y, [[a], [b], [a, b]])
    assert found == [name not in CURVED, True, False]
    for x, linear in zip((a, b), found, strict=False):
        assert (second(y, x) == 0) == linear
    # Both sides from one: its square, whatever it is called.
    c = leaf((1,), 5)
    y = run(a.detach() * c, b.detach() * c)
    assert linearity(y, [[c]]) == [False]


def test_a_norm_that_computes_its_statistics() -> None:
    x, w = leaf((3, 4), 0), leaf((4,), 1)
    y = F.batch_norm(x, None, None, w, training=True)
    assert linearity(y, [[x], [w]]) == [None, None]


@pytest.mark.parametrize("name", SMOOTHS)
def test_a_smooth_operation(name: str) -> None:
    x = leaf((2, 4), 1)
    y = SMOOTHS[name](x)
    assert name in [node.name() for node in nodes(y)]
    assert second(y, x) != 0
    assert linearity(y.relu(), [[x]]) == [False]


@pytest.mark.parametrize(
    "run",
    [torch.sin, F.hardswish, torch.square, lambda x: x / x.sum(), lambda x: x @ x.mT, torch.std,
     lambda x: x * F.relu(x), lambda x: x[:, :2] * x[:, 2:], F.softplus, torch.linalg.vector_norm],
)  # fmt: skip
def test_what_else_is_not_linear(run: Callable[[Tensor], Tensor]) -> None:
    x = leaf((2, 4, 4, 4), 1)
    assert second(run(x), x) != 0
    assert linearity(run(x), [[x]]) != [True]


def test_a_modulus_is_no_absolute_value() -> None:
    """Complex numbers: torch has one name for both."""
    x = leaf((2, 4), 1)
    y = (x[:, :2] + 1j * x[:, 2:]).abs()
    assert second(y, x) != 0
    assert linearity(y, [[x]]) == [False]


def test_an_operation_in_no_list_says_nothing() -> None:
    """Changes in place of a part, for one: torch hides in one node what was done."""
    x = leaf((2, 4), 1)
    y = torch.zeros_like(x)
    y[:1] = x[:1]
    assert second(y, x) == 0
    assert linearity(y, [[x]]) == [None]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    net = network(name)
    layers = [list(net.get_submodule(layer).parameters()) for layer in LAYERS[name]]
    found = dict(zip(LAYERS[name], linearity(net(X), layers), strict=True))
    if name in ("CNN, ReLU", "MLP"):
        assert set(found.values()) == {True}
    else:
        assert [layer for layer in found if found[layer]] == ["head"]
        assert None not in found.values()


def test_layers_that_share_parameters_and_long_graphs() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3000))).double()
    x = net(torch.ones(1, 2, dtype=F64))
    first, last = net[0], net[-1]
    every = [list(m.parameters()) for m in (first, last, net)]
    assert linearity(x, [*every, [first.weight], []]) == [True, True, False, True, True]
