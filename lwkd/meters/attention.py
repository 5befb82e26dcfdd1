"""Attention distances of two networks while they run; the teacher is streamed, not stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwkd.hooks import Capture, run, untouched
from lwkd.layers import LayerPairs
from lwkd.meters.blocks import SIDES, Blocks
from lwkd.ops import attention_maps
from lwkd.ops.attention import channel_dims, check_options, discrepancy, folds
from lwkd.ops.checks import message

_OP = "AttentionMeter"
Fold = tuple[int, int, int]


class AttentionMeter(Blocks[Capture[Tensor]]):
    """Measures the attention distance of every layer pair, in a with-block around the forwards.

    Activations are reduced to maps m[n,q] = Σ_c |x[n,c,q]|^p the moment a layer has produced them:
    one float a position, sample and layer stays, of the student and of the teacher, and nothing of
    the graph; the training step is not touched. The distances are those of
    ``ops.layer_discrepancy``: D[n] = Σ_q (m_S/‖m_S‖₂ − m_T/‖m_T‖₂)² ("l2") or the Jensen–Shannon
    divergence of the maps ("js"). Sources: Zagoruyko & Komodakis 2017; Kokane, Uddin & Xu 2024.

    In a block the j-th call of a layer in the student is compared to the j-th of its partner in the
    teacher; the mean is over the samples of all calls. Recomputations of activation checkpointing
    do not count. Every ``every``-th block is due, the first one included; in the others no hooks
    are installed. A block that ends with an exception leaves nothing and is not counted. No host
    synchronisation takes place.

    Args:
        pairs: From :func:`lwkd.pair_layers`.
        divergence: "l2" or "js".
        p: Power of the map, ≥ 1.
        beta: The student's weight in "js", in (0, 1).
        channel_dim: An int, a (student, teacher) tuple, or a list of L of these. None means 1 for
            four or more dimensions; three dimensions must say (1: [N, C, T], -1: [N, T, D]),
            unless ``tokens`` does.
        tokens: A (student, teacher) pair, each None or (h, w, prefix): that side's layers put out
            [N, prefix + h·w, D]; the prefix is dropped and the rest folded to an h×w grid.
        seed: Of no effect, since nothing is random here; all meters take it.
        every: Measure in every k-th block.
        backend: Of the comparison: None, "reference", "compiled" or "triton".

    Raises:
        ValueError: p, beta, divergence, every, channel_dim, tokens or backend out of range; from a
            forward: an output of the wrong shape (the message names the layer).
        TypeError: ``pairs`` is not a ``LayerPairs``; from a forward: a layer without a tensor.
        RuntimeError: On entering: a block inside a block, or a compiled network, for which
            ``measure`` and ``ops.layer_discrepancy`` are there.

    >>> import torch
    >>> from lwkd.layers import pair_layers
    >>> student = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU())
    >>> meter = AttentionMeter(pair_layers(student, teacher, ["1"]), every=2)
    >>> for step in range(3):
    ...     x = torch.ones(2, 1, 8, 8)
    ...     with meter, torch.no_grad():
    ...         _ = student(x), teacher(x)
    ...     d = meter.discrepancy()
    ...     print(None if d is None else tuple(d.shape))
    (1,)
    None
    (1,)
    """

    def __init__(
        self,
        pairs: LayerPairs,
        *,
        divergence: str = "l2",
        p: float = 2.0,
        beta: float = 0.5,
        channel_dim: int | Sequence[Any] | None = None,
        tokens: Sequence[Fold | None] | None = None,
        seed: int = 0,
        every: int = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__(_OP, pairs, seed=seed, every=every, backend=backend)
        check_options(_OP, p, divergence, beta)
        self._p = p
        self._compare = partial(
            discrepancy, _OP, reduction="mean", backend=backend,
            p=1.0, channel_dim=1, divergence=divergence, beta=beta,
        )  # fmt: skip
        self._folds = folds(_OP, tokens)
        self._dims = channel_dims(_OP, channel_dim, len(pairs))

    def discrepancy(self, mask: Sequence[Tensor | None] | None = None) -> Tensor | None:
        """Return the distances of the last with-block.

        May be called again: the maps stay until the next block begins.

        Args:
            mask: A list of L, each None or bool [N, *common space] with N the samples of all calls
                in order; positions that are False are left out.

        Returns:
            [L], detached, float32 (float64 where an activation was), on the student's device; maps
            of a teacher on another device are brought there. None if the block was not due.

        Raises:
            RuntimeError: Before any block, inside one, or after one that raised; a layer that did
                not run, or not equally often in student and teacher.
            ValueError: Batch sizes that differ, maps of different dimensions, or a wrong mask.
        """
        self._check_ended("a call after a with-block that has ended without an exception")
        return None if self._sides is None else self._distances(*self._sides, mask)

    def measure(
        self,
        inputs: Any,
        target: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
        mask: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Run both networks once and return the distances.

        Both run in eval mode, without gradients and, where they are compiled, as the original
        modules. Modes, buffers, ``.grad``, generators and hooks are left as they were, also after
        an exception. Does not count as a block and leaves the last block's result alone.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments for both
                networks; tensors are moved to each network's device.
            target: Of no effect here; all meters take it.
            loss_fn: Likewise.
            mask: As in :meth:`discrepancy`.

        Returns:
            [L], as from :meth:`discrepancy`.

        Raises:
            RuntimeError: Inside a with-block of this meter; a layer that did not run, or not
                equally often in student and teacher.
            ValueError: As :meth:`discrepancy`.
            TypeError: ``inputs`` is none of the above, or a layer returns no tensor.

        >>> import torch
        >>> from lwkd.layers import pair_layers
        >>> nets = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)) for _ in range(2)]
        >>> AttentionMeter(pair_layers(*nets, ["0"])).measure(torch.ones(2, 1, 8, 8)).shape
        torch.Size([1])
        """
        self._check_outside()
        student, teacher = self.pairs.student, self.pairs.teacher
        with untouched(student, teacher), ExitStack() as stack:
            sides = self._watch(stack)
            for side, network in zip(SIDES, (student, teacher), strict=True):
                run(f"{_OP}.measure", network, inputs, side)
        return self._distances(*sides, mask)

    def _watch(self, stack: ExitStack) -> tuple[Capture[Tensor], Capture[Tensor]]:
        student, teacher = (
            stack.enter_context(self.pairs.watch(_OP, name, partial(self._reduce, side)))
            for side, name in enumerate(SIDES)
        )
        return student, teacher

    def _reduce(self, side: int, layer: int, x: Tensor) -> Tensor:
        """Reduce an activation to its map, [N, *space]."""
        pair, fold, dim = self.pairs[layer], self._folds[side], self._dims[side][layer]
        argument, name = (("student", pair.student), ("teacher", pair.teacher))[side]
        if fold is not None:
            h, w, prefix = fold
            dim = -1 if dim is None else dim
            if x.dim() != 3 or x.shape[1 if dim in (-1, 2) else 2] != prefix + h * w:
                expected = f"tokens [N, {prefix} + {h}·{w}, D]"
                raise ValueError(message(_OP, argument, expected, list(x.shape), layer=name))
        elif x.dim() < 3:
            expected = "an output with a space axis, [N, C, *space] or [N, T, D]"
            raise ValueError(message(_OP, argument, expected, list(x.shape), layer=name))
        elif x.dim() == 3 and dim is None:
            expected = "channel_dim (1: [N, C, T], -1: [N, T, D]) or tokens, for three dimensions"
            raise ValueError(message(_OP, argument, expected, list(x.shape), layer=name))
        try:
            with torch.no_grad():
                m = attention_maps([x], p=self._p, channel_dim=dim)[0]
        except (TypeError, ValueError) as error:  # the op does not know whose output it is
            raise type(error)(f"{error}; this is {argument}'s layer {name!r}") from None
        return m if fold is None else m[:, prefix:].unflatten(1, (h, w))

    def _distances(self, student: Capture[Tensor], teacher: Capture[Tensor], mask: Any) -> Tensor:
        """Compare the maps; the calls of one batch size go through the op together."""
        if mask is not None and (type(mask) not in (list, tuple) or len(mask) != len(self.pairs)):
            got = len(mask) if type(mask) in (list, tuple) else type(mask).__name__
            expected = f"a list of {len(self.pairs)}, one a layer"
            raise ValueError(message(_OP, "mask", expected, got))
        rows: dict[int, list[_Row]] = {}
        total = [0] * len(self.pairs)
        for i, pair in enumerate(self.pairs):
            maps = student.calls(i), teacher.calls(i)
            if len(maps[0]) != len(maps[1]):
                expected = f"{len(maps[0])} call(s), as of student's layer {pair.student!r}"
                got = len(maps[1])
                raise RuntimeError(message(_OP, "teacher", expected, got, layer=pair.teacher))
            for s, t in zip(*maps, strict=True):
                _check_maps(s, t, pair.teacher)
            total[i] = sum(map(len, maps[0]))
            masks = _split(None if mask is None else mask[i], *maps, pair.student)
            for s, t, m in zip(*maps, masks, strict=True):
                rows.setdefault(len(s), []).append(_Row(i, s, t.to(s.device), m))
        with torch.no_grad():
            parts = [
                (group, self._compare_rows(group, mask is not None)) for group in rows.values()
            ]
            if len(parts) == 1 and len(parts[0][0]) == len(self.pairs):
                return parts[0][1]
            means: list[Any] = [0.0] * len(self.pairs)
            for group, d in parts:
                for row, value in zip(group, d.unbind(), strict=True):
                    share = len(row.student) / max(total[row.layer], 1)
                    means[row.layer] = means[row.layer] + share * value
            return torch.stack(means)

    def _compare_rows(self, rows: Sequence[_Row], masked: bool) -> Tensor:
        # A map is an activation of one channel, and its own map at p = 1.
        student = [r.student.unsqueeze(1) for r in rows]
        teacher = [r.teacher.unsqueeze(1) for r in rows]
        return self._compare(student, teacher, mask=[r.mask for r in rows] if masked else None)


