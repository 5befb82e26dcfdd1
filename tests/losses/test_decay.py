"""L2 and L2-SP against their formulas in float64."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lwkd import freeze, pair_layers
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
    loss = L2SP(model, source, head=["1"])
    assert loss.layers == ["0.1"]
    assert L2(model).layers == ["0.1", "1"]
    before = float(loss().total), float(L2(model)().total)
    with torch.no_grad():
        model[0][0].weight.add_(1.0)
    assert (float(loss().total), float(L2(model)().total)) == before


@pytest.mark.parametrize("frozen", [["0.0"], ["0"], ["0", "1"]])
def test_layers_that_train_again_decay_again(frozen: list[str]) -> None:
    """Of a loss made while they were frozen: nothing counts at first, everything after it."""
    model, source = fine_tuned()
    want = L2SP(model, source, head=["1"])(), L2(model, ["0.0", "1"])()
    handle = freeze(model, frozen)
    losses = L2SP(model, source, head=["1"]), L2(model, ["0.0", "1"])
    per_layer = losses[0]().per_layer
    assert per_layer.shape == (len(losses[0].layers),)
    assert float(losses[1]().per_layer[0]) == 0
    if frozen == ["0", "1"]:
        assert float(losses[0]().total) == float(losses[1]().total) == 0
    handle.remove()
    for terms, loss in zip(want, losses, strict=True):
        torch.testing.assert_close(loss().total, terms.total)


def test_a_head_that_was_replaced() -> None:
    """The one that is there decays, and not the one that was."""
    model, source = fine_tuned()
    losses = L2(model, ["1"], beta=1.0), L2(model, beta=1.0), L2SP(model, source, head=["1"])
    model[1] = nn.Linear(180, 4, bias=False).double()
    new = 0.5 * model[1].weight.square().sum()
    torch.testing.assert_close(losses[0]().total, new)
    body = sum(0.5 * p.square().sum() for p in model[0].parameters())
    torch.testing.assert_close(losses[1]().total, new + body)
    torch.testing.assert_close(losses[2]().total, L2SP(model, source, head=["1"])().total)
    model[0][0] = nn.Conv2d(1, 6, 3).double()
    with pytest.raises(ValueError, match=r"L2SP: model: expected 0\.0\.weight \[5, 1, 3, 3\] as"):
        losses[2]()
    del model[1]
    with pytest.raises(ValueError, match="L2: layers: expected names of modules, got '1'"):
        losses[0]()


def test_every_weight_counts_once() -> None:
    model, _ = fine_tuned()
    terms = L2(model, ["0", "0.0"], beta=1.0)()
    both = [sum(0.5 * p.square().sum() for p in m.parameters()) for m in (model[0], model[0][0])]
    torch.testing.assert_close(terms.total, both[0])
    torch.testing.assert_close(terms.per_layer, torch.stack(both))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    want = sum(0.5 * p.square().sum() for p in tied.parameters())
    torch.testing.assert_close(L2(tied, ["0", "1"], beta=1.0)().total, want)
    for source in (copy.deepcopy(tied), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))):
        with torch.no_grad():
            _ = [p.zero_() for p in source.parameters()]
        torch.testing.assert_close(L2SP(tied, source, alpha=1.0)().total, want)


def test_the_layers_of_a_whole_network_pair() -> None:
    model, source = fine_tuned()
    loss = L2(model)
    assert loss.layers == ["0.0", "0.1", "1"]
    assert pair_layers(model, source, loss.layers).names == loss.layers
    terms = loss()
    torch.testing.assert_close(terms.total, 0.01 * terms.per_layer.sum())
    for alone in (L2(nn.Linear(2, 2)), L2SP(nn.Linear(2, 2))):  # no layers, but weights
        assert alone.layers == []
        assert alone().per_layer.shape == (0,)


def test_a_source_of_another_architecture() -> None:
    model, source = fine_tuned()
    source[0].add_module("more", nn.Linear(2, 2))
    text = r"source \(layer '0.more'\): expected .* without 0.more.weight, got \[2, 2\]"
    with pytest.raises(ValueError, match=text):
        L2SP(model, source, head=["1"])
    model, source = fine_tuned()
    source[1] = nn.Sequential(nn.Linear(180, 9), nn.Linear(9, 7))  # an old head of other parts
    assert L2SP(model, source, head=["1"]).layers == ["0.0", "0.1"]


def test_a_source_that_is_the_model() -> None:
    model, source = fine_tuned()
    source[0][1] = model[0][1]
    for there, layer in ((model, "0.0"), (nn.DataParallel(model), "0.0"), (source, "0.1")):
        text = rf"source \(layer '{layer}'\): expected weights of its own .*got the model's {layer}"
        with pytest.raises(ValueError, match=text):
            L2SP(model, there, head=["1"])


def test_a_start_is_of_the_parameter_of_that_name() -> None:
    """The same shapes in another order, or under another name, are not mixed up."""

    def net(*names: str) -> nn.Module:
        return nn.Sequential(OrderedDict((name, nn.Linear(3, 3)) for name in names))

    first, second = net("a", "b"), net("b", "a")
    second.load_state_dict(first.state_dict())
    state, loss = L2SP(first).state_dict(), L2SP(second)
    assert list(state) == [f"start/{n}/{k}" for n in "ab" for k in ("weight", "bias")]
    _ = [start.zero_() for start in loss.state_dict().values()]
    loss.load_state_dict(state)
    assert float(loss().total) == 0
    with pytest.raises(RuntimeError, match="start/c/weight"):
        L2SP(net("a", "c")).load_state_dict(state)


@pytest.mark.parametrize("kind", ["L2", "L2 of layers", "L2SP", "L2SP of a start"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    model, source = fine_tuned()
    loss: nn.Module = {
        "L2": lambda: L2(model), "L2 of layers": lambda: L2(model, ["0.0", "1"]),
        "L2SP": lambda: L2SP(model, source, head=["1"]),
        "L2SP of a start": lambda: L2SP(model, head=["1"]),
    }[kind]()  # fmt: skip
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for frozen in ([], ["0.1"]):  # which what is compiled sees too
        freeze(model, frozen)
        seen = []
        for run in (loss, compiled):
            model.zero_grad()
            terms = run()
            terms.total.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen.append([terms.total.detach(), terms.per_layer.detach(), *grads])
        torch.testing.assert_close(*seen)


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
        (call(L2, model, ["0.2"]), ValueError, r"layer '0.2'\): expected a layer with parameters"),
        (call(L2, model, []), ValueError, r"L2: layers: expected one name at least, got \[\]"),
        (call(L2SP, model, head=["0.2"]), ValueError, r"head \(layer '0.2'\): expected a layer"),
        (call(L2SP, model, head=["0", "1"]), ValueError, "model: expected parameters outside the"),
        (call(L2, model, beta=-1), ValueError, "beta: expected a finite number ≥ 0"),
        (call(L2SP, model, source), ValueError,
         r"source \(layer '1'\): expected a network of the model's architecture.*head="),
        (call(L2SP, model, nn.Linear(2, 2), head=["1"]), ValueError, "got none of that name"),
        (call(L2SP, model, source, head=["head"]), ValueError, "head: expected names of modules"),
        (call(L2SP, model, source, head="1"), TypeError, "head: expected a list of names"),
        (call(L2SP, model, source, head=["1"], layers=["1"]), ValueError,
         r"layers \(layer '1'\): expected a layer with parameters outside the head"),
        (call(L2SP, model, source, head=["1"], alpha=float("nan")), ValueError, "alpha"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
