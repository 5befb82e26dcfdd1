"""Jacobian distances of two networks, layer by layer: by parameters, or by the input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lwkd.factoring import Calls, Owner, by_parameter, flat
from lwkd.hooks import Capture, first_tensor, run, untouched
from lwkd.layers import LayerPairs
from lwkd.losses.jacobian import common_grid
from lwkd.meters.blocks import SIDES, Blocks
from lwkd.meters.parameters import paired, say_what_does_not_factor
from lwkd.meters.projection import Projection
from lwkd.ops import attention_maps, jacobian, rademacher
from lwkd.ops.checks import choice, flag, message, number
from lwkd.ops.factors import Factors, Item
from lwkd.ops.jacobian_reference import COMPARISONS
from lwkd.ops.philox import OUTPUTS

_OP = "JacobianMeter"
_PROJECTIONS = {
    "params": ("rademacher", "label", "top", "loss"),
    "input": ("rademacher", "top"),
}


class JacobianMeter(Blocks[Calls]):
    """Measures how far the student's Jacobian is from the teacher's, layer by layer.

    ``wrt="params"``: with f the outputs and one vector v of their shape, G_n is the gradient of
    ⟨v[n], f[n]⟩ by all parameters of a paired layer, and D is ‖G_S/‖G_S‖ − G_T/‖G_T‖‖² (or
    ‖G_S − G_T‖², or of their norms), as in ``ops.layer_discrepancy(kind="jacobian")``. One backward
    pass a network gives the factors of every layer; no gradient of a parameter is ever built. v is

    * "rademacher": random signs, so that E‖G_n‖² = ‖∂f[n]/∂θ‖², the same for both networks;
    * "label": the output of the target; "top": the teacher's largest output, for both;
    * "loss": the gradient of ``loss_fn(output, target)``.

    ``wrt="input"`` compares networks of any architecture: the scalar of layer l is ⟨v[n], m_l[n]⟩,
    m_l[n,q] = Σ_c |x[n,c,q]|^p its attention map on the grid that the pair has in common, v random
    signs or ("top") the teacher's largest entry, and the rows are its gradients by the input; one
    backward a layer and network.

    ``measure`` runs both networks. With ``projection="loss"``, ``wrt="params"`` and normalize=True
    a training step can be measured instead, where only the teacher's backward costs extra::

        with meter:
            loss = F.cross_entropy(student(x), y)
            teacher_loss = F.cross_entropy(teacher(x), y)  # not under no_grad
        loss.backward()
        rates.update(meter.discrepancy(teacher_loss))

    Parameters of a layer are compared by their names within it; those of the student that are
    frozen do not count. Modules that do not factor (see ``lwkd.factoring``) take torch.func, which
    is said once; ``exclude`` leaves modules out.
    Source: Srinivas & Fleuret 2018; the factored form: Goodfellow 2015.

    Args:
        pairs: From :func:`lwkd.pair_layers`.
        wrt: "params" or "input".
        projection: As above; "label" and "loss" need a target.
        normalize: Compare directions, not sizes.
        compare: "difference", or "norms", for layers of other parameters (``wrt="params"``).
        exclude: Names of modules or parameters, of the student or the teacher, that do not count,
            nor anything inside them (``wrt="params"``).
        p: Power of the maps, ≥ 1 (``wrt="input"``).
        channel_dim: Of the activations (``wrt="input"``), as in ``ops.attention_maps``.
        seed: Of the random signs, 64 bits; torch's generators are not touched.
        every: Measure in every k-th with-block.
        backend: Of the comparison: None, "reference", "compiled" or "triton".

    Raises:
        ValueError: An argument out of its range; a layer without parameters that count, or whose
            parameters differ (without ``compare="norms"``); from a call: samples that are coupled.
        TypeError: ``pairs`` is not a ``LayerPairs``, or normalize no bool.

    >>> import torch
    >>> from lwkd.layers import pair_layers
    >>> nets = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    ...         for _ in range(2)]
    >>> meter = JacobianMeter(pair_layers(*nets, ["0", "2"]))
    >>> meter.measure(torch.rand(5, 4)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        pairs: LayerPairs,
        *,
        wrt: str = "params",
        projection: str = "rademacher",
        normalize: bool = True,
        compare: str = "difference",
        exclude: Collection[str] = (),
        p: float = 2.0,
        channel_dim: int | None = None,
        seed: int = 0,
        every: int = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__(_OP, pairs, seed=seed, every=every, backend=backend)
        choice(_OP, "wrt", wrt, tuple(_PROJECTIONS))
        choice(_OP, "projection", projection, _PROJECTIONS[wrt])
        choice(_OP, "compare", compare, COMPARISONS if wrt == "params" else COMPARISONS[:1])
        flag(_OP, "normalize", normalize)
        number(_OP, "p", p, "a finite number ≥ 1", lambda v: 1 <= v < float("inf"))
        self.wrt, self.projection = wrt, projection
        self._maps = partial(attention_maps, p=p, channel_dim=channel_dim)
        self._normalize = normalize
        self._compare = partial(
            jacobian.discrepancy, _OP, reduction="mean", backend=backend, normalize=normalize,
            compare=compare,
        )  # fmt: skip
        self._owners: tuple[list[list[Owner]], list[list[Owner]]] = ([], [])
        if wrt == "params":
            self._owners = paired(_OP, pairs, exclude, norms=compare == "norms")
            say_what_does_not_factor(_OP, self._owners)
        elif exclude:
            expected = "nothing with wrt='input', where parameters do not count"
            raise ValueError(message(_OP, "exclude", expected, repr(exclude)))

    # --- a training step ---------------------------------------------------------------------

    def __enter__(self) -> JacobianMeter:
        if (self.wrt, self.projection, self._normalize) != ("params", "loss", True):
            expected = "wrt='params', projection='loss' and normalize=True, or a call of measure"
            got = f"wrt={self.wrt!r}, projection={self.projection!r}, normalize={self._normalize}"
            raise RuntimeError(message(_OP, "with-block", expected, got))
        return super().__enter__()

    def _watch(self, stack: ExitStack) -> tuple[Calls, Calls]:
        networks = (self.pairs.student, self.pairs.teacher)
        student, teacher = (
            stack.enter_context(
                Calls(_OP, side, flat(found), listen=side == "student", network=network)
            )
            for side, network, found in zip(SIDES, networks, self._owners, strict=True)
        )
        return student, teacher

    def discrepancy(self, teacher_loss: Tensor) -> Tensor | None:
        """Return the distances of the last with-block, after the student's backward pass.

        Runs the teacher's backward pass, and lets go of everything that the block has kept.

        Args:
            teacher_loss: The teacher's loss, computed in the block with gradients on.

        Returns:
            [L], detached, on the student's device; None if the block was not due.

        Raises:
            RuntimeError: Before any block, inside one, after one that raised, or twice; before the
                student's backward; a layer that did not run, or that a loss does not depend on.
            ValueError: ``teacher_loss`` is no scalar.
        """
        self._check_ended("one call after a with-block that has ended without an exception")
        if self._sides is None:
            return None
        if not isinstance(teacher_loss, Tensor) or teacher_loss.dim() or not teacher_loss.grad_fn:
            expected = "a scalar that the teacher has computed in the block, with gradients on"
            shown = isinstance(teacher_loss, Tensor)
            got = f"one of shape {list(teacher_loss.shape)}" if shown else repr(teacher_loss)
            raise ValueError(message(f"{_OP}.discrepancy", "teacher_loss", expected, got))
        sides, self._sides, self._ready = self._sides, None, False
        found = [sides[0].items(), sides[1].items(teacher_loss)]
        return self._by_params(found)

    # --- both networks, run here -------------------------------------------------------------

    def measure(
        self,
        inputs: Any,
        target: Tensor | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Run both networks, and a backward pass of each, and return the distances.

        Both run in eval mode and, where they are compiled, as the original modules. Modes, buffers,
        ``.grad``, generators and hooks are left as they were, also after an exception. Does not
        count as a block.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments for both
                networks; for ``wrt="input"`` a floating tensor [N, ...].
            target: Class indices int64 [N] for "label", or what ``loss_fn`` takes.
            loss_fn: For "loss": ``loss_fn(output, target)``, a scalar.

        Returns:
            [L], detached, on the student's device.

        Raises:
            RuntimeError: Inside a with-block of this meter; a layer that did not run, or that the
                output does not depend on.
            ValueError: No target or loss_fn where one is needed, an output that is not [N, ...].
            TypeError: ``inputs`` is none of the above.

        >>> import torch
        >>> from lwkd.layers import pair_layers
        >>> nets = [torch.nn.Sequential(torch.nn.Conv2d(1, c, 3), torch.nn.Tanh()) for c in (4, 8)]
        >>> meter = JacobianMeter(pair_layers(*nets, ["1"]), wrt="input")
        >>> meter.measure(torch.rand(2, 1, 8, 8)).shape
        torch.Size([1])
        """
        self._check_outside()
        networks = (self.pairs.student, self.pairs.teacher)
        with untouched(*networks), torch.enable_grad():
            if self.wrt == "input":
                return self._measure_input(inputs)
            return self._measure_params(inputs, target, loss_fn)

    def _measure_params(self, inputs: Any, target: Any, loss_fn: Any) -> Tensor:
        """The teacher first: "top" is its choice."""
        choose = Projection(f"{_OP}.measure", self.projection, self.seed, target, loss_fn)
        found: list[Any] = [None, None]
        for side in (1, 0):
            network = (self.pairs.student, self.pairs.teacher)[side]
            with Calls(_OP, SIDES[side], flat(self._owners[side])) as calls:
                output = first_tensor(run(f"{_OP}.measure", network, inputs, SIDES[side]))
            scalar = choose(SIDES[side], output)
            found[side] = calls.items(scalar, samples=None if output is None else len(output))
        return self._by_params(found)

    def _by_params(self, found: Sequence[list[dict[str, Item]]]) -> Tensor:
        """Compare what every module's calls have left."""
        sides: list[list[dict[str, Item]]] = []
        for owners_of, items in zip(self._owners, found, strict=True):
            start, layers = 0, []
            for modules in owners_of:
                layers.append(by_parameter(modules, items[start : start + len(modules)]))
                start += len(modules)
            sides.append(layers)
        device = next(iter(sides[0][0].values())).d.device
        student, teacher = [], []
        for s, t in zip(*sides, strict=True):
            order = list(s) if s.keys() == t.keys() else list(t)
            student.append(tuple(s.values()))
            teacher.append(tuple(_to(t[n], device) for n in order))
        return self._compare(student, teacher)

    def _measure_input(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
            got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            expected = "a floating tensor [N, ...]: rows are gradients by it"
            raise TypeError(message(f"{_OP}.measure", "inputs", expected, got))
        maps: list[Capture[Tensor]] = []
        xs = []
        for side, network in zip(SIDES, (self.pairs.student, self.pairs.teacher), strict=True):
            home = next((z.device for z in network.parameters()), inputs.device)
            xs.append(inputs.detach().to(home).requires_grad_())
            with self.pairs.watch(_OP, side, self._map) as capture:
                run(f"{_OP}.measure", network, xs[-1], side)
            maps.append(capture)
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, pair in enumerate(self.pairs):
            both = [_once(capture, i) for capture in maps]
            s, t = common_grid(_OP, both[0], both[1], layer=pair.teacher)
            v = rademacher(s, seed=self.seed, layer=OUTPUTS, probe=i)
            if self.projection == "top":
                top = t.detach().argmax(1, keepdim=True).to(s.device)
                v = torch.zeros_like(s).scatter_(1, top, 1)
            for k, (m, name) in enumerate(((s, pair.student), (t, pair.teacher))):
                scalar = (v.to(m) * m).sum()
                row = None
                if scalar.requires_grad:
                    (row,) = torch.autograd.grad(
                        scalar, xs[k], retain_graph=True, allow_unused=True
                    )
                if row is None:
                    expected, got = "a layer that depends on the input", "one that does not"
                    raise RuntimeError(message(_OP, SIDES[k], expected, got, layer=name))
                rows[k].append(row.to(xs[0].device))
        return self._compare(rows[0], rows[1])

    def _map(self, i: int, x: Tensor) -> Tensor:
        return self._maps([x.clone()])[0]  # what comes next may change x in place


# --- small things --------------------------------------------------------------------------------


def _to(item: Item, device: torch.device) -> Item:
    if isinstance(item, Factors):
        return Factors(item.a.to(device), item.d.to(device))
    return item._replace(x=item.x.to(device), d=item.d.to(device))


def _once(capture: Capture[Tensor], i: int) -> Tensor:
    calls = capture.calls(i)
    if len(calls) > 1:
        expected, name = "a layer that runs once, for wrt='input'", capture.names[i]
        raise RuntimeError(message(_OP, "pairs", expected, f"{len(calls)} calls", layer=name))
    return calls[0]
