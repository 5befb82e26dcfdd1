"""Samples of traces from one batch: second backward passes, or factored first ones.

    hutchinson     v over all layers:       q_l = ⟨v_l, (Hv)_l⟩
    block          v on one layer alone:    q_l = ⟨v_l, H_ll v_l⟩
    gauss_newton   v of the loss's Hessian by the outputs, one ordinary backward pass of ⟨v, f⟩:
                   q_l = Σ_n ‖G_n‖²

One first-order graph serves all probes. What is needed of it is decided before it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.curvature.gauss_newton import OutputHessian, check_target, output_hessian
from lwkd.curvature.nodes import nodes, uses
from lwkd.curvature.targets import Target, every_parameter
from lwkd.factoring import Calls, by_parameter, supports
from lwkd.hooks import first_tensor, run
from lwkd.ops import philox
from lwkd.ops.checks import message
from lwkd.ops.factors import squares
from lwkd.ops.hessian import PROBE_DOT, RADEMACHER

_LINEAR = 2**32 - 1  # the probe of the test of linearity


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
        self._targets, self._target = targets, batch[1]
        self.ways = list(ways)
        self.bytes = 0
        factored = [t if w in ("auto", "gauss_newton") else None
                    for t, w in zip(targets, ways, strict=True)]  # fmt: skip
        self._places: list[list[int]] = []  # of a layer's owners among the watched modules
        watched: list[Any] = []
        for t in factored:
            self._places.append([])
            for owner in t.owners if t else ():
                self._places[-1].append(len(watched))
                watched.append(owner)
        self._calls = Calls(op, "model", watched)
        with ExitStack() as stack:
            if count:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._count, _same))
            if set(ways) != {"gauss_newton"}:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no second one
            stack.enter_context(self._calls)
            output = first_tensor(run(op, network, batch[0], "model", "batch"))
            if output is None or not output.is_floating_point():
                got = "none" if output is None else output.dtype
                raise ValueError(
                    message(op, "model", "a network that puts out a floating tensor", got)
                )
            self._output = output
            if isinstance(self._target, Tensor):
                self._target = self._target.to(output.device)
            check_target(op, loss_fn, output, self._target)
            self.loss = self._checked(loss_fn(output, self._target))
            self._grads: dict[int, Tensor | None] = {}
            if count and set(ways) != {"gauss_newton"}:
                self._differentiate()
        self._hessian: OutputHessian | None = None

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

    def _differentiate(self) -> None:
        """The loss's gradients, with their graph: made when they are first asked for."""
        wanted = [t for t, w in zip(self._targets, self.ways, strict=True) if w != "gauss_newton"]
        parameters, indices = every_parameter(wanted)
        grads = self._gradients(self.loss, parameters)
        self._grads = dict(zip(indices, grads, strict=True))

    def _gradients(self, scalar: Tensor, wrt: Any, weights: Any = None) -> Sequence[Tensor | None]:
        """First derivatives that can be differentiated again, and not as 0 by mistake."""
        grads: Sequence[Tensor | None] = self._twice(
            lambda: torch.autograd.grad(scalar, wrt, weights, create_graph=True, allow_unused=True)
        )
        # Where a function's own backward is once_differentiable, autograd leaves an error that no
        # second backward pass would run into: what lies before it would count as constant.
        for node in nodes(*(g for g in grads if g is not None)):
            if node.name() == "torch::autograd::Error":
                self._refuse("a torch.autograd.Function whose backward is once_differentiable")
        return grads

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

    # --- second backward passes ------------------------------------------------------------------

    def _signs(self, indices: Sequence[int], grads: Sequence[Tensor], seed: int, probe: int) -> Any:
        return [RADEMACHER("lwkd", g.detach(), seed, i, probe)
                for i, g in zip(indices, grads, strict=True)]  # fmt: skip

    def products(
        self, chosen: Sequence[Target], seed: int, probe: int, probes: int
    ) -> dict[int, Tensor]:
        """⟨v, Hv⟩ [probes] of every parameter of the chosen layers, v over all of these."""
        if not self._grads:
            self._differentiate()
        parameters, indices = every_parameter(chosen)
        kept = [(i, p, g) for i, p in zip(indices, parameters, strict=True)
                if (g := self._grads[i]) is not None and g.requires_grad]  # fmt: skip
        zero = self.loss.new_zeros(probes, dtype=torch.float64)
        found = dict.fromkeys(indices, zero)
        if not kept:
            return found
        own, wrt, grads = zip(*kept, strict=True)
        many = probes > 1
        vs = [self._signs(own, grads, seed, probe + k) for k in range(probes)]
        weights = [torch.stack(parts) for parts in zip(*vs, strict=True)] if many else vs[0]
        hvps = self._twice(
            lambda: torch.autograd.grad(
                grads, wrt, weights, retain_graph=True, allow_unused=True, is_grads_batched=many
            )
        )
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

    def curvature(self) -> OutputHessian:
        """The loss's Hessian by the outputs."""
        if self._hessian is None:
            self._hessian = output_hessian(self._op, self._loss_fn, self._output, self._target)
        return self._hessian

    def squares(self, chosen: Sequence[int], v: Tensor) -> Tensor:
        """Σ_n ‖G_n‖² [len(chosen)] of ⟨v, f⟩, of the layers with these numbers."""
        places = [place for layer in chosen for place in self._places[layer]]
        edges = [self._calls.edges(place) for place in places]
        flat = [edge for own in edges for edge in own]
        grads = iter(
            torch.autograd.grad(self._output, flat, v, retain_graph=True, allow_unused=True)
        )
        n = len(self._output) if self._output.dim() > 1 else None
        found = {
            place: self._calls.items_of(place, [next(grads) for _ in own], n)
            for place, own in zip(places, edges, strict=True)
        }
        items = []
        for layer in chosen:
            own = [found[place] for place in self._places[layer]]
            items.append(tuple(by_parameter(self._targets[layer].owners, own).values()))
        return squares(self._op, items).double().sum(1)

    # --- which estimator a layer takes ---------------------------------------------------------

    def examine(self, coupled: str, known: bool) -> list[tuple[str, str]]:
        """(estimator, reason) of every layer whose way was "auto".

        Args:
            coupled: Why no sample's output is its own, or nothing.
            known: Whether the loss's Hessian by the outputs is known.
        """
        chosen = [layer for layer, way in enumerate(self.ways) if way == "auto"]
        why = coupled or ("" if known else "the loss is none whose Hessian by the outputs is known")
        if why:
            return [("block", why) for _ in chosen]
        linear = self._linear(chosen)
        reasons = []
        for layer in chosen:
            why = "" if linear[layer] else "outputs are not linear in its parameters"
            why = why or self._not_seen(layer)
            if not why:
                try:
                    self.squares([layer], torch.zeros_like(self._output))
                except (RuntimeError, ValueError, TypeError) as error:
                    why = str(error).splitlines()[0]
            text = "outputs are linear in its parameters: the trace is the Gauss–Newton block's"
            reasons.append(("block", why) if why else ("gauss_newton", text))
        return reasons

    def _linear(self, chosen: Sequence[int]) -> dict[int, bool]:
        """Whether the second derivative of a random ⟨w, f⟩ along a random direction vanishes."""
        output = self._output
        w = philox.signs(output, 0, philox.OUTPUTS, _LINEAR)
        found = dict.fromkeys(chosen, True)
        parameters, indices = every_parameter([self._targets[layer] for layer in chosen])
        grads = self._gradients(output, parameters, w)
        by_index = dict(zip(indices, grads, strict=True))
        sizes, asked = [], []
        for layer in chosen:
            target = self._targets[layer]
            own = [(i, g) for i in target.indices
                   if (g := by_index[i]) is not None and g.requires_grad]  # fmt: skip
            if not own:
                continue
            directions = self._signs([i for i, _ in own], [g for _, g in own], 0, _LINEAR)
            seconds = self._twice(
                lambda: torch.autograd.grad(
                    [g for _, g in own], target.parameters, directions, retain_graph=True,  # noqa: B023
                    allow_unused=True,
                )
            )  # fmt: skip
            size = sum(x.detach().abs().sum().double() for x in seconds if x is not None)
            if isinstance(size, Tensor):
                sizes.append(size)
                asked.append(layer)
        for layer, size in zip(asked, torch.stack(sizes).tolist() if sizes else [], strict=True):
            found[layer] = size == 0
        return found

    def _not_seen(self, layer: int) -> str:
        """Why the modules' calls are not all that a layer's parameters are used in, or nothing."""
        owners = self._targets[layer].owners
        if not all(supports(owner.module) for owner in owners):
            return ""  # torch.func runs the whole module again
        used = uses(self._output, {id(p) for p in self._targets[layer].parameters})
        called: dict[int, int] = {}
        for place, owner in zip(self._places[layer], owners, strict=True):
            try:
                calls = len(self._calls.edges(place))
            except RuntimeError:
                return f"{owner.name!r} did not run"
            named = dict(owner.module.named_parameters())
            for name in owner.wanted:
                key = id(named[name])
                called[key] = called.get(key, 0) + calls
        return "" if used == called else "its parameters are used outside their modules too"


def _same(x: Tensor) -> Tensor:
    return x
