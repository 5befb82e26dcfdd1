"""The loss's Hessian by the outputs, sample by sample, as random vectors or as columns.

    cross-entropy          s²(diag p − ppᵀ)       v = s(√p·z − p⟨√p, z⟩), z signs
                                                  columns s√p_c (onehot(c) − p)
    elementwise losses     diag h                 v = √h · signs, columns √h_j e_j

E[vvᵀ] is that Hessian, and so is the sum over columns. Of cross-entropy v is the columns added up
with random signs. A class drawn from p would have the same mean, s(onehot(ŷ) − p), ŷ ~ p; but where
a network is sure of its classes almost every such v is nothing, and a rare one is all. s² is the
weight that the loss gives a position by its true target (0 for ignored ones), over what the loss
divides by.
Sources: Schraudolph 2002; Martens 2020; Dangel, Kunstner & Hennig 2020 (BackPACK).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.ops import rademacher
from lwkd.ops.checks import message
from lwkd.ops.philox import OUTPUTS

_MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (
        F.cross_entropy, ("weight", "ignore_index", "reduction", "label_smoothing")
    ),
    nn.BCEWithLogitsLoss: (
        F.binary_cross_entropy_with_logits, ("weight", "reduction", "pos_weight")
    ),
    nn.BCELoss: (F.binary_cross_entropy, ("weight", "reduction")),
    nn.MSELoss: (F.mse_loss, ("reduction",)),
}  # fmt: skip


class OutputHessian:
    """A loss's Hessian by the outputs of one batch.

    Args:
        vectors: Returns v like the outputs, from (seed, probe).
        columns: Returns the columns of its square root, each like the outputs.
    """

    def __init__(
        self, vectors: Callable[[int, int], Tensor], columns: Callable[[], Iterator[Tensor]]
    ) -> None:
        self.vectors, self.columns = vectors, columns


def known_loss(loss_fn: Any) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The function that a loss is, and its options; None for one whose Hessian is not known."""
    options: dict[str, Any] = {}
    while isinstance(loss_fn, partial) and not loss_fn.args:
        options = {**loss_fn.keywords, **options}
        loss_fn = loss_fn.func
    kind = type(loss_fn)
    if kind in _MODULES:
        function, names = _MODULES[kind]
        return function, {n: getattr(loss_fn, n) for n in names}
    for function, names in _MODULES.values():
        if loss_fn is function and set(options) <= set(names):
            return function, options
    return None


def output_hessian(op: str, loss_fn: Any, output: Tensor, target: Any) -> OutputHessian:
    """The Hessian of a known loss by the outputs [N, ...].

    Raises:
        ValueError: A loss that is not known.
    """
    known = known_loss(loss_fn)
    if known is None:
        expected = (
            "cross-entropy, binary cross-entropy or squared error (the function, its module, or a "
            "functools.partial of it); other losses: estimator='hutchinson' or 'block'"
        )
        got = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(message(op, "loss_fn", expected, got))
    function, options = known
    with torch.no_grad():
        if function is F.cross_entropy:
            return _cross_entropy(output.detach(), target, **options)
        if target.shape != output.shape:
            got = list(target.shape)
            raise ValueError(message(op, "target", f"{list(output.shape)}, as the output's", got))
        h = _CURVATURES[function](output.detach().double(), target, **options)
    return _elementwise(output, h)


def share(loss_fn: Any, output: Tensor | None, target: Any, samples: int) -> float:
    """How much a batch's loss counts in that of all batches: what it is divided by; 0 where summed.

    Of cross-entropy the weights of the targets that count, else the samples.
    """
    function, options = known_loss(loss_fn) or (None, {})
    if options.get("reduction", "mean") == "sum":
        return 0.0
    if function is not F.cross_entropy or output is None or target.is_floating_point():
        return float(samples)
    counts = target[target != options.get("ignore_index", -100)]
    weight = options.get("weight")
    return float(counts.numel() if weight is None else weight[counts].sum())


