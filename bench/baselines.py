"""What ours is measured against: eager PyTorch, the formulas of others, and the floor.

All formulas take (students, teachers, channel_dim) and return one scalar a layer, so that they are
timed alike. They are written here from the papers and the conventions of each project.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, RowsCase

Formula = Callable[[Sequence[Tensor], Sequence[Tensor], int], Sequence[Tensor]]

# --- eager: two ways to the map, and which is faster depends on layout and device ---------------

PowerMap = Callable[[Tensor, int], Tensor]


def squares(x: Tensor, channel_dim: int) -> Tensor:
    """Σ_c x² at each position, [N, P], in float32 or wider: bfloat16 sums lose all digits."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(channel_dim).flatten(1)


def norms(x: Tensor, channel_dim: int) -> Tensor:
    """The same through the norm: the activations are read once and nothing of their size kept."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=channel_dim, dtype=dtype).square().flatten(1)


def l2(ms: Tensor, mt: Tensor) -> Tensor:
    """Σ_q (m_S/‖m_S‖ − m_T/‖m_T‖)², [N] (Zagoruyko & Komodakis 2017)."""
    return (F.normalize(ms, dim=1) - F.normalize(mt, dim=1)).square().sum(1)


def js(ms: Tensor, mt: Tensor) -> Tensor:
    """H(½P_S + ½P_T) − ½H(P_S) − ½H(P_T), P = m/Σm, [N] (Kokane, Uddin & Xu 2024)."""
    ps, pt = ms / ms.sum(1, keepdim=True), mt / mt.sum(1, keepdim=True)
    entr = torch.special.entr
    return (entr(0.5 * (ps + pt)) - 0.5 * (entr(ps) + entr(pt))).sum(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2, "js": js}


def eager(divergence: str, power_map: PowerMap = squares) -> Formula:
    """The mean distance of every layer."""
    distance = DISTANCES[divergence]

    def formula(
        students: Sequence[Tensor], teachers: Sequence[Tensor], channel_dim: int
    ) -> list[Tensor]:
        pairs = zip(students, teachers, strict=True)
        return [
            distance(power_map(s, channel_dim), power_map(t, channel_dim)).mean() for s, t in pairs
        ]

    return formula


# --- others: their conventions, for [N, C, H, W] -----------------------------------------------


def at_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], channel_dim: int
) -> list[Tensor]:
    """The convention of the attention-transfer code: mean over channels, samples, positions."""

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.float().pow(2).mean(channel_dim).flatten(1))

    pairs = zip(students, teachers, strict=True)
    return [(attention(s) - attention(t)).pow(2).mean() for s, t in pairs]


def torchdistill(
    students: Sequence[Tensor], teachers: Sequence[Tensor], channel_dim: int
) -> list[Tensor]:
    """The paper's convention, which torchdistill offers: ‖q_S − q_T‖₂ a sample, over N."""

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.float().pow(2).sum(channel_dim).flatten(1))

    pairs = zip(students, teachers, strict=True)
    return [torch.norm(attention(s) - attention(t), dim=1).sum() / len(s) for s, t in pairs]


PEERS: dict[str, Formula] = {"at_loss": at_loss, "torchdistill": torchdistill}

# What each peer's number is in terms of our distance: (D [N] of a layer, positions) -> scalar.
CONVENTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "at_loss": lambda d, positions: d.mean() / positions,
    "torchdistill": lambda d, positions: d.sqrt().mean(),
}

# --- float64: what the gate compares with ------------------------------------------------------


def exact(
    case: Case, s: Tensor, t: Tensor, chunk: int = 8
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (samples, D [n], gradient of the mean distance) of one layer in float64, by chunks."""
    for start in range(0, case.samples, chunk):
        part = slice(start, min(start + chunk, case.samples))
        wide = s[part].detach().double().requires_grad_()
        maps = [squares(x, case.channel_dim) for x in (wide, t[part].double())]
        d = DISTANCES[case.divergence](*maps)
        (grad,) = torch.autograd.grad(d.sum() / case.samples, wide)
        yield part, d.detach(), grad


# --- floors ------------------------------------------------------------------------------------

# One pass over memory, by every stock operation that might be the fastest here; the fastest one on
# the case's own tensors serves as the floor, and its name is recorded with the row.
_WIDTH = 1024
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "amax": torch.amax,
    "vector_norm": torch.linalg.vector_norm,
    "dot": lambda x: torch.dot(x, x),
    "mv": lambda x: torch.mv(x.view(-1, _WIDTH), x[:_WIDTH]),
    "int64 sum": lambda x: x.view(torch.int64).sum(),
}
WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, out: torch.mul(x, 1.5, out=out),
    "copy": lambda x, out: out.copy_(x),
}


def flat(x: Tensor) -> Tensor:
    """The memory of a dense tensor, in the order in which it lies there."""
    return x.detach().as_strided((x.numel(),), (1,))


def _fastest(candidates: Mapping[str, Callable[[], object]], tries: int = 5) -> str:
    """The quickest of several calls on the CPU, by its best time; one that cannot run is out."""
    best: dict[str, float] = {}
    for _ in range(tries):
        for name, call in candidates.items():
            start = time.perf_counter()
            try:
                call()
            except RuntimeError:  # a width that does not divide, or no such kernel for the dtype
                continue
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return min(best, key=best.__getitem__)


class Floor:
    """Every input read once; with a backward also S read again and a kept buffer written.

    Args:
        case: The case; where it is ``small`` the passes are over one buffer a side.
        students: As drawn.
        teachers: As drawn.
        backward: Whether the second half is run.
    """

    def __init__(
        self,
        case: Case | RowsCase,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        *,
        backward: bool,
    ) -> None:
        sources = [flat(s) for s in students]
        inputs = sources + [flat(t) for t in teachers]
        if case.small:
            sources, inputs = [torch.cat(sources)], [torch.cat(inputs)]
        self._inputs = inputs
        self._pairs = [(s, torch.empty_like(s)) for s in sources] if backward else []
        self.read, self.write = "sum", "mul"
        if case.device == "cpu":
            self.read = _fastest({k: self._reading(k) for k in READS})
            self.write = _fastest({k: self._writing(k) for k in WRITES})
        self._run = (self._reading(self.read), self._writing(self.write))

    def _reading(self, name: str) -> Callable[[], object]:
        return lambda: [READS[name](x) for x in self._inputs]

    def _writing(self, name: str) -> Callable[[], object]:
        return lambda: [WRITES[name](x, out) for x, out in self._pairs]

    def __str__(self) -> str:
        return f"{self.read}, {self.write}" if self._pairs else self.read

    def __call__(self) -> None:
        for run in self._run:
            run()