class _Row(NamedTuple):
    """One call of one layer in both networks."""

    layer: int
    student: Tensor
    teacher: Tensor
    mask: Tensor | None


def _check_maps(s: Tensor, t: Tensor, name: str) -> None:
    if len(s) != len(t):
        expected = f"batch size {len(s)}, as the student's"
        raise ValueError(message(_OP, "teacher", expected, len(t), layer=name))
    if s.dim() != t.dim():
        expected = f"{s.dim() - 1} space dimension(s), as the student's"
        got = f"{t.dim() - 1}; tokens=(student, teacher) folds tokens to a grid"
        raise ValueError(message(_OP, "teacher", expected, got, layer=name))


def _split(
    mask: Any, student: Sequence[Tensor], teacher: Sequence[Tensor], name: str
) -> Sequence[Tensor | None]:
    """Cut a mask over the samples of all calls into one a call."""
    if mask is None:
        return [None] * len(student)
    n = sum(map(len, student))
    for s, t in zip(student, teacher, strict=True):
        shape = [n, *map(min, s.shape[1:], t.shape[1:])]
        expected = f"None or bool {shape} (the common space) on {s.device}"
        got = type(mask).__name__
        if isinstance(mask, Tensor):
            if mask.dtype == torch.bool and list(mask.shape) == shape and mask.device == s.device:
                continue
            got = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        raise ValueError(message(_OP, "mask", expected, got, layer=name))
    return list(mask.split([len(s) for s in student]))
