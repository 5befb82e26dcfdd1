"""One all-reduce of additive statistics, so that every rank computes the same learning rates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lwkd.ops import checks


class Verdict:
    """Whether any rank reported bad arguments, read without draining a GPU's queue.

    On a CPU the answer is there at once. On CUDA it travels to pinned host memory behind the
    all-reduce, and whoever asks without ``wait`` gets False until it has arrived.

    Args:
        flag: The number of ranks that failed, a scalar tensor.

    >>> Verdict(torch.tensor(0.0)).failed(), Verdict(torch.tensor(1.0)).failed()
    (False, True)
    """

    def __init__(self, flag: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._flag = flag
        if flag.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._flag = torch.zeros(())  # what a graph replays has passed the checks
        elif flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(flag.device))

    def failed(self, *, wait: bool = True) -> bool:
        """Tell whether a rank failed.

        Args:
            wait: Wait for the answer if it is still on its way.

        Returns:
            True if one is known to have failed.
        """
        if self._arrival is not None:
            if wait:
                self._arrival.synchronize()
            elif not self._arrival.query():
                return False
        return bool(self._flag > 0)


class Pooled(NamedTuple):
    """What all ranks have together.

    Attributes:
        mean: Weighted mean of the distances, [L]; 0 where no rank had a weight.
        weight: Sum of the weights, [L]; all 0 if a rank failed.
        verdict: Whether a rank failed.
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


def pool(
    d: Tensor, weight: Tensor, *, failed: bool = False, group: dist.ProcessGroup | None = None
) -> Pooled:
    """Average distances over the ranks: Σ weight·d / Σ weight, layer by layer.

    One all-reduce of 2L + 1 float64 numbers: Σ weight·d, Σ weight and the number of ranks that
    failed. Collective: every rank of the group calls it, also one without distances (weight 0)
    or with bad arguments (``failed``), so that none waits for another. The result is the same,
    bit for bit, on all ranks. No host synchronisation.

    Args:
        d: This rank's distances [L], finite.
        weight: This rank's weights [L], finite and not negative; 0 leaves a layer out.
        failed: This rank is about to raise.
        group: The process group; None is the default one.

    Returns:
        Mean, weight and verdict, in the dtype of ``d``.

    Raises:
        RuntimeError: A rank did not take part within the group's timeout.
    """
    flag = torch.full((1,), float(failed), dtype=torch.float64, device=d.device)
    buffer = torch.cat([d.double() * weight, weight.double(), flag])
    try:
        dist.all_reduce(buffer, group=group)
    except RuntimeError as error:
        expected = "a call on every rank of the process group within its timeout"
        got = f"{type(error).__name__}: {error}"
        raise RuntimeError(checks.message("LayerwiseLR.update", "d", expected, got)) from error
    total, weights, flags = buffer.split([d.numel(), d.numel(), 1])
    weights = torch.where(flags > 0, 0.0, weights)
    mean = torch.where(weights > 0, total / weights, 0.0)
    return Pooled(mean.to(d.dtype), weights.to(d.dtype), Verdict(flags[0]))
