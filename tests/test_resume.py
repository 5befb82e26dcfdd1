from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW

from lwkd.layers import pair_layers
from lwkd.schedule import LayerwiseLR, param_groups_layerwise
from tests.test_schedule import BASES, Net, build, lrs, make, momentum_sgd, train


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on tensors this small cost a hundred times what they save."""
    torch.set_num_threads(1)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def advance(student, optimizer, rates, steps):
    """Train; every third step has no distances, every fifth two vectors; return all rates."""
    seen = []
    for i in steps:
        train(student, optimizer, seed=i)
        if i % 3:
            rates.update(torch.rand(2, generator=torch.Generator().manual_seed(i)))
        if i % 5 == 0:
            rates.update(torch.tensor([1.0, math.nan]), weight=2.0)
        rates.step()
        seen.append(lrs(optimizer))
    return seen


def bits(student, optimizer):
    weights = [p.detach().clone() for p in student.parameters()]
    return weights + [v.clone() for s in optimizer.state.values() for v in s.values()]


RUNS = {
    "ratio, OneCycleLR": dict(
        make_optimizer=momentum_sgd,
        base=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=201),
        policy="ratio",
    ),
    "power, SequentialLR, every 7, warmup": dict(
        make_optimizer=momentum_sgd, base=BASES["SequentialLR"], every=7, warmup=95
    ),
    "softmax, tensor rates": dict(
        lr=torch.tensor(0.01), make_optimizer=AdamW, base=BASES["CosineAnnealingLR"]
    ),
    "custom": dict(
        make_optimizer=momentum_sgd,
        policy=lambda d, s: (d + s.get("t", torch.zeros(())), {"t": d.mean(), "each": d}),
    ),
}


def flat(state, path=""):
    """Flatten nested containers to {path: value}, tensors as (dtype, list)."""
    if isinstance(state, dict):
        return {k: v for key in state for k, v in flat(state[key], f"{path}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, x in enumerate(state) for k, v in flat(x, f"{path}/{i}").items()}
    return {path: (state.dtype, state.tolist()) if isinstance(state, torch.Tensor) else state}


@pytest.mark.parametrize(
    ("run", "rates_first"), [(run, i % 2 == 0) for i, run in enumerate(sorted(RUNS))]
)
def test_bit_for_bit(run, rates_first):
    """Stopped after 87 of 200 steps, between update and step: equal weights, states and rates."""
    whole = build(**RUNS[run])
    advance(*whole, range(87))
    whole[2].update(torch.tensor([0.25, 0.75]))
    saved = through_a_file([part.state_dict() for part in whole])
    before = lrs(whole[1])
    resumed = build(**RUNS[run])
    for i in (0, 2, 1) if rates_first else (0, 1, 2):
        resumed[i].load_state_dict(saved[i])
    assert lrs(resumed[1]) == before
    assert flat(resumed[2].state_dict()) == flat(whole[2].state_dict())
    seen = [advance(*part, range(87, 200)) for part in (whole, resumed)]
    assert seen[0] == seen[1]
    assert len({tuple(rates) for rates in seen[0]}) > 10
    for a, b in zip(bits(*whole[:2]), bits(*resumed[:2]), strict=True):
        assert torch.equal(a, b)
    assert flat(resumed[2].state_dict()) == flat(whole[2].state_dict())


@pytest.mark.parametrize("name", sorted(BASES))
def test_every_base_resumes(name):
    """Also a base whose state holds a Counter or nested schedulers reads back weights_only."""
    whole = build(0.1, momentum_sgd, BASES[name])
    advance(*whole, range(5))
    saved = through_a_file([part.state_dict() for part in whole])
    resumed = build(0.1, momentum_sgd, BASES[name])
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    seen = [advance(*part, range(5, 12)) for part in (whole, resumed)]
    assert seen[0] == seen[1]


def test_a_state_is_a_copy_keyed_by_name():
    student, optimizer, rates = build(torch.tensor(0.1), momentum_sgd, BASES["StepLR"])
    advance(student, optimizer, rates, range(4))
    state = rates.state_dict()
    before = copy.deepcopy(flat(state))
    assert list(state["layers"]) == ["block1", "block2"]
    assert list(state["groups"]) == ["block1", "block2", "rest"]
    advance(student, optimizer, rates, range(4, 9))
    assert flat(state) == before
    rates.load_state_dict(state)
    advance(student, optimizer, rates, range(4, 9))
    assert flat(state) == before
    assert all(v.untyped_storage().nbytes() <= 8 for v in state["layers"]["block1"].values())


def test_writing_into_a_state_writes_into_nothing_else():
    run = build(torch.tensor(0.1), momentum_sgd, BASES["StepLR"])
    advance(*run, range(2))
    loaded = run[2].state_dict()
    run[2].load_state_dict(loaded)
    taken, before = run[2].state_dict(), flat(run[2].state_dict())
    for state in (loaded, taken):
        base_lrs = state["base"]["state"]["base_lrs"]
        rows = [value for row in state["layers"].values() for value in row.values()]
        for value in (*state["groups"].values(), *base_lrs, *rows):
            value.fill_(99)
        base_lrs.clear()
    assert flat(run[2].state_dict()) == before


def test_other_bounds_than_the_saved_ones_hold():
    run = build(1.0, momentum=0.0)
    run[1].step()
    run[2].update(torch.tensor([1.0, 9.0]))
    run[2].step()
    narrow = build(1.0, momentum=0.0, bounds=(0.5, 1.5))
    narrow[2].load_state_dict(run[2].state_dict())
    assert lrs(narrow[1]) == [0.5, 1.5, 1.0]


def test_loading_twice_does_not_compound():
    student, optimizer, rates = build(0.1, momentum_sgd, BASES["ExponentialLR"], momentum=0.0)
    advance(student, optimizer, rates, range(4))
    state, optimizer_state = rates.state_dict(), copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.load_state_dict(optimizer_state)
        rates.load_state_dict(state)
        unscaled = 0.1 * 0.9**4
        wanted = [unscaled * m for m in [*rates.multipliers.tolist(), 1.0]]
        assert lrs(optimizer) == pytest.approx(wanted, rel=1e-12)
        assert rates.get_last_lr() == lrs(optimizer)


def test_tensor_rates_keep_their_identity_over_a_resume():
    saved = [part.state_dict() for part in build(torch.tensor(0.1), AdamW)]
    for order in ((1, 2), (2, 1), (1,)):
        parts = build(torch.tensor(0.1), AdamW)
        tensors = [group["lr"] for group in parts[1].param_groups]
        for i in order:
            parts[i].load_state_dict(saved[i])
        advance(*parts, range(3))
        for group, tensor in zip(parts[1].param_groups, tensors, strict=True):
            assert group["lr"] is tensor


@pytest.mark.parametrize("tensor", [False, True])
def test_through_the_state_of_a_distributed_checkpoint(tensor):
    """It keys groups by their parameters' names, and keeps every key of a group or raises."""
    options = dict(lr=torch.tensor(0.1) if tensor else 0.1, base=BASES["StepLR"])
    whole = build(make_optimizer=momentum_sgd, **options)
    advance(*whole, range(5))
    model, optimizer = get_state_dict(*whole[:2])
    saved = through_a_file([copy.deepcopy(model), copy.deepcopy(optimizer), whole[2].state_dict()])
    resumed = build(make_optimizer=momentum_sgd, **options)
    get_state_dict(*resumed[:2])
    set_state_dict(*resumed[:2], model_state_dict=saved[0], optim_state_dict=saved[1])
    resumed[2].load_state_dict(saved[2])
    assert lrs(resumed[1]) == lrs(whole[1])
    seen = [advance(*part, range(5, 12)) for part in (whole, resumed)]
    assert seen[0] == seen[1]


