"""Which parameters the outputs are linear in around the point, read off the autograd graph.

They are where every operation between a parameter and the outputs is linear or piecewise linear,
and no product has the parameter on both sides. An operation that is in no list says nothing.
Nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lwkd.curvature.nodes import after_their_inputs

# Linear in all inputs together, as torch calls their nodes; the second half piecewise.
LINEAR = frozenset(
    f"{name}Backward0"
    for name in (
        "AdaptiveAvgPool2D", "Add", "AsStrided", "AvgPool2D", "AvgPool3D", "Cat", "Clone",
        "Col2Im", "ConstantPadNd", "Cumsum", "Diagonal", "Embedding", "Expand", "Flip", "Gather",
        "Im2Col", "Index", "IndexSelect", "MaskedFill", "Mean", "Neg", "Permute",
        "PixelShuffle", "PixelUnshuffle", "ReflectionPad2D", "Repeat", "ReplicationPad2D",
        "ReshapeAlias", "Roll", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack",
        "Sub", "Sum", "T", "ToCopy", "Transpose", "Tril", "Triu", "Unbind", "Unfold",
        "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D", "View", "Where",
        "Abs", "AdaptiveMaxPool2D", "Amax", "Amin", "ClampMin", "Hardtanh", "LeakyRelu", "Max",
        "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum", "Min", "Minimum", "Relu",
        "Threshold", "Topk",
    )
) | {
    "ClampBackward1", "MaxBackward1", "MeanBackward1", "MinBackward1", "MulBackward1",
    "RsubBackward1", "SqueezeBackward1", "SqueezeBackward2", "SumBackward1",
    "torch::autograd::CopyBackwards",
}  # fmt: skip

# Linear in one of these inputs at a time, and in the rest together with it.
PRODUCTS = {
    "AddmmBackward0": (1, 2),
    "BaddbmmBackward0": (1, 2),
    "BmmBackward0": (0, 1),
    "ConvolutionBackward0": (0, 1),
    "DotBackward0": (0, 1),
    "LwkdConvolutionBackward": (0, 1),
    "MmBackward0": (0, 1),
    "MulBackward0": (0, 1),
    "MvBackward0": (0, 1),
    "PreluKernelBackward0": (0, 1),
}

# Linear in all inputs but this one.
CURVED = {"DivBackward0": 1, "NativeGroupNormBackward0": 0, "NativeLayerNormBackward0": 0}

# Linear in no input, anywhere in their range (as hardswish is in a part of its own).
SMOOTH = frozenset(
    f"{name}Backward0"
    for name in (
        "Exp", "Gelu", "Glu", "LogSoftmax", "LogSigmoid", "Mish", "Rsqrt", "SafeSoftmax", "Sigmoid",
        "Silu", "Softmax", "Sqrt", "Tanh",
    )
)  # fmt: skip

# Products of their first two inputs, where they take the running statistics.
NORMS = frozenset({"CudnnBatchNormBackward0", "NativeBatchNormBackward0"})


def linearity(output: Tensor, layers: Sequence[Sequence[Tensor]]) -> list[bool | None]:
    """Whether the output is linear in each layer's parameters; None where the graph does not say.

    False may be too much said (of a product that cancels, for one), True never is.
    """
    bits_of: dict[int, int] = {}  # a parameter may be in several layers
    for i, parameters in enumerate(layers):
        for p in parameters:
            bits_of[id(p)] = bits_of.get(id(p), 0) | 1 << i
    reached = {None: 0}  # the layers that come into a node's output, as bits
    curved = unsure = 0
    for node in after_their_inputs(output):
        inputs = [reached[before] for before, _ in node.next_functions]
        every = bits_of.get(id(getattr(node, "variable", None)), 0)
        for bits in inputs:
            every |= bits
        reached[node] = every
        if inputs:
            found = _curved(node, inputs, every)
            if found is None:
                unsure |= every
            else:
                curved |= found
    return [False if curved >> i & 1 else None if unsure >> i & 1 else True
            for i in range(len(layers))]  # fmt: skip


def _curved(node: object, inputs: Sequence[int], every: int) -> int | None:
    """The layers that a node's output is not linear in; None where that is not known."""
    name = node.name()  # type: ignore[attr-defined]
    if name == "AbsBackward0" and node._saved_self.is_complex():  # type: ignore[attr-defined]
        return every  # a modulus
    if name in LINEAR:
        return 0
    if name in SMOOTH:
        return every
    if name in NORMS and not node._saved_training:  # type: ignore[attr-defined]
        return inputs[0] & inputs[1]
    if name in PRODUCTS:
        a, b = PRODUCTS[name]
        return inputs[a] & inputs[b]
    return inputs[CURVED[name]] if name in CURVED else None
