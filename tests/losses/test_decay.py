"""L2 and L2-SP against their formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lwkd import pair_layers
from lwkd.losses import L2, L2SP


def network(classes: int = 3, width: int = 5) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten())
    return nn.Sequential(body, nn.Linear(36 * width, classes)).double()


def fine_tuned() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    source = network(7)
    model = copy.deepcopy(source)
    model[1] = nn.Linear(180, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model, source


def test_l2_sp() -> None:
    model, source = fine_tuned()
    loss = L2SP(model, source, head=["1"], alpha=0.3, beta=0.7)
    terms = loss()
    want = {}
    for name in ("0.0", "0.1"):
        own, there = (dict(n.get_submodule(name).named_parameters()) for n in (model, source))
        want[name] = sum(0.5 * (own[k] - there[k]).square().sum() for k in own)
    assert loss.layers == list(want)
    torch.testing.assert_close(terms.per_layer, torch.stack(list(want.values())))
    head = sum(0.5 * p.square().sum() for p in model[1].parameters())
    torch.testing.assert_close(terms.total, 0.3 * sum(want.values()) + 0.7 * head)
    terms.total.backward()
    w, w0 = model[0][0].weight, source[0][0].weight
    torch.testing.assert_close(w.grad, 0.3 * (w - w0).detach())
    torch.testing.assert_close(model[1].bias.grad, 0.7 * model[1].bias.detach())
    assert all(p.grad is None for p in source.parameters())
    pair_layers(model, source, loss.layers)


def test_layers_that_are_asked_for() -> None:
    model, source = fine_tuned()
    every = L2SP(model, source, head=["1"])()
    one = L2SP(nn.DataParallel(model), source, head=["module.1"], layers=["0"])
    assert one.layers == ["0"]
    torch.testing.assert_close(one().per_layer[0], every.per_layer.sum())
    torch.testing.assert_close(one().total, every.total)  # of the whole body, whatever is asked


def test_a_start_that_is_remembered() -> None:
    """Without a source: the weights at the beginning, also after a checkpoint."""
    model, source = fine_tuned()
    loss = L2SP(model, head=["1"], beta=0.0)
    assert float(loss().total) == 0
    with torch.no_grad():
        model[0][0].weight.add_(1.0)
    moved = float(loss().total)
    assert moved == pytest.approx(0.01 * 0.5 * 45)
    again = L2SP(model, head=["1"], beta=0.0)
    assert float(again().total) == 0
    again.load_state_dict(loss.state_dict())
    assert float(again().total) == moved
    assert not L2SP(model, source, head=["1"]).state_dict()


def test_frozen_parameters_do_not_count() -> None:
    model, source = fine_tuned()
    model[0][0].requires_grad_(False)
    assert L2SP(model, source, head=["1"]).layers == ["0.1"]


def test_l2() -> None:
    model, _ = fine_tuned()
    terms = L2(model, ["0.0", "1"], beta=0.2)()
    want = torch.stack([
        sum(0.5 * p.square().sum() for p in m.parameters()) for m in (model[0][0], model[1])
    ])  # fmt: skip
    torch.testing.assert_close(terms.per_layer, want)
    torch.testing.assert_close(terms.total, 0.2 * want.sum())
    whole = sum(0.5 * p.square().sum() for p in model.parameters())
    torch.testing.assert_close(L2(model, beta=1.0)().total, whole)


def test_errors() -> None:
    model, source = fine_tuned()

    def call(kind: Any, *args: Any, **options: Any) -> Any:
        return lambda: kind(*args, **options)

    for run, kind, text in (
        (call(L2, model, ["2"]), ValueError, "L2: layers: expected names of modules, got '2'"),
        (call(L2, model, "1"), TypeError, "layers: expected a list of names"),
        (call(L2, model, ["0.2"]), ValueError, r"layer '0.2'\): expected a layer with trained"),
        (call(L2, model, beta=-1), ValueError, "beta: expected a finite number ≥ 0"),
        (call(L2SP, model, source), ValueError,
         r"source \(layer '1'\): expected a network of the model's architecture.*head="),
        (call(L2SP, model, nn.Linear(2, 2), head=["1"]), ValueError, "got none of that name"),
        (call(L2SP, model, source, head=["head"]), ValueError, "head: expected names of modules"),
        (call(L2SP, model, source, head="1"), TypeError, "head: expected a list of names"),
        (call(L2SP, model, source, head=["1"], layers=["1"]), ValueError,
         r"layers \(layer '1'\): expected a layer with trained parameters outside the head"),
        (call(L2SP, model, source, head=["1"], alpha=float("nan")), ValueError, "alpha"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