def test_pairs_in_another_order_find_their_layers():
    student, optimizer, rates = build()
    advance(student, optimizer, rates, range(4))
    other, pairs = make(["block2", "block1"])
    groups = param_groups_layerwise(other, pairs, lr=0.1)
    optimizer = SGD([groups[1], groups[0], groups[2]])
    again = LayerwiseLR(optimizer, pairs, policy="power")
    again.load_state_dict(rates.state_dict())
    assert again.multipliers.tolist() == rates.multipliers.tolist()[::-1]
    assert lrs(optimizer) == lrs(rates.optimizer)


# --- fault 22: what torch loads silently -------------------------------------------------------


def twisted(change):
    """A run whose optimizer has its groups changed."""
    student, pairs = make()
    groups = param_groups_layerwise(student, pairs, lr=0.1)
    optimizer = momentum_sgd(change(groups))
    return student, optimizer, LayerwiseLR(optimizer, pairs, policy="power")


def split(groups):
    """Make the groups of block1 and block2 the same size, so that torch swaps them silently."""
    last = groups[0]["params"]
    extra = dict(groups[0], params=last[2:], name="block1/norm")
    return [dict(groups[0], params=last[:2]), groups[1], groups[2], extra]


def swapped(groups):
    first, second, *others = split(groups)
    return [second, first, *others]


