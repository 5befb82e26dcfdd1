"""What "auto" finds: the estimator of every layer, and why that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lwkd.curvature.graph import Graph
from lwkd.curvature.linear import linearity
from lwkd.curvature.nodes import uses
from lwkd.curvature.targets import every_parameter
from lwkd.factoring import supports
from lwkd.ops import philox

_PROBE = 2**32 - 1  # of the test of linearity
_LINEAR = "outputs are linear in its parameters: the trace is the Gauss–Newton block's"


def examine(graph: Graph, seed: int, coupled: str, known: bool) -> list[tuple[str, str]]:
    """(estimator, reason) of every layer: gauss_newton where that is the trace, else block.

    Args:
        graph: Of one batch.
        seed: Of the probes; a first one is drawn, to see that the layers have factors.
        coupled: Why no sample's output is its own, or nothing.
        known: Whether the loss's Hessian by the outputs is known.
    """
    every = range(len(graph.targets))
    why = coupled or ("" if known else "the loss is none whose Hessian by the outputs is known")
    if why:
        return [("block", why) for _ in every]
    linear = linearity(graph.output, [t.parameters for t in graph.targets])
    curved = _curved(graph, [layer for layer in every if linear[layer] is None])
    curved |= {layer for layer in every if linear[layer] is False}
    used = uses(graph.output, {id(p) for t in graph.targets for p in t.parameters})
    against = {layer: "outputs are not linear in its parameters" if layer in curved
               else _not_seen(graph, layer, used) for layer in every}  # fmt: skip
    against |= graph.try_gauss_newton([layer for layer in every if not against[layer]], seed)
    return [("block", against[layer]) if against[layer] else ("gauss_newton", _LINEAR)
            for layer in every]  # fmt: skip


def _curved(graph: Graph, layers: Sequence[int]) -> set[int]:
    """Those where the second derivative of a random ⟨w, f⟩ along a random direction is not 0."""
    w = philox.signs(graph.output, 0, philox.OUTPUTS, _PROBE)
    parameters, indices = every_parameter([graph.targets[layer] for layer in layers])
    grads = graph.gradients(graph.output, parameters, w) if layers else ()
    by_index = dict(zip(indices, grads, strict=True))
    sizes: dict[int, Tensor] = {}
    for layer in layers:
        target = graph.targets[layer]
        own = [(i, g) for i in target.indices
               if (g := by_index[i]) is not None and g.requires_grad]  # fmt: skip
        if not own:
            continue
        firsts = [g for _, g in own]
        directions = graph.signs([i for i, _ in own], firsts, 0, _PROBE)
        seconds = graph.again(firsts, target.parameters, directions)
        for x in seconds:
            if x is not None:
                sizes[layer] = sizes.get(layer, 0.0) + x.detach().abs().sum().double()
    both = zip(sizes, torch.stack([*sizes.values()]).tolist() if sizes else (), strict=True)
    return {layer for layer, size in both if size != 0}


def _not_seen(graph: Graph, layer: int, used: Mapping[int, int]) -> str:
    """Why the modules' calls are not all that a layer's parameters are used in, or nothing."""
    owners = graph.targets[layer].owners
    if not all(supports(owner.module) for owner in owners):
        return ""  # torch.func runs the whole module again
    try:
        calls = graph.calls(layer)
    except RuntimeError:
        return "it did not run"
    called: dict[int, int] = {}
    for owner, times in zip(owners, calls, strict=True):
        named = dict(owner.module.named_parameters())
        for name in owner.wanted:
            key = id(named[name])
            called[key] = called.get(key, 0) + times
    same = called == {key: used.get(key, 0) for key in called}
    return "" if same else "its parameters are used outside their modules too"
