"""The Jacobian kind by factors: the Jacobian by a layer's parameters, which nobody ever builds.

For z = W a the gradient of a scalar by W is, sample by sample, G_n = Σ_t δ[n,t] a[n,t]ᵀ, t over
tokens or over the positions of a convolution, whose a are the unfolded patches. With the norms of
G_S and G_T, and c = ‖G_S‖/‖G_T‖ (c = 1 where nothing is normalised):

    compare="difference", normalize=False    D[n] = ‖G_S − G_T‖²
    compare="difference", normalize=True     D[n] = ‖ G_S/‖G_S‖ − G_T/‖G_T‖ ‖²
                                                  = (‖U‖² − x²) / (‖G_S‖·c‖G_T‖)
    compare="norms"                          D[n] = ((‖G_S‖ − ‖G_T‖)/(‖G_S‖ + ‖G_T‖))²

    U = G_S − cG_T = Σ_t (δ_S − cδ_T) a_Sᵀ + cδ_T (a_S − a_T)ᵀ       the stacked factors, 2T rows
    x = ⟨U, G_S + cG_T⟩ / (‖G_S‖ + c‖G_T‖)                           G_S + cG_T = 2G_S − U

so that a difference of two nearly equal gradients is never taken of the gradients themselves: it
keeps its digits in float32. A norm below eps = 1e-12 is replaced by eps. An inner product of two
such sums is contracted in one of two ways, chosen by their operations:

    gram      Σ_{t,t'} (a_t·a'_t')(δ_t·δ'_t')        2T × 2T products, tile by tile
    direct    Σ_ij G_ij G'_ij                        d_out × d_in products, tile by tile
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lwkd.ops import backends
from lwkd.ops import factors_reference as reference
from lwkd.ops.checks import choice, flag, message
from lwkd.ops.jacobian_reference import COMPARISONS, SQUARES, how
from lwkd.ops.operands import DTYPES, compute_dtype

CONTRACTIONS = ("gram", "direct")


class Factors(NamedTuple):
    """The factors of a linear layer's gradient, G_n = Σ_t d[n,t] a[n,t]ᵀ.

    Attributes:
        a: What the weight multiplies, [N, T, d_in], or [N, G, T, d_in] for G groups of weights; or
            int64 [N, T]: the rows of an embedding.
        d: The gradient by what comes out, [N, T, d_out] or [N, G, T, d_out].

    A bias is a factor of its own with a of ones. Floating dtypes: float64/32/16 and bfloat16.
    """

    a: Tensor
    d: Tensor


class ConvFactors(NamedTuple):
    """The factors of a convolution's gradient; the op gathers the patches.

    Attributes:
        x: The input [N, C_in, *space], one to three space dimensions, padded already where padding
            is other than with zeros.
        d: The gradient by the output, [N, C_out, *out_space].
        kernel_size: One int a space dimension, as all that follow.
        stride: Of the kernel's steps.
        padding: Zeros on both sides of each dimension.
        dilation: Between the kernel's elements.
        groups: Of channels.
        transposed: Whether it is a transposed convolution (its output may be longer than the
            kernel reaches: output_padding).
    """

    x: Tensor
    d: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


Item = Factors | ConvFactors


def is_item(x: object) -> bool:
    """Whether this is an item of factors, or a tuple of such."""
    if isinstance(x, (Factors, ConvFactors)):
        return True
    return isinstance(x, tuple) and len(x) > 0 and all(map(is_item, x))


# --- the boundary: every argument is checked here, once ----------------------------------------


def discrepancy(
    op: str,
    student: Sequence[Any],
    teacher: Sequence[Any],
    reduction: str,
    backend: str | None,
    *,
    normalize: bool = True,
    compare: str = "difference",
    contraction: str | None = None,
) -> Tensor:
    """Check the arguments of kind="jacobian" for factors and call the op.

    ``contraction``: "gram" or "direct" for every item, None for the cheaper of the two.
    """
    flag(op, "normalize", normalize)
    choice(op, "compare", compare, COMPARISONS)
    if contraction is not None:
        choice(op, "contraction", contraction, CONTRACTIONS)
    sides, layers = _flatten(op, student, teacher)
    first = _operands(sides[0][0])[0]
    for argument, items in zip(("student", "teacher"), sides, strict=True):
        for layer, item in zip(layers, items, strict=True):
            _check_item(op, argument, item, layer, first)
    for layer, s, t in zip(layers, *sides, strict=True):
        _check_alike(op, s, t, layer, compare == "norms")
    forms: list[int] = []
    ways: list[int] = []
    for s, t in zip(*sides, strict=True):
        forms += form_of(s) + form_of(t)
        way = contraction or choose_contraction(s)
        ways.append(CONTRACTIONS.index("gram" if form_of(s)[0] == reference.INDICES else way))
    namespace = FACTORS.choose(op, backend, first.device)
    flat = [[_operands(item)[k] for item in items] for items in sides for k in (0, 1)]
    distance: Tensor = FACTORS(
        namespace, *flat, layers, forms, ways, how(normalize, compare), reduction == "mean"
    )
    return distance


def squares(
    op: str, items: Sequence[Any], backend: str | None = None, *, contraction: str | None = None
) -> Tensor:
    """Return ‖G_n‖² [L, N] of L items of factors."""
    sides, layers = _flatten(op, items, items)
    first = _operands(sides[0][0])[0]
    for layer, item in zip(layers, sides[0], strict=True):
        _check_item(op, "items", item, layer, first)
    forms = [word for item in sides[0] for word in 2 * form_of(item)]
    ways = [contraction or choose_contraction(item, stacked=False) for item in sides[0]]
    ways = ["gram" if form_of(x)[0] == reference.INDICES else way
            for x, way in zip(sides[0], ways, strict=True)]  # fmt: skip
    namespace = FACTORS.choose(op, backend, first.device)
    a, d = ([_operands(item)[k] for item in sides[0]] for k in (0, 1))
    indices = [CONTRACTIONS.index(way) for way in ways]
    norms: Tensor = FACTORS(namespace, a, d, a, d, layers, forms, indices, SQUARES, False)
    return norms


def _flatten(
    op: str, student: Any, teacher: Any
) -> tuple[tuple[list[Item], list[Item]], list[int]]:
    """Every item of all layers, the tuples opened, and the layer of each."""
    for argument, items in (("student", student), ("teacher", teacher)):
        if not isinstance(items, (list, tuple)) or is_item(items):
            expected = "a list of factors, one item a layer"
            raise TypeError(message(op, argument, expected, type(items).__name__))
    if len(student) != len(teacher):
        expected = f"{len(student)} items, as many as student"
        raise ValueError(message(op, "teacher", expected, len(teacher)))
    sides: tuple[list[Item], list[Item]] = ([], [])
    layers: list[int] = []
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        opened = []
        for argument, item in zip(("student", "teacher"), pair, strict=True):
            if not is_item(item):
                expected = "Factors, ConvFactors or a tuple of these, as all other layers"
                raise TypeError(message(op, argument, expected, type(item).__name__, layer=i))
            opened.append(_open(item))
        if len(opened[0]) != len(opened[1]):
            expected = f"{len(opened[0])} parameters, as the student's"
            raise ValueError(message(op, "teacher", expected, len(opened[1]), layer=i))
        layers += [i] * len(opened[0])
        for side, items in zip(sides, opened, strict=True):
            side += items
    return sides, layers


def _open(item: Any) -> list[Item]:
    if isinstance(item, (Factors, ConvFactors)):
        return [item]
    return [x for part in item for x in _open(part)]


def _operands(item: Item) -> tuple[Tensor, Tensor]:
    return item[0], item[1]


def _check_item(op: str, argument: str, item: Item, layer: int, first: Tensor) -> None:
    """Raise unless the two tensors of an item are factors of one gradient."""
    for name, x in zip(item._fields, item[:2], strict=False):
        where = f"{argument}.{name}"
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
            got = x.layout if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(message(op, where, "a dense tensor", got, layer=layer))
        indices = name == "a" and x.dtype == torch.int64
        if x.dtype not in DTYPES and not indices:
            expected = "float64, float32, float16 or bfloat16"
            raise TypeError(message(op, where, expected, x.dtype, layer=layer))
        if x.device != first.device:
            expected = f"a tensor on {first.device}, as student's layer 0"
            raise ValueError(message(op, where, expected, x.device, layer=layer))
        if x.dim() and first.dim() and x.shape[0] != first.shape[0]:
            expected = f"batch size {first.shape[0]}, as student's layer 0"
            raise ValueError(message(op, where, expected, list(x.shape), layer=layer))
    if isinstance(item, ConvFactors):
        _check_conv(op, argument, item, layer)
    else:
        _check_dense(op, argument, item, layer)


def _check_dense(op: str, argument: str, item: Factors, layer: int) -> None:
    a, d = item
    if a.dtype == torch.int64:
        good, expected = a.dim() == 2 and d.dim() == 3, "indices [N, T] and d [N, T, d_out]"
    else:
        good = a.dim() in (3, 4) and a.dim() == d.dim()
        expected = "a [N, T, d_in] and d [N, T, d_out], or both with [N, G, T, ...]"
    shapes = f"{list(a.shape)} and {list(d.shape)}"
    if not good:
        raise ValueError(message(op, argument, expected, shapes, layer=layer))
    last = a.dim() if a.dtype == torch.int64 else a.dim() - 1
    if a.shape[:last] != d.shape[:last]:
        expected = "the same N, groups and T in a and d"
        raise ValueError(message(op, argument, expected, shapes, layer=layer))


def _check_conv(op: str, argument: str, item: ConvFactors, layer: int) -> None:
    x, d, space = item.x, item.d, item.x.dim() - 2
    settings = (item.kernel_size, item.stride, item.padding, item.dilation)
    if not 1 <= space <= 3 or d.dim() != x.dim() or any(len(s) != space for s in settings):
        expected = "x [N, C_in, *space], d [N, C_out, *out_space], one number a space dimension"
        got = f"{list(x.shape)}, {list(d.shape)} and {settings}"
        raise ValueError(message(op, argument, expected, got, layer=layer))
    if item.groups < 1 or x.shape[1] % item.groups or d.shape[1] % item.groups:
        expected = f"channels that {item.groups} groups divide"
        got = f"{x.shape[1]} and {d.shape[1]}"
        raise ValueError(message(op, argument, expected, got, layer=layer))
    patches, other = (d, x) if item.transposed else (x, d)
    for k in range(space):
        reach = item.dilation[k] * (item.kernel_size[k] - 1)
        room = patches.shape[2 + k] + 2 * item.padding[k] - reach - 1
        steps, needed = room // item.stride[k] + 1, other.shape[2 + k]
        # A transposed convolution's output may end before its last step could.
        if steps < needed or (not item.transposed and steps != needed):
            expected = f"{steps} positions along space dimension {k}"
            raise ValueError(message(op, f"{argument}.d", expected, needed, layer=layer))


def _weight_shape(item: Item) -> list[int]:
    if isinstance(item, ConvFactors):
        return [item.x.shape[1], item.d.shape[1], item.groups, *item.kernel_size]
    groups = item.a.shape[1] if item.a.dim() == 4 else 1
    return [1 if item.a.dtype == torch.int64 else item.a.shape[-1], item.d.shape[-1], groups]


def _check_alike(op: str, s: Item, t: Item, layer: int, norms: bool) -> None:
    """Raise where the two gradients cannot be subtracted, or not by stacking their factors."""
    if norms:
        return
    kinds = ["embedding" if x[0].dtype == torch.int64 else type(x).__name__ for x in (s, t)]
    if kinds[0] != kinds[1]:
        raise TypeError(message(op, "teacher", f"{kinds[0]}, as student", kinds[1], layer=layer))
    shapes = _weight_shape(s), _weight_shape(t)
    if shapes[0] != shapes[1]:
        expected = f"a parameter of the student's shape {shapes[0]} (compare='norms' takes any)"
        raise ValueError(message(op, "teacher", expected, shapes[1], layer=layer))
    if isinstance(s, Factors) and s.d.shape[-2] != t.d.shape[-2]:
        expected = f"T = {s.d.shape[-2]}, as the student's"
        raise ValueError(message(op, "teacher", expected, t.d.shape[-2], layer=layer))
    if isinstance(s, ConvFactors) and isinstance(t, ConvFactors):
        if s.d.shape[2:] != t.d.shape[2:]:
            expected = f"{list(s.d.shape[2:])} output positions, as the student's"
            raise ValueError(message(op, "teacher", expected, list(t.d.shape[2:]), layer=layer))
        ways = (s.x.shape[2:], *s[3:]), (t.x.shape[2:], *t[3:])
        if ways[0] != ways[1]:
            expected = (
                f"input, stride, padding, dilation, groups as the student's {_shown(ways[0])}"
            )
            raise ValueError(message(op, "teacher", expected, _shown(ways[1]), layer=layer))


def _shown(way: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(x) if isinstance(x, torch.Size) else x) for x in way)


# --- how an item is told to the kernels, and contracted ----------------------------------------


def form_of(item: Item) -> list[int]:
    """The integers that say what an item's tensors are: reference.FORM of them.

    Form, groups, transposed; then kernel, stride, padding, dilation, each for three space
    dimensions, padded in front.
    """
    if not isinstance(item, ConvFactors):
        form = reference.INDICES if item.a.dtype == torch.int64 else reference.DENSE
        return [form, *[0] * (reference.FORM - 1)]
    front = 3 - len(item.kernel_size)
    out = [reference.CONVOLUTION, item.groups, int(item.transposed)]
    for values, neutral in (
        (item.kernel_size, 1), (item.stride, 1), (item.padding, 0), (item.dilation, 1),
    ):  # fmt: skip
        out += [neutral] * front + list(values)
    return out


def choose_contraction(item: Item, *, stacked: bool = True) -> str:
    """The contraction that takes fewer operations for this item: "gram" or "direct".

    A gram of 2T rows is symmetric: 2T·2T·(d_in + d_out) operations a sample and group, against
    2·2T·d_in·d_out; not stacked there are T rows. Of a convolution a gram counts four times: it
    wants the patches in memory.
    """
    weight = 4 if isinstance(item, ConvFactors) else 1
    if isinstance(item, ConvFactors):
        patches, other = (item.d, item.x) if item.transposed else (item.x, item.d)
        rows, inputs = 1, patches.shape[1] // item.groups
        for size, kernel in zip(other.shape[2:], item.kernel_size, strict=True):
            rows, inputs = rows * size, inputs * kernel
        outputs = other.shape[1] // item.groups
    elif item.a.dtype == torch.int64:
        return "gram"
    else:
        rows, inputs, outputs = item.a.shape[-2], item.a.shape[-1], item.d.shape[-1]
    terms = weight * rows * (inputs + outputs)
    return "gram" if terms < (1 if stacked else 2) * inputs * outputs else "direct"


# --- fake, autograd ----------------------------------------------------------------------------


def _fake(
    student_a: Sequence[Tensor],
    student_d: Sequence[Tensor],
    teacher_a: Sequence[Tensor],
    teacher_d: Sequence[Tensor],
    layers: list[int],
    forms: list[int],
    contractions: list[int],
    how: int,
    mean: bool,
) -> Tensor:
    length = layers[-1] + 1
    dtype = compute_dtype(student_a, student_d, teacher_a, teacher_d)
    d = student_d[0]
    return d.new_empty((length,) if mean else (length, d.shape[0]), dtype=dtype)


def _inputs(
    student_a: Sequence[Tensor],
    student_d: Sequence[Tensor],
    teacher_a: Sequence[Tensor],
    teacher_d: Sequence[Tensor],
    *_: Any,
) -> list[Tensor]:
    return [*student_a, *student_d, *teacher_a, *teacher_d]


def _no_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "lwkd.ops.layer_discrepancy: kind='jacobian' has no derivative by factors; detach them, or "
        "compare rows, which are differentiable"
    )


FACTORS = backends.Op(
    backends.Formula(
        "jacobian_factors(Tensor[] student_a, Tensor[] student_d, Tensor[] teacher_a, "
        "Tensor[] teacher_d, int[] layers, int[] forms, int[] contractions, int how, bool mean) "
        "-> Tensor",
        reference.distances, _fake, "factors.distances", _inputs, _no_derivative,
        _no_derivative,
    )
)  # fmt: skip
