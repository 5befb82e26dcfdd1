from __future__ import annotations

import math
import pickle

import pytest
import torch

from lwkd import policy
from tests.test_schedule import build, lrs

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

BOUNDS = (0.1, 10.0)
NAMES = sorted(policy.POLICIES)
NASTY = [
    0.0,
    -0.0,
    1e-45,
    1e-38,
    1e-12,
    1.0,
    2.0,
    1e38,
    3.4e38,
    -1.0,
    math.nan,
    math.inf,
    -math.inf,
]


def oracle(name: str, rows: list[list[float]], *, mu=0.9, gamma=1.0, lam=0.5, tau=1.0):
    """Multipliers after the last row, from the formulas, in Python floats; good rows only."""
    lo, hi = BOUNDS
    clip = lambda x: min(max(x, lo), hi)  # noqa: E731
    L = len(rows[0])
    if name == "ratio":
        ref, m = [0.0] * L, [1.0] * L
        for row in rows:
            ref = [max(a, b) for a, b in zip(ref, row, strict=True)]
            r = [1.0 if a < 1e-12 else clip(b / a) for a, b in zip(ref, row, strict=True)]
            m = [mu * a + (1 - mu) * b for a, b in zip(m, r, strict=True)]
        return [clip(x) for x in m]
    d = rows[0]
    for row in rows[1:]:
        d = [mu * a + (1 - mu) * b for a, b in zip(d, row, strict=True)]
    if sum(d) == 0:
        return [1.0] * L
    d = [max(x, 1e-3 * sum(d) / L) for x in d]
    mean = sum(d) / L
    if name == "power":
        p = [(x / mean) ** gamma for x in d]
        return [clip(x / (sum(p) / L)) for x in p]
    if name == "relative":
        return [clip(1 + lam * (x / mean - 1)) for x in d]
    e = [math.exp((x - max(d)) / tau) for x in d]
    return [clip(L * x / sum(e)) for x in e]


def run(function, rows, dtype=torch.float32):
    state: policy.State = {}
    for row in rows:
        m, state = function(torch.tensor(row, dtype=dtype), state)
    return m, state


