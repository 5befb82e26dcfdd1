"""hessian_trace: traces of the Hessian's diagonal blocks, with honest standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lwkd.curvature.block import Graph
from lwkd.curvature.gauss_newton import known_loss
from lwkd.curvature.targets import Target, batches_of, size_of, targets_of
from lwkd.factoring import refuse_coupled
from lwkd.hooks import untouched
from lwkd.layers import unwrap
from lwkd.ops.checks import choice, flag, message, number
from lwkd.ops.hessian import seed_of

ESTIMATORS = ("auto", "gauss_newton", "block", "hutchinson")
_OP = "hessian_trace"
_ODD = 0x9E3779B97F4A7C15  # from batch to batch: other random outputs, the same signs of parameters
_REASONS = {
    "gauss_newton": "asked for: the Gauss–Newton block's trace, which is the Hessian's only where "
    "the outputs are linear in the layer's parameters (estimator='auto' tests it)",
    "block": "asked for",
    "hutchinson": "asked for",
}


class TraceEstimate(NamedTuple):
    """Traces of L layers from K probes.

    Attributes:
        mean: [L] float64, the traces.
        stderr: [L], the standard error of each; NaN from one probe, 0 where exact.
        samples: [K, L], what every probe has given.
        layers: The L names.
        estimator: Of every layer: "gauss_newton", "block" or "hutchinson".
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

    The loss is ``loss_fn(model(inputs), target)``, a mean over the batch; of several batches their
    mean, by samples. With random signs v (see :func:`lwkd.ops.rademacher`):

    * "hutchinson": v over all layers, ⟨v_l, (Hv)_l⟩: what everybody does, and noisy, since every
      other layer l' adds ‖H_ll'‖² to the variance;
    * "block": v on one layer at a time, ⟨v_l, H_ll v_l⟩: that noise is gone, for one second
      backward pass a layer;
    * "gauss_newton": Σ_n ‖G_n‖², G_n the gradient of ⟨v[n], f[n]⟩ by θ_l and v random with
      E[vvᵀ] = the loss's Hessian by the outputs: one ordinary backward pass for all layers, and no
      gradient of a parameter is built. The Gauss–Newton block's trace: equal to tr H_l where the
      outputs are linear in θ_l (ReLU networks), another number elsewhere;
    * "auto": tests every layer for that, once a call, and takes gauss_newton where it holds and the
      loss is one whose Hessian by the outputs is known (cross-entropy, binary cross-entropy,
      squared error), else block. The result says which, and why.

    The network runs in the mode it is in, uncompiled, without autocast, and scaled-dot-product
    attention in the one form that can be differentiated twice. Modes, buffers, ``.grad``,
    generators and hooks are left as they were, also after an exception.
    Sources: Hutchinson 1990; Yao et al. 2020 (PyHessian); Schraudolph 2002; Martens 2020.

    Args:
        model: The network; DDP and torch.compile wrappers are looked through.
        loss_fn: A scalar of (output, target).
        batch: (inputs, target), or an iterable of such; inputs: a tensor, a tuple of positional or
            a dict of keyword arguments. With ``tol`` an iterable is kept in memory.
        layers: Names of modules, all trained parameters inside each, or of parameters; None: all
            modules that have some of their own.
        estimator: As above.
        probes: K, at least 1; with ``tol`` so many at a time.
        seed: 64 bits; the same seed is the same estimate.
        tol: Go on until every layer's standard error is at most tol·|mean|.
        max_probes: With ``tol``: where to stop at the latest (default 100 · probes).
        chunk: Probes at once in a second backward pass ("block", "hutchinson"); takes about chunk
            times the graph's memory, which is looked at before. On a CPU no faster than one by one.
        exact: No random numbers: one backward pass a column of the loss's Hessian by the outputs.
            Only where every layer takes gauss_newton.

    Returns:
        A :class:`TraceEstimate`, on the network's device.

    Raises:
        ValueError: Unknown or parameterless layers, an argument out of range, a loss that is no
            scalar, targets out of range, a loss that gauss_newton does not know, samples that are
            coupled (gauss_newton, BatchNorm in train mode), a trace that is not finite.
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
    known: TraceEstimate | None = None,
) -> TraceEstimate:
    """As :func:`hessian_trace`; ``known``: whose estimators are taken over, instead of a test."""
    network = unwrap(model)
    targets = targets_of(_OP, network, layers)
    sampler = _Sampler(network, loss_fn, targets, settings)
    if known is not None:
        sampler.found = list(zip(known.estimator, known.reason, strict=True))
    device = targets[0].parameters[0].device
    off = torch.autocast(device.type, enabled=False)
    with untouched(network, evaluate=False), torch.enable_grad(), off:
        samples = sampler.run(batch)
    mean = samples.mean(0)
    stderr = samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else mean * torch.nan
    if settings.exact:
        stderr = torch.zeros_like(mean)
    return TraceEstimate(
        mean, stderr, samples, tuple(t.name for t in targets),
        tuple(way for way, _ in sampler.found), tuple(why for _, why in sampler.found),
    )  # fmt: skip


