"""A learning rate per layer: parameter groups, and the scheduler that sets their rates."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lwkd import distributed
from lwkd import groups as grouping
from lwkd import policy as policies
from lwkd.groups import Rate, param_groups_layerwise
from lwkd.layers import LayerPairs
from lwkd.ops import checks
from lwkd.saved import SavedState

if TYPE_CHECKING:
    import torch.distributed as dist

VERSION = 1
"""Of the layout of `LayerwiseLR.state_dict`."""

__all__ = ["LayerwiseLR", "param_groups_layerwise"]

_log = logging.getLogger(__name__)


class LayerwiseLR(LRScheduler):
    """Scale each layer's learning rate by a multiplier that follows its distance to the teacher.

    ``rate = unscaled rate × multiplier``: ``base`` (or else the optimizer as it is) sets the
    unscaled rate, the policy sets the multiplier, 1 to start with. Before ``base`` steps the
    unscaled rates are put back, so nothing compounds. Parameters outside the pairs (groups "rest")
    always have the unscaled rate.

    Call ``update(d)`` with the [L] distances whenever there are some, in any number per step (they
    are averaged by weight), then ``optimizer.step()``, then ``step()``, which alone changes rates.
    The rates belong to this scheduler: nobody else steps ``base`` or writes ``group["lr"]``, and a
    rate that was written by someone else raises at the next ``step()``.

    A rate that is a tensor keeps its identity and is written in place: a compiled
    ``optimizer.step`` does not recompile, and if it is on the distances' device there is no host
    synchronisation, and update and step can be captured in a CUDA graph (without ``base``). Rates
    that are floats, or on another device, cost one synchronisation for all groups together, at
    the steps where the multipliers change.

    A distance that is not finite or negative, and a multiplier that is not finite, leaves its
    layer's last good multiplier in place and is counted in `skipped`. This is logged once, when
    the counts are on the host anyway: on a CPU at once, else with the next transfer of float rates
    or when `skipped` or the state is read.

    With torch.distributed initialised (and more than one rank), ``update`` is one all-reduce:
    every rank calls it equally often, also with None (which then counts with weight 0), and all
    ranks get the same rates. A bad value on one rank is left out there; a vector of the wrong
    shape raises on all ranks (on CUDA, elsewhere than on the guilty rank, with the next call).

    Args:
        optimizer: Its groups hold every trainable parameter of the pairs, and none mixes layers;
            see `param_groups_layerwise`. Matched by the parameters' identity, not by name.
        pairs: What `pair_layers` returned; L of them.
        policy: A name in `lwkd.policy.POLICIES`, a callable ``(d, state) -> (multipliers, state)``
            (see `lwkd.policy.bind`), or None for `lwkd.policy.DEFAULT`.
        base: A scheduler of the same optimizer that needs no metric.
        bounds: The smallest and the largest multiplier; the clip comes last.
        momentum: μ of the smoothing.
        gamma: Of policy "power".
        lam: Of policy "relative".
        tau: Of policy "softmax".
        every: Multipliers are computed anew at each ``every``-th ``step()``.
        warmup: The first ``warmup`` calls of ``step()`` keep multiplier 1, while the policy already
            follows the distances.
        process_group: The ranks to agree with; None is the default group.

    Raises:
        TypeError: An optimizer, pairs, policy or base of another type.
        ValueError: Groups that mix layers, lack a pair's parameters or carry ``lr_scale``; a pair
            without parameters; a ``base`` of another optimizer or one that needs a metric; an
            option out of its range.

    >>> import torch
    >>> from torch import nn
    >>> from lwkd import pair_layers
    >>> student, teacher = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in "st")
    >>> pairs = pair_layers(student, teacher, pairs=["0", "1"])
    >>> optimizer = torch.optim.SGD(param_groups_layerwise(student, pairs, lr=0.1))
    >>> rates = LayerwiseLR(optimizer, pairs, policy="power")
    >>> _ = student(torch.ones(4, 2)).sum().backward()
    >>> rates.update(torch.tensor([1.0, 3.0]))
    >>> optimizer.step(); rates.step()
    >>> [round(rate, 4) for rate in rates.get_last_lr()]
    [0.05, 0.15]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        pairs: LayerPairs,
        *,
        policy: str | policies.Policy | None = None,
        base: LRScheduler | None = None,
        bounds: tuple[float, float] = (0.1, 10.0),
        momentum: float = 0.9,
        gamma: float = 1.0,
        lam: float = 0.5,
        tau: float = 1.0,
        every: int = 1,
        warmup: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = dict(bounds=bounds, momentum=momentum, gamma=gamma, lam=lam, tau=tau)
        self._policy_name, self._policy = policies.bind(policy, **options)  # type: ignore[arg-type]
        self._bounds = bounds
        self._every = _whole("every", every, 1)
        self._warmup = _whole("warmup", warmup, 0)
        self._layer_of_group = grouping.match(optimizer, pairs)
        _check_base(base, optimizer)
        self._base, self._base_epoch, self._group = base, _epoch(base), process_group
        self._layers = tuple(pairs.names)
        self._keys = grouping.keys(optimizer, self._layers, self._layer_of_group)
        self._titles = [group.get("name") for group in optimizer.param_groups]
        device = next(p for _, m in pairs.student_layers for p in m.parameters()).device
        self._multipliers = torch.ones(len(self._layers), device=device)  # the last good ones
        self._mean = torch.zeros_like(self._multipliers)  # of the distances since the last change
        self._weight = torch.zeros_like(self._multipliers)
        self._skipped = torch.zeros_like(self._multipliers, dtype=torch.int64)
        self._state: policies.State = {}
        self._recorded = False  # an update has come since the last change
        self._logged = False
        self._host: list[float] | None = None  # the multipliers in force, once they were needed
        self._verdict: distributed.Verdict | None = None
        self._ready = False
        _separate(optimizer)
        super().__init__(optimizer)
        self._unscaled = _rates(optimizer)
        self._note_written()
        self._ready = True

    @property
    def multipliers(self) -> Tensor:
        """The multipliers in force, [L] float32, a copy on the distances' device."""
        return self._in_force().clone()

    @property
    def skipped(self) -> Tensor:
        """How many bad values each layer has had on this rank, [L] int64, a copy."""
        self._log_skipped(int(self._skipped.sum()))
        return self._skipped.clone()

    @torch.no_grad()
    def update(self, d: Tensor | None, weight: float | Tensor | None = None) -> None:
        """Record distances; the rates change at the next due ``step()``.

        Args:
            d: Distances [L], floating, in the order of the pairs. None: nothing due.
            weight: How much they count against the other ranks' and this step's other updates, for
                example the number of samples: a number, or a tensor of one or [L] numbers. None: 1.

        Raises:
            TypeError: Distances that are not a floating tensor.
            ValueError: Another shape than [L]. On the other ranks: RuntimeError.
            RuntimeError: Another rank had a bad vector, or did not call update in time.
        """
        self._refuse(wait=True)
        together = distributed.is_active(self._group)
        if d is None and not together:
            return
        problem: Exception | None = None
        value = share = torch.zeros_like(self._mean)
        try:
            if d is not None:
                value, share = self._observation(d, weight)
        except (TypeError, ValueError) as error:
            problem = error
        valid = policies.is_valid(value) & policies.is_valid(share)
        value, share = torch.where(valid, value, 0.0), torch.where(valid, share, 0.0)
        if together:
            failed = problem is not None
            pooled = distributed.pool(value, share, failed=failed, group=self._group)
            if problem is None:
                self._verdict = pooled.verdict
                self._refuse(wait=False)
            value, share = pooled.mean, pooled.weight
        if problem is not None:
            raise problem
        self._move(value.device)
        self._weight += share
        part = torch.where(self._weight > 0, share / self._weight, 0.0)
        self._mean += (value - self._mean) * part
        self._skipped += ~valid
        self._recorded = True
        if not self._logged and self._skipped.device.type == "cpu":
            self._log_skipped(int(self._skipped.sum()))

    @torch.no_grad()
    def step(self, epoch: int | None = None) -> None:
        """Step ``base`` and set every group's rate; call it after ``optimizer.step()``.

        Args:
            epoch: Only None; torch deprecates it.

        Raises:
            ValueError: An epoch was given.
            RuntimeError: Someone else wrote rates, renamed, swapped or added groups, or stepped
                ``base``; another rank had a bad vector.
        """
        if not self._ready or getattr(self, "_is_initial", False):
            super().step()
            return
        op = "LayerwiseLR.step"
        if epoch is not None:
            raise ValueError(checks.message(op, "epoch", "None", epoch))
        self._check_groups(op)
        self._check_rates(op)
        self._refuse(wait=False)
        fresh = None
        if self._recorded and (self.last_epoch + 1) % self._every == 0:
            fresh = self._recomputed()
        self._step_base(op)
        if fresh is not None:
            self._accept(*fresh)
        if self.last_epoch == self._warmup:
            self._host = None
        super().step()
        self._note_written()

    def get_lr(self) -> list[Rate]:
        """Return unscaled rate × multiplier for each group, as copies."""
        if not self._ready:
            return _rates(self.optimizer)
        multipliers, scaled = self._in_force(), []
        rows = multipliers.unbind()
        for unscaled, layer in zip(self._unscaled, self._layer_of_group, strict=True):
            factor: Rate = 1.0
            if layer is not None:
                on_device = isinstance(unscaled, Tensor) and unscaled.device == multipliers.device
                factor = rows[layer] if on_device else self._on_host(multipliers)[layer]
            scaled.append(unscaled * factor)
        return scaled

    # --- multipliers ---------------------------------------------------------------------------

    def _in_force(self) -> Tensor:
        if self.last_epoch > self._warmup:
            return self._multipliers
        return torch.ones_like(self._multipliers)

    def _on_host(self, multipliers: Tensor) -> list[float]:
        if self._host is None:
            *values, skipped = torch.cat([multipliers, self._skipped.sum().view(1)]).tolist()
            self._log_skipped(int(skipped))
            self._host = values
        return self._host

    def _observation(self, d: Tensor, weight: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """Check one call's arguments; return distances and weights, both [L]."""
        op, L = "LayerwiseLR.update", len(self._layers)
        if not isinstance(d, Tensor) or not d.is_floating_point():
            got = f"{d.dtype} tensor" if isinstance(d, Tensor) else type(d).__name__
            raise TypeError(checks.message(op, "d", "a floating tensor", got))
        if d.shape != (L,):
            expected = f"shape ({L},), one distance per pair"
            raise ValueError(checks.message(op, "d", expected, f"shape {tuple(d.shape)}"))
        value = d.to(self._mean.dtype)
        if weight is None:
            return value, torch.ones_like(value)
        if isinstance(weight, (int, float)):
            return value, torch.full_like(value, weight)
        if not isinstance(weight, Tensor):
            got = type(weight).__name__
            raise TypeError(checks.message(op, "weight", "a number or a tensor", got))
        if weight.shape not in {(), (1,), (L,)}:
            got = f"shape {tuple(weight.shape)}"
            raise ValueError(checks.message(op, "weight", f"a number or shape ({L},)", got))
        return value, weight.to(value).expand(L)

    def _recomputed(self) -> tuple[Tensor, policies.State, Tensor]:
        """Ask the policy; change nothing."""
        seen = self._weight > 0
        d = torch.where(seen, self._mean, math.nan)
        multipliers, state = self._policy(d, self._state)
        multipliers, new = policies.hold(multipliers, self._multipliers, seen, self._bounds)
        return multipliers, state, self._skipped + (seen & ~new)

    def _accept(self, multipliers: Tensor, state: policies.State, skipped: Tensor) -> None:
        """Take the new values over, in place: a captured graph replays on the same memory."""
        self._multipliers.copy_(multipliers)
        self._skipped.copy_(skipped)
        old, self._state = self._state, {}
        for key, value in state.items():
            same = key in old and old[key].shape == value.shape
            self._state[key] = old[key].copy_(value) if same else value.clone()
        self._mean.zero_()
        self._weight.zero_()
        self._recorded, self._host = False, None

    def _move(self, device: torch.device) -> None:
        """Follow the distances to their device."""
        if self._multipliers.device != device:
            for name in ("_multipliers", "_mean", "_weight", "_skipped"):
                setattr(self, name, getattr(self, name).to(device))
            self._state = {key: value.to(device) for key, value in self._state.items()}

    def _log_skipped(self, count: int) -> None:
        if count and not self._logged:
            self._logged = True
            text = "%d value(s) so far not finite or negative; those layers keep their multiplier"
            _log.warning("lwkd.LayerwiseLR: " + text, count)

    def _refuse(self, *, wait: bool) -> None:
        if self._verdict is not None and self._verdict.failed(wait=wait):
            self._verdict = None
            expected = f"a floating tensor of shape ({len(self._layers)},) on every rank"
            got = "something else on another rank, which says what"
            raise RuntimeError(checks.message("LayerwiseLR.update", "d", expected, got))

    # --- the optimizer -------------------------------------------------------------------------

    def _step_base(self, op: str) -> None:
        if self._base is None:
            return
        if _epoch(self._base) != self._base_epoch:
            expected, got = f"last_epoch {self._base_epoch}", f"{_epoch(self._base)}"
            why = ": someone else stepped it, and LayerwiseLR does"
            raise RuntimeError(checks.message(op, "base", expected, got + why))
        before = _rates(self.optimizer)
        _write(self.optimizer, self._unscaled)
        try:
            self._base.step()
        except Exception:
            _write(self.optimizer, before)
            raise
        self._unscaled, self._base_epoch = _rates(self.optimizer), _epoch(self._base)

    def _note_written(self) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._written = [(r, r._version if isinstance(r, Tensor) else 0) for r in rates]

    def _check_rates(self, op: str) -> None:
        """Raise if a rate is not what was last written; look at values only if it was touched."""
        groups = self.optimizer.param_groups
        for i, (group, (written, version)) in enumerate(zip(groups, self._written, strict=True)):
            rate, last = group["lr"], self._last_lr[i]
            if rate is written and (not isinstance(rate, Tensor) or rate._version == version):
                continue
            if float(rate) != float(last):
                expected = f"lr {float(last)} in group {self._keys[i]!r}, as last written"
                got = f"{float(rate)}; schedule rates with base=, load both states together"
                raise RuntimeError(checks.message(op, "optimizer", expected, got))
            # An equal copy, from the optimizer's load_state_dict: keep the tensor that is known.
            group["lr"] = written.copy_(rate) if isinstance(written, Tensor) else written

    def _check_groups(self, op: str) -> None:
        """Raise if groups were added, or renamed by loading another optimizer's state."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._titles):
            expected, got = f"{len(self._titles)} groups as at the start", f"{len(groups)}"
            raise RuntimeError(checks.message(op, "optimizer", expected, got))
        for i, (group, title) in enumerate(zip(groups, self._titles, strict=True)):
            if group.get("name", title) != title:
                expected, got = f"group {i} to be {title!r}", repr(group["name"])
                why = ": the state of an optimizer with other groups was loaded into it"
                raise RuntimeError(checks.message(op, "optimizer", expected, got + why))
        for group, title in zip(groups, self._titles, strict=True):
            if title is not None:
                group["name"] = title  # a state without names took it away

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what training has changed, ``base`` included: tensors and plain types, copies.

        Per layer, by name: the multiplier, the distances since the last change and their weight,
        the counts, and the policy's own state; the unscaled rate of each group, by name. Options
        are not in it. Load it together with the state of the optimizer, in either order.

        Returns:
            A dict for ``torch.save``; ``torch.load(weights_only=True)`` reads it back.
        """
        self._log_skipped(int(self._skipped.sum()))
        L = len(self._layers)
        rows = {k: v for k, v in self._state.items() if v.ndim and v.shape[0] == L}
        vectors = {
            "multiplier": self._multipliers,
            "distance": self._mean,
            "weight": self._weight,
            "skipped": self._skipped,
            **{f"policy.{key}": value for key, value in rows.items()},
        }
        base = self._base and {
            "kind": type(self._base).__name__,
            "state": copy.deepcopy(self._base.state_dict()),
        }
        return {
            "version": VERSION,
            "policy": self._policy_name,
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "recorded": self._recorded,
            "layers": {
                name: {key: value[i].clone() for key, value in vectors.items()}
                for i, name in enumerate(self._layers)
            },
            "shared": {k: v.clone() for k, v in self._state.items() if k not in rows},
            "groups": dict(zip(self._keys, copy.deepcopy(self._unscaled), strict=True)),
            "base": base,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, bit for bit, and write the rates that it means into the optimizer.

        Args:
            state_dict: What `state_dict` returned. Layers and groups are matched by name, and the
                groups' order has to be the saved one, by which the optimizer restores itself.

        Raises:
            ValueError: Another version, policy, base, layer, group or layout, or values that cannot
                be. Then nothing has changed.
            RuntimeError: The optimizer's groups are not those of the start.
        """
        op = "LayerwiseLR.load_state_dict"
        self._check_groups(op)
        saved = SavedState(op, state_dict)
        saved.expect("version", VERSION)
        saved.expect("policy", self._policy_name)
        last_epoch, step_count = saved.count("last_epoch"), saved.count("step_count")
        recorded = saved.get("recorded", bool)
        template = None
        if self._policy_name in policies.POLICIES:
            template = list(self._policy(torch.ones_like(self._multipliers), {})[1])
        shared = saved.tensors("shared", self._multipliers.device)
        vectors = saved.layers(self._layers, self._multipliers, template, policies.UNSEEN)
        unscaled = saved.groups(self._keys)
        self._load_base(op, saved)
        # From here on nothing fails.
        self.last_epoch, self._step_count, self._recorded = last_epoch, step_count, recorded
        self._multipliers.copy_(vectors["multiplier"].clamp(*self._bounds))
        self._mean.copy_(vectors["distance"])
        self._weight.copy_(vectors["weight"])
        self._skipped.copy_(vectors["skipped"])
        self._state = {k[7:]: v for k, v in vectors.items() if k.startswith("policy.")} | shared
        self._host = self._verdict = None
        for group, (written, _) in zip(self.optimizer.param_groups, self._written, strict=True):
            group["lr"] = written  # the tensor that is known, if it is one
        self._unscaled = [
            torch.as_tensor(new).to(old, copy=True).view_as(old)
            if isinstance(old, Tensor)
            else float(new)
            for new, old in zip(unscaled, self._unscaled, strict=True)
        ]
        _write(self.optimizer, self.get_lr())
        self._last_lr = _rates(self.optimizer)
        self._note_written()

    def _load_base(self, op: str, saved: SavedState) -> None:
        """Restore ``base`` if its saved state fits; put it back as it was if it refuses."""
        kind = type(self._base).__name__ if self._base is not None else None
        entry = saved.get("base", dict) if saved.get("base", object) is not None else {}
        if entry.get("kind") != kind:
            expected, got = f"base {kind}", f"base {entry.get('kind')}"
            raise ValueError(checks.message(op, "state_dict", expected, got))
        if self._base is None:
            return
        before = copy.deepcopy(self._base.state_dict())
        saved.check_base(before, entry.get("state"))
        try:
            self._base.load_state_dict(copy.deepcopy(entry["state"]))
        except Exception:
            self._base.load_state_dict(before)
            raise
        self._base_epoch = _epoch(self._base)


def _whole(argument: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        got = type(value).__name__
        raise TypeError(checks.message("LayerwiseLR", argument, "an int", got))
    if value < least:
        raise ValueError(checks.message("LayerwiseLR", argument, f"at least {least}", value))
    return value


def _epoch(base: LRScheduler | None) -> int | None:
    return getattr(base, "last_epoch", None)


def _rates(optimizer: Optimizer) -> list[Rate]:
    """Copy every group's rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def _write(optimizer: Optimizer, rates: Sequence[Rate]) -> None:
    """Set every group's rate, in place where it is a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(rate))
        else:
            group["lr"] = rate


def _separate(optimizer: Optimizer) -> None:
    """Give every group its own tensor: torch puts one and the same into all."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:
                group["lr"] = group["lr"].detach().clone()
            seen.add(id(group["lr"]))


def _check_base(base: LRScheduler | None, optimizer: Optimizer) -> None:
    if base is None:
        return
    op, expected = "LayerwiseLR", "a torch.optim.lr_scheduler.LRScheduler"
    if not isinstance(base, LRScheduler):
        raise TypeError(checks.message(op, "base", expected, type(base).__name__))
    if isinstance(base, (ReduceLROnPlateau, LayerwiseLR)):
        got = type(base).__name__
        raise ValueError(checks.message(op, "base", "a scheduler that steps without a metric", got))
    if base.optimizer is not optimizer:
        got = f"a {type(base).__name__} of another"
        raise ValueError(checks.message(op, "base", "a scheduler of the same optimizer", got))
