"""Whether the factors of a layer make its gradient, sample by sample, in this network.

They come from what the layer's modules were called with. They do not make its gradient where a
parameter is used elsewhere too, where a module does more than its class says (by a hook, a forward
of its own), or where samples meet on the way (graph networks, centring over the batch). No list of
modules knows all of these; numbers show each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.curvature.graph import Graph
from lwkd.ops import philox

FLIPS = 2**32 - 1  # the probe whose signs turn samples around

_COUPLED = "its samples are coupled: what other samples have counts in each"
_PARTIAL = (
    "what its modules were called with does not make its gradient: a parameter that is used "
    "elsewhere too, a hook that changes an output, or a forward of its own"
)


def without_factors(graph: Graph, layers: Sequence[int], seed: int) -> dict[int, Exception]:
    """Why layers have no factors, by number; of the others the graph keeps the sample of probe 0.

    With v of that probe and G_n what the factors of sample n make of ⟨v, f⟩: ‖G_n‖ must stay when
    the samples of v are multiplied by random signs, and of one sample m alone it must be the norm
    of the gradient that autograd finds. m is a sample that is active in all layers.
    """
    v = graph.curvature().vectors(seed, 0)
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
    for layer in [layer for layer, own in norms.items() if len(own) != samples]:
        text = f"it has {len(norms.pop(layer))} samples, the output {samples}"
        failed[layer] = graph.error(layer, text)
    graph.first_sample = (seed, 0), norms
    return failed | (_wrong(graph, v, norms, seed) if norms else {})


def _wrong(graph: Graph, v: Tensor, norms: dict[int, Tensor], seed: int) -> dict[int, Exception]:
    layers, found = list(norms), torch.stack([*norms.values()])
    signs = philox.signs(v.new_empty(len(found[0])), seed, philox.OUTPUTS, FLIPS)
    flipped = graph.squares(layers, v * signs.reshape(-1, *[1] * (v.dim() - 1)))
    largest = found.amax(1)
    # Relative to the layer, but for what rounding leaves of a gradient that is 0 in truth.
    dtypes = [p.dtype for layer in layers for p in graph.targets[layer].parameters]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    room = (64 * eps) ** 2 * largest.max()
    coupled = (flipped - found).abs().amax(1) > eps**0.5 * largest + room
    active = largest > 0
    m = int((found[active] / largest[active, None]).amin(0).argmax()) if bool(active.any()) else 0
    alone, size = torch.zeros_like(v), v[m].double().norm()
    alone[m] = torch.where(size > 0, v[m] / size, 0.0)  # whatever is small of v is not so here
    want, own = graph.norms(layers, alone) * size.square(), found[:, m]
    partial = (want - own).abs() > eps**0.5 * torch.maximum(want, own) + room
    both = zip(layers, coupled.tolist(), partial.tolist(), strict=True)
    return {layer: graph.error(layer, _COUPLED if c else _PARTIAL)
            for layer, c, p in both if c or p}  # fmt: skip
