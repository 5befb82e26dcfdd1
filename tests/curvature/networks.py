"""Networks small enough for their whole Hessian, and that Hessian, by torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from tests import cases

N, CLASSES = 6, 4


class CNN(nn.Module):
    """Convolutions, a norm with running statistics, an activation changed in place."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2)
        self.norm, self.act = nn.BatchNorm2d(4), act
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c1(x))
        return self.head(self.act(self.norm(self.c2(x))).flatten(1))


class Transformer(nn.Module):
    """Attention, functional GELU, a residual."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + F.gelu(self.mlp(x))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(True), nn.Linear(5, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "CNN, ReLU": lambda: CNN(nn.ReLU(inplace=True)),
    "CNN, GELU": lambda: CNN(nn.GELU()),
    "MLP": mlp,
    "transformer": Transformer,
}
LAYERS = {
    "CNN, ReLU": ["c1", "c2", "norm", "head"],
    "CNN, GELU": ["c1", "c2", "norm", "head"],
    "MLP": ["1", "3"],
    "transformer": ["patch", "norm", "attention", "mlp", "head"],
}
X = cases.draw((N, 1, 6, 6), torch.float64, 1)
Y = torch.tensor([2, 0, 3, 1, 1, 2])


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return NETWORKS[name]().double().eval()


class Exact(NamedTuple):
    """Of every layer: the trace, and the variance of one probe's sample."""

    trace: Tensor
    block: Tensor
    hutchinson: Tensor


def exact(
    net: nn.Module, loss_fn: Any = F.cross_entropy, x: Tensor = X, y: Any = Y, layers: Any = None
) -> Exact:
    params = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        own = {n: part.view_as(p) for (n, p), part in zip(params.items(), parts, strict=True)}
        return loss_fn(functional_call(net, own, (x,)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        h = hessian(loss)(torch.cat([p.flatten() for p in params.values()]))
    names = [n for n, p in params.items() for _ in range(p.numel())]
    found: list[list[Tensor]] = []
    for layer in layers:
        inside = torch.tensor([n == layer or n.startswith(f"{layer}.") for n in names])
        own, others = h[inside][:, inside], h[inside][:, ~inside]
        block = 2 * (own.square().sum() - own.diagonal().square().sum())
        found.append([own.trace(), block, block + others.square().sum()])
    return Exact(*torch.tensor(found, dtype=torch.float64).unbind(1))
