"""Frozen layers stay as they are whatever a training loop does, and come back."""

from __future__ import annotations

import copy
import io
from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd import LayerwiseLR, freeze, pair_layers, param_groups_layerwise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for a, b in pairwise((1, 4, 6)):
        parts.append(nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout()))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(96, 3))


def state(module: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in module.state_dict().values()]


def step(model: nn.Module) -> None:
    pairs = pair_layers(model, network(), ["0", "1"])
    optimizer = torch.optim.SGD(param_groups_layerwise(model, pairs, lr=0.1), momentum=0.9)
    rates = LayerwiseLR(optimizer, pairs)
    model.train()
    F.cross_entropy(model(torch.rand(6, 1, 8, 8)), torch.arange(6) % 3).backward()
    optimizer.step()
    rates.update(torch.tensor([0.1, 0.2]))
    rates.step()


def test_a_frozen_layer_does_not_move() -> None:
    model = network()
    before = [state(layer) for layer in model]
    frozen = freeze(model, ["0"])
    assert frozen.layers == ["0"]
    step(model)
    step(model)
    assert not any(m.training for m in model[0].modules())
    assert model[1].training
    moved = [not all(map(torch.equal, a, state(m))) for a, m in zip(before, model, strict=True)]
    assert moved == [False, True, False, True]
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(model[0](x), model[0](x))  # no dropout


def test_it_comes_back() -> None:
    model = network()
    model[0][0].bias.requires_grad_(False)
    model[1][3].eval()
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    frozen = freeze(model, ["0", "1", "1.3"])
    frozen.remove()
    frozen.remove()  # nothing left to do
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert not any("train" in vars(m) for m in model.modules())
    before = state(model[0])
    model.train()
    step(model)
    assert not all(map(torch.equal, before, state(model[0])))


@pytest.mark.parametrize("how", ["copy", "file"])
def test_copies_are_frozen_too(how: str) -> None:
    model = network()
    freeze(model, ["0"])
    if how == "copy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.train()
    assert not other[0][1].training
    assert other[1][1].training
    other[0][1].eval()
    assert vars(other[0][1])["train"].module is other[0][1]  # its own, not the original's
    again = freeze(other, ["0", "1"])
    again.remove()
    assert [m.training for m in (other.train()[0][1], other[1][1])] == [False, True]
    assert [p.requires_grad for p in (other[0][0].weight, other[1][0].weight)] == [False, True]


def test_a_copy_with_its_handle_comes_back() -> None:
    model = network()
    frozen = freeze(model, ["0"])
    other, handle = copy.deepcopy((model, frozen))
    handle.remove()
    assert all(m.training for m in other.train().modules())
    assert all(p.requires_grad for p in other.parameters())
    assert not any(m.training for m in model.train()[0].modules())
    assert not any(p.requires_grad for p in model[0].parameters())


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_layers_that_are_frozen_several_times(order: tuple[int, ...]) -> None:
    """Each stays as it is until the last of those that hold it is removed."""
    model = network()
    names = [["0", "1"], ["0"], ["0.1", "1.0"]]
    handles = [freeze(model, layers) for layers in names]
    left = {0, 1, 2}
    for i in order:
        handles[i].remove()
        handles[i].remove()  # counts once
        left.remove(i)
        held = [name for k in left for name in names[k]]
        model.train()
        for name, module in model.named_modules():
            stays = any(name == h or name.startswith(f"{h}.") for h in held)
            assert module.training != stays
            assert all(p.requires_grad != stays for p in module.parameters(recurse=False))
    assert not any("train" in vars(m) for m in model.modules())


@pytest.mark.parametrize("first", [0, 1])
def test_tied_layers_stay_while_one_of_them_does(first: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    handles = [freeze(model, ["0"]), freeze(model, ["1"])]
    handles[first].remove()
    assert not model[0].weight.requires_grad
    assert model[first].bias.requires_grad
    handles[1 - first].remove()
    assert all(p.requires_grad for p in model.parameters())


def test_wrappers_and_compile() -> None:
    model = network()
    freeze(nn.DataParallel(model), ["module.0"])
    model.train()
    assert not model[0][1].training
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled.train()
    compiled(torch.rand(6, 1, 8, 8))
    assert int(model[0][1].num_batches_tracked) == 0
    assert int(model[1][1].num_batches_tracked) == 1


def test_errors() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"lwkd\.freeze: layers: .*'1\.9'"):
        freeze(model, ["0", "1.9"])
    with pytest.raises(TypeError, match=r"lwkd\.freeze: layers: "):
        freeze(model, "0")
    assert all(p.requires_grad for p in model.parameters())  # nothing was frozen by half
    assert all(m.training for m in model.modules())