class Settings(NamedTuple):
    """The options of hessian_trace, checked."""

    estimator: str
    probes: int
    seed: int
    tol: float | None
    most: int
    chunk: int
    exact: bool


def check_options(
    op: str,
    estimator: str,
    probes: object,
    seed: object,
    tol: Any,
    max_probes: Any,
    chunk: Any,
    exact: Any,
) -> Settings:
    """Raise unless these are options of hessian_trace."""
    choice(op, "estimator", estimator, ESTIMATORS)
    flag(op, "exact", exact)
    if type(probes) is not int or probes < 1:
        raise ValueError(message(op, "probes", "an int ≥ 1", repr(probes)))
    if type(chunk) is not int or chunk < 1:
        raise ValueError(message(op, "chunk", "an int ≥ 1", repr(chunk)))
    if tol is not None:
        number(op, "tol", tol, "None or a finite number > 0", lambda v: 0 < v < float("inf"))
    if max_probes is not None and (tol is None or type(max_probes) is not int or max_probes < 2):
        expected = "None, or with tol an int ≥ 2"
        raise ValueError(message(op, "max_probes", expected, repr(max_probes)))
    if exact and (estimator in ("block", "hutchinson") or tol is not None):
        expected = "False for random estimators; exact=True is gauss_newton's, without tol"
        raise ValueError(message(op, "exact", expected, f"True, {estimator!r}, tol={tol}"))
    most = max_probes if max_probes is not None else 100 * probes
    return Settings(estimator, probes, seed_of(op, seed), tol, most, chunk, exact)


