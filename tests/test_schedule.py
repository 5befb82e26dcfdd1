from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler, swa_utils

from lwkd import policy
from lwkd.layers import LayerPairs, pair_layers
from lwkd.meters import AttentionMeter
from lwkd.schedule import LayerwiseLR, param_groups_layerwise
from tests.growth import live_tensors, resident

NAMES = ["block1", "block2"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on tensors this small cost a hundred times what they save."""
    torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.block1 = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())
        self.block2 = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.stem(x))))


def make(names=NAMES) -> tuple[Net, LayerPairs]:
    torch.manual_seed(0)
    student = Net()
    return student, pair_layers(student, Net(8), pairs=list(names))


def build(lr=0.1, make_optimizer=SGD, base=None, **options):
    """Return student, optimizer and rates; ``base`` is a function of the optimizer."""
    student, pairs = make()
    optimizer = make_optimizer(param_groups_layerwise(student, pairs, lr=lr))
    options = {"policy": "power", **options}
    base = base and base(optimizer)
    return student, optimizer, LayerwiseLR(optimizer, pairs, base=base, **options)


def train(student, optimizer, seed=0):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    student(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()


def lrs(optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# --- groups ------------------------------------------------------------------------------------


def described(groups, student):
    names = {id(p): name for name, p in student.named_parameters()}
    return {g["name"]: (g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups}


def test_groups():
    student, pairs = make()
    student.stem.weight.requires_grad_(False)
    groups = param_groups_layerwise(
        student, pairs, lr=0.1, weight_decay=0.01, no_weight_decay_list=["head.weight"]
    )
    assert all(set(g) == {"params", "lr", "weight_decay", "name"} for g in groups)
    assert described(groups, student) == {
        "block1": (0.01, ["block1.0.weight"]),
        "block1/no_decay": (0.0, ["block1.0.bias", "block1.1.weight", "block1.1.bias"]),
        "block2": (0.01, ["block2.0.weight"]),
        "block2/no_decay": (0.0, ["block2.0.bias"]),
        "rest/no_decay": (0.0, ["stem.bias", "head.weight", "head.bias"]),
    }
    names = [g["name"] for g in param_groups_layerwise(student, pairs, lr=0.1)]
    assert names == ["block1", "block2", "rest"]  # without decay: one group per layer


def test_longest_prefix_wins_and_names_stay_unique():
    student = nn.Sequential()
    student.add_module("rest", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    student.add_module("restless", nn.Linear(2, 2))
    teacher = nn.Sequential()
    teacher.add_module("rest", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    pairs = pair_layers(student, teacher, pairs=["rest", "rest.1"])
    groups = param_groups_layerwise(student, pairs, lr=0.1)
    assert described(groups, student) == {
        "rest": (0.0, ["rest.0.weight", "rest.0.bias"]),
        "rest.1": (0.0, ["rest.1.weight", "rest.1.bias"]),
        "rest_": (0.0, ["restless.weight", "restless.bias"]),
    }


def test_a_bias_of_two_dimensions_is_not_decayed():
    student, pairs = make()
    student.block2.bias = nn.Parameter(torch.ones(2, 2))
    groups = param_groups_layerwise(student, pairs, lr=0.1, weight_decay=0.1)
    assert described(groups, student)["block2/no_decay"] == (0.0, ["block2.bias", "block2.0.bias"])


def test_groups_of_wrapped_students_and_of_adapters_around_them():
    student, pairs = make()
    plain = described(param_groups_layerwise(student, pairs, lr=0.1), student)
    compiled = torch.compile(student, backend="eager")
    assert described(param_groups_layerwise(compiled, pairs, lr=0.1), student) == plain
    both = nn.ModuleDict({"student": student, "adapter": nn.Linear(2, 2)})
    groups = param_groups_layerwise(both, pairs, lr=0.1)
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("block1", 4),
        ("block2", 2),
        ("rest", 6),
    ]


def test_group_errors():
    student, pairs = make(["block1", "block2.1"])
    text = r"pairs \(layer 'block2.1'\): expected .* parameters of its own, got none; .*'block2.0'"
    with pytest.raises(ValueError, match=text):
        param_groups_layerwise(student, pairs, lr=0.1)
    student, pairs = make()
    text = r"student \(layer 'block1'\): expected the network .*, got none with 'block1.0.weight'"
    with pytest.raises(ValueError, match=text):
        param_groups_layerwise(Net(), pairs, lr=0.1)
    with pytest.raises(TypeError, match="pairs: expected what pair_layers returned, got list"):
        param_groups_layerwise(student, NAMES, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no_weight_decay_list: expected a collection of names"):
        param_groups_layerwise(student, pairs, lr=0.1, no_weight_decay_list="head.weight")
    with pytest.raises(ValueError, match="weight_decay: expected a number >= 0, got nan"):
        param_groups_layerwise(student, pairs, lr=1.0, weight_decay=math.nan)
    with pytest.raises(TypeError, match="weight_decay: expected a number >= 0, got str"):
        param_groups_layerwise(student, pairs, lr=1.0, weight_decay="0.1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lr", "error", "text"),
    [
        (-1.0, ValueError, "a number >= 0, got -1.0"),
        (math.nan, ValueError, "a number >= 0, got nan"),
        (math.inf, ValueError, "a number >= 0, got inf"),
        ("0.1", TypeError, "a number >= 0, got str"),
        (None, TypeError, "a number >= 0, got NoneType"),
        (True, TypeError, "a number >= 0, got bool"),
        (torch.tensor(1), TypeError, "a floating tensor of one number >= 0, got torch.int64"),
        (torch.ones(2), ValueError, r"a floating tensor of one number >= 0, got shape \(2,\)"),
        (torch.tensor(-1.0), ValueError, "a floating tensor of one number >= 0, got -1.0"),
        (torch.tensor(math.nan), ValueError, "a floating tensor of one number >= 0, got nan"),
    ],
)
def test_rates_that_are_none(lr, error, text):
    student, pairs = make()
    with pytest.raises(error, match="param_groups_layerwise: lr: expected " + text):
        param_groups_layerwise(student, pairs, lr=lr)
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=0.1))
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(error, match=f"optimizer: expected {text} as 'lr' in group 'block2'"):
        LayerwiseLR(optimizer, pairs)
    optimizer.param_groups[1].update(lr=0.1, unscaled_lr=lr, scaled_lr=0.1)
    with pytest.raises(error, match=f"{text} as 'unscaled_lr' in group 'block2'"):
        LayerwiseLR(optimizer, pairs)
    assert "initial_lr" not in optimizer.param_groups[0]


def test_names_without_weight_decay():
    student, pairs = make()
    student.head.weight = student.stem.tied = nn.Parameter(torch.ones(2, 4))
    for network in (student, nn.DataParallel(student), torch.compile(student, backend="eager")):
        for name in ("head.weight", "stem.tied", "module.head.weight", "_orig_mod.stem.tied"):
            groups = param_groups_layerwise(
                network, pairs, lr=0.1, weight_decay=0.1, no_weight_decay_list=[name]
            )
            bare = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
            assert any(p is student.head.weight for p in bare)
    for name, close in (("head.wieght", "head.weight"), ("module.stem.weigt", "stem.weight")):
        text = rf"no_weight_decay_list: expected names of parameters, got '{name}'; .*'{close}'"
        with pytest.raises(ValueError, match=text):
            param_groups_layerwise(student, pairs, lr=0.1, no_weight_decay_list=[name])


def test_a_layer_that_was_replaced_after_pairing():
    student, pairs = make()
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=0.1))
    student.block1 = nn.Sequential(nn.Linear(4, 4))
    text = r"pairs \(layer 'block1'\): expected the module that was paired, .*since pair_layers"
    with pytest.raises(ValueError, match=text):
        param_groups_layerwise(student, pairs, lr=0.1)
    with pytest.raises(ValueError, match=text):
        LayerwiseLR(optimizer, pairs)


def test_the_rest_may_be_trained_by_another_optimizer():
    student, pairs = make()
    *paired, _ = param_groups_layerwise(student, pairs, lr=1.0)
    optimizer = SGD(paired)
    rates = LayerwiseLR(optimizer, pairs, policy="power", momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    assert lrs(optimizer) == pytest.approx([0.5, 1.5])


# --- rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
def test_constructor_changes_no_rate(tensor):
    student, pairs = make()
    lr = torch.tensor(0.1) if tensor else 0.1
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=lr))
    before = [(g["lr"], float(g["lr"])) for g in optimizer.param_groups]
    rates = LayerwiseLR(optimizer, pairs)
    assert isinstance(rates, lr_scheduler.LRScheduler)
    after = [(g["lr"], float(g["lr"])) for g in optimizer.param_groups]
    assert all(a[0] is b[0] and a[1] == b[1] for a, b in zip(before, after, strict=True))
    assert rates.last_epoch == 0
    assert [float(x) for x in rates.get_last_lr()] == lrs(optimizer)
    assert rates.multipliers.tolist() == [1.0, 1.0]
    assert rates.skipped.tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(policy.POLICIES))
@pytest.mark.parametrize("tensor", [False, True])
def test_rates_are_the_policys(name, tensor):
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    student, optimizer, rates = build(lr, policy=name, momentum=0.5)
    _, function = policy.bind(name, momentum=0.5)
    state: policy.State = {}
    for step in range(5):
        d = torch.rand(2)
        expected, state = function(d, state)
        train(student, optimizer)
        before = lrs(optimizer)
        rates.update(d)
        assert lrs(optimizer) == before  # only step() changes them
        rates.step()
        assert torch.equal(rates.multipliers, expected)
        wanted = [0.1 * m for m in [*expected.tolist(), 1.0]]
        assert lrs(optimizer) == pytest.approx(wanted, rel=1e-12)
        assert [float(x) for x in rates.get_last_lr()] == lrs(optimizer)
        assert rates.last_epoch == step + 1


def test_the_optimizer_uses_them():
    student, optimizer, rates = build(0.5, momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    train(student, optimizer, seed=1)
    factor = {"block1": 0.5, "block2": 1.5}
    for name, p in student.named_parameters():
        lr = 0.5 * factor.get(name.split(".")[0], 1.0)
        torch.testing.assert_close(p.detach(), before[name] - lr * p.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("base", [None, "CosineAnnealingLR", "LambdaLR"])
def test_a_second_scheduler_starts_from_the_unscaled_rates(tensor, base):
    student, pairs = make()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=lr))
    for _ in range(3):
        schedule = base and BASES[base](optimizer)
        rates = LayerwiseLR(optimizer, pairs, policy="power", base=schedule, momentum=0.0)
        unscaled = lrs(optimizer)
        assert unscaled == pytest.approx([unscaled[2]] * 3, rel=1e-12)
        assert base or unscaled == [0.1] * 3
        for _ in range(2):
            train(student, optimizer)
            rates.update(torch.tensor([1.0, 3.0]))
            rates.step()
        rest = lrs(optimizer)[2]
        assert lrs(optimizer) == pytest.approx([0.5 * rest, 1.5 * rest, rest], rel=1e-6)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.7) if tensor else 0.7  # written by the user
    LayerwiseLR(optimizer, pairs)
    assert lrs(optimizer) == pytest.approx([0.7, rest, rest], rel=1e-6)


def test_the_optimizers_state_carries_the_unscaled_rates():
    """A checkpoint without the state of the rates: what it scaled is not scaled again."""
    student, pairs = make()
    state = None
    for _ in range(3):
        optimizer = SGD(param_groups_layerwise(student, pairs, lr=0.1))
        if state:
            optimizer.load_state_dict(state)
        rates = LayerwiseLR(optimizer, pairs, policy="power", momentum=0.0)
        train(student, optimizer)
        rates.update(torch.tensor([1.0, 3.0]))
        rates.step()
        assert lrs(optimizer) == pytest.approx([0.05, 0.15, 0.1])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        kept = [(g["unscaled_lr"], g["scaled_lr"]) for g in state["param_groups"]]
        assert kept == [(0.1, lr) for lr in lrs(optimizer)]


@pytest.mark.parametrize("tensor", [False, True])
def test_every_and_warmup(tensor):
    lr = torch.tensor(1.0) if tensor else 1.0
    student, optimizer, rates = build(lr, every=3, warmup=4, momentum=0.0)
    seen = []
    for _ in range(7):
        train(student, optimizer)
        rates.update(torch.tensor([1.0, 3.0]))
        rates.step()
        assert rates.multipliers[0].item() == pytest.approx(lrs(optimizer)[0])
        seen.append(round(lrs(optimizer)[0], 4))
    # Computed at step 3, in force once 4 steps have kept multiplier 1.
    assert seen == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    student, optimizer, rates = build(lr, every=3, momentum=0.0)
    seen = []
    for step in range(7):
        train(student, optimizer)
        rates.update(torch.tensor([1.0, 3.0]) if step < 3 else torch.tensor([3.0, 1.0]))
        rates.step()
        seen.append(round(lrs(optimizer)[0], 4))
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 1.5, 1.5]


def test_updates_before_a_step_are_averaged_by_weight():
    student, optimizer, rates = build(1.0, momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 9.0]), weight=3)
    rates.update(None)
    rates.update(torch.tensor([5.0, 1.0], dtype=torch.float64), weight=torch.tensor([1.0, 3.0]))
    rates.step()  # (3·1 + 5)/4 = 2 and (3·9 + 3·1)/6 = 5
    assert rates.multipliers.tolist() == pytest.approx([4 / 7, 10 / 7])
    rates.update(None)
    train(student, optimizer)
    rates.step()
    assert rates.multipliers.tolist() == pytest.approx([4 / 7, 10 / 7])  # nothing due: as they were


def test_custom_policy():
    def first_only(d, state):
        calls = state.get("calls", torch.zeros(())) + 1
        return torch.stack([d[0] * 100, calls]), {"calls": calls}

    student, optimizer, rates = build(1.0, policy=first_only)
    for _ in range(3):
        train(student, optimizer)
        rates.update(torch.tensor([0.02, 0.5]))
        rates.step()
    assert lrs(optimizer) == pytest.approx([2.0, 3.0, 1.0])


@pytest.mark.parametrize(
    "broken",
    [
        lambda d, state: None,
        lambda d, state: (d, None),
        lambda d, state: (d, {"n": 1}),
        lambda d, state: (d, {"h": torch.cat([state.get("h", d[:0]), d])}),
    ],
)
def test_a_policy_that_returns_something_else_changes_nothing(broken):
    calls = []

    def policy_(d, state):
        calls.append(d)
        return (d, {"h": d}) if len(calls) < 3 else broken(d, state)

    student, optimizer, rates = build(1.0, policy=policy_, base=BASES["StepLR"])
    for _ in range(2):
        train(student, optimizer)
        rates.update(torch.tensor([0.5, 2.0]))
        rates.step()
    train(student, optimizer)
    rates.update(torch.tensor([0.25, 4.0]))
    before = str(rates.state_dict()), lrs(optimizer)
    with pytest.raises((TypeError, ValueError), match="LayerwiseLR: policy: expected"):
        rates.step()
    assert (str(rates.state_dict()), lrs(optimizer)) == before
    calls.clear()
    rates.step()
    assert lrs(optimizer) == [0.125, 2.0, 0.5]


def test_a_copy_goes_on_like_the_original():
    """Pickled, or copied together with its optimizer: it shares nothing with the first."""
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        for options in ({"lr": torch.tensor(0.1), "base": BASES["SequentialLR"]}, {"policy": None}):
            student, optimizer, rates = build(**options)
            train(student, optimizer)
            rates.update(torch.tensor([1.0, 3.0]))
            rates.step()
            again = copied(rates)
            assert again.optimizer is not optimizer
            for one in (rates, again):
                one.update(torch.tensor([0.5, 3.0]))
                one.step()
            assert lrs(again.optimizer) == lrs(optimizer)
            assert str(again.state_dict()) == str(rates.state_dict())
            train(student, optimizer)
            rates.step()
            assert again.last_epoch == rates.last_epoch - 1


# --- base schedulers ---------------------------------------------------------------------------

BASES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=40),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2, 0.7)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=5),
}


def momentum_sgd(groups):
    return SGD(groups, momentum=0.9)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", sorted(BASES))
def test_nothing_compounds(name, tensor):
    """The unscaled rate is what ``base`` alone would have set, to the last bit for floats."""
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    twin, pairs = make()
    alone = momentum_sgd(param_groups_layerwise(twin, pairs, lr=lr))
    reference = BASES[name](alone)
    student, optimizer, rates = build(lr, momentum_sgd, BASES[name], momentum=0.0)
    assert lrs(optimizer) == lrs(alone)
    for step in range(12):
        train(student, optimizer)
        train(twin, alone)
        rates.update(torch.tensor([1.0 + step, 2.0]))
        rates.step()
        reference.step()
        assert lrs(optimizer)[2] == lrs(alone)[2]
        factors = [*rates.multipliers.tolist(), 1.0]
        wanted = [rate * m for rate, m in zip(lrs(alone), factors, strict=True)]
        assert lrs(optimizer) == pytest.approx(wanted, rel=1e-12)


def test_a_base_that_raises_leaves_the_rates():
    def at_most_one(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=2)

    student, optimizer, rates = build(0.1, momentum_sgd, at_most_one)
    for _ in range(2):
        train(student, optimizer)
        rates.update(torch.tensor([1.0, 3.0]))
        rates.step()
    before, m = lrs(optimizer), rates.multipliers
    train(student, optimizer)
    rates.update(torch.tensor([9.0, 3.0]))
    with pytest.raises(ValueError, match="total steps"):
        rates.step()
    assert lrs(optimizer) == before
    assert torch.equal(rates.multipliers, m)
    assert rates.last_epoch == 2


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_raises_is_as_it_was(tensor, nested):
    """Its epoch too, so that the next step goes through as if nothing had been."""
    broken = []

    def factor(epoch):
        if broken:
            raise ZeroDivisionError("no factor")
        return 0.5**epoch

    def schedule(optimizer):
        inner = lr_scheduler.LambdaLR(optimizer, factor)
        return lr_scheduler.SequentialLR(optimizer, [inner], []) if nested else inner

    lr = torch.tensor(1.0) if tensor else 1.0
    runs = [build(lr, base=schedule, momentum=0.0) for _ in range(2)]
    for i in range(4):
        for student, optimizer, rates in runs:
            train(student, optimizer)
            rates.update(torch.tensor([1.0 + i, 3.0]))
        if i == 2:
            _, optimizer, rates = runs[0]
            before = str(rates.state_dict()), lrs(optimizer)
            broken.append(True)
            with pytest.raises(ZeroDivisionError, match="no factor"):
                rates.step()
            broken.clear()
            assert (str(rates.state_dict()), lrs(optimizer)) == before
        for _, _, rates in runs:
            rates.step()
        assert lrs(runs[0][1]) == lrs(runs[1][1])
    assert lrs(runs[0][1])[2] == 0.5**4


def test_a_base_that_raises_takes_back_what_it_wrote_into_its_lists():
    class Remembering(lr_scheduler.StepLR):
        seen = ()

        def get_lr(self):
            self.seen = self.seen or {"epochs": []}
            self.seen["epochs"].append(self.last_epoch)
            if self.last_epoch == 2 and self.seen["epochs"].count(2) == 1 and not forgiven:
                raise ZeroDivisionError
            return super().get_lr()

    forgiven: list[bool] = []
    _, optimizer, rates = build(base=lambda o: Remembering(o, 2))
    optimizer.step()
    rates.step()
    before = str(rates.state_dict())
    with pytest.raises(ZeroDivisionError):
        rates.step()
    assert str(rates.state_dict()) == before
    forgiven.append(True)
    rates.step()
    assert rates.state_dict()["base"]["state"]["seen"] == {"epochs": [0, 1, 2]}


def test_schedulers_that_wrap_this_one_are_refused():
    """They go round step(): the multiplier would never come off again."""
    text = "step: base: expected its own step\\(\\), and the other scheduler as base="
    student, optimizer, rates = build()
    with pytest.raises(RuntimeError, match=text):
        lr_scheduler.SequentialLR(optimizer, [rates, BASES["StepLR"](optimizer)], [2])
    student, optimizer, rates = build()
    wrapper = lr_scheduler.SequentialLR(optimizer, [BASES["StepLR"](optimizer), rates], [2])
    train(student, optimizer)
    wrapper.step()
    with pytest.raises(RuntimeError, match=text):
        wrapper.step()
    student, optimizer, rates = build()
    wrapper = lr_scheduler.ChainedScheduler([rates, BASES["ExponentialLR"](optimizer)])
    train(student, optimizer)
    wrapper.step()
    with pytest.raises(RuntimeError, match="schedule rates with base="):
        wrapper.step()


def test_base_errors():
    student, pairs = make()
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=0.1))
    other = SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"base: .* without a metric, got ReduceLROnPlateau"):
        LayerwiseLR(optimizer, pairs, base=lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match=r"base: .* same optimizer, got a StepLR of another"):
        LayerwiseLR(optimizer, pairs, base=lr_scheduler.StepLR(other, 1))
    with pytest.raises(TypeError, match=r"base: expected .*LRScheduler, got SGD"):
        LayerwiseLR(optimizer, pairs, base=other)  # type: ignore[arg-type]
    for period, text in ((5, "base: expected last_epoch 0, got 1: someone"), (1, "last written")):
        base = lr_scheduler.StepLR(optimizer, period)
        rates = LayerwiseLR(optimizer, pairs, base=base)
        train(student, optimizer)
        base.step()
        with pytest.raises(RuntimeError, match=text):
            rates.step()


# --- tensors -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda groups: SGD(groups, momentum=0.9),
    "SGD foreach": lambda groups: SGD(groups, momentum=0.9, foreach=True),
    "SGD fused": lambda groups: SGD(groups, momentum=0.9, fused=True),
    "AdamW": AdamW,
    "AdamW fused": lambda groups: AdamW(groups, fused=True),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_tensor_rates_do_what_float_rates_do_in_place(name):
    twins = [build(lr, OPTIMIZERS[name]) for lr in (0.125, torch.tensor(0.125))]
    tensors = [group["lr"] for group in twins[1][1].param_groups]
    assert len({id(lr) for lr in tensors}) == 3
    for step in range(4):
        for student, optimizer, rates in twins:
            train(student, optimizer, seed=step)
            rates.update(torch.tensor([1.0 + step, 2.0]))
            rates.step()
    for group, tensor in zip(twins[1][1].param_groups, tensors, strict=True):
        assert group["lr"] is tensor
    assert lrs(twins[0][1]) == pytest.approx(lrs(twins[1][1]), rel=1e-6)
    for p, q in zip(twins[0][0].parameters(), twins[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_tensor_rates_keep_their_identity_under_a_base():
    student, optimizer, rates = build(torch.tensor(0.1), AdamW, BASES["CosineAnnealingLR"])
    tensors = [group["lr"] for group in optimizer.param_groups]
    addresses = [lr.data_ptr() for lr in tensors]
    for step in range(3):
        train(student, optimizer)
        rates.update(torch.tensor([1.0 + step, 2.0]))
        rates.step()
        for group, tensor in zip(optimizer.param_groups, tensors, strict=True):
            assert group["lr"] is tensor
    assert [lr.data_ptr() for lr in tensors] == addresses


@pytest.mark.parametrize("built_inside", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_inference_mode_leaves_nothing_that_later_steps_cannot_write(tensor, built_inside):
    def run(mode):
        torch.manual_seed(0)
        with torch.inference_mode(mode and built_inside):
            lr = torch.tensor(0.1) if tensor else 0.1
            _, optimizer, rates = build(lr, base=BASES["StepLR"], policy=average)
        optimizer.step()
        d = torch.tensor([1.0, 3.0])
        with torch.inference_mode(mode):
            rates.update(d * 2, weight=torch.tensor(2.0))
            rates.step()
            computed = d * 3
        for _ in range(2):
            rates.update(computed, weight=computed)
            rates.step()
        with torch.inference_mode(mode):
            rates.load_state_dict(rates.state_dict())
        for _ in range(2):
            rates.update(computed, weight=computed)
            rates.step()
        return lrs(optimizer), str(rates.state_dict())

    def average(d, state):
        mean = 0.5 * (state.get("mean", d) + d)
        return mean, {"mean": mean}

    assert run(True) == run(False)


def test_one_tensor_shared_by_all_groups_is_separated():
    student, pairs = make()
    groups = param_groups_layerwise(student, pairs, lr=0.1)
    for group in groups:
        del group["lr"]
    optimizer = AdamW(groups, lr=torch.tensor(0.1))  # torch puts this one tensor into all groups
    rates = LayerwiseLR(optimizer, pairs, policy="power", momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    assert lrs(optimizer) == pytest.approx([0.05, 0.15, 0.1], rel=1e-6)


def test_no_synchronisation_with_tensor_rates():
    """Fault 26: on the meta device reading a value raises."""
    student, pairs = make()
    student.to("meta")
    for schedule in (lambda _: None, BASES["CosineAnnealingLR"], BASES["SequentialLR"]):
        lr = torch.tensor(0.1, device="meta")
        optimizer = SGD(param_groups_layerwise(student, pairs, lr=lr))
        base = schedule(optimizer)
        rates = LayerwiseLR(optimizer, pairs, base=base)
        optimizer._opt_called = True  # what step() would have set
        for _ in range(3):
            rates.update(torch.rand(2, device="meta"), weight=torch.tensor(4.0, device="meta"))
            rates.step()
        assert all(group["lr"].device.type == "meta" for group in optimizer.param_groups)
        with pytest.raises(RuntimeError, match="meta"):
            rates.multipliers.tolist()


def test_the_state_stays_where_it_is_in_memory():
    """Fault 26: a captured graph reads and writes the same addresses at every replay."""

    def addresses(rates):
        tensors = [rates._multipliers, rates._mean, rates._weight, rates._skipped]
        return [t.data_ptr() for t in (*tensors, *rates._state.values())]

    for name in sorted(policy.POLICIES):
        _, optimizer, rates = build(torch.tensor(0.1), policy=name)
        optimizer.step()
        seen = []
        for _ in range(4):
            rates.update(torch.rand(2))
            rates.step()
            seen.append(addresses(rates))
        assert len(seen[0]) > 4
        assert seen == seen[:1] * 4


def test_float_rates_cost_one_synchronisation_and_only_when_due():
    student, optimizer, rates = build(0.1, every=4)
    reads = []
    real = rates._on_host

    def counted(multipliers):
        reads.append(rates._host is None)
        return real(multipliers)

    rates._on_host = counted
    for _ in range(8):
        train(student, optimizer)
        rates.update(torch.rand(2))
        rates.step()
    assert sum(reads) == 3  # the first step, and two changes
    assert len(reads) == 16


def test_a_compiled_step_follows_the_rates_without_recompiling():
    compiled = []

    def backend(module, _):
        compiled.append(module)
        return module.forward

    twins = [build(torch.tensor(0.1), AdamW) for _ in range(2)]
    step = torch.compile(lambda: twins[1][1].step(), backend=backend)
    for i in range(6):
        for student, optimizer, rates in twins:
            torch.manual_seed(i)
            optimizer.zero_grad()
            student(torch.randn(5, 3)).square().mean().backward()
            # The first step makes the optimizer's state.
            (step if optimizer is twins[1][1] and i else optimizer.step)()
            rates.update(torch.tensor([1.0 + i, 2.0]))
            rates.step()
    assert len(compiled) == 1
    for p, q in zip(twins[0][0].parameters(), twins[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --- bad values --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", sorted(policy.POLICIES))
def test_bad_distances_hold_the_last_good_rate(name, bad, caplog):
    """Fault 23: held, bounded, counted, logged once; training goes on."""
    student, optimizer, rates = build(0.1, policy=name)
    for d in ([1.0, 2.0], [0.5, 2.5]):
        train(student, optimizer)
        rates.update(torch.tensor(d))
        rates.step()
    good = lrs(optimizer)
    with caplog.at_level(logging.WARNING, "lwkd"):
        for _ in range(3):
            train(student, optimizer)
            rates.update(torch.tensor([0.25, bad]))
            rates.step()
    assert lrs(optimizer)[1] == good[1]
    assert lrs(optimizer)[0] != good[0]
    assert rates.skipped.tolist() == [0, 3]
    assert [r.message for r in caplog.records if "not finite or negative" in r.message] == [
        "lwkd.LayerwiseLR: 1 value(s) so far not finite or negative; "
        "those layers keep their multiplier"
    ]
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_bad_weights_and_bad_multipliers_are_counted():
    def broken(d, state):
        return torch.where(d > 1, math.nan, d), state

    student, optimizer, rates = build(1.0, policy=broken)
    nan = torch.tensor(math.nan)
    for d, weight in (([0.5, 0.5], 1.0), ([0.75, 2.0], 1.0), ([0.9, 0.9], nan)):
        train(student, optimizer)
        rates.update(torch.tensor(d), weight)
        rates.step()
    assert lrs(optimizer) == [0.75, 0.5, 1.0]
    assert rates.skipped.tolist() == [1, 2]


def test_update_errors_change_nothing():
    student, optimizer, rates = build()
    train(student, optimizer)
    before = rates.state_dict()
    for d, weight, error, text in (
        (torch.ones(3), None, ValueError, r"d: expected shape \(2,\), .* got shape \(3,\)"),
        (torch.ones(2, 1), None, ValueError, r"got shape \(2, 1\)"),
        (torch.tensor(1.0), None, ValueError, r"got shape \(\)"),
        (torch.ones(2).long(), None, TypeError, "expected a floating tensor, got torch.int64"),
        ([1.0, 2.0], None, TypeError, "d: expected a floating tensor, got list"),
        (torch.ones(2), torch.ones(3), ValueError, r"weight: .* got shape \(3,\)"),
        (torch.ones(2), "2", TypeError, "weight: expected a number or a tensor, got str"),
        (torch.ones(2), True, TypeError, "weight: expected a number or a tensor, got bool"),
        (
            torch.ones(2),
            torch.ones(2) + 1j,
            TypeError,
            "weight: expected real numbers",
        ),
        (
            torch.ones(2),
            10**39,
            ValueError,
            r"weight: expected a number in \[0, 3.4e\+38\]",
        ),
        (
            torch.ones(2),
            10**400,
            ValueError,
            r"weight: expected a number in \[0, 3.4e\+38\]",
        ),
        (torch.ones(2), 1e300, ValueError, "weight: expected .* got a larger one"),
        (torch.ones(2), -1, ValueError, "weight: expected .* got -1"),
        (torch.ones(2), math.nan, ValueError, "weight: expected .* got nan"),
        (torch.ones(2).to_sparse(), None, ValueError, "d: expected a dense tensor that holds data"),
        (
            torch.ones(2, device="meta"),
            None,
            ValueError,
            "d: expected .* Tensor on meta",
        ),
        (torch.ones(2), torch.ones(2).to_sparse(), ValueError, "weight: expected a dense tensor"),
        (
            torch.ones(2),
            torch.ones(2, device="meta"),
            ValueError,
            "weight: expected a dense tensor",
        ),
    ):
        with pytest.raises(error, match=text):
            rates.update(d, weight)
        assert str(rates.state_dict()) == str(before)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    assert lrs(optimizer) == pytest.approx([0.05, 0.15, 0.1])


def test_the_weights_of_one_step_may_pass_the_largest_float():
    _, optimizer, rates = build(momentum=0.0)
    optimizer.step()
    for _ in range(2):
        rates.update(torch.tensor([1.0, 3.0]), weight=3e38)
    rates.load_state_dict(rates.state_dict())
    rates.step()
    assert lrs(optimizer) == pytest.approx([0.05, 0.15, 0.1])


# --- the optimizer's side ----------------------------------------------------------------------


def test_matching_errors():
    student, pairs = make()

    def groups():
        return param_groups_layerwise(student, pairs, lr=0.1)

    text = (
        r"optimizer: expected one layer per group .*, got 'block1', 'block2', the rest in group 0"
    )
    with pytest.raises(ValueError, match=text):
        LayerwiseLR(SGD(student.parameters(), lr=0.1), pairs)
    with pytest.raises(ValueError, match=r"optimizer \(layer 'block2'\): .* 'block2.0.weight'"):
        LayerwiseLR(SGD([groups()[0]]), pairs)
    scaled = [dict(g, lr_scale=0.5) for g in groups()]
    with pytest.raises(ValueError, match=r"expected groups without 'lr_scale', got 0.5 in group"):
        LayerwiseLR(SGD(scaled), pairs)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        LayerwiseLR(groups(), pairs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pairs: expected what pair_layers returned"):
        LayerwiseLR(SGD(groups()), NAMES)  # type: ignore[arg-type]
    for options, error, text in (
        (dict(every=0), ValueError, "every: expected at least 1, got 0"),
        (dict(warmup=-1), ValueError, "warmup: expected at least 0, got -1"),
        (dict(every=1.5), TypeError, "every: expected an int, got float"),
        (dict(policy="rato"), ValueError, "did you mean 'ratio'"),
        (
            dict(process_group=3),
            TypeError,
            "process_group: .* a process group .* int",
        ),
    ):
        optimizer = SGD(groups())
        with pytest.raises(error, match=text):
            LayerwiseLR(optimizer, pairs, **options)
        assert "initial_lr" not in optimizer.param_groups[0]  # nothing has changed


def test_groups_are_matched_by_parameters_not_by_name():
    student, pairs = make()
    groups = param_groups_layerwise(student, pairs, lr=1.0)
    groups[0]["name"], groups[1]["name"] = groups[1]["name"], groups[0]["name"]
    optimizer = SGD(list(reversed(groups)))
    rates = LayerwiseLR(optimizer, pairs, policy="power", momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    assert lrs(optimizer) == pytest.approx([1.0, 1.5, 0.5])


def test_frozen_layers_need_no_group():
    student, pairs = make()
    student.block1.requires_grad_(False)
    optimizer = SGD(param_groups_layerwise(student, pairs, lr=1.0))
    rates = LayerwiseLR(optimizer, pairs, policy="power", momentum=0.0)
    train(student, optimizer)
    rates.update(torch.tensor([1.0, 3.0]))
    rates.step()
    assert lrs(optimizer) == pytest.approx([1.5, 1.0])


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_that_someone_else_wrote_is_not_overwritten_in_silence(tensor):
    student, optimizer, rates = build(torch.tensor(0.1) if tensor else 0.1)
    train(student, optimizer)
    rates.step()
    if tensor:
        optimizer.param_groups[0]["lr"].fill_(0.01)
    else:
        optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(RuntimeError, match=r"lr 0.1\d* in group 'block1', as last written, got"):
        rates.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_an_added_group_is_refused():
    """Fault 22."""
    student, optimizer, rates = build()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    train(student, optimizer)
    with pytest.raises(RuntimeError, match="optimizer: expected 3 groups as at the start, got 4"):
        rates.step()


def test_torchs_warning_about_the_order_of_steps():
    student, optimizer, rates = build(base=BASES["StepLR"])
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        rates.step()
    student, optimizer, rates = build(base=BASES["StepLR"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(student, optimizer)
            rates.step()
    with pytest.raises(ValueError, match="epoch: expected None, got 3"):
        rates.step(3)


@pytest.mark.parametrize("tensor", [False, True])
def test_ten_thousand_updates_leave_nothing_behind(tensor):
    """Fault 18, for the scheduler: tensors +0 between update 100 and update 10,000."""
    _, optimizer, rates = build(torch.tensor(0.1) if tensor else 0.1)
    optimizer.step()
    d = torch.rand(2, requires_grad=True)
    for i in range(10_000):
        rates.update(d * 2)
        if i % 4 == 0:
            rates.step()
        if i == 100:
            before = live_tensors()
    assert live_tensors() <= before  # less: what other tests have left may go meanwhile


@pytest.mark.slow
def test_a_whole_training_loop_does_not_grow():
    """Fault 18: meter, update and step; under 1 MiB more between step 100 and step 3,000."""
    student, pairs = make()
    optimizer = momentum_sgd(param_groups_layerwise(student, pairs, lr=0.01))
    rates = LayerwiseLR(optimizer, pairs, base=BASES["CosineAnnealingLR"](optimizer))
    meter = AttentionMeter(pairs, channel_dim=1)
    x = torch.randn(5, 6, 3)
    for i in range(3000):
        with meter:
            with torch.no_grad():
                pairs.teacher(x)
            loss = student(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.update(meter.discrepancy())
        rates.step()
        if i == 100:
            tensors, before = live_tensors(), resident()
    assert live_tensors() == tensors
    assert resident() - before < 2**20
    assert rates.multipliers.ne(1).any()


# --- on a GPU ----------------------------------------------------------------------------------


def on_gpu(**options):
    student, pairs = make()
    student.cuda()
    lr = torch.tensor(0.1, device="cuda")
    optimizer = AdamW(param_groups_layerwise(student, pairs, lr=lr), capturable=True)
    return optimizer, LayerwiseLR(optimizer, pairs, policy="power", **options)


@pytest.mark.gpu
def test_gpu_no_synchronisation():
    """Fault 26."""
    optimizer, rates = on_gpu()
    optimizer.step()
    d = torch.rand(4, 2, device="cuda")
    rates.update(d[0])
    rates.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in d:
            rates.update(row, weight=3)
            rates.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rates.multipliers.ne(1).all()


@pytest.mark.gpu
def test_gpu_graph_replays():
    """Fault 26: captured once, replayed 100 times, the same rates as without a graph."""
    (eager_optimizer, eager), (optimizer, captured) = on_gpu(), on_gpu()
    eager_optimizer.step()
    optimizer.step()
    d = torch.rand(2, device="cuda")
    for rates in (eager, captured):
        rates.update(d)
        rates.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(d)
        captured.step()
    for seed in range(100):
        d.copy_(torch.rand(2, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        eager.update(d)
        eager.step()
        assert torch.equal(captured.multipliers, eager.multipliers)
        assert lrs(optimizer) == lrs(eager_optimizer)
