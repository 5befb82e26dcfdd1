"""The channel weights of DELTA against one full pass a filter, behind a gate: the same rises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import CHANNEL_CASE, FORWARD, STAGES, resnet
from lwkd.losses import channel_importance

Batch = tuple[Tensor, Tensor]


@torch.no_grad()
def plain(net: nn.Module, batch: Batch, layers: list[str]) -> list[Tensor]:
    """As the authors of DELTA measure it: zero a filter, run the network, put the filter back."""
    base = F.cross_entropy(net(batch[0]), batch[1])
    found = []
    for name in layers:
        weight = net.get_submodule(name).weight
        rise = torch.empty(len(weight), dtype=torch.float64)
        for c in range(len(weight)):
            kept = weight[c].clone()
            weight[c] = 0
            rise[c] = F.cross_entropy(net(batch[0]), batch[1]) - base
            weight[c] = kept
        found.append(rise)
    return found


@torch.no_grad()
def above(net: nn.Sequential, batch: Batch, channels: list[int]) -> None:
    """What is above the stages, once for every channel, all in one batch: less is not needed."""
    x = batch[0]
    for i, part in enumerate(net):
        x = part(x)
        if 1 <= i <= len(channels):
            net[i + 1 :](x.repeat(channels[i - 1], *[1] * (x.dim() - 1)))


def test_channels_cpu(cpu_benchmark: Any) -> None:
    case = CHANNEL_CASE.quick() if cpu_benchmark.quick else CHANNEL_CASE
    torch.manual_seed(0)
    net = resnet((2, 2, 2, 2), bottleneck=False, width=case.width, classes=10).eval()
    batch = torch.randn(case.samples, 3, 32, 32), torch.randint(10, (case.samples,))
    layers = [f"{stage}.1.body.2.0" for stage in STAGES]
    ours = partial(channel_importance, net, [batch], layers)
    found, want = ours(), plain(net, batch, layers)
    for rise, expected in zip(found.rise.values(), want, strict=True):
        error = float((rise - expected).abs().max())
        assert error <= 1e-6 * found.loss, f"rises differ by {error:.1e}"
    rivals: dict[str, list[Callable[[], object]]] = {
        "lwkd": [ours],
        "a pass a filter": [partial(plain, net, batch, layers)],
        "lwkd first order": [partial(ours, method="first_order")],
        "floor": [partial(above, net, batch, [len(r) for r in want])],
    }
    cpu_benchmark(case, FORWARD, rivals, info={"floor_is": "what is above the stages, batched"})
