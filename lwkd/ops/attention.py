"""The attention kind: how far a student's attention maps are from its teacher's.

For layer l and sample n, with x the activations [N, C, *space], p ≥ 1 and eps = 1e-12:

    map         m[n,q] = Σ_c |x[n,c,q]|^p, adaptive-average-pooled to the pair's common space,
                0 at masked positions
    "l2"        q = m / max(‖m‖₂, eps);   D[n] = Σ_q (q_S − q_T)²                     in [0, 2]
    "js"        P = m / Σm (all-zero: uniform), M = βP_S + (1−β)P_T, Δ = P_S − P_T,
                f(u) = (1+u)·log1p(u) − u;
                D[n] = Σ_q M·[β f((1−β)Δ/M) + (1−β) f(−βΔ/M)]                 in nats

which is H(M) − βH(P_S) − (1−β)H(P_T) with every term ≥ 0, so that it keeps its digits when the
two maps are nearly equal. Sources: Zagoruyko & Komodakis 2017; the divergence: Kokane, Uddin &
Xu 2024.

An operand reaches the kernels as it is, with four integers that say how to read it as
[N, C, *space]: (channel dimension, leading tokens to drop, h, w); h = 0 where space is not folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.ops import attention_reference as reference
from lwkd.ops import backends, operands
from lwkd.ops.checks import choice, message, number

Pair = tuple[Any, Any]
_INTS = (int, torch.SymInt)

# --- the boundary: every argument is checked here, once ----------------------------------------


def discrepancy(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    reduction: str,
    backend: str | None,
    *,
    p: float = 2.0,
    divergence: str = "l2",
    beta: float = 0.5,
    channel_dim: int | Sequence[Any] | None = None,
    tokens: Sequence[tuple[int, int, int] | None] | None = None,
    mask: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Check the arguments of kind="attention" and call the op; see ops.layer_discrepancy."""
    s_shapes, t_shapes = operands.check_pairs(op, student, teacher)
    check_options(op, p, divergence, beta)
    s_dims, t_dims = channel_dims(op, channel_dim, len(student))
    s_fold, t_fold = folds(op, tokens)
    s_layout = _layouts(op, "student", s_shapes, s_dims, s_fold)
    t_layout = _layouts(op, "teacher", t_shapes, t_dims, t_fold)
    _check_spaces(op, s_shapes, t_shapes, s_fold, t_fold)
    masks = _masks(op, mask, student, teacher, s_layout, t_layout) if mask is not None else []
    namespace = ATTENTION.choose(op, backend, student[0].device)
    distance: Tensor = ATTENTION(
        namespace,
        student, teacher, masks, s_layout, t_layout,
        float(p), reference.DIVERGENCES[divergence], float(beta), reduction == "mean",
    )[0]  # fmt: skip
    return distance


def check_options(op: str, p: float, divergence: str, beta: float) -> None:
    """Raise where an option of kind="attention" is out of its range."""
    number(op, "p", p, "a finite number ≥ 1", lambda v: 1 <= v < float("inf"))
    choice(op, "divergence", divergence, tuple(reference.DIVERGENCES))
    number(op, "beta", beta, "a number in (0, 1)", lambda v: 0 < v < 1)


def channel_dims(op: str, channel_dim: Any, length: int) -> Pair:
    """The channel dimensions of (student, teacher), one a layer; None where nothing was said."""
    if isinstance(channel_dim, tuple):
        if len(channel_dim) != 2:
            raise ValueError(
                message(op, "channel_dim", "a (student, teacher) pair", repr(channel_dim))
            )
        sides = [channel_dim[0]] * length, [channel_dim[1]] * length
    elif isinstance(channel_dim, list):
        if len(channel_dim) != length:
            raise ValueError(
                message(op, "channel_dim", f"a list of {length}, one a layer", len(channel_dim))
            )
        pairs = [d if isinstance(d, tuple) and len(d) == 2 else (d, d) for d in channel_dim]
        sides = [s for s, _ in pairs], [t for _, t in pairs]
    else:
        sides = [channel_dim] * length, [channel_dim] * length
    for kind in {*map(type, sides[0]), *map(type, sides[1])}:
        if kind not in (*_INTS, type(None)):
            expected = "None, an int, a (student, teacher) pair, or a list of these"
            raise TypeError(message(op, "channel_dim", expected, repr(channel_dim)))
    return sides


