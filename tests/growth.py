"""What a process holds, before and after."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from torch import Tensor


def live_tensors() -> int:
    """How many tensors Python can reach, but for those that were there when the tests began."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
