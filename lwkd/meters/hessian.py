"""Hessian distances of two networks: traces of every layer's block, by the same probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.curvature import TraceEstimate
from lwkd.curvature.settings import check_options
from lwkd.curvature.trace import estimate
from lwkd.layers import LayerPairs
from lwkd.meters.blocks import Blocks
from lwkd.ops.checks import flag, message
from lwkd.ops.hessian import distance

_OP = "HessianMeter"


class HessianMeter(Blocks[None]):
    """Measures how far the curvature of the student's layers is from that of the teacher's.

    With tr H_l the trace of the Hessian of the loss by the parameters of layer l, estimated by
    :func:`lwkd.hessian_trace` with the same seed in both networks:

    * normalize=True: d_l = |tr_S − tr_T| / (|tr_S| + |tr_T| + 1e-12), in [0, 1];
    * normalize=False: d_l = |tr_S/numel_S − tr_T/numel_T|.

    Second derivatives want a graph of their own: ``measure`` makes it. In a training loop the
    with-blocks count the steps, and ``discrepancy`` measures when a block was due::

        with meter:
            loss = F.cross_entropy(student(x), y)
        ...
        rates.update(meter.discrepancy(x, y, F.cross_entropy))

    Source: Yao et al. 2020 (PyHessian).

    Args:
        pairs: From :func:`lwkd.pair_layers`. The student's parameters count that are trained, the
            teacher's all, frozen or not.
        estimator: "auto", "gauss_newton", "split", "block" or "hutchinson", as in
            ``hessian_trace``; "auto" looks at every layer in every measurement.
        probes: As there.
        normalize: As above.
        exact: As in ``hessian_trace``.
        chunk: Likewise.
        seed: Of the probes, 64 bits; every measurement takes the same ones.
        every: Measure after every k-th with-block.
        backend: None; the other meters take it.

    Raises:
        ValueError: An argument out of its range; from a call what ``hessian_trace`` raises.
        TypeError: ``pairs`` is not a ``LayerPairs``, or normalize no bool.

    >>> import torch
    >>> from lwkd.layers import pair_layers
    >>> nets = [torch.nn.Sequential(torch.nn.Linear(4, c), torch.nn.ReLU(), torch.nn.Linear(c, 3))
    ...         for c in (8, 16)]
    >>> meter = HessianMeter(pair_layers(*nets, ["0", "2"]), probes=4)
    >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> meter.measure(x, y, torch.nn.functional.cross_entropy).shape
    torch.Size([2])
    """

    def __init__(
        self,
        pairs: LayerPairs,
        *,
        estimator: str = "auto",
        probes: int = 8,
        normalize: bool = True,
        exact: bool = False,
        chunk: int = 1,
        seed: int = 0,
        every: int = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__(_OP, pairs, seed=seed, every=every, backend=backend)
        flag(_OP, "normalize", normalize)
        if backend is not None:
            expected = "None: each layer's way is its estimator's"
            raise ValueError(message(_OP, "backend", expected, repr(backend)))
        self._settings = check_options(
            _OP, estimator, probes, seed, None, None, chunk, exact
        )  # fmt: skip
        self._normalize = normalize
        self._numbers: dict[tuple[int, str], int] = {}
        self.estimates: tuple[TraceEstimate, TraceEstimate] | None = None
        """Student's and teacher's traces of the last measurement."""

    def _watch(self, stack: ExitStack) -> tuple[None, None]:
        return None, None

    def discrepancy(
        self, inputs: Any, target: Any = None, loss_fn: Callable[..., Tensor] | None = None
    ) -> Tensor | None:
        """Measure, if the last with-block was due.

        Args:
            inputs: As in :meth:`measure`.
            target: Likewise.
            loss_fn: Likewise.

        Returns:
            [L], or None if the block was not due.

        Raises:
            RuntimeError: Before any block, inside one, or after one that raised.
        """
        self._check_ended("a call after a with-block that has ended without an exception")
        return None if self._sides is None else self.measure(inputs, target, loss_fn)

    def measure(
        self, inputs: Any, target: Any = None, loss_fn: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Estimate the traces of both networks and return the distances.

        Both run in the mode they are in and, where they are compiled, as the original modules.
        Modes, buffers, ``.grad``, generators and hooks are left as they were, also after an
        exception. Does not count as a block.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments for both
                networks.
            target: What ``loss_fn`` takes.
            loss_fn: ``loss_fn(output, target)``, a scalar: the mean over the batch.

        Returns:
            [L] float32, on the student's device.

        Raises:
            RuntimeError: Inside a with-block of this meter.
            ValueError: No ``loss_fn``; and as ``hessian_trace``.
        """
        self._check_outside()
        if not callable(loss_fn):
            expected = "loss_fn(output, target), whose second derivatives are measured"
            raise ValueError(message(f"{_OP}.measure", "loss_fn", expected, repr(loss_fn)))
        student = self._traces(
            self.pairs.student, self.pairs.student_layers, inputs, target, loss_fn
        )
        with _trained(module for _, module in self.pairs.teacher_layers):
            teacher = self._traces(
                self.pairs.teacher, self.pairs.teacher_layers, inputs, target, loss_fn
            )
        self.estimates = student[0], teacher[0]
        s, t = student[1], teacher[1].to(student[1].device)
        return distance(s, t, student[2], teacher[2], self._normalize).float()

    def _traces(
        self, network: nn.Module, layers: Sequence[tuple[str, nn.Module]], inputs: Any, target: Any,
        loss_fn: Callable[..., Tensor],
    ) -> tuple[TraceEstimate, Tensor, list[int]]:  # fmt: skip
        """The estimate, and of every pair's layer the trace and the number of parameters."""
        names = [name for name, _ in layers]
        unique = list(dict.fromkeys(names))  # a layer may be the partner of several

        def number(layer: str, parameter: str) -> int:
            """Of a parameter's signs: the partner's parameter of that name has the same."""
            key = names.index(layer), parameter
            return self._numbers.setdefault(key, len(self._numbers))

        found = estimate(network, loss_fn, (inputs, target), unique, self._settings, number)
        places = torch.tensor([unique.index(name) for name in names], device=found.mean.device)
        sizes = [sum(p.numel() for p in module.parameters() if p.requires_grad)
                 for _, module in layers]  # fmt: skip
        return found, found.mean[places], sizes


@contextmanager
def _trained(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have gradients by parameters that are frozen."""
    frozen = [p for module in modules for p in module.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
