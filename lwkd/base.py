"""The scheduler that sets the unscaled rates: it steps and loads as a whole, or not at all."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lwkd import rates
from lwkd.ops import checks
from lwkd.rates import Rate
from lwkd.saved import SavedState


class Base:
    """A scheduler of the user's, stepped by `LayerwiseLR` alone; or none, with rates that stay.

    Args:
        scheduler: The scheduler, or None.
        optimizer: Whose rates it has to set.
        refused: Types that cannot serve.

    Raises:
        TypeError: Not a scheduler.
        ValueError: One of another optimizer, or of a type that cannot serve.
    """

    def __init__(
        self,
        scheduler: LRScheduler | None,
        optimizer: Optimizer,
        refused: type[LRScheduler],
    ) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer
        self._epoch = _epoch(scheduler)
        if scheduler is None:
            return
        op, expected = "LayerwiseLR", "a torch.optim.lr_scheduler.LRScheduler"
        got = type(scheduler).__name__
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(checks.message(op, "base", expected, got))
        if isinstance(scheduler, (ReduceLROnPlateau, refused)):
            expected = "a scheduler that steps without a metric"
            raise ValueError(checks.message(op, "base", expected, got))
        if scheduler.optimizer is not optimizer:
            expected = "a scheduler of the same optimizer"
            raise ValueError(checks.message(op, "base", expected, f"a {got} of another"))

    def step(self, op: str, unscaled: list[Rate]) -> list[Rate]:
        """Step with the unscaled rates in the optimizer.

        Args:
            op: Who asks.
            unscaled: The unscaled rates as they were.

        Returns:
            The new unscaled rates, which are then in the optimizer too.

        Raises:
            RuntimeError: Someone else stepped it.
        """
        if self._scheduler is None:
            return unscaled
        if _epoch(self._scheduler) != self._epoch:
            expected, got = f"last_epoch {self._epoch}", f"{_epoch(self._scheduler)}"
            why = ": someone else stepped it, and LayerwiseLR does"
            raise RuntimeError(checks.message(op, "base", expected, got + why))
        before = _containers_copied(self._scheduler.state_dict())
        scaled = rates.copies(self._optimizer)
        rates.write(self._optimizer, unscaled)
        try:
            self._scheduler.step()
        except BaseException:
            self._scheduler.load_state_dict(before)
            rates.write(self._optimizer, scaled)
            raise
        self._epoch = _epoch(self._scheduler)
        return rates.copies(self._optimizer)

    def state_dict(self) -> dict[str, Any] | None:
        """Return a copy of its state and what it is; None if there is none."""
        if self._scheduler is None:
            return None
        state = copy.deepcopy(self._scheduler.state_dict())
        return {"kind": type(self._scheduler).__name__, "state": state}

    def load(self, saved: SavedState) -> None:
        """Restore it if its saved state fits; put it back as it was if it refuses."""
        kind = type(self._scheduler).__name__ if self._scheduler is not None else None
        entry = saved.get("base", dict) if saved.get("base", object) is not None else {}
        if entry.get("kind") != kind:
            saved.fail(f"base {kind}", f"base {entry.get('kind')}")
        if self._scheduler is None:
            return
        before = copy.deepcopy(self._scheduler.state_dict())
        saved.check_base(before, entry.get("state"))
        try:
            self._scheduler.load_state_dict(copy.deepcopy(entry["state"]))
        except BaseException:
            self._scheduler.load_state_dict(before)
            raise
        self._epoch = _epoch(self._scheduler)


def _epoch(scheduler: LRScheduler | None) -> int | None:
    return getattr(scheduler, "last_epoch", None)  # ChainedScheduler has none


def _containers_copied(value: Any) -> Any:
    """Copy dicts and lists, at every depth; what they hold is replaced by a step, not written."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = _containers_copied(item)
        return copied
    return [_containers_copied(item) for item in value] if isinstance(value, list) else value
