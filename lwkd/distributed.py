"""One all-reduce of additive statistics, so that every rank computes the same learning rates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lwkd.ops import checks

Reason = Literal["failed", "apart"]
"""Why nothing came of a call: a rank had bad arguments, or the ranks are not at the same call."""


class Verdict:
    """Whether all ranks agreed, read without draining a GPU's queue.

    On a CPU the answer is there at once. On CUDA it travels to pinned host memory behind the
    all-reduce, and whoever asks without ``wait`` gets None until it has arrived.

    Args:
        flags: [2]: how many ranks failed; more than 0 if the ranks are at different calls.

    >>> Verdict(torch.tensor([0.0, 0.0])).reason()
    >>> Verdict(torch.tensor([1.0, 0.0])).reason(), Verdict(torch.tensor([0.0, 1.0])).reason()
    ('failed', 'apart')
    """

    def __init__(self, flags: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._flags = flags
        if _capturing(flags.device):
            self._flags = torch.zeros(2)  # what a graph replays has passed the checks
        elif flags.device.type == "cuda":
            self._flags = torch.empty(2, dtype=flags.dtype, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(flags.device))

    def reason(self, *, wait: bool = True) -> Reason | None:
        """Tell why nothing came of the call.

        Args:
            wait: Wait for the answer if it is still on its way.

        Returns:
            None if all is well, as far as is known.
        """
        if self._arrival is not None:
            if wait:
                self._arrival.synchronize()
            elif not self._arrival.query():
                return None
        failed, apart = self._flags.tolist()
        return "failed" if failed > 0 else "apart" if apart > 0 else None


class Pooled(NamedTuple):
    """What all ranks have together.

    Attributes:
        mean: Weighted mean of the distances, [L]; 0 where no rank had a weight.
        weight: Sum of the weights, [L], at most the largest float; all 0 unless all ranks agreed.
        verdict: Whether they did.
    """

    mean: Tensor
    weight: Tensor
    verdict: Verdict


def is_active(group: dist.ProcessGroup | None = None) -> bool:
    """Tell whether there are other ranks to agree with.

    Args:
        group: The process group; None is the default one.

    Returns:
        True if torch.distributed is initialised and the group has more than one rank.

    >>> is_active()
    False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def checked_group(group: object, op: str) -> dist.ProcessGroup | None:
    """Return a process group, or None for the default one.

    Raises:
        TypeError: Something else; also what torch gives to a rank that is not in a new group.
    """
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return group
    expected, got = "None or a process group with this rank in it", type(group).__name__
    raise TypeError(checks.message(op, "process_group", expected, got))


def agree(number: int, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Tell whether all ranks have the same number, by an all-reduce of fixed size.

    Collective. It reads the answer, and is meant to be called once; while a CUDA graph is captured
    it does nothing and says yes.

    Args:
        number: 32 bits.
        device: Where the process group communicates.
        group: The process group; None is the default one.

    Returns:
        The same on all ranks.

    Raises:
        RuntimeError: A rank did not take part within the group's timeout.
    """
    if _capturing(device):
        return True
    halves = torch.tensor([number & 0xFFFF, number >> 16], dtype=torch.float64)
    buffer = torch.cat([halves, halves**2]).to(device)
    _all_reduce(buffer, group)
    sums, squares = buffer.chunk(2)
    return not bool(_spread(sums, squares, group).gt(0).any())


def pool(
    d: Tensor,
    weight: Tensor,
    *,
    failed: bool = False,
    stamp: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Pooled:
    """Average distances over the ranks: Σ weight·d / Σ weight, layer by layer.

    One all-reduce of 2L + 3 float64 numbers: Σ weight·d, Σ weight, the number of ranks that
    failed, Σ stamp and Σ stamp². Collective: every rank of the group calls it, also one without
    distances (weight 0) or with bad arguments (``failed``), so that none waits for another. The
    result is the same, bit for bit, on all ranks. No host synchronisation.

    Args:
        d: This rank's distances [L], finite.
        weight: This rank's weights [L], finite and not negative; 0 leaves a layer out.
        failed: This rank is about to raise.
        stamp: 16 bits that say which call this is: a rank that left one out shows by its stamp.
        group: The process group; None is the default one.

    Returns:
        Mean, weight and verdict, in the dtype of ``d``.

    Raises:
        RuntimeError: A rank did not take part within the group's timeout.
    """
    # Filled one by one: a tensor made of a list would be copied from the host, and wait for it.
    own = [d.new_full((1,), x, dtype=torch.float64) for x in (failed, stamp, stamp**2)]
    buffer = torch.cat([d.double() * weight, weight.double(), *own])
    _all_reduce(buffer, group)
    total, weights, failures, stamps, squares = buffer.split([d.numel(), d.numel(), 1, 1, 1])
    flags = torch.cat([failures, _spread(stamps, squares, group)])
    weights = torch.where((flags > 0).any(), 0.0, weights)
    mean = torch.where(weights > 0, total / weights, 0.0)
    weights = weights.clamp(max=torch.finfo(d.dtype).max)
    return Pooled(mean.to(d.dtype), weights.to(d.dtype), Verdict(flags))


def _spread(sums: Tensor, squares: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return 0 where all ranks had the same whole number; exact for numbers of 16 bits."""
    apart = (dist.get_world_size(group) * squares - sums**2).abs()
    return torch.where(apart > 0.25, apart, 0.0)


def _all_reduce(buffer: Tensor, group: dist.ProcessGroup | None) -> None:
    try:
        dist.all_reduce(buffer, group=group)
    except RuntimeError as error:
        expected = "a call on every rank of the process group within its timeout"
        got = f"{type(error).__name__}: {error}"
        raise RuntimeError(checks.message("LayerwiseLR.update", "d", expected, got)) from error


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