def folds(op: str, tokens: Any) -> Pair:
    """The (h, w, prefix) of (student, teacher), None where space is not folded."""
    if tokens is None:
        return None, None
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2 or not all(map(_is_fold, tokens)):
        expected = "None or a (student, teacher) pair, each None or (h, w, prefix)"
        raise ValueError(message(op, "tokens", expected, repr(tokens)))
    return tokens[0], tokens[1]


def _is_fold(fold: Any) -> bool:
    """Tell whether this is one side of ``tokens``: None or (h, w, prefix)."""
    if fold is None:
        return True
    whole = isinstance(fold, (tuple, list)) and len(fold) == 3
    return whole and all(type(v) in _INTS for v in fold) and min(*fold[:2], fold[2] + 1) > 0


def _layouts(
    op: str, side: str, shapes: Sequence[torch.Size], dims: Sequence[int | None], fold: Any
) -> list[int]:
    """The layouts of one side, one behind the other."""
    alike = fold is None and len({*map(len, shapes)}) == len({*dims}) == 1
    if alike:  # nearly always, and 64 layers are dear one by one
        return [*_layout(op, side, 0, shapes[0], dims[0], None)] * len(shapes)
    out: list[int] = []
    for i, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        out += _layout(op, side, i, shape, dim, fold)
    return out


def _check_spaces(
    op: str,
    s_shapes: Sequence[torch.Size],
    t_shapes: Sequence[torch.Size],
    s_fold: Any,
    t_fold: Any,
) -> None:
    """Raise where a pair differs in the number of its space dimensions."""
    s_spaces = [2 if s_fold else len(shape) - 2 for shape in s_shapes]
    t_spaces = [2 if t_fold else len(shape) - 2 for shape in t_shapes]
    for i, (s, t) in enumerate(zip(s_spaces, t_spaces, strict=True)):
        if s != t:
            expected, got = f"{s} space dimension(s), as the student's", list(t_shapes[i])
            raise ValueError(
                message(op, "teacher", expected, f"shape {got}", layer=i)
                + "; tokens=(student, teacher) folds token sequences to a grid"
            )


def _layout(
    op: str, side: str, layer: int, shape: torch.Size, channel_dim: int | None, fold: Any
) -> tuple[int, int, int, int]:
    """(channel dimension, prefix, h, w) of one operand."""
    dim = len(shape)
    if fold is not None:
        h, w, prefix = fold
        d = 2 if channel_dim is None else channel_dim % 3
        if channel_dim is not None and not -3 <= channel_dim < 3:
            expected = "None, 1, 2, -1 or -2 for tokens"
            raise ValueError(message(op, "channel_dim", expected, channel_dim, layer=layer))
        if dim != 3 or d == 0 or shape[3 - d] != prefix + h * w:
            expected = f"tokens [N, {prefix + h * w}, D] (prefix {prefix} + {h}×{w})"
            raise ValueError(message(op, side, expected, list(shape), layer=layer))
        return d, prefix, h, w
    if not 3 <= dim <= 5:
        expected = "[N, C, *space] with one to three space dimensions"
        raise ValueError(message(op, side, expected, f"shape {list(shape)}", layer=layer))
    if channel_dim is None:
        if dim == 3:
            expected = "an int for three-dimensional activations (1: [N, C, T], 2: [N, T, D])"
            raise ValueError(message(op, "channel_dim", expected, None, layer=layer))
        return 1, 0, 0, 0
    d = channel_dim + dim if channel_dim < 0 else channel_dim
    if not 1 <= d < dim:
        expected = f"a dimension of {list(shape)} other than the batch's"
        raise ValueError(message(op, "channel_dim", expected, channel_dim, layer=layer))
    return d, 0, 0, 0