distances = st.just(0.0) | st.floats(2.0**-20, 100, width=32)  # not at the threshold of 1e-12


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda L: st.lists(st.lists(distances, min_size=L, max_size=L), min_size=1, max_size=4)
    ),
    mu=st.sampled_from([0.0, 0.5, 0.9]),
    gamma=st.floats(-3, 3),
    lam=st.floats(-2, 2),
    tau=st.floats(0.1, 10),
)
def test_formula(name, rows, mu, gamma, lam, tau):
    options = {"gamma": gamma, "lam": lam, "tau": tau}
    _, function = policy.bind(name, bounds=BOUNDS, momentum=mu, **options)
    m, _ = run(function, rows, torch.float64)
    expected = torch.tensor(oracle(name, rows, mu=mu, **options), dtype=torch.float64)
    torch.testing.assert_close(m, expected, rtol=1e-9, atol=1e-12)
    # In float32 a difference d - max d loses up to 1e-7 of the largest, here 1e-5 / tau.
    torch.testing.assert_close(run(function, rows)[0].double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.integers(1, 6).flatmap(
        lambda L: st.lists(
            st.lists(st.sampled_from(NASTY) | st.floats(width=32), min_size=L, max_size=L),
            min_size=1,
            max_size=5,
        )
    ),
    options=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.0, 0.9, 0.999]),
            "gamma": st.sampled_from([-1e38, -2.0, 0.0, 1.0, 1e38]),
            "lam": st.sampled_from([-1e38, 0.5, 1e38]),
            "tau": st.sampled_from([1e-30, 1.0, 1e30]),
            "bounds": st.sampled_from([(0.1, 10.0), (0.0, 1.0), (1.0, 1.0), (0.5, 2.0)]),
        }
    ),
)
def test_any_vector_gives_finite_bounded_multipliers(name, rows, options):
    """Fault 23: NaN, Inf, 0, denormals, all-equal, 1e38."""
    _, function = policy.bind(name, **options)
    state: policy.State = {}
    for row in rows:
        m, state = function(torch.tensor(row), state)
        lo, hi = (torch.tensor(b) for b in options["bounds"])
        assert torch.isfinite(m).all()
        assert ((m >= lo) & (m <= hi)).all()
        assert all(torch.isfinite(v).all() for v in state.values())


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, 1e-45, 1e38, 3.4e38, -1.0, math.nan, math.inf])
            | st.floats(width=32),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
        max_size=6,
    ),
    name=st.sampled_from(sorted(policy.POLICIES)),
    per_step=st.integers(1, 3),
    tensor=st.booleans(),
)
def test_any_distances_give_finite_rates_in_bounds(rows, name, per_step, tensor):
    """Fault 23, through the scheduler: also averaged updates, and rates of both kinds."""
    _, optimizer, rates = build(torch.tensor(1.0) if tensor else 1.0, policy=name)
    optimizer.step()
    for i, row in enumerate(rows):
        rates.update(torch.tensor(row), weight=1 + i)
        if i % per_step == 0:
            rates.step()
        low, high = (float(torch.tensor(b)) for b in (0.1, 10.0))
        assert all(low <= lr <= high for lr in lrs(optimizer))
        assert lrs(optimizer)[2] == 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hundred_thousand_vectors(name, dtype):
    """Fault 23, in bulk: 10⁵ vectors of every magnitude and sort of bad value, three in a row."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 100_000, 7)
    exponents = torch.randint(-45, 38, shape, generator=generator).to(dtype)
    d = torch.rand(shape, generator=generator, dtype=dtype) * 10.0**exponents
    pick = torch.randint(0, 40, shape, generator=generator)
    for i, bad in enumerate(NASTY):
        d[pick == i] = bad
    d[:, :100] = 0.0
    d[:, 100:200] = math.nan
    d[:, 200:300] = d[:, 200:300, :1]
    state: policy.State = {}
    low, high = (torch.tensor(b, dtype=dtype) for b in BOUNDS)
    for step in d:
        m, state = policy.POLICIES[name](step, state)
        assert torch.isfinite(m).all()
        assert ((m >= low) & (m <= high)).all()
    assert (m[:200] == 1).all()
    if name != "ratio":  # equal distances are no reason for unequal rates
        same = policy.POLICIES[name](torch.full((4,), 0.3, dtype=dtype), {})[0]
        assert (same == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_distance_leaves_that_layers_state_alone(name):
    function = policy.POLICIES[name]
    _, state = function(torch.tensor([1.0, 2.0, 3.0]), {})
    for bad in (math.nan, math.inf, -1.0):
        _, with_bad = function(torch.tensor([0.5, bad, 1.0]), state)
        _, without = function(torch.tensor([0.5, 0.1, 1.0]), state)
        for key, before in state.items():
            assert with_bad[key][1] == before[1]
            assert torch.equal(with_bad[key][[0, 2]], without[key][[0, 2]])


@pytest.mark.parametrize("name", ["power", "relative", "softmax"])
def test_a_layer_without_any_distance_is_left_out_of_the_mean(name):
    function = policy.POLICIES[name]
    m, _ = function(torch.tensor([1.0, math.nan, 3.0]), {})
    alone, _ = function(torch.tensor([1.0, 3.0]), {})
    assert m[1] == 1
    torch.testing.assert_close(m[[0, 2]], alone)


def test_ratio_by_hand():
    state: policy.State = {}
    seen = []
    for value in (2.0, 1.0, 0.0, 4.0):
        m, state = policy.ratio(torch.tensor([value]), state, momentum=0.5)
        seen.append(m.item())
    assert seen == pytest.approx([1.0, 0.75, 0.425, 0.7125])


def test_signs():
    d = torch.tensor([1.0, 2.0, 4.0])
    up, down = policy.power(d, {}, gamma=1.0)[0], policy.power(d, {}, gamma=-1.0)[0]
    assert up.diff().gt(0).all()
    assert down.diff().lt(0).all()
    assert policy.power(d, {}, gamma=0.0)[0].tolist() == [1.0, 1.0, 1.0]
    assert up.mean().item() == pytest.approx(1.0)
    assert down.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_pure(name):
    d = torch.tensor([1.0, math.nan, 3.0])
    function = policy.POLICIES[name]
    _, state = function(torch.tensor([2.0, 1.0, 1.0]), {})
    copies = d.clone(), {k: v.clone() for k, v in state.items()}
    first, second = function(d, state), function(d, state)
    assert torch.equal(first[0], second[0])
    assert torch.equal(d, copies[0]) or torch.equal(d.isnan(), copies[0].isnan())
    assert all(torch.equal(state[k], copies[1][k]) for k in state)


@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation(name):
    """Fault 26: on the meta device, where there are no values, reading one raises."""
    d = torch.rand(5, device="meta")
    m, state = policy.POLICIES[name](d, {})
    m, _ = policy.POLICIES[name](d, state)
    m, good = policy.hold(m, torch.ones_like(m), policy.is_valid(d), BOUNDS)
    assert (m.device.type, good.device.type) == ("meta", "meta")
    with pytest.raises(RuntimeError, match="meta"):
        m.sum().item()


def test_custom_policy_never_sees_a_bad_distance():
    seen = []

    def average(d, state):
        seen.append(d.tolist())
        ema = 0.5 * state.get("ema", d) + 0.5 * d
        return ema, {"ema": ema}

    name, function = policy.bind(average)
    assert name == "custom"
    state: policy.State = {}
    for row in ([math.nan, 1.0], [2.0, math.inf], [math.nan, math.nan]):
        m, state = function(torch.tensor(row), state)
    assert seen == [[0.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
    assert m.shape == (2,)
    assert state["ema"].tolist() == [1.0, 1.0]  # nothing new in the last row: as before it


def test_hold():
    last = torch.tensor([1.0, 2.0, 3.0, 4.0])
    m, new = policy.hold(
        torch.tensor([5.0, math.nan, 50.0, math.inf]),
        last,
        torch.tensor([False, True, True, True]),
        BOUNDS,
    )
    assert m.tolist() == [1.0, 2.0, 10.0, 4.0]
    assert new.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(policy="rato"), ValueError, r"policy: expected one of .*did you mean 'ratio'\?"),
        (dict(policy=3), TypeError, "policy: expected a name or a callable, got int"),
        (dict(bounds=(0.1, 0.5)), ValueError, "bounds: expected 0 <= low <= 1 <= high"),
        (dict(bounds=(-1.0, 2.0)), ValueError, "bounds"),
        (dict(bounds=(0.1, math.inf)), ValueError, "bounds"),
        (dict(bounds=(0.1,)), ValueError, "bounds: expected a pair"),
        (dict(momentum=1.0), ValueError, r"momentum: expected a number in \[0, 1\), got 1.0"),
        (dict(momentum=math.nan), ValueError, "momentum"),
        (dict(gamma=math.inf), ValueError, "gamma"),
        (dict(lam=math.nan), ValueError, "lam"),
        (dict(tau=0.0), ValueError, "tau: expected a positive number, got 0.0"),
        (dict(bounds="ab"), TypeError, r"bounds: expected a pair \(low, high\), got str"),
        (dict(bounds=None), TypeError, r"bounds: expected a pair \(low, high\), got NoneType"),
        (dict(bounds=(True, 2.0)), TypeError, "bounds: expected 0 <= low .* got bool"),
        (dict(bounds=(0.1, "2")), TypeError, "bounds: expected 0 <= low .* got str"),
        (dict(bounds=(0.1, 1e300)), ValueError, "bounds: expected 0 <= low"),
        (dict(momentum="x"), TypeError, r"momentum: expected a number in \[0, 1\), got str"),
        (dict(gamma=None), TypeError, "gamma: expected a finite number, got NoneType"),
        (dict(gamma=10**400), ValueError, "gamma: expected a finite number, got 1000"),
        (dict(lam="1"), TypeError, "lam: expected a finite number, got str"),
        (dict(tau=torch.ones(())), TypeError, "tau: expected a positive number, got Tensor"),
    ],
)
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        policy.bind(**{"policy": None, **options})


def test_custom_policy_of_the_wrong_shape():
    _, function = policy.bind(lambda d, state: (d.sum(), state))
    with pytest.raises(ValueError, match=r"policy: expected multipliers of shape \(2,\), got"):
        function(torch.ones(2), {})


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (None, TypeError, r"a pair \(multipliers, state\), got NoneType"),
        (torch.ones(2), TypeError, r"a pair \(multipliers, state\), got Tensor"),
        ((torch.ones(2),), TypeError, r"a pair \(multipliers, state\), got 1 of them"),
        (([1.0, 1.0], {}), ValueError, r"multipliers of shape \(2,\), got list"),
        ((torch.ones(2) + 1j, {}), TypeError, "real multipliers, got torch.complex64"),
        ((torch.ones(2), None), TypeError, "a state that is a dict of tensors, got NoneType"),
        ((torch.ones(2), {"n": 1}), TypeError, "a state of tensors by name, .* int at 'n'"),
        ((torch.ones(2), {1: torch.ones(2)}), TypeError, "a state of tensors by name"),
        ((torch.ones(2), {"last_valid": torch.ones(2)}), TypeError, ".*'last_valid' being taken"),
        (
            (torch.ones(2), {"h": torch.ones(4)}),
            ValueError,
            r"state 'h' of shape \(3,\), .*shape \(4,\)",
        ),
    ],
)
def test_custom_policy_that_returns_something_else(result, error, text):
    _, function = policy.bind(lambda d, state: result)
    with pytest.raises(error, match="LayerwiseLR: policy: expected " + text):
        function(torch.ones(2), {"h": torch.ones(3)})


@pytest.mark.parametrize("name", [*NAMES, policy.power])
def test_a_bound_policy_can_be_pickled(name):
    _, function = policy.bind(name, momentum=0.5)
    d = torch.tensor([1.0, 3.0])
    assert torch.equal(pickle.loads(pickle.dumps(function))(d, {})[0], function(d, {})[0])
