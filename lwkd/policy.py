"""From distances to multipliers: pure functions of tensors, on the distances' device, no syncs.

A policy is called as ``policy(d, state)`` and returns ``(multipliers, state)``. ``d`` holds one
distance per layer, [..., L] (leading dimensions are independent runs); ``state`` is a dict of
tensors, ``{}`` to start with, and is never written to: the caller keeps the one that comes back.
A multiplier of 1 leaves the layer at its unscaled rate.

A distance counts if it is finite and not negative. For a layer whose distance does not count, a
policy leaves that layer's state as it was; `hold` then keeps its last good multiplier.
"""

from __future__ import annotations

import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeGuard

import torch
from torch import Tensor

from lwkd.ops import checks

EPS = 1e-12
"""Below this a reference distance is taken for zero."""

FLOOR = 1e-3
"""Distances are floored at this part of their mean, so that no quotient or logarithm explodes."""

UNSEEN = -1.0
"""Marks, in a policy's state, a layer without a distance so far; distances are never negative."""

LARGEST = torch.finfo(torch.float32).max
"""Of the numbers that a multiplier or a weight can be."""

State = dict[str, Tensor]
Policy = Callable[[Tensor, State], tuple[Tensor, State]]


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is one real number; True and False are none.

    >>> [is_number(x) for x in (0.5, 3, True, "1", None)]
    [True, True, False, False, False]
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_valid(d: Tensor) -> Tensor:
    """Tell which distances count: finite and not negative (bool, the shape of ``d``).

    >>> is_valid(torch.tensor([0.5, 0.0, -1.0, float("nan"), float("inf")])).tolist()
    [True, True, False, False, False]
    """
    return torch.isfinite(d) & (d >= 0)


