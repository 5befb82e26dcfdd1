"""HessianMeter: distances of exact traces, common probes, blocks that are due."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwkd
from lwkd import HessianMeter, pair_layers
from tests.curvature.networks import CNN, X, Y, exact
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
LAYERS = ["c1", "c2", "norm", "head"]


def networks(act: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (CNN(act or nn.ReLU(True)).double().eval() for _ in "st")
    return student, teacher


@pytest.mark.parametrize("normalize", [True, False])
def test_distances_of_exact_traces(normalize: bool) -> None:
    nets = networks()
    meter = HessianMeter(pair_layers(*nets, LAYERS), exact=True, normalize=normalize)
    got = meter.measure(X, Y, F.cross_entropy)
    s, t = (exact(net, layers=LAYERS).trace for net in nets)
    want = (s - t).abs() / (s.abs() + t.abs())
    if not normalize:
        sizes = [sum(p.numel() for p in getattr(nets[0], n).parameters()) for n in LAYERS]
        want = (s - t).abs() / torch.tensor(sizes)
    torch.testing.assert_close(got, want.float())
    assert meter.estimates is not None
    torch.testing.assert_close(meter.estimates[1].mean, t)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "split", "block", "hutchinson"])
def test_a_copy_is_at_no_distance(estimator: str) -> None:
    """Student and teacher share probes: nothing of the noise is in the difference."""
    student, teacher = networks(nn.GELU())
    teacher.load_state_dict(student.state_dict())
    meter = HessianMeter(pair_layers(student, teacher, LAYERS), estimator=estimator, probes=2)
    assert meter.measure(X, Y, F.cross_entropy).tolist() == [0.0] * 4


def test_probes_are_common_by_pair_and_name() -> None:
    """Whatever else either network trains, and wherever the layers are in it."""
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)]
    student = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), *parts).double()
    teacher = copy.deepcopy(student)
    for pairs in (["2", "4", "6"], {"6": "6", "2": "2"}, {"4": "4"}):
        meter = HessianMeter(pair_layers(student, teacher, pairs), estimator="block", probes=2)
        assert meter.measure(X, Y, F.cross_entropy).tolist() == [0.0] * len(pairs)
    student[2].bias.requires_grad_(False)
    meter = HessianMeter(
        pair_layers(student, teacher, ["2", "4", "6"]), estimator="block", probes=2
    )
    first, *others = meter.measure(X, Y, F.cross_entropy).tolist()
    assert first > 0  # its trained parameters are others
    assert others == [0.0, 0.0]


def test_auto_looks_every_time() -> None:
    """Another loss, mode or activation is another network."""
    nets = networks()
    meter = HessianMeter(pair_layers(*nets, LAYERS), probes=2)

    def found(loss: Any = F.cross_entropy) -> set[str]:
        meter.measure(X, Y, loss)
        assert meter.estimates is not None
        return set(meter.estimates[0].estimator)

    assert found() == {"gauss_newton"}
    assert found(lambda z, y: F.cross_entropy(z, y)) == {"block"}
    nets[0].act = nn.GELU()
    assert found() == {"gauss_newton", "block"}
    nets[0].train()
    assert found() == {"block"}


def test_a_frozen_teacher_of_another_width() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(36, c), nn.ReLU(), nn.Linear(c, 4)).double()
            for c in (3, 7)]  # fmt: skip
    nets[1].requires_grad_(False)
    meter = HessianMeter(pair_layers(*nets, ["1", "3"]), exact=True)
    got = meter.measure(X, Y, F.cross_entropy)
    assert not any(p.requires_grad for p in nets[1].parameters())
    nets[1].requires_grad_(True)
    s, t = (exact(net, layers=["1", "3"]).trace for net in nets)
    torch.testing.assert_close(got, ((s - t).abs() / (s + t)).float())


def test_two_students_layers_with_one_partner() -> None:
    nets = networks()
    meter = HessianMeter(pair_layers(*nets, {"c1": "c2", "head": "head", "c2": "c2"}), exact=True)
    got = meter.measure(X, Y, F.cross_entropy)
    s, t = (exact(net, layers=LAYERS).trace for net in nets)
    want = [(s[i] - t[j]).abs() / (s[i] + t[j]) for i, j in ((0, 1), (3, 3), (1, 1))]
    torch.testing.assert_close(got, torch.stack(want).float())


def step(meter: HessianMeter, nets: Any) -> Tensor | None:
    with meter:
        F.cross_entropy(nets[0](X), Y).backward()
    return meter.discrepancy(X, Y, F.cross_entropy)


def test_blocks_that_are_due_and_rates() -> None:
    nets = networks()
    pairs = pair_layers(*nets, ["c1", "c2", "head"])
    meter = HessianMeter(pairs, every=2, probes=2)
    assert [step(meter, nets) is None for _ in range(4)] == [False, True, False, True]
    other = HessianMeter(pairs, every=2, probes=2)
    other.load_state_dict(meter.state_dict())
    assert other.state_dict() == {"calls": 4}
    groups = lwkd.param_groups_layerwise(nets[0], pairs, lr=0.1)
    rates = lwkd.LayerwiseLR(torch.optim.SGD(groups), pairs)
    for _ in range(2):
        d = step(meter, nets)
        rates.optimizer.step()
        rates.update(d)
        rates.step()
    assert len(set(rates.get_last_lr())) > 1


def test_errors() -> None:
    nets = networks()
    pairs = pair_layers(*nets, LAYERS)
    meter = HessianMeter(pairs)
    with pytest.raises(ValueError, match=r"HessianMeter.measure: loss_fn: expected loss_fn"):
        meter.measure(X, Y)
    with pytest.raises(RuntimeError, match="discrepancy: with-block: expected a call after"):
        meter.discrepancy(X, Y, F.cross_entropy)
    with meter, pytest.raises(RuntimeError, match="measure: with-block: expected a call outside"):
        meter.measure(X, Y, F.cross_entropy)
    for options, kind, text in (
        ({"backend": "triton"}, ValueError, "backend: expected None"),
        ({"normalize": 1}, TypeError, "normalize: expected True or False"),
        ({"every": 0}, ValueError, "every: expected an int ≥ 1"),
        ({"estimator": "best"}, ValueError, "estimator: expected one of"),
        ({"probes": 0}, ValueError, "probes: expected an int ≥ 1"),
    ):
        with pytest.raises(kind, match=text):
            HessianMeter(pairs, **options)
    nets[0].c1.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer 'c1'\): expected a layer with trained"):
        meter.measure(X, Y, F.cross_entropy)