def _masks(
    op: str,
    mask: Sequence[Tensor | None],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    s_layout: list[int],
    t_layout: list[int],
) -> list[Tensor]:
    """The masks with a 1-dimensional empty tensor for None."""
    if not isinstance(mask, (list, tuple)):
        expected = f"a list of {len(student)}, one a layer"
        raise TypeError(message(op, "mask", expected, type(mask).__name__))
    if len(mask) != len(student):
        raise ValueError(message(op, "mask", f"a list of {len(student)}, one a layer", len(mask)))
    spaces = reference.common_space(student, teacher, s_layout, t_layout)
    out = []
    for i, (m, x, space) in enumerate(zip(mask, student, spaces, strict=True)):
        shape = [x.shape[0], *space]
        if m is None:
            m = x.new_empty(0, dtype=torch.bool)
        elif not isinstance(m, Tensor) or m.layout is not torch.strided:
            expected = "None or a dense bool tensor"
            got = m.layout if isinstance(m, Tensor) else type(m).__name__
            raise TypeError(message(op, "mask", expected, got, layer=i))
        elif m.dtype != torch.bool or list(m.shape) != shape:
            expected = f"None or bool {shape} (the common space)"
            raise ValueError(message(op, "mask", expected, f"{m.dtype} {list(m.shape)}", layer=i))
        elif m.device != x.device:
            raise ValueError(message(op, "mask", f"a tensor on {x.device}", m.device, layer=i))
        out.append(m)
    return out


def maps(op: str, xs: Sequence[Tensor], p: float, channel_dim: Any) -> list[Tensor]:
    """Check the arguments of ops.attention_maps and call the op."""
    shapes = operands.check_list(op, "xs", xs)
    check_options(op, p, "l2", 0.5)
    each = list(channel_dim) if isinstance(channel_dim, tuple) else channel_dim
    layout = _layouts(op, "xs", shapes, channel_dims(op, each, len(xs))[0], None)
    dims = layout[::4]
    return list(ATTENTION_MAPS("lwkd", xs, dims, float(p)))


# --- fake, autograd ----------------------------------------------------------------------------


def _fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Sequence[Tensor],
    student_layout: list[int],
    teacher_layout: list[int],
    p: float,
    divergence: int,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    dtype = operands.compute_dtype(student, teacher)
    n = student[0].shape[0]
    spaces = reference.common_space(student, teacher, student_layout, teacher_layout)
    cells = sum(reference.numel(s) for s in spaces)
    shape = (len(student),) if mean else (len(student), n)
    x = student[0]
    return x.new_empty(shape, dtype=dtype), x.new_empty((2 * n * cells,), dtype=dtype)