def hold(
    multipliers: Tensor, last: Tensor, valid: Tensor, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Clip to ``bounds``; keep the last good multiplier where there is no good new one.

    Args:
        multipliers: What a policy returned, [L].
        last: The last good multipliers, [L].
        valid: Which layers had a distance that counts, bool [L].
        bounds: The smallest and the largest multiplier.

    Returns:
        The multipliers to use, [L], and which are new, bool [L].

    >>> m, new = hold(torch.tensor([20.0, float("nan")]), torch.ones(2), torch.tensor([True] * 2),
    ...               (0.1, 10.0))
    >>> m.tolist(), new.tolist()
    ([10.0, 1.0], [True, False])
    """
    good = valid & torch.isfinite(multipliers)
    return torch.where(good, multipliers.clamp(*bounds), last), good


def ratio(
    d: Tensor, state: State, *, bounds: tuple[float, float] = (0.1, 10.0), momentum: float = 0.9
) -> tuple[Tensor, State]:
    """Slow a layer down as it catches up with its teacher.

    ``ref_l ← max(ref_l, d_l)``, the present distance included; ``r_l = clip(d_l / ref_l, lo, hi)``,
    and 1 while ``ref_l < 1e-12``; ``m_l ← μ m_l + (1 − μ) r_l`` from ``m_l = 1``. The momentum
    acts on ``r``, and the multiplier is ``m``, so it is never above 1.

    Our reconstruction of the idea of Kokane, Uddin & Xu 2024 (a rate per matched layer, set from
    that layer's divergence, with a momentum factor that keeps the rate from collapsing); the
    formula they used, even its sign, is in no source that we could read.

    Args:
        d: Distances [..., L], floating.
        state: ``{}``, or what the last call returned: ``ref`` and ``m``, both [..., L].
        bounds: lo and hi.
        momentum: μ in [0, 1).

    Returns:
        Multipliers [..., L] in ``bounds``, and the new state.

    >>> m, state = ratio(torch.tensor([1.0, 4.0]), {}, momentum=0.5)
    >>> m, state = ratio(torch.tensor([0.5, 4.0]), state, momentum=0.5)
    >>> m.tolist()
    [0.75, 1.0]
    """
    valid = is_valid(d)
    ref = state.get("ref", torch.zeros_like(d))
    m = state.get("m", torch.ones_like(d))
    ref = torch.where(valid, torch.maximum(ref, d), ref)
    r = torch.where(ref < EPS, 1.0, (d / ref).clamp(*bounds))
    m = torch.where(valid, torch.lerp(m, r, 1.0 - momentum), m)
    return m.clamp(*bounds), {"ref": ref, "m": m}


def power(
    d: Tensor,
    state: State,
    *,
    bounds: tuple[float, float] = (0.1, 10.0),
    momentum: float = 0.9,
    gamma: float = 1.0,
) -> tuple[Tensor, State]:
    """Rates as a power of the distance: ``m_l ∝ (d_l / mean_k d_k)^γ``, scaled to mean 1.

    γ = 0 is uniform, γ > 0 speeds up the layers that differ most, γ < 0 protects them. ``d`` is
    smoothed first, ``d ← μ d + (1 − μ) d_new`` from the first distance of each layer, then floored
    at 1e-3 of its mean; where the mean is 0, and for a layer without a distance so far, m = 1.
    The clip to ``bounds`` comes last and may move the mean.

    Args:
        d: Distances [..., L], floating.
        state: ``{}``, or what the last call returned: ``d`` [..., L], −1 for none so far.
        bounds: The smallest and the largest multiplier.
        momentum: μ in [0, 1).
        gamma: γ.

    Returns:
        Multipliers [..., L] in ``bounds``, and the new state.

    >>> [round(m, 4) for m in power(torch.tensor([1.0, 3.0]), {}, gamma=1.0)[0].tolist()]
    [0.5, 1.5]
    """
    smooth = _smooth(d, state, momentum)
    seen, share, _ = _shares(smooth)
    # The mean cancels in the scaling; the clamp keeps differences of logits finite for any gamma.
    m = _mean_one((gamma * share.log()).clamp(-1e30, 1e30), seen)
    return _settle(m, smooth, seen, bounds), {"d": smooth}


def relative(
    d: Tensor,
    state: State,
    *,
    bounds: tuple[float, float] = (0.1, 10.0),
    momentum: float = 0.9,
    lam: float = 0.5,
) -> tuple[Tensor, State]:
    """Rates as a linear function of the distance: ``m_l = 1 + λ (d_l / mean_k d_k − 1)``.

    ``d`` is smoothed and floored, and layers without a distance are treated, as in `power`.

    Args:
        d: Distances [..., L], floating.
        state: ``{}``, or what the last call returned: ``d`` [..., L], −1 for none so far.
        bounds: The smallest and the largest multiplier.
        momentum: μ in [0, 1).
        lam: λ.

    Returns:
        Multipliers [..., L] in ``bounds``, and the new state.

    >>> relative(torch.tensor([1.0, 3.0]), {}, lam=0.5)[0].tolist()
    [0.75, 1.25]
    """
    smooth = _smooth(d, state, momentum)
    seen, share, _ = _shares(smooth)
    m = 1.0 + lam * (share / _mean(share, seen) - 1.0)
    return _settle(m, smooth, seen, bounds), {"d": smooth}


def softmax(
    d: Tensor,
    state: State,
    *,
    bounds: tuple[float, float] = (0.1, 10.0),
    momentum: float = 0.9,
    tau: float = 1.0,
) -> tuple[Tensor, State]:
    """Share a budget of L among the layers, ``m_l = L · exp(d_l / τ) / Σ_k exp(d_k / τ)``.

    ``d`` is smoothed and floored, and layers without a distance are treated, as in `power`.

    Args:
        d: Distances [..., L], floating.
        state: ``{}``, or what the last call returned: ``d`` [..., L], −1 for none so far.
        bounds: The smallest and the largest multiplier.
        momentum: μ in [0, 1).
        tau: τ > 0, in the distances' unit.

    Returns:
        Multipliers [..., L] in ``bounds``, and the new state.

    >>> softmax(torch.tensor([0.0, 0.0, 0.0]), {})[0].tolist()
    [1.0, 1.0, 1.0]
    """
    smooth = _smooth(d, state, momentum)
    seen, share, peak = _shares(smooth)
    # d − max d rather than d: d / τ may be past the largest float.
    m = _mean_one(peak * (share - 1.0) / tau, seen)
    return _settle(m, smooth, seen, bounds), {"d": smooth}


POLICIES: Mapping[str, Callable[..., tuple[Tensor, State]]] = MappingProxyType(
    {"ratio": ratio, "power": power, "relative": relative, "softmax": softmax}
)
"""The policies that have a name."""

DEFAULT = "power"
"""The policy that `LayerwiseLR` uses when none is named: what our measurements support.

On the digits, ten seeds each, `power` cannot be told from one rate for all layers, while `ratio`,
our reconstruction, costs 0.4 ± 0.1 points of accuracy with all training images and 1.0 ± 0.4 with
128 of them (`bench/transfer`). Whether larger distances should mean larger or smaller rates
remains an open question.
"""


def bind(
    policy: str | Policy | None,
    *,
    bounds: tuple[float, float] = (0.1, 10.0),
    momentum: float = 0.9,
    gamma: float = 1.0,
    lam: float = 0.5,
    tau: float = 1.0,
) -> tuple[str, Policy]:
    """Choose a policy and fix its options.

    Args:
        policy: A name in `POLICIES`, None for `DEFAULT`, or a callable ``(d, state) ->
            (multipliers, state)``. A callable gets the distances unsmoothed, [L], each layer's
            last valid one where the newest does not count (0 before any), and its own state back.
        bounds: 0 ≤ lo ≤ 1 ≤ hi; 1 is the neutral multiplier, with which every layer starts.
        momentum: μ in [0, 1).
        gamma: Of `power`, finite.
        lam: Of `relative`, finite.
        tau: Of `softmax`, positive and finite.

    Returns:
        The policy's name ("custom" for a callable) and the function of (d, state).

    Raises:
        ValueError: An unknown name, or an option out of its range.
        TypeError: A policy that is neither a name nor callable, an option that is no number.

    >>> name, policy = bind("power", gamma=-1.0)
    >>> name, [round(m, 4) for m in policy(torch.tensor([1.0, 3.0]), {})[0].tolist()]
    ('power', [1.5, 0.5])
    """
    if not isinstance(bounds, (tuple, list)):
        raise TypeError(_error("bounds", "a pair (low, high)", type(bounds).__name__))
    if len(bounds) != 2:
        raise ValueError(_error("bounds", "a pair (low, high)", bounds))
    low, high = (_number("bounds", x, "0 <= low <= 1 <= high", lambda x: x >= 0) for x in bounds)
    if not low <= 1.0 <= high <= LARGEST:
        raise ValueError(_error("bounds", "0 <= low <= 1 <= high", bounds))
    options = {
        "bounds": (low, high),
        "momentum": _number("momentum", momentum, "a number in [0, 1)", lambda x: 0 <= x < 1),
        "gamma": _number("gamma", gamma, "a finite number"),
        "lam": _number("lam", lam, "a finite number"),
        "tau": _number("tau", tau, "a positive number", lambda x: x > 0),
    }
    if policy is None:
        policy = DEFAULT
    if not isinstance(policy, str):
        if not callable(policy):
            raise TypeError(_error("policy", "a name or a callable", type(policy).__name__))
        return "custom", partial(_shielded, policy)
    if policy not in POLICIES:
        expected = "one of " + ", ".join(POLICIES)
        raise ValueError(
            _error("policy", expected, f"{policy!r}{checks.suggest(policy, POLICIES)}")
        )
    function = POLICIES[policy]
    takes = inspect.signature(function).parameters
    return policy, partial(function, **{k: v for k, v in options.items() if k in takes})


def _error(argument: str, expected: str, got: object) -> str:
    return checks.message("LayerwiseLR", argument, expected, got)


def _number(
    argument: str, value: object, expected: str, fits: Callable[[float], bool] = math.isfinite
) -> float:
    if not is_number(value):
        raise TypeError(_error(argument, expected, type(value).__name__))
    if not (abs(value) <= sys.float_info.max and fits(value)):
        raise ValueError(_error(argument, expected, value))
    return float(value)


def _shielded(policy: Policy, d: Tensor, state: State) -> tuple[Tensor, State]:
    """Let a user's policy see only distances that count, so that no NaN settles in its state."""
    valid = is_valid(d)
    last = torch.where(valid, d, state.get("last_valid", torch.zeros_like(d)))
    own = {key: value for key, value in state.items() if key != "last_valid"}
    multipliers, new = _checked(policy(last.clone(), dict(own)), d, own)
    kept = {
        # Without any new distance nothing was learned: the state stays.
        key: torch.where(valid.any(), value, own[key]) if key in own else value
        for key, value in new.items()
    }
    return multipliers.to(d), {**kept, "last_valid": last}


def _checked(result: object, d: Tensor, own: State) -> tuple[Tensor, State]:
    """Return what a user's policy returned, if it is what a policy returns."""
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"{len(result)} of them" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(_error("policy", "a pair (multipliers, state)", got))
    multipliers, new = result
    if not isinstance(multipliers, Tensor) or multipliers.shape != d.shape:
        got = getattr(multipliers, "shape", type(multipliers).__name__)
        raise ValueError(_error("policy", f"multipliers of shape {tuple(d.shape)}", got))
    if multipliers.is_complex():
        raise TypeError(_error("policy", "real multipliers", multipliers.dtype))
    if not isinstance(new, dict):
        raise TypeError(_error("policy", "a state that is a dict of tensors", type(new).__name__))
    for key, value in new.items():
        if not isinstance(key, str) or key == "last_valid" or not isinstance(value, Tensor):
            expected = "a state of tensors by name, 'last_valid' being taken"
            raise TypeError(_error("policy", expected, f"{type(value).__name__} at {key!r}"))
        if key in own and value.shape != own[key].shape:
            expected = f"state {key!r} of shape {tuple(own[key].shape)}, as before"
            raise ValueError(_error("policy", expected, f"shape {tuple(value.shape)}"))
    return multipliers, new


def _smooth(d: Tensor, state: State, momentum: float) -> Tensor:
    """Per layer, the running mean of the distances that count; `UNSEEN` before the first."""
    old = state.get("d", torch.full_like(d, UNSEEN))
    new = torch.where(old < 0, d, torch.lerp(old, d, 1.0 - momentum))
    return torch.where(is_valid(d), new, old)


def _shares(smooth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which layers have a distance, d / max d floored at 1e-3 of its mean, and max d.

    Divided by the largest first: neither a sum of 1e38s nor a quotient of denormals is then lost.
    """
    seen = smooth >= 0
    peak = smooth.amax(-1, keepdim=True).clamp_min(0.0)
    share = torch.where(seen, smooth, 0.0) / peak
    return seen, share.maximum(FLOOR * _mean(share, seen)), peak


def _mean(x: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, x, 0.0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)


def _mean_one(logits: Tensor, seen: Tensor) -> Tensor:
    """exp(logits), scaled to mean 1 over the layers seen: exactly 1 for equal logits."""
    logits = torch.where(seen, logits, -math.inf)
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    return weight / _mean(weight, seen)


def _settle(m: Tensor, smooth: Tensor, seen: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Put 1 where there is nothing to compare, and clip."""
    positive = smooth.amax(-1, keepdim=True) > 0
    return torch.where(seen & positive, m, 1.0).clamp(*bounds)