def renamed(groups):
    first, *others = split(groups)
    return [dict(first, name="stage1"), *others]


@pytest.mark.parametrize("change", [swapped, renamed])
def test_swapped_and_renamed_groups(change):
    """Fault 22: torch loads them, and overwrites the names as well; we say so."""
    run = twisted(split)
    advance(*run, range(3))
    saved = [part.state_dict() for part in run]
    _, optimizer, rates = other = twisted(change)
    with pytest.raises(ValueError, match=r"state_dict: expected groups.*block"):
        rates.load_state_dict(saved[2])
    before = lrs(optimizer)
    optimizer.load_state_dict(saved[1])  # torch says nothing
    with pytest.raises(RuntimeError, match=r"optimizer: expected group 0 to be '.*, got 'block1'"):
        rates.load_state_dict(saved[2])
    with pytest.raises(RuntimeError, match="the state of an optimizer with other groups"):
        advance(*other, range(1))
    assert rates.get_last_lr() == before


def test_swapped_groups_without_names():
    """Fault 22: groups without a name go by their layer."""

    def bare(groups):
        return [{k: v for k, v in g.items() if k != "name"} for g in groups]

    run = twisted(lambda groups: bare(split(groups)))
    advance(*run, range(3))
    state = run[2].state_dict()
    assert list(state["groups"]) == ["block1", "block2", "rest", "block1#1"]
    twisted(lambda groups: bare(split(groups)))[2].load_state_dict(state)
    with pytest.raises(ValueError, match="expected groups in the order"):
        twisted(lambda groups: bare(swapped(groups)))[2].load_state_dict(state)


def test_a_state_without_group_names_does_not_take_them_away():
    run = build()
    state = run[1].state_dict()
    for group in state["param_groups"]:
        del group["name"]
    run[1].load_state_dict(state)
    advance(*run, range(1))
    assert [g["name"] for g in run[1].param_groups] == ["block1", "block2", "rest"]


def test_an_optimizer_restored_alone_is_noticed():
    run = build()
    advance(*run, range(3))
    fresh = build()
    fresh[1].load_state_dict(run[1].state_dict())
    with pytest.raises(RuntimeError, match=r"as last written, got .*load both states together"):
        advance(*fresh, range(1))


# --- states that cannot be ---------------------------------------------------------------------


def other_names():
    pairs = pair_layers(Net(), Net(8), pairs=["block1", "stem"])
    optimizer = momentum_sgd(param_groups_layerwise(pairs.student, pairs, lr=0.1))
    return LayerwiseLR(optimizer, pairs, policy="power", base=BASES["SequentialLR"](optimizer))


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def put(*path):
    """Return a function that writes the last item of ``path`` at the keys before it."""

    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value

    return change


def drop(*path):
    def change(state):
        *keys, last = path
        for key in keys:
            state = state[key]
        del state[last]

    return change