def _fake_backward(grad: Tensor, xs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


def _inputs(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [*student, *teacher]


_PADDING = ((1, 1, 1), (1, 1), (1,), ())  # what makes a space of so many dimensions one of three


def _layouts_of(items: list[int], layout: list[int]) -> list[int]:
    if 4 * len(items) == len(layout):
        return layout
    return [v for i in items for v in layout[4 * i : 4 * i + 4]]


def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask, s_layout, t_layout, p, divergence, beta, _ = args
    maps = output[1]
    ctx.mark_non_differentiable(maps)
    ctx.set_materialize_grads(False)
    # Only what needs a gradient is kept: a teacher's activations are free once they are maps.
    s_items = [i for i, x in enumerate(student) if x.requires_grad]
    t_items = [i for i, x in enumerate(teacher) if x.requires_grad]
    layers, sides = s_items + t_items, [0] * len(s_items) + [1] * len(t_items)
    layout = _layouts_of(s_items, s_layout) + _layouts_of(t_items, t_layout)
    space: list[int] = []
    for sizes in reference.common_space(student, teacher, s_layout, t_layout):
        space += _PADDING[len(sizes)]
        space += sizes
    ctx.masks = len(mask)
    ctx.options = (layers, sides, layout, space, p, divergence, beta)
    xs = [student[i] for i in s_items] + [teacher[i] for i in t_items]
    ctx.save_for_backward(maps, *mask, *xs)


def _backward(ctx: Any, namespace: str, grad: Tensor | None, _: None) -> Sequence[Tensor | None]:
    maps, *rest = ctx.saved_tensors
    mask, xs = rest[: ctx.masks], rest[ctx.masks :]
    if grad is None:
        return [None] * len(xs)
    grads: list[Tensor] = ATTENTION_BACKWARD(namespace, grad, xs, mask, maps, *ctx.options)
    return grads


def _backward_inputs(
    grad: Tensor, xs: Sequence[Tensor], mask: Sequence[Tensor], maps: Tensor, *_: Any
) -> list[Tensor]:
    return [grad, *xs, maps]


def _no_second_derivative(*_: Any) -> Sequence[Tensor | None]:
    raise RuntimeError(
        "lwkd.ops.layer_discrepancy: kind='attention' has no second derivative; compose "
        "lwkd.ops.attention_maps, which is twice differentiable, with torch's own operations"
    )


ATTENTION = backends.Op(
    backends.Formula(
        "attention(Tensor[] student, Tensor[] teacher, Tensor[] mask, int[] student_layout, "
        "int[] teacher_layout, float p, int divergence, float beta, bool mean) "
        "-> (Tensor distance, Tensor maps)",
        reference.forward, _fake, "attention.forward", _inputs, _save, _backward,
    )
)  # fmt: skip
ATTENTION_BACKWARD = backends.Op(
    backends.Formula(
        "attention_backward(Tensor grad, Tensor[] xs, Tensor[] mask, Tensor maps, int[] layers, "
        "int[] sides, int[] layout, SymInt[] space, float p, int divergence, float beta) "
        "-> Tensor[]",
        reference.backward, _fake_backward, "attention.backward",
        _backward_inputs, lambda *_: None, _no_second_derivative,
    )
)  # fmt: skip


# --- the maps alone ----------------------------------------------------------------------------


def _maps_fake(xs: Sequence[Tensor], channel_dims: list[int], p: float) -> list[Tensor]:
    return [
        x.new_empty([s for d, s in enumerate(x.shape) if d != c], dtype=operands.compute_dtype([x]))
        for x, c in zip(xs, channel_dims, strict=True)
    ]


def _maps_save(ctx: Any, args: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, channel_dims, ctx.p = args
    items = [i for i, x in enumerate(xs) if x.requires_grad]
    ctx.items = [(i, channel_dims[i]) for i in items]
    ctx.save_for_backward(*(xs[i] for i in items))


def _maps_backward(ctx: Any, namespace: str, *grads: Tensor) -> list[Tensor]:
    return [
        _power_gradient(x, ctx.p, grads[i].unsqueeze(d))
        for x, (i, d) in zip(ctx.saved_tensors, ctx.items, strict=True)
    ]


def _power_gradient(x: Tensor, p: float, g: Tensor) -> Tensor:
    """g·p·|x|^(p−1)·sign(x) in plain operations, so that autograd differentiates it again."""
    wide = x.to(g.dtype)
    if p == 2:
        return (2 * g * wide).to(x.dtype)
    if p == 1:
        return (g * wide.sign()).to(x.dtype)
    # Where x is 0 so is the gradient; a stand-in of 1 keeps |x|^(p−2) finite for autograd.
    safe = torch.where(wide == 0, torch.ones_like(wide), wide)
    slope = p * safe.abs().pow(p - 1) * safe.sign()
    return torch.where(wide == 0, torch.zeros_like(slope), g * slope).to(x.dtype)


ATTENTION_MAPS = backends.Op(
    backends.Formula(
        "attention_maps(Tensor[] xs, int[] channel_dims, float p) -> Tensor[]",
        reference.maps, _maps_fake, "attention.maps",
        lambda xs, *_: xs, _maps_save, _maps_backward,
    )
)  # fmt: skip
