"""Draws samples of traces, batch by batch and probe by probe, until they are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.batches import batches_of, size_of
from lwkd.curvature.completeness import without_factors
from lwkd.curvature.examine import examine
from lwkd.curvature.graph import FACTORED, Graph
from lwkd.curvature.settings import Settings
from lwkd.curvature.targets import Target
from lwkd.factoring import refuse_coupled
from lwkd.ops.checks import message

_OP = "hessian_trace"
_ODD = 0x9E3779B97F4A7C15  # from batch to batch: other random outputs, the same signs of parameters
_REASONS = {
    "gauss_newton": "asked for: the Gauss–Newton block's trace, which is the Hessian's only where "
    "the outputs are linear in the layer's parameters (estimator='auto' tests it)",
    "split": "asked for",
    "block": "asked for",
    "hutchinson": "asked for",
}


class Sampler:
    """Draws samples [K, L] from all batches."""

    def __init__(
        self, network: nn.Module, loss_fn: Any, targets: list[Target], settings: Settings
    ) -> None:
        self._network, self._loss_fn, self._targets = network, loss_fn, targets
        self._settings = settings
        way = settings.estimator
        self._asked = [(way, _REASONS.get(way, "")) for _ in targets]
        self._found: list[list[tuple[str, str]]] = []  # of every batch, once it is known
        self._coupled = _coupled(network)
        for name, module in network.named_modules():
            embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            if embeds and module.max_norm is not None:
                expected = "embeddings without max_norm: their forward changes the weights"
                got = f"max_norm={module.max_norm}"
                raise ValueError(message(_OP, "model", expected, got, layer=name))
        if way in FACTORED:
            for name, module in network.named_modules():
                refuse_coupled(_OP, name, module)

    @property
    def found(self) -> list[tuple[str, str]]:
        """(estimator, reason) of every layer; "block" if that was needed for any batch."""
        every = self._found or [self._asked]
        return [next((own for own in each if own[0] == "block"), each[0])
                for each in zip(*every, strict=True)]  # fmt: skip

    def run(self, batch: Any) -> Tensor:
        """Samples of every probe, until they are as many or as sure as was asked for."""
        s = self._settings
        if s.tol is None:
            return self._round(batches_of(_OP, batch), 0, 1 if s.exact else s.probes)
        batches = list(batches_of(_OP, batch))
        kept = [self._graph(0, batches[0])] if len(batches) == 1 else None
        samples = self._round(batches, 0, min(max(s.probes, 2), s.most), kept)
        while len(samples) < s.most and not _sure(samples, s.tol):
            more = min(s.probes, s.most - len(samples))
            samples = torch.cat([samples, self._round(batches, len(samples), more, kept)])
        return samples

    def _round(self, batches: Any, first: int, count: int, kept: Any = None) -> Tensor:
        """[count, L] of all batches: of the loss that one batch of them all would have."""
        total: Tensor | None = None
        weight = 0.0
        for b, batch in enumerate(batches):
            graph = kept[b] if kept else self._graph(b, batch)
            own = graph.share(size_of(batch[0]))
            part = (own or 1.0) * self._samples(graph, b, first, count)
            total, weight = part if total is None else total + part, weight + own
            del graph  # before the next one is built
        if total is None:
            raise ValueError(message(_OP, "batch", "at least one batch", "none"))
        samples = total / (weight or 1.0)
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

    def _graph(self, b: int, batch: tuple[Any, Any]) -> Graph:
        s, new = self._settings, b == len(self._found)
        ways = [way for way, _ in (self._asked if new else self._found[b])]
        graph = Graph(_OP, self._network, self._loss_fn, batch, self._targets, ways,
                      count=s.chunk > 1)  # fmt: skip
        if new:
            self._found.append(self._examined(graph, b))
            graph.ways = [way for way, _ in self._found[b]]
        if s.chunk > 1:
            for rest in {way == "split" for way in graph.ways if way != "gauss_newton"}:
                graph.differentiate(rest)
            _check_room(graph.loss.device, graph.bytes, s.chunk)
        return graph

    def _seed(self, b: int) -> int:
        """Of a batch's random outputs, as a signed number of 64 bits."""
        return (self._settings.seed + b * _ODD + 2**63) % 2**64 - 2**63

    def _examined(self, graph: Graph, b: int) -> list[tuple[str, str]]:
        """(estimator, reason) of every layer for this batch."""
        s, seed = self._settings, self._seed(b)
        if s.estimator == "auto":
            found = examine(graph, seed, self._coupled)
            blocks = [layer for layer, (way, _) in enumerate(found) if way == "block"]
            if s.exact and blocks:
                expected = "layers whose trace is the Gauss–Newton block's, for exact=True"
                got, name = found[blocks[0]][1], self._targets[blocks[0]].name
                raise ValueError(message(_OP, "exact", expected, got, layer=name))
            return found
        if s.estimator in FACTORED and b == 0:
            for error in without_factors(graph, range(len(self._targets)), seed).values():
                raise error
        return self._asked

    def _samples(self, graph: Graph, b: int, first: int, count: int) -> Tensor:
        """[count, L] of one batch."""
        s, targets = self._settings, self._targets
        out = graph.loss.new_zeros((count, len(targets)), dtype=torch.float64)
        layers = {way: [layer for layer, w in enumerate(graph.ways) if w == way]
                  for way in ("gauss_newton", "split", "block", "hutchinson")}  # fmt: skip
        factored = [*layers["gauss_newton"], *layers["split"]]
        if factored and s.exact:
            for v in graph.curvature().columns():
                out[0, factored] += graph.squares(factored, v).sum(1)
        elif factored:
            seed = self._seed(b)
            for k in range(count):
                out[k, factored] = graph.gauss_newton(factored, seed, first + k)
        single = layers["split"] + layers["block"]
        groups = [[layer] for layer in single] + [g for g in [layers["hutchinson"]] if g]
        for k in range(0, count, s.chunk):
            some = min(s.chunk, count - k)
            for group in groups:
                chosen, rest = [targets[layer] for layer in group], group[0] in layers["split"]
                found = graph.products(chosen, s.seed, first + k, some, rest)
                for layer in group:
                    out[k : k + some, layer] += sum(found[i] for i in targets[layer].indices)
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
