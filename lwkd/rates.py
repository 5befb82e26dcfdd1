"""The rates in an optimizer's groups: checked, copied, written, and watched for other writers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lwkd.ops import checks
from lwkd.policy import is_number

Rate = float | Tensor
UNSCALED, SCALED = "unscaled_lr", "scaled_lr"
"""Keys that every group gets, and the optimizer's state_dict with it: see `start`."""


def check(op: str, argument: str, rate: object, where: str = "") -> None:
    """Raise unless a rate is a finite number >= 0, or a floating tensor of one.

    Args:
        op: Who asks.
        argument: The argument that holds the rate.
        rate: The rate; the value of one on the meta device is not looked at.
        where: Added to what was got.

    Raises:
        TypeError: Something else than a number or a floating tensor.
        ValueError: Several numbers, or one that is no rate.
    """
    expected, largest = "a number >= 0", sys.float_info.max
    if isinstance(rate, Tensor):
        expected = "a floating tensor of one number >= 0"
        if not rate.is_floating_point():
            raise TypeError(checks.message(op, argument, expected, f"{rate.dtype}{where}"))
        if rate.numel() != 1:
            got = f"shape {tuple(rate.shape)}{where}"
            raise ValueError(checks.message(op, argument, expected, got))
        if rate.is_meta:
            return
        largest = torch.finfo(rate.dtype).max
        rate = float(rate)
    elif not is_number(rate):
        got = f"{type(rate).__name__}{where}"
        raise TypeError(checks.message(op, argument, expected, got))
    if not 0.0 <= rate <= largest:
        raise ValueError(checks.message(op, argument, expected, f"{rate}{where}"))


def copies(optimizer: Optimizer) -> list[Rate]:
    """Copy every group's rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def write(optimizer: Optimizer, rates: Sequence[Rate]) -> None:
    """Set every group's rate, in place where it is a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(rate))
        else:
            group["lr"] = float(rate) if isinstance(rate, Tensor) else rate


def check_all(op: str, optimizer: Optimizer) -> None:
    """Check the rates of all groups, and those that an earlier scheduler left there."""
    for i, group in enumerate(optimizer.param_groups):
        for key in ("lr", UNSCALED, SCALED):
            if key == "lr" or key in group:
                where = f" as {key!r} in group {group.get('name', i)!r}"
                check(op, "optimizer", group.get(key), where)


def start(optimizer: Optimizer) -> list[Rate]:
    """Give every group a rate of its own, and the one that it had before it was scaled.

    A rate that an earlier scheduler has scaled, in this process or in the checkpoint that the
    optimizer was restored from, would otherwise be scaled again. One that is not as that scheduler
    left it was written by the user, and is taken.

    Returns:
        Copies of the unscaled rates.
    """
    seen: set[int] = set()
    for group in optimizer.param_groups:
        rate = group["lr"]
        # torch puts one and the same tensor into all; one from inference mode cannot be written.
        if isinstance(rate, Tensor) and (id(rate) in seen or rate.is_inference()):
            group["lr"] = rate.detach().clone()
        seen.add(id(rate))
    write(optimizer, [_before(group) for group in optimizer.param_groups])
    return copies(optimizer)


def _before(group: dict[str, Any]) -> Rate:
    now: Rate = group["lr"]
    before: Rate | None = group.get(UNSCALED)
    scaled: Rate | None = group.get(SCALED)
    if before is None or scaled is None:
        return now
    if any(isinstance(x, Tensor) and x.is_meta for x in (now, before, scaled)):
        return now
    return before if float(scaled) == float(now) else now


class Watch:
    """Notices when someone else writes rates, or renames, swaps or adds groups.

    Args:
        optimizer: The optimizer.
        keys: A name for each group.
    """

    def __init__(self, optimizer: Optimizer, keys: Sequence[str]) -> None:
        self._optimizer, self._keys = optimizer, keys
        self._titles = [group.get("name") for group in optimizer.param_groups]
        self._written: list[tuple[Rate, int]] = []

    def note(self, unscaled: Sequence[Rate], scaled: Sequence[Rate]) -> None:
        """Remember the rates as they are now, and leave in the groups what `start` needs."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self._written = [(r, r._version if isinstance(r, Tensor) else 0) for r in rates]
        for group, before, after in zip(groups, unscaled, scaled, strict=True):
            group[UNSCALED], group[SCALED] = before, after

    def put_back(self) -> None:
        """Put the rates that are known into the groups, whatever their values are by now."""
        for group, (written, _) in zip(self._optimizer.param_groups, self._written, strict=True):
            group["lr"] = written

    def check_rates(self, op: str, scaled: Sequence[Rate]) -> None:
        """Raise if a rate is not what was last written; look at values only if it was touched."""
        groups = self._optimizer.param_groups
        for i, (group, (written, version)) in enumerate(zip(groups, self._written, strict=True)):
            rate, last = group["lr"], scaled[i]
            if rate is written and (not isinstance(rate, Tensor) or rate._version == version):
                continue
            if float(rate) != float(last):
                expected = f"lr {float(last)} in group {self._keys[i]!r}, as last written"
                got = f"{float(rate)}; schedule rates with base=, load both states together"
                raise RuntimeError(checks.message(op, "optimizer", expected, got))
            # An equal copy, from the optimizer's load_state_dict: keep the tensor that is known.
            group["lr"] = written.copy_(rate) if isinstance(written, Tensor) else written

    def check_groups(self, op: str) -> None:
        """Raise if groups were added, or renamed by loading another optimizer's state."""
        groups = self._optimizer.param_groups
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
