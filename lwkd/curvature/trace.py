"""hessian_trace: traces of the Hessian's diagonal blocks, with honest standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lwkd.curvature.sampler import Sampler
from lwkd.curvature.settings import Settings, check_options
from lwkd.curvature.targets import Numbers, targets_of
from lwkd.hooks import untouched
from lwkd.names import unwrap

_OP = "hessian_trace"


class TraceEstimate(NamedTuple):
    """Traces of L layers from K probes.

    Attributes:
        mean: [L] float64, the traces.
        stderr: [L], the standard error of each; NaN from one probe, 0 where exact.
        samples: [K, L], what every probe has given.
        layers: The L names.
        estimator: Of every layer: "gauss_newton", "split", "block" or "hutchinson".
        reason: Why that one.
    """

    mean: Tensor
    stderr: Tensor
    samples: Tensor
    layers: tuple[str, ...]
    estimator: tuple[str, ...]
    reason: tuple[str, ...]


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    layers: Sequence[str] | None = None,
    *,
    estimator: str = "auto",
    probes: int = 8,
    seed: int = 0,
    tol: float | None = None,
    max_probes: int | None = None,
    chunk: int = 1,
    exact: bool = False,
) -> TraceEstimate:
    """Estimate tr H_l, H_l = ∂²loss/∂θ_l², for every layer l of a network.

    The loss is ``loss_fn(model(inputs), target)``, a mean over the batch; of several batches the
    loss of them all: their mean, by what each is divided by (the samples; of a known cross-entropy
    the weights of the targets that count), or their sum where a known loss sums. With random
    signs v (see :func:`lwkd.ops.rademacher`):

    * "hutchinson": v over all layers, ⟨v_l, (Hv)_l⟩: what everybody does, and noisy, since every
      other layer l' adds ‖H_ll'‖² to the variance;
    * "block": v on one layer at a time, ⟨v_l, H_ll v_l⟩: that noise is gone, for one second
      backward pass a layer;
    * "gauss_newton": Σ_n ‖G_n‖², G_n the gradient of ⟨v[n], f[n]⟩ by θ_l and v random with
      E[vvᵀ] = the loss's Hessian by the outputs: one ordinary backward pass for all layers, and no
      gradient of a parameter is built. The Gauss–Newton block's trace: equal to tr H_l where the
      outputs are linear in θ_l (ReLU networks), another number elsewhere;
    * "split": that, and block probes of what it leaves, Σ_i (∂loss/∂f_i) ∂²f_i/∂θ_l²: for any
      network, and less noisy than "block" where the Gauss–Newton part makes the noise (docs/maths);
    * "auto": gauss_newton for every layer that outputs are linear in, if the loss is one whose
      Hessian by the outputs is known (cross-entropy, binary cross-entropy, squared error), else
      block. Read off the network's graph; where that does not say, tested by a second derivative.
      The result says which, and why.

    Whether a layer's factors are its gradient, sample by sample, is tested too (gauss_newton,
    split, auto): they are not where a parameter is used outside its module, or samples are coupled.

    The network runs in the mode it is in, uncompiled, without autocast, without the hooks of its
    parameters, and scaled-dot-product attention in the one form that can be differentiated twice.
    Modes, buffers, ``.grad``, generators and hooks are left as they were, also after an exception.
    Sources: Hutchinson 1990; Yao et al. 2020 (PyHessian); Schraudolph 2002; Martens 2020.

    Args:
        model: The network; DDP and torch.compile wrappers are looked through.
        loss_fn: A scalar of (output, target).
        batch: (inputs, target), or an iterable of such; inputs: a tensor, a tuple of positional or
            a dict of keyword arguments. With ``tol`` an iterable is kept in memory.
        layers: Names of modules, all trained parameters inside each, or of parameters; None: all
            modules that have some of their own, multi-head attention as one, and no parameter twice
            (what a module has beside others inside it, a class token say, is a layer by its name).
        estimator: As above.
        probes: K, at least 1; with ``tol`` so many at a time.
        seed: 64 bits; the same seed is the same estimate.
        tol: Go on until every layer's standard error is at most tol·|mean|.
        max_probes: With ``tol``: where to stop at the latest (default 100 · probes).
        chunk: Probes at once in a second backward pass (all but "gauss_newton"); takes about chunk
            times the graph's memory, which is looked at before. On CPUs four took a fifth less time
            than one by one on a ResNet-18, and no less on a transformer.
        exact: No random numbers: one backward pass a column of the loss's Hessian by the outputs.
            Only where every layer takes gauss_newton.

    Returns:
        A :class:`TraceEstimate`, on the network's device.

    Raises:
        ValueError: Unknown or parameterless layers, an argument out of range, a loss that is no
            scalar, targets out of range, a loss that gauss_newton and split do not know, samples
            that are coupled or factors that are not the gradient (for these two), a trace that is
            not finite.
        TypeError: A batch or layers of another kind.
        RuntimeError: Something that cannot be differentiated twice, or not enough memory for chunk.

    >>> import torch, lwkd
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> x, y = torch.rand(16, 4), torch.randint(3, (16,))
    >>> result = lwkd.hessian_trace(net, torch.nn.functional.cross_entropy, (x, y), probes=4)
    >>> result.layers, result.estimator, result.mean.shape
    (('0', '2'), ('gauss_newton', 'gauss_newton'), torch.Size([2]))
    """
    settings = check_options(_OP, estimator, probes, seed, tol, max_probes, chunk, exact)
    return estimate(model, loss_fn, batch, layers, settings)


def estimate(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    layers: Sequence[str] | None,
    settings: Settings,
    numbers: Numbers | None = None,
) -> TraceEstimate:
    """As :func:`hessian_trace`, its options checked; ``numbers`` as in ``targets_of``."""
    network = unwrap(model)
    targets = targets_of(_OP, network, layers, numbers)
    sampler = Sampler(network, loss_fn, targets, settings)
    device = targets[0].parameters[0].device
    off = torch.autocast(device.type, enabled=False)
    with untouched(network, evaluate=False), _unhooked(network), torch.enable_grad(), off:
        samples = sampler.run(batch)
    mean = samples.mean(0)
    stderr = samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else mean * torch.nan
    if settings.exact:
        stderr = torch.zeros_like(mean)
    return TraceEstimate(
        mean, stderr, samples, tuple(t.name for t in targets),
        tuple(way for way, _ in sampler.found), tuple(why for _, why in sampler.found),
    )  # fmt: skip


@contextmanager
def _unhooked(network: nn.Module) -> Iterator[None]:
    """Leave out the hooks of parameters: they change gradients, and would run once a probe."""
    hooks: list[tuple[Any, Any]] = [(h, h.copy()) for p in network.parameters()
                                    if (h := p._backward_hooks)]  # fmt: skip
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)
