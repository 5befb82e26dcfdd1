"""The ops: distances between student and teacher, layer by layer, in one fused call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lwkd.ops import attention, hessian, jacobian
from lwkd.ops.checks import choice, message, suggest
from lwkd.ops.factors import ConvFactors, Factors

__all__ = [
    "KINDS",
    "ConvFactors",
    "Factors",
    "attention_maps",
    "layer_discrepancy",
    "probe_dot",
    "rademacher",
    "trace_discrepancy",
]

KINDS: dict[str, Callable[..., Tensor]] = {
    "attention": attention.discrepancy,
    "jacobian": jacobian.discrepancy,
    "hessian": hessian.discrepancy,
}
_OPTIONS = {kind: tuple(run.__kwdefaults__ or ()) for kind, run in KINDS.items()}
_REDUCTIONS = ("mean", "none")


def layer_discrepancy(
    student: Sequence[Any],
    teacher: Sequence[Any],
    *,
    kind: str = "attention",
    reduction: str = "mean",
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """Measure how far the student is from its teacher, layer by layer, in one fused call.

    kind="attention", with the maps m[n,q] = Σ_c |x[n,c,q]|^p (source: Zagoruyko & Komodakis 2017)
    pooled to the smaller size of the pair in each space dimension, masked, and then:

    * divergence="l2": D[n] = Σ_q (m_S/‖m_S‖₂ − m_T/‖m_T‖₂)², in [0, 2];
    * divergence="js": with P = m/Σm and M = βP_S + (1−β)P_T,
      D[n] = H(M) − βH(P_S) − (1−β)H(P_T) in nats, in [0, ln 2] at β = ½
      (source: Kokane, Uddin & Xu 2024).

    kind="jacobian", with s and t the rows of the two Jacobians, flattened behind the batch
    (source: Srinivas & Fleuret 2018):

    * normalize=True: D[n] = ‖s/‖s‖ − t/‖t‖‖², in [0, 4]; a norm below 1e-12 is replaced by 1e-12
      (both zero: 0, one zero: 1), and such a row's gradient is 0;
    * normalize=False: D[n] = ‖s − t‖²;
    * compare="norms": D[n] = ((‖s‖ − ‖t‖)/(‖s‖ + ‖t‖))², in [0, 1], for rows of any two lengths.

    An item may also be the factors of a layer's gradient by its parameters, ``Factors`` or
    ``ConvFactors``, or a tuple of these for a layer of several parameters: G_n = Σ_t d[n,t] a[n,t]ᵀ
    takes the place of a row and is never built. Not differentiable then.

    kind="hessian", with tr the mean over probes k of ⟨v_k, (Hv_k)_l⟩, v_k the signs of
    :func:`rademacher` for layer l and probe k (sources: Hutchinson 1990; Yao et al. 2020):

    * normalize=True: d_l = |tr_S − tr_T| / (|tr_S| + |tr_T| + 1e-12), in [0, 1];
    * normalize=False: d_l = |tr_S/numel_S − tr_T/numel_T|, per parameter.

    Sums over rows are in float64, so that a student that is a copy of its teacher, or a rescaled
    copy, but for 1e-6 still is at the right distance, to 1e-2 of it (float32 rows).

    Differentiable once in student and teacher; a second derivative, forward-mode differentiation
    and ``torch.func`` transforms raise. Equal operands of equal
    layout are at a distance of exactly 0. NaN and Inf in an operand give NaN. An empty batch has
    distance 0.

    Args:
        student: L tensors, float64/32/16 or bfloat16, any strides. Of "attention": [N, C, *space]
            with one to three space dimensions, or tokens [N, T, D]. Of "jacobian": rows [N, ...],
            or L items of factors. Of "hessian": Hessian-vector products [K, *parameter], probe k
            at index k.
        teacher: L tensors alike, on the same device and of the same N. Of "attention" C and space
            may differ; of "jacobian" shapes are equal, unless norms are compared; of "hessian" K,
            parameters and device may differ.
        kind: What is compared: "attention", "jacobian" or "hessian".
        reduction: "mean" over the batch, or "none"; of "hessian" the mean over probes.
        backend: None (the dispatcher chooses; of factors on a GPU, Triton), "reference", "compiled"
            or "triton".
        **options: For kind="jacobian":

            * normalize (bool, default True): compare directions, not sizes;
            * compare (str, default "difference"): "difference" or "norms".

            For kind="hessian":

            * seed (int, default 0): of the signs, 64 bits;
            * normalize (bool, default True): compare relative to the traces' size.

            For kind="attention":

            * p (float, default 2.0): power of the map, ≥ 1;
            * divergence (str, default "l2"): "l2" or "js";
            * beta (float, default 0.5): the student's weight in "js", in (0, 1);
            * channel_dim (int, (student, teacher) pair, or a list of L of these): None means 1
              for four or more dimensions; three dimensions must say;
            * tokens ((student, teacher) pair, each None or (h, w, prefix)): drop ``prefix``
              leading tokens and fold the rest to an h×w grid;
            * mask (list of L, each None or bool [N, *common space]): False leaves a position
              out; no position left: distance 0.

    Returns:
        The distances, [L] or [L, N] for reduction="none": float32, float64 when an input is
        float64, on the inputs' device; dimensionless ("l2") or in nats ("js").

    Raises:
        ValueError: A value, shape, length or device is wrong; the message names the argument and
            the layer.
        TypeError: An operand is no dense floating-point tensor, or an option is unknown.
        RuntimeError: ``backend`` is not available here; the message says what to install.

    >>> import torch, lwkd
    >>> x = torch.ones(8, 16, 4, 4)
    >>> y = torch.rand(8, 32, 8, 8)  # other channels, other resolution
    >>> lwkd.ops.layer_discrepancy([x, x], [x, y]).shape
    torch.Size([2])
    >>> float(lwkd.ops.layer_discrepancy([x], [x])[0])
    0.0
    >>> s, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[30.0, 40.0]])
    >>> lwkd.ops.layer_discrepancy([s], [t], kind="jacobian", normalize=False)
    tensor([2025.])
    """
    op = "ops.layer_discrepancy"
    choice(op, "kind", kind, tuple(KINDS))
    choice(op, "reduction", reduction, _REDUCTIONS)
    for name in options:
        if name not in _OPTIONS[kind]:
            expected = f"those of kind={kind!r}: {', '.join(_OPTIONS[kind])}"
            got = repr(name) + suggest(name, _OPTIONS[kind])
            raise TypeError(message(op, "options", expected, got))
    return KINDS[kind](op, student, teacher, reduction, backend, **options)


def attention_maps(
    xs: Sequence[Tensor], *, p: float = 2.0, channel_dim: int | Sequence[int] | None = None
) -> list[Tensor]:
    """Reduce activations to attention maps, m[n,q] = Σ_c |x[n,c,q]|^p; differentiable twice.

    Forward-mode differentiation and ``torch.func`` transforms raise.

    One position costs one float instead of C: this is how a teacher's activations are streamed.
    Source: Zagoruyko & Komodakis 2017.

    Args:
        xs: Tensors [N, C, *space] or [N, T, D], float64/32/16 or bfloat16, on one device.
        p: The power, ≥ 1.
        channel_dim: The dimension summed over, an int or one a tensor; None means 1 for four or
            more dimensions, while three dimensions must say.

    Returns:
        One map [N, *space] a tensor, float32 (float64 for float64), contiguous.

    Raises:
        ValueError: p < 1, or a wrong dimension; the message names the tensor.
        TypeError: Not a list of dense floating-point tensors.

    >>> import torch, lwkd
    >>> lwkd.ops.attention_maps([torch.full((1, 3, 2, 2), 2.0)])[0]
    tensor([[[12., 12.],
             [12., 12.]]])
    """
    return attention.maps("ops.attention_maps", xs, p, channel_dim)


def rademacher(
    like: Tensor, *, seed: int, layer: int = 0, probe: int = 0, backend: str | None = None
) -> Tensor:
    """Return the signs of one probe: ±1, a function of seed, layer, probe and element alone.

    Philox4x32-10 with key = seed (low, high word) and counter = (block low, block high, layer,
    probe), block = e // 128 for element e in logical order; bit e % 128 of the four output words
    decides, a set bit is +1. The same on every backend, device and layout; torch's generators are
    not touched. Source: Salmon, Moraes, Dror & Shaw 2011.

    Args:
        like: A tensor float64/32/16 or bfloat16, whose shape, dtype, device and layout are taken.
        seed: 64 bits.
        layer: 32 bits.
        probe: 32 bits.
        backend: None (the dispatcher chooses), "reference", "compiled" or "triton".

    Returns:
        ±1, as ``like``.

    Raises:
        ValueError: seed, layer or probe out of range.
        TypeError: ``like`` is no dense floating-point tensor.
        RuntimeError: ``backend`` is not available here.

    >>> import torch, lwkd
    >>> lwkd.ops.rademacher(torch.empty(2, 3), seed=0)
    tensor([[ 1., -1.,  1.],
            [-1.,  1., -1.]])
    """
    return hessian.signs("ops.rademacher", like, seed, layer, probe, backend)


def probe_dot(
    hvps: Sequence[Tensor], *, seed: int, probe: int = 0, backend: str | None = None
) -> Tensor:
    """Return ⟨v_l, h_l⟩ for every h_l, v_l the signs of layer l, which are never stored.

    With h_l = (Hv)_l this is the sample of Hutchinson's estimator of tr H_l. Every h_l is read
    once; sums are in float64. Differentiable.

    Args:
        hvps: L tensors float64/32/16 or bfloat16 of any shapes and strides, on one device.
        seed: Of the signs, 64 bits.
        probe: Which probe, 32 bits.
        backend: None (the dispatcher chooses), "reference", "compiled" or "triton".

    Returns:
        [L] float32, float64 where a tensor is.

    Raises:
        ValueError: An empty list, several devices, or seed or probe out of range.
        TypeError: A tensor is not dense floating-point.
        RuntimeError: ``backend`` is not available here.

    >>> import torch, lwkd
    >>> h = 3 * lwkd.ops.rademacher(torch.empty(2, 3), seed=7)
    >>> lwkd.ops.probe_dot([h], seed=7)
    tensor([18.])
    """
    return hessian.dot("ops.probe_dot", hvps, seed, probe, backend)


def trace_discrepancy(
    tr_s: Tensor, tr_t: Tensor, numel_s: Any, numel_t: Any, *, normalize: bool = True
) -> Tensor:
    """Return how far the traces of two networks' Hessians are apart, layer by layer.

    d_l = |tr_S − tr_T| / (|tr_S| + |tr_T| + 1e-12), in [0, 1]; normalize=False:
    |tr_S/numel_S − tr_T/numel_T|, per parameter.

    Args:
        tr_s: The student's traces, floating [L].
        tr_t: The teacher's, [L] on the same device.
        numel_s: L whole numbers: parameters of the student's layers.
        numel_t: Of the teacher's.
        normalize: As above.

    Returns:
        [L], differentiable.

    Raises:
        ValueError: Lengths or devices differ, or a number of parameters is not positive.
        TypeError: Traces are no floating tensors, or normalize is no bool.

    >>> import torch, lwkd
    >>> lwkd.ops.trace_discrepancy(torch.tensor([3.0]), torch.tensor([1.0]), [4], [4])
    tensor([0.5000])
    """
    return hessian.traces("ops.trace_discrepancy", tr_s, tr_t, numel_s, numel_t, normalize)
