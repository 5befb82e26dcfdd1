"""Samples of traces from one batch: second backward passes, or factored first ones.

    hutchinson     v over all layers:       q_l = ⟨v_l, (Hv)_l⟩
    block          v on one layer alone:    q_l = ⟨v_l, H_ll v_l⟩
    gauss_newton   v of the loss's Hessian by the outputs, one ordinary backward pass of ⟨v, f⟩:
                   q_l = Σ_n ‖G_n‖²
    split          that, and block of ⟨∂loss/∂f, f⟩ with ∂loss/∂f held constant: what is left

One first-order graph serves all probes. What is needed of it is decided before it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.linalg import vector_norm
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.curvature.convolution import Convolutions
from lwkd.curvature.gauss_newton import (
    OutputHessian,
    check_target,
    known_loss,
    output_hessian,
    share,
)
from lwkd.curvature.nodes import nodes
from lwkd.curvature.targets import Target, every_parameter
from lwkd.factoring import Calls, by_parameter
from lwkd.hooks import first_tensor, run
from lwkd.ops.checks import message
from lwkd.ops.factors import squares
from lwkd.ops.hessian import PROBE_DOT, RADEMACHER

FACTORED = ("gauss_newton", "split")  # these take first derivatives by factors


class Graph:
    """One batch's loss, with its first-order graph; samples of traces of every layer.

    Args:
        op: The public name of the caller, for errors.
        network: Without wrappers.
        loss_fn: ``loss_fn(output, target)``, a scalar.
        batch: (inputs, target).
        targets: The layers.
        ways: The estimator of every layer; "auto" where :meth:`examine` is to find one.
        count: Count the bytes that the graph keeps.
    """

    def __init__(
        self,
        op: str,
        network: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: tuple[Any, Any],
        targets: Sequence[Target],
        ways: Sequence[str],
        *,
        count: bool = False,
    ) -> None:
        self._op, self._network, self._loss_fn = op, network, loss_fn
        self.targets, self._target = targets, batch[1]
        self.ways = list(ways)
        self.bytes, self._counts = 0, count
        self._wanted: set[int] = set()  # ids of the parameters that the next backward pass is about
        self._places: list[list[int]] = []  # of a layer's owners among the watched modules
        watched: list[Any] = []
        for t, way in zip(targets, ways, strict=True):
            self._places.append([])
            for owner in t.owners if way in ("auto", *FACTORED) else ():
                self._places[-1].append(len(watched))
                watched.append(owner)
        self._calls = Calls(op, "model", watched, lenient="auto" in ways)
        with ExitStack() as stack:
            stack.enter_context(self._counting())
            if set(ways) != {"gauss_newton"}:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no second one
            if not {*ways} <= {"gauss_newton", "hutchinson"}:  # for probes that leave much out
                stack.enter_context(Convolutions(self._wanted))
            stack.enter_context(self._calls)
            whole = run(op, network, batch[0], "model", "batch")
            self._output = first_tensor(whole)
            if isinstance(self._target, Tensor):
                self._target = self._target.to(targets[0].parameters[0].device)
            if known_loss(loss_fn) is not None:  # these take one tensor
                whole = self.output
                check_target(op, loss_fn, whole, self._target)
            self.loss = self._checked(loss_fn(whole, self._target))
        # Its backward pass runs another one, which no derivative comes through.
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes(self.loss)):
            self._refuse("a reentrant checkpoint; torch.utils.checkpoint has use_reentrant=False")
        self._grads: dict[bool, dict[int, Tensor | None]] = {}
        self._hessian: OutputHessian | None = None
        self.first_sample: tuple[tuple[int, int] | None, dict[int, Tensor]] = None, {}
        """(seed, probe), and what the test of the factors has found for it: [N] of layers."""

    @property
    def output(self) -> Tensor:
        """What the network puts out, or the first of it."""
        if self._output is None or not self._output.is_floating_point():
            expected = "a network that puts out a floating tensor, or one first"
            got = "none" if self._output is None else self._output.dtype
            raise ValueError(message(self._op, "model", expected, got))
        return self._output

    def _counting(self) -> AbstractContextManager[Any]:
        """Count what a graph keeps while it is built."""
        if not self._counts:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._count, _same)

    def _count(self, x: Tensor) -> Tensor:
        self.bytes += x.numel() * x.element_size()
        return x

    def _checked(self, loss: object) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(message(self._op, "loss_fn", "a scalar, the mean over the batch", got))
        if not loss.requires_grad:
            expected, got = "a loss that depends on the parameters", "one that does not"
            raise ValueError(message(self._op, "loss_fn", expected, got))
        return loss

    def differentiate(self, rest: bool) -> dict[int, Tensor | None]:
        """First derivatives with their graph, by parameter: made when they are first asked for.

        Args:
            rest: Not of the loss but of ⟨∂loss/∂f, f⟩, for what "split" leaves to block probes.
        """
        if rest not in self._grads:
            own = ("split",) if rest else ("block", "hutchinson")
            wanted = [t for t, way in zip(self.targets, self.ways, strict=True) if way in own]
            parameters, indices = every_parameter(wanted)
            scalar, slope = self.loss, None
            if rest:
                (slope,) = torch.autograd.grad(self.loss, self.output, retain_graph=True)
                scalar = self.output
            with self._counting():
                grads = self.gradients(scalar, parameters, slope)
            self._grads[rest] = dict(zip(indices, grads, strict=True))
        return self._grads[rest]

    def gradients(self, scalar: Tensor, wrt: Any, weights: Any = None) -> Sequence[Tensor | None]:
        """First derivatives that can be differentiated again, and not as 0 by mistake."""
        self._about(wrt)
        # Every derivative is linear in what the backward pass starts from. One that has no graph
        # to it was not made by operations that can be differentiated, constant or not.
        start = (torch.ones_like(scalar) if weights is None else weights).detach().requires_grad_()
        grads: Sequence[Tensor | None] = self._twice(
            lambda: torch.autograd.grad(scalar, wrt, start, create_graph=True, allow_unused=True)
        )
        there = [g for g in grads if g is not None]
        if any(g.is_sparse for g in there):
            self._refuse("a sparse gradient (an embedding with sparse=True)")
        if any(not g.requires_grad and bool(g.any()) for g in there):
            self._refuse("a torch.autograd.Function whose backward autograd does not record")
        # Where a function's own backward is once_differentiable, autograd leaves an error that no
        # second backward pass would run into: what lies before it would count as constant.
        if any(node.name() == "torch::autograd::Error" for node in nodes(*there)):
            self._refuse("a torch.autograd.Function whose backward is once_differentiable")
        return grads

    def again(self, grads: Any, wrt: Sequence[Tensor], weights: Any, *, many: bool = False) -> Any:
        """Second derivatives of ⟨weights, grads⟩ by some parameters; many: weights [K, ...]."""
        self._about(wrt)

        def one(own: Any) -> Any:
            return torch.autograd.grad(grads, wrt, own, retain_graph=True, allow_unused=True)

        if not many:
            return self._twice(lambda: one(weights))
        there: list[bool] = []

        def dense(*own: Tensor) -> tuple[Tensor, ...]:
            found = one(own)
            there[:] = [h is not None for h in found]
            return tuple(h for h in found if h is not None)

        found = iter(self._twice(lambda: vmap(dense)(*weights)))
        return [next(found) if h else None for h in there]

    def _about(self, wrt: Sequence[Tensor]) -> None:
        """Say which parameters the next backward pass is about."""
        self._wanted.clear()
        self._wanted.update(map(id, wrt))

    def _twice(self, run: Callable[[], Any]) -> Any:
        """Run a derivative; what torch cannot differentiate twice is named."""
        try:
            return run()
        except RuntimeError as error:
            text = str(error).strip().splitlines()[0]
            if not any(word in text for word in ("derivative", "not implemented", "double back")):
                raise
            self._refuse(text, error)

    def _refuse(self, got: str, error: Exception | None = None) -> NoReturn:
        expected = "operations that can be differentiated twice (estimator='gauss_newton' asks for "
        text = message(self._op, "model", f"{expected}one derivative only)", got)
        raise RuntimeError(text) from error

    def error(self, layer: int, got: str) -> ValueError:
        """That a layer has no factors."""
        expected = "a layer whose factors make its gradient (estimator='block' needs none)"
        name = self.targets[layer].name
        return ValueError(message(self._op, "model", expected, got, layer=name))

    # --- second backward passes ------------------------------------------------------------------

    def signs(self, indices: Sequence[int], grads: Sequence[Tensor], seed: int, probe: int) -> Any:
        """A probe's signs, like these gradients of parameters with these indices."""
        return [RADEMACHER("lwkd", g.detach(), seed, i, probe)
                for i, g in zip(indices, grads, strict=True)]  # fmt: skip

    def products(
        self, chosen: Sequence[Target], seed: int, probe: int, probes: int, rest: bool = False
    ) -> dict[int, Tensor]:
        """⟨v, Hv⟩ [probes] of every parameter of the chosen layers, v over all of these.

        Args:
            chosen: The layers.
            seed: Of the signs.
            probe: The first one.
            probes: How many.
            rest: As in :meth:`differentiate`.
        """
        first = self.differentiate(rest)
        parameters, indices = every_parameter(chosen)
        kept = [(i, p, g) for i, p in zip(indices, parameters, strict=True)
                if (g := first[i]) is not None and g.requires_grad]  # fmt: skip
        zero = self.loss.new_zeros(probes, dtype=torch.float64)
        found = dict.fromkeys(indices, zero)
        if not kept:
            return found
        own, wrt, grads = zip(*kept, strict=True)
        many = probes > 1
        vs = [self.signs(own, grads, seed, probe + k) for k in range(probes)]
        weights = [torch.stack(parts) for parts in zip(*vs, strict=True)] if many else vs[0]
        hvps = self.again(grads, wrt, weights, many=many)
        there = [(i, h.detach()) for i, h in zip(own, hvps, strict=True) if h is not None]
        if there:
            layers, found_hvps = zip(*there, strict=True)
            dots = PROBE_DOT(
                "lwkd", list(found_hvps), list(layers), seed, probe, probes if many else 0
            )
            for i, q in zip(layers, dots.double(), strict=True):
                found[i] = q.reshape(probes)
        return found

    # --- the Gauss–Newton trace ------------------------------------------------------------------

    def share(self, samples: int) -> float:
        """How much the batch counts among several, as its loss has it; 0: they are added up."""
        return share(self._loss_fn, self._output, self._target, samples)

    def without_hessian(self) -> str:
        """Why the loss's Hessian by the outputs is not known, or nothing."""
        if known_loss(self._loss_fn) is None:
            return "the loss is none whose Hessian by the outputs is known"
        try:
            self.curvature()
        except ValueError as error:
            return str(error)
        return ""

    def curvature(self) -> OutputHessian:
        """The loss's Hessian by the outputs."""
        if self._hessian is None:
            self._hessian = output_hessian(self._op, self._loss_fn, self.output, self._target)
        return self._hessian

    def squares(self, chosen: Sequence[int], v: Tensor) -> Tensor:
        """‖G_n‖² [len(chosen), N] of ⟨v, f⟩, of the layers with these numbers."""
        places = [place for layer in chosen for place in self._places[layer]]
        edges = [self._calls.edges(place) for place in places]
        flat = [edge for own in edges for edge in own]
        self._about(())
        grads = iter(
            torch.autograd.grad(self.output, flat, v, retain_graph=True, allow_unused=True)
        )
        n = len(self.output) if self.output.dim() > 1 else None
        found = {
            place: self._calls.items_of(place, [next(grads) for _ in own], n)
            for place, own in zip(places, edges, strict=True)
        }
        items = []
        for layer in chosen:
            own = [found[place] for place in self._places[layer]]
            items.append(tuple(by_parameter(self.targets[layer].owners, own).values()))
        return squares(self._op, items).double()

    def norms(self, chosen: Sequence[int], v: Tensor) -> Tensor:
        """‖∂⟨v, f⟩/∂θ_l‖² [len(chosen)] of the layers with these numbers, without factors."""
        parameters, indices = every_parameter([self.targets[layer] for layer in chosen])
        self._about(parameters)
        grads = torch.autograd.grad(
            self.output, parameters, v, retain_graph=True, allow_unused=True
        )
        own = {
            i: p.new_zeros((), dtype=_wide(p.dtype))
            if g is None
            else vector_norm(g.to_dense(), dtype=_wide(p.dtype))
            for i, p, g in zip(indices, parameters, grads, strict=True)
        }
        every = [[own[i] for i in self.targets[layer].indices] for layer in chosen]
        return torch.stack([torch.stack(parts).double().square().sum() for parts in every])

    def gauss_newton(self, chosen: Sequence[int], seed: int, probe: int) -> Tensor:
        """A sample [len(chosen)] of the Gauss–Newton trace, of the layers with these numbers."""
        if self.first_sample[0] == (seed, probe):
            return torch.stack([self.first_sample[1][layer] for layer in chosen]).sum(1)
        return self.squares(chosen, self.curvature().vectors(seed, probe)).sum(1)

    def calls(self, layer: int) -> list[int]:
        """How often each module that has parameters of a layer was called.

        Raises:
            RuntimeError: One was not.
        """
        return [len(self._calls.edges(place)) for place in self._places[layer]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _same(x: Tensor) -> Tensor:
    return x
