"""What the modules of a network were called with, and where their outputs enter the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lwkd.factoring.modules import factor
from lwkd.factoring.owners import Owner
from lwkd.factoring.sums import add
from lwkd.hooks import first_tensor
from lwkd.ops.checks import message
from lwkd.ops.factors import Item


class Call(NamedTuple):
    """One call of one module."""

    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    versions: tuple[int, ...]  # of both, to see what was changed in place
    edge: Any  # where the gradient by the output can be asked for
    heard: list[Tensor]  # the gradient by the output, once a backward pass has come by


class Calls:
    """Records the calls of modules for the length of a with-block, graph included.

    An output that no gradient would reach, since everything before it is frozen, is made the
    beginning of a graph of its own. Recomputations of activation checkpointing do not count.

    Args:
        op: The public name of the caller, for errors.
        side: "student" or "teacher", for errors.
        modules: What to watch.
        listen: Hear the gradients of whoever runs the backward pass, instead of running one.
        network: Whose inputs and outputs tell how many samples there can be, where nobody says it.
        lenient: What cannot be recorded of a module is raised when its calls are asked for, not
            from its forward.
    """

    def __init__(
        self,
        op: str,
        side: str,
        modules: Sequence[Owner],
        *,
        listen: bool = False,
        network: nn.Module | None = None,
        lenient: bool = False,
    ) -> None:
        self._op, self._side, self._modules, self._listen = op, side, modules, listen
        self._lenient, self._failed = lenient, dict[int, Exception]()
        self._records: list[list[Call]] = [[] for _ in modules]
        self._network, self._sizes = network, set[int]()
        self._stack = ExitStack()

    def __enter__(self) -> Calls:
        with ExitStack() as stack:
            for i, owner in enumerate(self._modules):
                # First of all hooks: others may change the output.
                hook = owner.module.register_forward_hook(
                    partial(self._hook, i), with_kwargs=True, prepend=True
                )
                stack.callback(hook.remove)
            if self._network is not None:
                hook = self._network.register_forward_hook(self._size, with_kwargs=True)
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _hook(
        self, i: int, module: nn.Module, inputs: tuple[Any, ...], keywords: Any, output: Any
    ) -> Any:
        if torch._C._current_graph_task_id() != -1:
            return None
        out = first_tensor(output)
        name = self._modules[i].name
        if out is None or not out.is_floating_point():
            got = type(output).__name__
            expected = "a module that returns a floating tensor, or a tuple or list that starts so"
            return self._fail(
                i, TypeError(message(self._op, self._side, expected, got, layer=name))
            )
        if not torch.is_grad_enabled():
            expected, got = "a layer that runs with gradients", "one under no_grad or checkpointed"
            text = message(self._op, self._side, expected, got, layer=name)
            return self._fail(i, RuntimeError(text))
        changed = None
        if not out.requires_grad:
            # Not a leaf: what comes next may change it in place.
            out = out.detach().requires_grad_().clone()
            changed = out if isinstance(output, Tensor) else type(output)((out, *output[1:]))
        kept = tuple(map(_detached, inputs))
        named = {key: _detached(value) for key, value in keywords.items()}
        heard: list[Tensor] = []
        if self._listen:
            out.register_hook(partial(_hear, heard))
        versions = _versions(kept, named)
        self._records[i].append(Call(kept, named, versions, get_gradient_edge(out), heard))
        return changed

    def _fail(self, i: int, error: Exception) -> None:
        if not self._lenient:
            raise error
        self._failed[i] = error

    def _size(self, _: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        every = (*inputs, *keywords.values(), first_tensor(output))
        self._sizes |= {len(x) for x in every if isinstance(x, Tensor) and x.dim()}

    def items(
        self, scalar: Tensor | None = None, samples: int | None = None
    ) -> list[dict[str, Item]]:
        """Run one backward pass from a scalar; return each module's items by parameter.

        Args:
            scalar: What to differentiate; None where the gradients were listened to.
            samples: The batch size, where it is known.

        Raises:
            RuntimeError: A module that did not run, one whose output the scalar does not depend
                on, or an input that was changed in place after the call.
            ValueError: A module that has another number than ``samples`` first, or than any that
                the network's inputs and outputs have.
        """
        edges = [self.edges(i) for i in range(len(self._modules))]
        grads: Iterator[Tensor | None]
        if scalar is None:
            every = [call for calls in self._records for call in calls]
            grads = iter([sum(c.heard[1:], c.heard[0]) if c.heard else None for c in every])
        else:
            flat = [edge for own in edges for edge in own]
            grads = iter(torch.autograd.grad(scalar, flat, allow_unused=True))
        out = [self.items_of(i, [next(grads) for _ in own], samples) for i, own in enumerate(edges)]
        self._records = [[] for _ in self._modules]
        return out

    def edges(self, i: int) -> list[Any]:
        """Where gradients by the outputs of module i can be asked for, one a call.

        Raises:
            RuntimeError: The module did not run.
        """
        if i in self._failed:
            raise self._failed[i]
        if not self._records[i]:
            expected, got, name = (
                "the layer to run in the forward",
                "no call",
                self._modules[i].name,
            )
            raise RuntimeError(message(self._op, self._side, expected, got, layer=name))
        return [call.edge for call in self._records[i]]

    def items_of(
        self, i: int, gradients: Sequence[Tensor | None], samples: int | None = None
    ) -> dict[str, Item]:
        """The items of module i by parameter, from the gradient by the output of every call.

        Raises:
            As :meth:`items`.
        """
        owner, found = self._modules[i], []
        sizes = self._sizes if samples is None else {samples}
        for call, g in zip(self._records[i], gradients, strict=True):
            items = self._factor(owner, call, g)
            for item in items.values():
                if sizes and len(item.d) not in sizes:
                    known = " or ".join(map(str, sorted(sizes)))
                    expected = f"a layer that has the batch, {known} samples, first"
                    raise ValueError(
                        message(self._op, self._side, expected, len(item.d), layer=owner.name)
                    )
            found.append(items)
        return {n: add([items[n] for items in found]) for n in found[0]}

    def _factor(self, owner: Owner, call: Call, gradient: Tensor | None) -> dict[str, Item]:
        if gradient is None:
            expected, got = "a layer that the output depends on", "one that it does not"
            if self._listen:
                expected, got = "a backward pass before the call", "none that reached the layer"
            raise RuntimeError(message(self._op, self._side, expected, got, layer=owner.name))
        if _versions(call.inputs, call.keywords) != call.versions:
            expected = "an input that is left as it was"
            got = "one changed in place after the layer had read it"
            raise RuntimeError(message(self._op, self._side, expected, got, layer=owner.name))
        return factor(
            self._op, owner.name, owner.module, call.inputs, gradient,
            keywords=call.keywords, wanted=owner.wanted,
        )  # fmt: skip


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _versions(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int, ...]:
    both = (*inputs, *keywords.values())
    return tuple(x._version if isinstance(x, Tensor) else 0 for x in both)


def _hear(heard: list[Tensor], gradient: Tensor) -> None:
    heard.append(gradient.detach())
