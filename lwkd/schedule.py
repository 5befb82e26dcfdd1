"""A learning rate per layer: parameter groups, and the scheduler that sets their rates."""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lwkd import distributed
from lwkd import groups as grouping
from lwkd import policy as policies
from lwkd import rates as rating
from lwkd.base import Base
from lwkd.groups import param_groups_layerwise
from lwkd.layers import LayerPairs
from lwkd.ops import checks
from lwkd.rates import Rate, Watch
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
    rate that was written by someone else raises at the next ``step()``. Nor does another scheduler
    wrap this one (``SequentialLR``, ``ChainedScheduler``): it is what ``base`` is for.

    Every group carries its unscaled rate and the scaled one, ``unscaled_lr`` and ``scaled_lr``, and
    so does the optimizer's state. A second LayerwiseLR on the same optimizer, or on one restored
    from a checkpoint without the state of its rates, starts from ``unscaled_lr`` where ``lr`` is
    still ``scaled_lr``, so that nothing compounds there either; an ``lr`` that you have written
    since is taken as it is. (Give it a ``base`` that leaves the rates alone when it is made: one
    that multiplies them there and then, as LinearLR does, has written another ``lr``.)

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
    shape raises on all ranks (on CUDA, elsewhere than on the guilty rank, with the next call), and
    so does a rank that has left out, or repeated, an ``update`` or a ``step`` (on CUDA with the
    next call). The first ``update`` compares layers, policy and options over the ranks, once.

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
        TypeError: An optimizer, pairs, policy, base, option or rate of another type.
        ValueError: Groups that mix layers, lack a pair's parameters, carry ``lr_scale`` or a rate
            that is none; a pair without parameters, or whose module was replaced since; a ``base``
            of another optimizer or one that needs a metric; an option out of its range.

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

    @torch.inference_mode(False)
    @torch.no_grad()
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
        self._bounds = float(bounds[0]), float(bounds[1])
        self._every = _whole("every", every, 1)
        self._warmup = _whole("warmup", warmup, 0)
        self._layer_of_group = grouping.match(optimizer, pairs)
        self._base = Base(base, optimizer, LayerwiseLR)
        self._group = distributed.checked_group(process_group, "LayerwiseLR")
        self._layers = tuple(pairs.names)
        # What must be the same on every rank.
        options["bounds"] = self._bounds
        self._likeness = repr((self._layers, self._policy_name, options, every, warmup))
        self._keys = grouping.keys(optimizer, self._layers, self._layer_of_group)
        device = next(p for _, m in pairs.student_layers for p in m.parameters()).device
        L = len(self._layers)
        self._multipliers = torch.ones(L, dtype=torch.float32, device=device)  # the last good ones
        self._mean = torch.zeros_like(self._multipliers)  # of the distances since the last change
        self._weight = torch.zeros_like(self._multipliers)
        self._skipped = torch.zeros_like(self._multipliers, dtype=torch.int64)
        self._state: policies.State = {}
        self._recorded = False  # an update has come since the last change
        self._logged = False
        self._host: list[float] | None = None  # the multipliers in force, once they were needed
        self._verdict: distributed.Verdict | None = None
        self._alike = False  # the ranks have been compared
        self._calls = 0  # collective ones since the last step
        self._ready, self._stepping = False, False
        self._unscaled = rating.start(optimizer)
        super().__init__(optimizer)
        self._watch = Watch(optimizer, self._keys)
        self._watch.note(self._unscaled, self._last_lr)
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, d: Tensor | None, weight: float | Tensor | None = None) -> None:
        """Record distances; the rates change at the next due ``step()``.

        Args:
            d: Distances [L], floating, in the order of the pairs. None: nothing due.
            weight: How much they count against the other ranks' and this step's other updates, for
                example the number of samples: a number, or a tensor of one or [L] numbers. None: 1.

        Raises:
            TypeError: Distances that are not a floating tensor, a weight that is no number.
            ValueError: Another shape than [L], a tensor that holds no data, a negative or infinite
                weight. On the other ranks: RuntimeError.
            RuntimeError: Another rank had a bad vector, did not call update in time or is at
                another step, or has other layers, policy or options.
        """
        self._refuse(wait=True)
        together = distributed.is_active(self._group)
        if d is None and not together:
            return
        problem: Exception | None = None
        value = share = torch.zeros_like(self._mean)
        valid = torch.ones_like(self._mean, dtype=torch.bool)
        try:
            if d is not None:
                value, share, valid = self._observation(d, weight)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            problem = error
        if together:
            value, share = self._pooled(value, share, failed=problem is not None)
        if problem is not None:
            raise problem
        self._move(value.device)
        self._weight.add_(share).clamp_(max=policies.LARGEST)
        part = torch.where(self._weight > 0, share / self._weight, 0.0)
        self._mean += (value - self._mean) * part
        self._skipped += ~valid
        self._recorded = True
        if not self._logged and self._skipped.device.type == "cpu":
            self._log_skipped(int(self._skipped.sum()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, epoch: int | None = None) -> None:
        """Step ``base`` and set every group's rate; call it after ``optimizer.step()``.

        If ``base`` or a policy raises, nothing has changed.

        Args:
            epoch: Only None; torch deprecates it.

        Raises:
            ValueError: An epoch was given; a policy returned something else than a policy does.
            TypeError: Likewise.
            RuntimeError: Someone else wrote rates, renamed, swapped or added groups, or stepped
                ``base``; another scheduler wraps this one; another rank had a bad vector, or is at
                another step.
        """
        if not self._ready:
            super().step()
            return
        op = "LayerwiseLR.step"
        if epoch is not None:
            raise ValueError(checks.message(op, "epoch", "None", epoch))
        if getattr(self, "_is_initial", False):
            self._update_lr()  # a scheduler that wraps this one starts it anew
        self._watch.check_groups(op)
        self._watch.check_rates(op, self._last_lr)
        self._refuse(wait=False)
        fresh = None
        if self._recorded and (self.last_epoch + 1) % self._every == 0:
            fresh = self._recomputed()
        self._unscaled = self._base.step(op, self._unscaled)
        if fresh is not None:
            self._accept(*fresh)
        if self.last_epoch == self._warmup:
            self._host = None
        self._calls, self._stepping = 0, True
        try:
            super().step()
        finally:
            self._stepping = False
        self._watch.note(self._unscaled, self._last_lr)

    def _update_lr(self, epoch: int | None = None) -> None:
        """Refuse what goes round `step`: torch's SequentialLR and its like call this."""
        if self._ready and not self._stepping:
            expected = "its own step(), and the other scheduler as base="
            got = "a call by another scheduler, which wraps it"
            raise RuntimeError(checks.message("LayerwiseLR.step", "base", expected, got))
        super()._update_lr(epoch)

    def get_lr(self) -> list[Rate]:
        """Return unscaled rate × multiplier for each group, as copies."""
        if not self._ready:
            return rating.copies(self.optimizer)
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

    def _observation(
        self, d: Tensor, weight: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Check one call's arguments; return distances, weights, and which count, all [L]."""
        op, L = "LayerwiseLR.update", len(self._layers)
        if not isinstance(d, Tensor) or not d.is_floating_point():
            got = f"{d.dtype} tensor" if isinstance(d, Tensor) else type(d).__name__
            raise TypeError(checks.message(op, "d", "a floating tensor", got))
        if d.shape != (L,):
            expected = f"shape ({L},), one distance per pair"
            raise ValueError(checks.message(op, "d", expected, f"shape {tuple(d.shape)}"))
        self._check_data(op, "d", d)
        value = d.to(self._mean.dtype)
        share = self._share(op, weight, value)
        valid = policies.is_valid(value) & policies.is_valid(share)
        return torch.where(valid, value, 0.0), torch.where(valid, share, 0.0), valid

    def _check_data(self, op: str, argument: str, x: Tensor) -> None:
        spread = hasattr(x, "full_tensor")  # over ranks: a DTensor, which has its own collectives
        if spread or x.layout is not torch.strided or (x.is_meta and not self._mean.is_meta):
            got = f"a {x.layout} {type(x).__name__} on {x.device}"
            raise ValueError(checks.message(op, argument, "a dense tensor that holds data", got))

    def _share(self, op: str, weight: float | Tensor | None, value: Tensor) -> Tensor:
        """Check a weight; return it for every layer, [L]."""
        if isinstance(weight, Tensor):
            if weight.shape not in {(), (1,), value.shape}:
                expected = f"a number or shape {tuple(value.shape)}"
                got = f"shape {tuple(weight.shape)}"
                raise ValueError(checks.message(op, "weight", expected, got))
            if weight.is_complex():
                raise TypeError(checks.message(op, "weight", "real numbers", weight.dtype))
            self._check_data(op, "weight", weight)
            return weight.to(value).expand_as(value)
        if weight is None:
            weight = 1.0
        if not policies.is_number(weight):
            got = type(weight).__name__
            raise TypeError(checks.message(op, "weight", "a number or a tensor", got))
        if not 0.0 <= weight <= policies.LARGEST:
            expected = f"a number in [0, {policies.LARGEST:.3g}]"
            got = "a larger one" if weight > policies.LARGEST else f"{weight}"
            raise ValueError(checks.message(op, "weight", expected, got))
        return torch.full_like(value, float(weight))

    def _pooled(self, value: Tensor, share: Tensor, *, failed: bool) -> tuple[Tensor, Tensor]:
        """Average over the ranks, all of which call this, or raise on all."""
        if not self._alike:
            likeness = crc32(self._likeness.encode())
            if not distributed.agree(likeness, value.device, self._group):
                expected, got = "the same on every rank", f"others than here: {self._likeness}"
                op, argument = "LayerwiseLR", "pairs, policy and options"
                raise RuntimeError(checks.message(op, argument, expected, got))
            self._alike = True
        self._calls += 1
        stamp = crc32(f"{self.last_epoch} {self._calls}".encode()) & 0xFFFF
        pooled = distributed.pool(value, share, failed=failed, stamp=stamp, group=self._group)
        if not failed:  # else this rank says itself what is wrong
            self._verdict = pooled.verdict
            self._refuse(wait=False)
        return pooled.mean, pooled.weight

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
        """Raise if it has come out that the last collective call was not one."""
        reason = self._verdict.reason(wait=wait) if self._verdict is not None else None
        if reason is None:
            return
        self._verdict = None
        expected = f"a floating tensor of shape ({len(self._layers)},) on every rank"
        got = "something else on another rank, which says what"
        if reason == "apart":
            expected = "a call on every rank at the same step"
            got = f"calls of different steps; this rank has made {self.last_epoch}, and since then"
            got += f" {self._calls} update(s)"
        raise RuntimeError(checks.message("LayerwiseLR.update", "d", expected, got))

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
            "base": self._base.state_dict(),
        }

    @torch.inference_mode(False)
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
        self._watch.check_groups(op)
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
        self._base.load(saved)
        # From here on nothing fails.
        self.last_epoch, self._step_count, self._recorded = last_epoch, step_count, recorded
        self._multipliers.copy_(vectors["multiplier"].clamp(*self._bounds))
        self._mean.copy_(vectors["distance"])
        self._weight.copy_(vectors["weight"])
        self._skipped.copy_(vectors["skipped"])
        self._state = {k[7:]: v for k, v in vectors.items() if k.startswith("policy.")} | shared
        self._host, self._verdict, self._calls = None, None, 0
        self._watch.put_back()
        self._unscaled = [
            torch.as_tensor(new).to(old, copy=True).view_as(old)
            if isinstance(old, Tensor)
            else float(new)
            for new, old in zip(unscaled, self._unscaled, strict=True)
        ]
        rating.write(self.optimizer, self.get_lr())
        self._last_lr = rating.copies(self.optimizer)
        self._watch.note(self._unscaled, self._last_lr)


def _whole(argument: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        got = type(value).__name__
        raise TypeError(checks.message("LayerwiseLR", argument, "an int", got))
    if value < least:
        raise ValueError(checks.message("LayerwiseLR", argument, f"at least {least}", value))
    return value