T = torch.tensor
HOSTILE = {
    "version": (put("version", 2), "version 1, got 2"),
    "version bool": (put("version", True), "version 1, got True"),
    "version type": (put("version", "1"), "'version' to be a int, got str"),
    "policy": (put("policy", "ratio"), "policy 'power', got 'ratio'"),
    "last_epoch": (put("last_epoch", -1), "'last_epoch' to be a number >= 0"),
    "endless last_epoch": (put("last_epoch", 10**30), "'last_epoch' to be a number >= 0 of 63"),
    "step_count": (put("step_count", True), "'step_count' to be a number >= 0"),
    "recorded": (put("recorded", None), "'recorded' to be a bool"),
    "no layers": (drop("layers"), "expected the key 'layers'"),
    "layers type": (put("layers", []), "'layers' to be a dict, got list"),
    "missing layer": (drop("layers", "block2"), r"missing \['block2'\], unknown \[\]"),
    "unknown layer": (
        put("layers", "block22", {}),
        r"unknown \['block22'\]; did you mean 'block2'",
    ),
    "layer type": (put("layers", "block2", 3), r"\(layer 'block2'\): expected a dict of tensors"),
    "no multiplier": (drop("layers", "block1", "multiplier"), r"missing \['multiplier'\]"),
    "no policy state": (drop("layers", "block2", "policy.d"), r"missing \['policy.d'\]"),
    "unknown value": (put("layers", "block1", "x", T(1.0)), r"unknown \['x'\]"),
    "not a tensor": (put("layers", "block1", "weight", 1.0), "a dict of tensors"),
    "shape": (put("layers", "block2", "multiplier", torch.ones(2)), "'multiplier' of shape"),
    "NaN multiplier": (put("layers", "block2", "multiplier", T(math.nan)), "'multiplier' finite"),
    "complex multiplier": (put("layers", "block2", "multiplier", T(1j)), "'multiplier' to be flo"),
    "bool multiplier": (put("layers", "block2", "multiplier", T(True)), "'multiplier' to be float"),
    "whole distance": (put("layers", "block2", "distance", T(1)), "'distance' to be floating"),
    "bool skipped": (put("layers", "block2", "skipped", T(True)), "'skipped' to be whole, got tor"),
    "half skipped": (put("layers", "block2", "skipped", T(0.5)), "'skipped' to be whole, got torc"),
    "complex state": (put("layers", "block2", "policy.d", T(1j)), "'policy.d' to be floating"),
    "no data": (
        put("layers", "block2", "weight", T(1.0).to("meta")),
        "a dict of tensors that hold",
    ),
    "sparse": (
        put("layers", "block2", "weight", T([1.0]).to_sparse()),
        "a dict of tensors that ho",
    ),
    "negative weight": (put("layers", "block2", "weight", T(-1.0)), "'weight' finite, at least"),
    "infinite state": (put("layers", "block2", "policy.d", T(math.inf)), "'policy.d' finite"),
    "shared": (put("shared", {"d": T(1.0)}), r"shared .*unknown \['d'\]"),
    "shared type": (put("shared", {"d": 1.0}), r"shared\['d'\] to be a tensor"),
    "missing group": (drop("groups", "rest"), r"groups .* missing \['rest'\]"),
    "negative rate": (put("groups", "rest", -0.1), "rate of group 'rest'"),
    "NaN rate": (put("groups", "rest", math.nan), "rate of group 'rest'"),
    "complex rate": (put("groups", "rest", T(1j)), "rate of group 'rest'"),
    "whole rate": (put("groups", "rest", T(1)), "rate of group 'rest'"),
    "bool rate": (put("groups", "rest", True), "rate of group 'rest'"),
    "rate without data": (put("groups", "rest", T(0.1).to("meta")), "rate of group 'rest' to hold"),
    "rate type": (put("groups", "rest", "0.1"), "rate of group 'rest'"),
    "no base": (put("base", None), "expected base SequentialLR, got base None"),
    "other base": (put("base", "kind", "StepLR"), "expected base SequentialLR, got base StepLR"),
    "base type": (put("base", 3), "'base' to be a dict"),
    "no base state": (drop("base", "state"), "base to be a dict, got NoneType"),
    "base attribute": (put("base", "state", "step", 3), r"base .*unknown \['step'\]"),
    "base value": (put("base", "state", "last_epoch", "x"), r"base\['last_epoch'\] .*number"),
    "nested base": (
        put("base", "state", "_schedulers", 0, "base_lrs", [0.1]),
        r"base\['_schedulers'\]\[0\]\['base_lrs'\] to be a list of 3",
    ),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_state_that_cannot_be_changes_nothing(name):
    """Fault 25: truncated and hostile states raise, naming what is wrong."""
    run = build(0.1, momentum_sgd, BASES["SequentialLR"])
    advance(*run, range(3))
    state = copy.deepcopy(run[2].state_dict())
    change, text = HOSTILE[name]
    change(state)
    advance(*run, range(3, 6))
    before, rates = flat(run[2].state_dict()), lrs(run[1])
    with pytest.raises(ValueError, match=r"LayerwiseLR.load_state_dict: state_dict.*" + text):
        run[2].load_state_dict(state)
    assert flat(run[2].state_dict()) == before
    assert lrs(run[1]) == rates
    advance(*run, range(6, 8))


def test_not_even_a_dict():
    with pytest.raises(ValueError, match="state_dict: expected a dict, got list"):
        build()[2].load_state_dict([])  # type: ignore[arg-type]


def test_a_base_that_refuses_its_state_is_put_back():
    class Refusing(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            if self.last_epoch == 2:
                raise KeyError("no")

    run = build(0.1, momentum_sgd, lambda o: Refusing(o, 2))
    advance(*run, range(2))
    state = run[2].state_dict()
    advance(*run, range(2, 5))
    before, rates = flat(run[2].state_dict()), lrs(run[1])
    with pytest.raises(KeyError, match="no"):
        run[2].load_state_dict(state)
    assert flat(run[2].state_dict()) == before
    assert lrs(run[1]) == rates


def test_a_pickled_payload_is_not_run():
    """Fault 25: our states need nothing but weights_only, which refuses a ``__reduce__``."""
    state = build()[2].state_dict()
    assert flat(through_a_file(state)) == flat(state)
    with pytest.raises(Exception, match=r"[Uu]nsupported|weights_only|Weights only"):
        through_a_file({**state, "extra": Payload()})


def corrupted(data: bytes) -> dict[str, bytes]:
    """Cut at every sort of place, and with a header that promises far more than there is."""
    cuts = {0, 1, 4, 30, len(data) // 3, len(data) // 2, len(data) - 22, len(data) - 1}
    files = {f"cut at {cut}": data[:cut] for cut in sorted(cuts)}
    directory, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x06\x06")
    for name, at, size in (("entry", directory + 20, 8), ("directory", end + 24, 24)):
        files[f"huge {name}"] = data[:at] + b"\xfe" * size + data[at + size :]
    return files


def test_a_file_that_was_cut_or_lies_about_its_size_changes_nothing():
    """Fault 25: it raises before anything is touched."""
    run = build(0.1, momentum_sgd, BASES["SequentialLR"])
    advance(*run, range(3))
    file = io.BytesIO()
    torch.save(run[2].state_dict(), file)
    before, rates = flat(run[2].state_dict()), lrs(run[1])
    refused, files = [], corrupted(file.getvalue())
    for name, data in files.items():
        try:
            run[2].load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            refused.append(name)
        assert flat(run[2].state_dict()) == before
        assert lrs(run[1]) == rates
    assert refused == list(files)
    advance(*run, range(3, 5))


def test_other_pairs_are_named():
    state = build(0.1, momentum_sgd, BASES["SequentialLR"])[2].state_dict()
    with pytest.raises(ValueError, match=r"layers \['block1', 'stem'\], got missing \['stem'\]"):
        other_names().load_state_dict(state)
