"""What the losses on derivatives by the input say of networks that have no second ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.losses import GradientAttentionTransfer, JacobianMatching
from tests.losses.test_jacobian import draw


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part[:, None] for part in self.project(x).chunk(3, -1)]
        return self.head(F.scaled_dot_product_attention(*parts).mean((1, 2)))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def second_derivatives(net: Callable[[Tensor], Tensor], way: str) -> None:
    x, y = torch.randn(4, 5, 8).requires_grad_(), torch.tensor([0, 1, 2, 0])
    teacher = Attention()  # the teacher's are not differentiated again
    if way == "jacobian":
        terms = JacobianMatching()(net(x), teacher(x), x, y)
    else:
        terms = GradientAttentionTransfer()(
            F.cross_entropy(net(x), y), F.cross_entropy(teacher(x), y), x
        )
    terms.total.backward()


@pytest.mark.parametrize("way", ["jacobian", "gradient"])
def test_what_cannot_be_differentiated_twice_is_named(way: str) -> None:
    argument = {"jacobian": "student", "gradient": "student_loss"}[way]
    text = rf"losses\..*: {argument}: expected a network that can be .*MATH\)\), got "
    net = Attention()
    with pytest.raises(RuntimeError, match=text + "fused attention"):
        second_derivatives(net, way)
    with sdpa_kernel(SDPBackend.MATH):
        second_derivatives(net, way)
        assert net.project.weight.grad is not None
        with pytest.raises(RuntimeError, match=text + "an operation whose derivative has none"):
            second_derivatives(lambda x: net(Once.apply(x)), way)
        compiled = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)), backend="aot_eager")
        with pytest.raises(RuntimeError, match=text + r"one that torch\.compile has compiled"):
            second_derivatives(compiled, way)
    torch._dynamo.reset()


@pytest.mark.parametrize("of", ["label", "map"])
def test_a_step_compiles_where_dynamo_traces_derivatives(of: str) -> None:
    """As the docstring says: with the networks in it, and not without them."""
    torch._dynamo.reset()
    student, teacher, x, y = draw()
    loss = JacobianMatching(of=of)

    def step(x: Tensor, y: Tensor) -> Tensor:
        if of == "label":
            return loss(student(x), teacher(x), x, y).total
        return loss(student.features(x), teacher.features(x), x).total

    want = torch.autograd.grad(step(x, y), student.first.weight)[0]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="trace_autograd_ops"):
        compiled(x, y)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.autograd.grad(compiled(x, y), student.first.weight)[0]
        torch.testing.assert_close(got, want)
        if of == "label":
            alone = torch.compile(loss, backend="aot_eager", fullgraph=True)
            with pytest.raises(torch._dynamo.exc.Unsupported, match="external grad_fn"):
                alone(student(x), teacher(x), x, y)
    torch._dynamo.reset()
