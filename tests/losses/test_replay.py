"""What is below a layer runs once, and the rises are the same whatever is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.losses import channel_importance
from tests.curvature.networks import X, Y
from tests.losses.test_channels import zeroed


class Linear(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Stack(nn.Module):
    """Layers below, and two above; `below` is what a test makes of it."""

    def __init__(self, below: Callable[[Stack, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (Linear(36, 36) for _ in "abc")
        self.act = nn.SiLU(inplace=True)
        self.layer, self.head = nn.Linear(36, 5), Linear(5, 4)
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.below(self, x.flatten(1))))


BELOW: dict[str, Callable[[Stack, Tensor], Tensor]] = {
    "one after the other": lambda net, x: net.c(net.b(net.a(x))),
    "twice": lambda net, x: net.c(net.a(net.a(x))),
    "an output changed in place": lambda net, x: net.a(x).add_(net.b(x)).mul_(net.c(x)),
    "by a module that is shared": lambda net, x: net.act(net.c(net.act(net.b(x)))),
    "by a module": lambda net, x: net.c(net.act(net.b(x))),
}


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", BELOW)
def test_it_is_the_same_whatever_is_below(name: str, chunk: int) -> None:
    net = Stack(BELOW[name]).double().eval()
    want = zeroed(net, "layer")
    got = channel_importance(net, [(X, Y)], ["layer"], chunk=chunk)
    torch.testing.assert_close(got.rise["layer"], want, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(m) for m in net.modules())


def test_what_is_below_runs_once() -> None:
    net = Stack(BELOW["one after the other"]).double().eval()
    channel_importance(net, [(X, Y), (X, Y)], ["layer"], chunk=2)
    assert [net.a.calls, net.b.calls, net.c.calls] == [2, 2, 2]  # once a batch
    assert net.head.calls == 2 * (1 + 1 + 3)  # as it is, without what is below, and 2 + 2 + 1


class Notes(nn.Module):
    """Does more than return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        return x.sin()


def test_a_module_that_does_more_than_return() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.notes, self.layer = Notes(), nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.notes.seen.clear()
            z = self.layer(self.notes(x.flatten(1)))
            return z * (1 + sum(self.notes.seen))

    net = Net().double()
    got = channel_importance(net, [(X, Y)], ["layer"], chunk=1).rise["layer"]
    torch.testing.assert_close(got, zeroed(net, "layer"), rtol=1e-9, atol=1e-12)


def test_a_forward_and_hooks_of_ones_own() -> None:
    net = Stack(BELOW["one after the other"]).double().eval()
    net.a.forward = own = lambda x: 2 * F.linear(x, net.a.weight)
    net.c.register_forward_hook(lambda m, args, y: y + 1)  # which would be added twice
    got = channel_importance(net, [(X, Y)], ["layer"], chunk=1).rise["layer"]
    torch.testing.assert_close(got, zeroed(net, "layer"), rtol=1e-9, atol=1e-12)
    assert vars(net.a)["forward"] is own
    assert "forward" not in vars(net.c)
