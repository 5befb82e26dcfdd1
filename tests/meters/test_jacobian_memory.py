"""What measuring Jacobians by parameters holds in memory at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases import resnet
from lwkd import JacobianMeter, pair_layers


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made while it is on."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        kept = (*before.parameters(), *before.buffers())
        self._old = {x.untyped_storage()._cdata for x in kept}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._old:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return out


def passes(net: nn.Module, names: list[str], x: Tensor) -> int:
    """Bytes of the inputs and the outputs' gradients of the layers, from one pass both ways."""
    seen: list[tuple[Tensor, Tensor]] = []
    modules = [net.get_submodule(name) for name in names]
    hooks = [m.register_forward_hook(lambda _, i, o: seen.append((i[0], o))) for m in modules]
    out = net(x)
    for hook in hooks:
        hook.remove()
    grads = torch.autograd.grad(out.sum(), [o for _, o in seen])
    inputs = {i.untyped_storage()._cdata: i.untyped_storage().nbytes() for i, _ in seen}
    return sum(inputs.values()) + sum(g.untyped_storage().nbytes() for g in grads)


@pytest.mark.parametrize("width", [8, 32])
def test_a_measurement_holds_one_network_more(width: int) -> None:
    """Beside what a pass of one network needs: the other's factors, whatever the parameters are."""
    torch.manual_seed(0)
    nets = nn.ModuleList(
        resnet((1, 1, 1, 1), bottleneck=False, width=width, classes=10).eval() for _ in "st"
    )
    weights = (nn.Conv2d, nn.Linear)
    names = [name for name, m in nets[0].named_modules() if isinstance(m, weights)]
    meter = JacobianMeter(pair_layers(*nets, names))
    x = torch.randn(16, 3, 32, 32)
    with Peak(nets) as alone:
        pairs = passes(nets[0], names, x)
    with Peak(nets) as both:
        meter.measure(x)
    extra = (both.bytes - alone.bytes) / pairs
    assert extra <= 1.1, extra
