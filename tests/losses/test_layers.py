"""The layers of a loss: they pair networks, and what does not fit them is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lwkd import LayerwiseLR, losses, pair_layers, param_groups_layerwise
from tests import cases


def network(width: int, names: tuple[str, str]) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module(names[0], nn.Conv2d(1, width, 3))
    net.add_module(names[1], nn.Conv2d(width, width, 3))
    return net


@pytest.mark.parametrize("of", ["attention", "jacobian"])
@pytest.mark.parametrize("layers", [["b", "a"], {"a": "d", "b": "c"}])
def test_they_pair_networks(of: str, layers: Any) -> None:
    student = network(3, ("a", "b"))
    teacher = network(5, ("a", "b") if isinstance(layers, list) else ("c", "d")).eval()
    if of == "attention":
        loss: Any = losses.AttentionTransfer(layers=layers)
    else:
        loss = losses.JacobianMatching(of="map", layers=layers)
    assert loss.layers == layers
    pairs = pair_layers(student, teacher, loss.layers)
    assert pairs.names == list(layers)
    assert [p.teacher for p in pairs] == (
        list(layers.values()) if isinstance(layers, dict) else layers
    )
    x = cases.draw((4, 1, 8, 8), torch.float32, 1).requires_grad_()
    with pairs.capture() as features:
        _ = student(x), teacher(x)
    both = features.student, features.teacher
    terms = loss(*both) if of == "attention" else loss(*both, x)
    groups = param_groups_layerwise(student, pairs, lr=0.1)
    rates = LayerwiseLR(torch.optim.SGD(groups), pairs)
    rates.update(terms.per_layer.detach())
    with pytest.raises(ValueError, match=r"LayerwiseLR\.update: d: expected .*2"):
        rates.update(terms.per_layer.detach()[:1])  # of other layers than the pairs
    for args in ((both[0][:1], both[1]), (both[0], both[1][:1])):
        with pytest.raises(ValueError, match=r"one for each of \['[ab]', '[ab]'\], got 1"):
            loss(*args) if of == "attention" else loss(*args, x)
    with pytest.raises(ValueError, match=r"pair_layers: pairs"):
        pair_layers(student, network(5, ("e", "f")), loss.layers)


def test_every_loss_has_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    there = {
        losses.KnowledgeDistillation(): None,
        losses.GradientAttentionTransfer(): None,
        losses.JacobianMatching(): None,
        losses.AttentionTransfer(): None,
        losses.AttentionTransfer(layers=("a",)): ["a"],
        losses.DELTA(["a"]): ["a"],
        losses.L2(model, ["0"]): ["0"],
        losses.L2SP(model): ["0"],
    }
    for loss, layers in there.items():
        assert loss.layers == layers
    assert {type(loss).__name__ for loss in there} | {"TeacherLogits", "ChannelImportance",
            "LossTerms", "channel_importance"} == set(losses.__all__)  # fmt: skip
    assert "['a'], beta" in repr(losses.AttentionTransfer(layers=["a"]))


def calls() -> dict[str, Any]:
    """Every loss of one batch, with the tensors that it is given."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5))
            for _ in "st"]  # fmt: skip
    moved = losses.L2SP(nets[0])
    with torch.no_grad():
        nets[0][0].weight += 0.1
    x, y = torch.randn(4, 2, 6, 6).requires_grad_(), torch.arange(4)
    maps = [[300 * net[:2](x)] for net in nets]  # whose squares half precision cannot hold
    logits = [net(x) for net in nets]
    ce = [F.cross_entropy(z, y) for z in logits]
    weights = torch.rand(6).softmax(0)
    return {
        "distillation": lambda: losses.KnowledgeDistillation()(*logits, y),
        "attention": lambda: losses.AttentionTransfer()(*maps),
        "attention, paper": lambda: losses.AttentionTransfer(convention="paper")(*maps),
        "gradient": lambda: losses.GradientAttentionTransfer()(*ce, x),
        "jacobian": lambda: losses.JacobianMatching()(*logits, x, y),
        "jacobian of maps": lambda: losses.JacobianMatching(of="map")(*maps, x),
        "delta": lambda: losses.DELTA({"0": weights})(*maps),
        "delta, alike": lambda: losses.DELTA(["0"])(*maps),
        "l2": lambda: losses.L2(nets[0])(),
        "l2-sp": lambda: moved(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", calls())
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    call = calls()[name]
    want = call()
    with torch.autocast("cpu", dtype):
        got = call()
    for a, b in zip(got, want, strict=True):
        if b is not None:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layers", "kind", "text"),
    [
        ("a", TypeError, "names of layers, or a dict .* got 'a'"),
        ([1], TypeError, r"got \[1\]"),
        ({"a": None}, TypeError, "got {'a': None}"),
        ([], ValueError, "one name at least"),
    ],
)
def test_errors(layers: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=rf"lwkd\.losses\.AttentionTransfer: layers: expected .*{text}"):
        losses.AttentionTransfer(layers=layers)
    with pytest.raises(kind, match=rf"lwkd\.losses\.JacobianMatching: layers: expected .*{text}"):
        losses.JacobianMatching(of="map", layers=layers)


def test_outputs_have_no_layers() -> None:
    with pytest.raises(ValueError, match=r"JacobianMatching: layers: expected None.* of='map'"):
        losses.JacobianMatching(layers=["a"])
