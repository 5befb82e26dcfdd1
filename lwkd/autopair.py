"""Which layers of a network are worth pairing, from what was seen to run: pure functions.

A network of equal blocks (a ViT) offers its blocks; any other the last module of every stage, a
run of outputs of one resolution and channel count. Two networks are aligned by relative depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log2, prod

from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """A module that ran, in order of completion; weights: how many weight layers had run."""

    name: str
    module: nn.Module
    shape: Shape
    weights: int


@dataclass(frozen=True)
class Candidate:
    """A layer worth pairing, at its depth in [0, 1], and why."""

    name: str
    shape: Shape
    depth: float
    why: str


def candidates(events: Sequence[Event]) -> list[Candidate]:
    """Return the layers of one network that are worth pairing, in order."""
    return _blocks(events) or _stages(events)


def times(sizes: Iterable[int] | None) -> str:
    """Write sizes as 8x8."""
    return "?" if sizes is None else "x".join(map(str, sizes))


def _blocks(events: Sequence[Event]) -> list[Candidate]:
    """Take the repeated blocks of a network that consists of blocks of one shape."""
    classes: dict[type, list[Event]] = {}
    for e in events:
        if _composite(e) and type(e.module) is not nn.Sequential and len(e.shape) > 2:
            classes.setdefault(type(e.module), []).append(e)
    groups = [_outermost(group) for group in classes.values()]
    groups = [g for g in groups if len(g) > 1]
    largest = max(groups, key=lambda g: sum(map(_numel, g)), default=[])
    total = sum(_numel(e) for e in _outermost(events))
    if len({e.shape for e in largest}) != 1 or 2 * sum(map(_numel, largest)) < total:
        return []
    n = len(largest)
    return [
        Candidate(e.name, e.shape, i / n, f"block {i} of {n}") for i, e in enumerate(largest, 1)
    ]


def _stages(events: Sequence[Event]) -> list[Candidate]:
    """Take the last module before each change of resolution or channel count."""
    children: dict[str, list[Event]] = {"": []}
    ran = {e.name for e in events}
    for e in events:
        children.setdefault(next((a for a in _above(e.name) if a in ran), ""), []).append(e)
    level = _level(children, "")
    ends = _ends(level)
    while len(ends) < 2 and (inside := [e for e in level if e.name in children]):
        whole = max(inside, key=_numel)
        at = level.index(whole)
        level = level[:at] + _level(children, whole.name) + level[at + 1 :]
        ends = _ends(level) or ends
    last = ends[-1].weights if ends else 1
    return [
        Candidate(e.name, e.shape, e.weights / max(last, 1), f"last at {times(e.shape[1:])}")
        for e in ends
    ]


def _level(children: Mapping[str, list[Event]], name: str) -> list[Event]:
    """List what runs directly inside a module, looking into trunks: what changes size twice."""
    level: list[Event] = []
    for e in children[name]:
        inside = [x.shape for x in children.get(e.name, []) if _spatial(x)]
        sizes = {s[2:] for s in inside if len(s) > 3}
        # [N, A, B] is tokens or a signal: a trunk changes both sizes, a block at most one twice
        sides = min(len({s[d] for s in inside if len(s) == 3}) for d in (1, 2))
        if max(len(sizes), sides) > 2:
            level += _level(children, e.name)
        else:
            level.append(e)
    return level


def _ends(level: Sequence[Event]) -> list[Event]:
    """Return the last module of each stage: a run of outputs of one shape, with parameters."""
    runs = [list(run) for _, run in groupby(filter(_spatial, level), key=lambda e: e.shape[1:])]
    runs = [run for run in runs if any(map(_numel, run))]
    # Where two stages or more hold composite blocks, single layers are stem or transition.
    deep = [run for run in runs if any(map(_composite, run))]
    runs = deep if len(deep) > 1 else runs
    dropout = nn.modules.dropout._DropoutNd
    kept = ([e for e in run if not isinstance(e.module, dropout)] for run in runs)
    # What owns weights can be given a rate of its own: a convolution, not the ReLU behind it.
    weighty = ([e for e in run if _weighty(e)] or run for run in kept)
    return [run[-1] for run in weighty if run]


def align(a: list[Candidate], b: list[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Match every layer of the shorter list to one of the longer, in order.

    Minimises the sum of differences in relative depth, then of resolution, by dynamic programming.
    """
    if len(a) > len(b):
        return [(s, t) for t, s in align(b, a)]
    best: list[tuple[float, float, list[int]]] = [(0.0, 0.0, [])] * (len(b) + 1)
    for s in a:
        row: list[tuple[float, float, list[int]]] = [(float("inf"), 0.0, [])]
        for j, t in enumerate(b):
            depth, size, path = best[j]
            apart = abs(log2(_positions(s.shape) / _positions(t.shape)))
            taken = (round(depth + abs(s.depth - t.depth), 6), round(size + apart, 6), [*path, j])
            row.append(min(row[-1], taken, key=lambda r: r[:2]))
        best = row
    return [(s, b[j]) for s, j in zip(a, best[-1][2], strict=True)]


def _spatial(e: Event) -> bool:
    """Whether an output has more than one position."""
    if len(e.shape) == 3:
        return min(e.shape[1:]) > 1
    return len(e.shape) > 3 and prod(e.shape[2:]) > 1


def _positions(shape: Shape) -> int:
    return shape[1] if len(shape) == 3 else prod(shape[2:])


def _composite(e: Event) -> bool:
    return any(any(True for _ in c.parameters()) for c in e.module.children())


def _weighty(e: Event) -> bool:
    return any(p.dim() > 1 for p in e.module.parameters())


def _numel(e: Event) -> int:
    return sum(p.numel() for p in e.module.parameters())


def _above(name: str) -> list[str]:
    """List the names of the modules around a module, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1)]


def _outermost(events: Sequence[Event]) -> list[Event]:
    names = {e.name for e in events}
    return [e for e in events if not names.intersection(_above(e.name))]
