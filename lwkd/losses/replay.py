"""What runs before a layer, run once: its outputs are kept, and returned in later passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lwkd.hooks import first_tensor


class Recording:
    """What had ended when each of some layers was first called, in one forward pass.

    The outermost modules that had ended by then, and that are called once in the pass, return the
    same whatever the layer puts out. Their outputs are kept as they are, not copied.

    Args:
        layers: The modules.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> recording, x = Recording([net[2]]), torch.rand(5, 4)
    >>> with recording.watch(net):
    ...     y = net(x)
    >>> with recording.replay(net[2]):  # neither net[0] nor net[1] runs
    ...     torch.equal(net(torch.rand(5, 4)), y)
    True
    """

    def __init__(self, layers: Collection[nn.Module]) -> None:
        self._layers = set(layers)
        self._calls: Counter[nn.Module] = Counter()
        self._ended: list[list[tuple[nn.Module, Any]]] = [[]]  # inside each module that is running
        self._before: dict[nn.Module, list[tuple[nn.Module, Any]]] = {}

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[None]:
        """Record the forward pass that runs in this with-block."""
        with ExitStack() as stack:
            for module in network.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no such hooks
                    stack.callback(module.register_forward_pre_hook(self._begin).remove)
                    stack.callback(module.register_forward_hook(self._end).remove)
            yield

    @contextmanager
    def replay(self, layer: nn.Module) -> Iterator[None]:
        """Have what ended before a layer return what it returned, instead of running."""
        with ExitStack() as stack:
            for module, output in self._before.get(layer, ()):
                if self._calls[module] == 1:
                    stack.callback(_restore, module, module.__dict__.get("forward"))
                    module.__dict__["forward"] = lambda *_, _output=output, **__: _output
            yield

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module in self._layers and module not in self._before:
            self._before[module] = [item for ended in self._ended for item in ended]
        self._calls[module] += 1
        self._ended.append([])

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        inside = self._ended.pop()
        self._ended[-1] += inside if first_tensor(output) is None else [(module, output)]


def _restore(module: nn.Module, own: Any) -> None:
    """Give a module back the forward of its class, or the one that it had of its own."""
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own
