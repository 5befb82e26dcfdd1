"""What "auto" finds: the estimator of every layer, and why that one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.curvature.completeness import without_factors
from lwkd.curvature.graph import Graph
from lwkd.curvature.linear import linearity
from lwkd.curvature.targets import every_parameter
from lwkd.ops import rademacher
from lwkd.ops.philox import OUTPUTS

_PROBE = 2**32 - 1  # of the test of linearity
_GOLDEN = (5**0.5 - 1) / 2
_LINEAR = "outputs are linear in its parameters: the trace is the Gauss–Newton block's"


def examine(graph: Graph, seed: int, against: str) -> list[tuple[str, str]]:
    """(estimator, reason) of every layer: gauss_newton where that is the trace, else block.

    Args:
        graph: Of one batch.
        seed: Of the probes; a first one is drawn, to see that the layers have factors.
        against: What speaks against gauss_newton in every layer, or nothing.
    """
    every = range(len(graph.targets))
    why = against or graph.without_hessian()
    if why:
        return [("block", why) for _ in every]
    linear = linearity(graph.output, [t.parameters for t in graph.targets])
    curved = _curved(graph, [layer for layer in every if linear[layer] is None], seed)
    curved |= {layer for layer in every if linear[layer] is False}
    reasons = dict.fromkeys(curved, "outputs are not linear in its parameters")
    failed = without_factors(graph, [layer for layer in every if layer not in reasons], seed)
    reasons |= {layer: str(error).splitlines()[0] for layer, error in failed.items()}
    return [("block", reasons[layer]) if layer in reasons else ("gauss_newton", _LINEAR)
            for layer in every]  # fmt: skip


def _curved(graph: Graph, layers: Sequence[int], seed: int) -> set[int]:
    """Those where the second derivative of a random ⟨w, f⟩ along a random direction is not 0."""
    w = _spread(rademacher(graph.output, seed=seed, layer=OUTPUTS, probe=_PROBE))
    parameters, indices = every_parameter([graph.targets[layer] for layer in layers])
    grads = graph.gradients(graph.output, parameters, w) if layers else ()
    by_index = dict(zip(indices, grads, strict=True))
    sizes: dict[int, Tensor] = {}
    for layer in layers:
        target = graph.targets[layer]
        own = {i: g for i in target.indices if (g := by_index[i]) is not None}
        if not own:
            continue
        firsts = [*own.values()]
        directions = [_spread(v) for v in graph.signs([*own], firsts, seed, _PROBE)]
        seconds = graph.again(firsts, target.parameters, directions)
        for x in seconds:
            if x is not None:
                sizes[layer] = sizes.get(layer, 0.0) + x.detach().abs().sum().double()
    both = zip(sizes, torch.stack([*sizes.values()]).tolist() if sizes else (), strict=True)
    return {layer for layer, size in both if size != 0}


def _spread(signs: Tensor) -> Tensor:
    """Of sizes from ½ to 1: with ±1 alone sums and differences vanish that are not 0 in general."""
    count = torch.arange(signs.numel(), dtype=torch.float64, device=signs.device)
    sizes = 0.5 + 0.5 * (count * _GOLDEN).frac()
    return signs * sizes.reshape(signs.shape).to(signs.dtype)