def check_target(op: str, loss_fn: Any, output: Tensor, target: Any) -> None:
    """Raise where a loss would read what it must not: on a GPU nothing works after."""
    function, options = known_loss(loss_fn) or (None, {})
    if function is None or not isinstance(target, Tensor):
        return
    shares = function is F.binary_cross_entropy
    if shares and not bool(((target >= 0) & (target <= 1)).all()):
        got = f"{float(target.min()):.6g} to {float(target.max()):.6g}"
        raise ValueError(message(op, "target", "probabilities in [0, 1]", got))
    if function is not F.cross_entropy:
        return
    classes, ignored = output.shape[min(output.dim() - 1, 1)], options.get("ignore_index", -100)
    if target.is_floating_point() or target.numel() == 0:
        return
    if bool((((target < 0) | (target >= classes)) & (target != ignored)).any()):
        expected = f"class indices in [0, {classes}), or ignore_index={ignored}"
        got = f"{int(target.min())} to {int(target.max())}"
        raise ValueError(message(op, "target", expected, got))


# --- cross-entropy -------------------------------------------------------------------------------


def _cross_entropy(
    output: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> OutputHessian:
    """Of outputs [N, C, *positions] (or [C]) and targets, indices or probabilities."""
    dim = 1 if output.dim() > 1 else 0
    classes = output.shape[dim]
    p = output.movedim(dim, -1).double().softmax(-1)  # [N, *positions, C]
    weights = p.new_ones(classes) if weight is None else weight.to(p)
    smooth = label_smoothing * weights.sum() / classes
    if target.is_floating_point():
        own = (target.movedim(dim, -1).double() * weights).sum(-1)
        squares = (1 - label_smoothing) * own + smooth
        whole = own.new_tensor(p[..., 0].numel())
    else:
        counts = target != ignore_index
        own = torch.where(counts, weights[target.clamp(0, classes - 1)], 0.0)
        squares = torch.where(counts, (1 - label_smoothing) * own + smooth, 0.0)
        whole = own.sum()
    s = (squares / (whole if reduction == "mean" else 1)).sqrt()
    n = p.shape[0] if output.dim() > 1 else 1
    rows = p.reshape(n, -1, classes)

    def shaped(v: Tensor) -> Tensor:
        return v.reshape(p.shape).movedim(-1, dim).to(output.dtype)

    def vectors(seed: int, probe: int) -> Tensor:
        z = rows.sqrt() * rademacher(rows, seed=seed, layer=OUTPUTS, probe=probe)
        return shaped(s.reshape(n, -1, 1) * (z - rows * z.sum(-1, keepdim=True)))

    def columns() -> Iterator[Tensor]:
        for t in range(rows.shape[1]):  # positions of one sample share its gradient
            for c in range(classes):
                v = torch.zeros_like(rows)
                root = s.reshape(n, -1)[:, t, None] * rows[:, t, c, None].sqrt()
                one = F.one_hot(torch.tensor(c, device=rows.device), classes)
                v[:, t] = root * (one - rows[:, t])
                yield shaped(v)

    return OutputHessian(vectors, columns)


# --- losses of one element at a time -------------------------------------------------------------


def _squared_error(x: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    return _reduced(torch.full_like(x, 2.0), reduction)


def _binary(
    x: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Of probabilities x."""
    y = target.double()
    h = y / x.square() + (1 - y) / (1 - x).square()
    return _reduced(h if weight is None else h * weight, reduction)


def _binary_with_logits(
    x: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    p, y = x.sigmoid(), target.double()
    h = p * (1 - p) * (1 if pos_weight is None else pos_weight * y + (1 - y))
    return _reduced(h if weight is None else h * weight, reduction)


def _reduced(h: Tensor, reduction: str) -> Tensor:
    return h / h.numel() if reduction == "mean" else h


_CURVATURES: dict[Any, Callable[..., Tensor]] = {
    F.mse_loss: _squared_error,
    F.binary_cross_entropy: _binary,
    F.binary_cross_entropy_with_logits: _binary_with_logits,
}


def _elementwise(output: Tensor, h: Tensor) -> OutputHessian:
    root = h.expand(output.shape).sqrt()

    def vectors(seed: int, probe: int) -> Tensor:
        return (root * rademacher(root, seed=seed, layer=OUTPUTS, probe=probe)).to(output.dtype)

    def columns() -> Iterator[Tensor]:
        flat = root.reshape(len(root), -1)
        for j in range(flat.shape[1]):
            v = torch.zeros_like(flat)
            v[:, j] = flat[:, j]
            yield v.reshape(root.shape).to(output.dtype)

    return OutputHessian(vectors, columns)
