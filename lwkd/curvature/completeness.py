"""Whether the factors of a layer make its gradient, sample by sample, in this network.

They come from what the layer's modules were called with. They do not make its gradient where a
parameter is used elsewhere too, where a module does more than its class says, or where samples meet
on the way (graph networks, centring over the batch). The graph shows the first, and numbers the
rest: no list of modules knows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lwkd.curvature.graph import Graph
from lwkd.curvature.nodes import uses
from lwkd.factoring import exact_kind, supports
from lwkd.ops import rademacher
from lwkd.ops.philox import OUTPUTS

FLIPS = 2**32 - 1  # the probe whose signs turn samples around

_COUPLED = "its samples are coupled: what other samples have counts in each"
_PARTIAL = "what its modules were called with does not make its gradient"
_OUTSIDE = "its parameters are used outside their modules too"


def without_factors(graph: Graph, layers: Sequence[int], seed: int) -> dict[int, Exception]:
    """Why layers have no factors, by number; of the others the graph keeps the sample of probe 0.

    With v of that probe and G_n what the factors of sample n make of ⟨v, f⟩: ‖G_n‖ must stay when
    the samples of v are multiplied by random signs. Modules of torch's own classes must be all that
    uses their parameters; where there are others, ‖G_m‖ must, for v of one sample m alone, be the
    norm of the gradient that autograd finds. m is a sample that is active in all layers.
    """
    v = graph.curvature().vectors(seed, 0)
    used = uses(graph.output, {id(p) for t in graph.targets for p in t.parameters})
    norms: dict[int, Tensor] = {}
    failed: dict[int, Exception] = {}
    groups = [list(layers)] if layers else []
    while groups:
        group = groups.pop(0)
        try:
            norms.update(zip(group, graph.squares(group, v), strict=True))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if len(group) == 1:
                unnamed = isinstance(error, IndexError)  # of a module without a batch
                failed[group[0]] = graph.error(group[0], str(error)) if unnamed else error
            else:
                groups += [[layer] for layer in group]
    samples = len(v) if v.dim() else 1
    for layer, own in [*norms.items()]:
        text = "" if len(own) == samples else f"it has {len(own)} samples, the output {samples}"
        text = text or ("" if _counted(graph, layer, used) else _OUTSIDE)
        if text:
            failed[layer] = graph.error(layer, text)
            del norms[layer]
    graph.first_sample = (seed, 0), norms
    return failed | (_wrong(graph, v, norms, seed) if norms else {})


def _counted(graph: Graph, layer: int, used: Mapping[int, int]) -> bool:
    """Whether the calls of the modules that factor are as many as the uses of their parameters."""
    called: dict[int, int] = {}
    unknown: set[int] = set()  # in modules that torch.func runs again: used as often as they like
    for owner, times in zip(graph.targets[layer].owners, graph.calls(layer), strict=True):
        named = dict(owner.module.named_parameters())
        for name in owner.wanted:
            key = id(named[name])
            called[key] = called.get(key, 0) + times
            if not supports(owner.module):
                unknown.add(key)
    return all(key in unknown or times == used.get(key, 0) for key, times in called.items())


def _wrong(graph: Graph, v: Tensor, norms: dict[int, Tensor], seed: int) -> dict[int, Exception]:
    layers, found = list(norms), torch.stack([*norms.values()])
    signs = rademacher(v.new_empty(len(found[0])), seed=seed, layer=OUTPUTS, probe=FLIPS)
    flipped = graph.squares(layers, v * signs.reshape(-1, *[1] * (v.dim() - 1)))
    largest = found.amax(1)
    # Relative to the layer, but for what rounding leaves of a gradient that is 0 in truth.
    dtypes = [p.dtype for layer in layers for p in graph.targets[layer].parameters]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    room = (64 * eps) ** 2 * largest.max()
    coupled = (flipped - found).abs().amax(1) > eps**0.5 * largest + room
    wrong = dict.fromkeys(_at(layers, coupled), _COUPLED)
    owners = [graph.targets[layer].owners for layer in layers]
    others = [k for k, own in enumerate(owners) if not all(exact_kind(o.module) for o in own)]
    if others:
        layers, found, largest = [layers[k] for k in others], found[others], largest[others]
        active = largest > 0
        shares = found[active] / largest[active, None]
        m = int(shares.amin(0).argmax()) if len(shares) else 0
        alone, size = torch.zeros_like(v), v[m].double().norm()
        alone[m] = torch.where(size > 0, v[m] / size, 0.0)  # what is small of v is not so here
        want, own = graph.norms(layers, alone) * size.square(), found[:, m]
        partial = (want - own).abs() > eps**0.5 * torch.maximum(want, own) + room
        wrong = dict.fromkeys(_at(layers, partial), _PARTIAL) | wrong
    return {layer: graph.error(layer, got) for layer, got in wrong.items()}


def _at(layers: Sequence[int], marks: Tensor) -> list[int]:
    return [layer for layer, mark in zip(layers, marks.tolist(), strict=True) if mark]