class _Sampler:
    """Draws samples [K, L] from all batches."""

    def __init__(
        self, network: nn.Module, loss_fn: Any, targets: list[Target], settings: Settings
    ) -> None:
        self._network, self._loss_fn, self._targets = network, loss_fn, targets
        self._settings = settings
        way = settings.estimator
        self.found: list[tuple[str, str]] = [(way, _REASONS.get(way, "")) for _ in targets]
        self._coupled = _coupled(network)
        if way == "gauss_newton":
            for name, module in network.named_modules():
                refuse_coupled(_OP, name, module)

    def run(self, batch: Any) -> Tensor:
        """Samples of every probe, until they are as many or as sure as was asked for."""
        s = self._settings
        if s.tol is None:
            return self._round(batches_of(_OP, batch), 0, 1 if s.exact else s.probes)
        batches = list(batches_of(_OP, batch))
        kept = [self._graph(batches[0])] if len(batches) == 1 else None
        samples = self._round(batches, 0, min(max(s.probes, 2), s.most), kept)
        while len(samples) < s.most and not _sure(samples, s.tol):
            more = min(s.probes, s.most - len(samples))
            samples = torch.cat([samples, self._round(batches, len(samples), more, kept)])
        return samples

    def _round(self, batches: Any, first: int, count: int, kept: Any = None) -> Tensor:
        """[count, L] of the mean over all batches, by samples."""
        total: Tensor | None = None
        weight = 0
        for b, batch in enumerate(batches):
            graph = kept[b] if kept else self._graph(batch)
            n = size_of(batch[0])
            part = n * self._samples(graph, b, first, count)
            total, weight = part if total is None else total + part, weight + n
            del graph  # before the next one is built
        if total is None:
            raise ValueError(message(_OP, "batch", "at least one batch", "none"))
        samples = total / weight
        if not bool(samples.isfinite().all()):
            probe, layer = (~samples.isfinite()).nonzero()[0].tolist()
            expected, got = (
                "a finite trace",
                f"{float(samples[probe, layer])} from probe {first + probe}",
            )
            raise ValueError(
                message(_OP, "loss_fn", expected, got, layer=self._targets[layer].name)
            )
        return samples

    def _graph(self, batch: tuple[Any, Any]) -> Graph:
        s, ways = self._settings, [way for way, _ in self.found]
        graph = Graph(_OP, self._network, self._loss_fn, batch, self._targets, ways,
                      count=s.chunk > 1)  # fmt: skip
        if "auto" in ways:
            self.found = graph.examine(self._coupled, known_loss(self._loss_fn) is not None)
            graph.ways = [way for way, _ in self.found]
            if s.exact and "block" in graph.ways:
                layer = graph.ways.index("block")
                expected = "layers whose trace is the Gauss–Newton block's, for exact=True"
                got, name = self.found[layer][1], self._targets[layer].name
                raise ValueError(message(_OP, "exact", expected, got, layer=name))
        if s.chunk > 1:
            _check_room(graph.loss.device, graph.bytes, s.chunk)
        return graph

    def _samples(self, graph: Graph, b: int, first: int, count: int) -> Tensor:
        """[count, L] of one batch."""
        s, targets = self._settings, self._targets
        out = graph.loss.new_zeros((count, len(targets)), dtype=torch.float64)
        factored = [layer for layer, way in enumerate(graph.ways) if way == "gauss_newton"]
        if factored and s.exact:
            for v in graph.curvature().columns():
                out[0, factored] += graph.squares(factored, v)
        elif factored:
            seed = (s.seed + b * _ODD) % 2**64
            for k in range(count):
                v = graph.curvature().vectors(seed, first + k)
                out[k, factored] = graph.squares(factored, v)
        joint = [layer for layer, way in enumerate(graph.ways) if way == "hutchinson"]
        single = [layer for layer, way in enumerate(graph.ways) if way == "block"]
        for k in range(0, count, s.chunk):
            some = min(s.chunk, count - k)
            for group in ([joint] if joint else []) + [[layer] for layer in single]:
                chosen = [targets[layer] for layer in group]
                found = graph.products(chosen, s.seed, first + k, some)
                for layer in group:
                    out[k : k + some, layer] = sum(found[i] for i in targets[layer].indices)
        return out


def _coupled(network: nn.Module) -> str:
    """Why a sample's output is not its own, or nothing."""
    try:
        for name, module in network.named_modules():
            refuse_coupled(_OP, name, module)
    except ValueError as error:
        return str(error)
    return ""


def _sure(samples: Tensor, tol: float) -> bool:
    stderr = samples.std(0) / len(samples) ** 0.5
    return bool((stderr <= tol * samples.mean(0).abs()).all())


def _check_room(device: torch.device, graph: int, chunk: int) -> None:
    """Raise where a second backward pass of so many probes will not fit."""
    free = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if free is not None and chunk * graph > free:
        expected = f"room for {chunk} times the graph's {graph / 2**20:.0f} MiB"
        raise RuntimeError(message(_OP, "chunk", expected, f"{free / 2**20:.0f} MiB free"))
