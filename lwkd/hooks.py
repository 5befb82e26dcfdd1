"""Watching networks run: forward hooks that live exactly as long as a with-block.

Hooks are installed on entering and removed on leaving, whatever happens in between. Calls made
while a backward pass runs are recomputations of activation checkpointing and are not recorded,
so that every forward counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lwkd.ops.checks import message

T = TypeVar("T")
Named = Sequence[tuple[str, nn.Module]]


def first_tensor(output: object) -> Tensor | None:
    """Return the tensor that a module's output stands for, or None.

    Args:
        output: What the module returned: a tensor, or a tuple or list, whose first item counts
            (``nn.MultiheadAttention`` and recurrent layers return such).

    Returns:
        The tensor, or None where there is none.

    >>> first_tensor((torch.ones(2), "weights")).shape
    torch.Size([2])
    >>> first_tensor({"features": torch.ones(2)})
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


class Capture(Generic[T]):
    """Records what modules put out, for the length of a with-block.

    ``transform(i, x)`` is called with the output x of module i the moment it is produced, and what
    it returns is kept, one item per call of the module. A module that is used several times, or
    run several times, has as many items.

    Args:
        op: The public name of the caller, for errors.
        modules: (name, module) for every module to watch.
        transform: What to keep of an output.
        argument: Whose modules they are, as the caller calls it, for errors.
        current: Returns the modules that have those names now, to tell when one was replaced.
        lenient: Pass over outputs that hold no dense tensor instead of raising.

    Raises:
        TypeError: From the module's forward, if its output is neither a dense tensor nor a tuple
            or list that starts with one.
        RuntimeError: On entering twice, or from the forward of a network that is being compiled.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with Capture("example", [("1", net[1])], lambda i, x: tuple(x.shape)) as capture:
    ...     _ = net(torch.zeros(2, 4))
    >>> capture.calls(0), len(net[1]._forward_hooks)
    ([(2, 3)], 0)
    """

    def __init__(
        self,
        op: str,
        modules: Named,
        transform: Callable[[int, Tensor], T],
        *,
        argument: str = "pairs",
        current: Callable[[], Mapping[str, nn.Module]] | None = None,
        lenient: bool = False,
    ) -> None:
        self._op, self._argument = op, argument
        self._modules = list(modules)
        self._transform = transform
        self._current = current
        self._lenient = lenient
        self._records: list[list[T]] | None = None
        self._hooks: ExitStack | None = None

    def __enter__(self) -> Capture[T]:
        if self._hooks is not None:
            raise RuntimeError(message(self._op, "with-block", "one entry at a time", "a second"))
        self._records = [[] for _ in self._modules]
        with ExitStack() as stack:
            for i, (_, module) in enumerate(self._modules):
                stack.callback(module.register_forward_hook(partial(self._hook, i)).remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is not None:
            self._records = None

    def _hook(self, i: int, module: nn.Module, args: object, output: object) -> None:
        name = self._modules[i][0]
        if torch.compiler.is_compiling():
            # Without the break the compiler would run the hook eagerly instead of raising.
            torch._dynamo.graph_break()
            raise RuntimeError(message(self._op, "network", *COMPILED, layer=name))
        if torch._C._current_graph_task_id() != -1 or self._hooks is None or self._records is None:
            return
        x = first_tensor(output)
        if x is not None and not x.is_nested:
            self._records[i].append(self._transform(i, x))
        elif not self._lenient:
            expected, got = TENSOR, str(type(output))
            if x is not None:
                expected, got = NESTED
            raise TypeError(message(self._op, self._argument, expected, got, layer=name))

    @property
    def names(self) -> list[str]:
        """The names of the modules, in order."""
        return [name for name, _ in self._modules]

    def calls(self, i: int) -> list[T]:
        """Return what was kept of module i, one item per call.

        Raises:
            RuntimeError: If nothing was recorded: no with-block yet, one that ended with an
                exception, or a module that did not run in it.
        """
        if self._records is None:
            expected = "a with-block that has been entered and has not raised"
            raise RuntimeError(message(self._op, "with-block", expected, "none"))
        if self._records[i]:
            return self._records[i]
        expected, name = "the layer to run in the with-block", self._modules[i][0]
        raise RuntimeError(
            message(self._op, self._argument, expected, self._why_not(i), layer=name)
        )

    def _why_not(self, i: int) -> str:
        """Guess why a module made no call."""
        name, module = self._modules[i]
        if self._current is not None and self._current().get(name) is not module:
            return "no call: the module was replaced since pair_layers; pair the layers again"
        children = [f"{name}.{child}" for child, _ in module.named_children()]
        got = "no call; layers of a compiled or scripted network cannot be seen"
        if children:
            got += f"; nor a container whose children are called one by one: pair {children[-1]!r}"
        return got


TENSOR = "a module that returns a tensor, or a tuple or list that starts with one"
NESTED = (
    "a module that returns a dense tensor",
    "a nested one, as nn.TransformerEncoder makes of a padding mask in eval mode; build it with "
    "enable_nested_tensor=False",
)


class Kept(NamedTuple):
    """An activation, its version when it was produced, and whether gradients were on."""

    x: Tensor
    version: int
    graph: bool


def keep(copies: Sequence[bool], i: int, x: Tensor) -> Kept:
    """Keep an activation, as a copy where it is known to be changed in place later."""
    graph = torch.is_grad_enabled()
    if x.is_inference():  # has no version and no autograd: a normal copy has both
        with torch.inference_mode(False):
            x = x.clone()
    elif copies[i]:
        x = x.clone()
    return Kept(x, x._version, graph)


class Features:
    """The activations of paired layers, graph kept, for losses (see ``LayerPairs.capture``).

    Args:
        student: Keeps the student's, by :func:`keep`.
        teacher: Keeps the teacher's.
        examined: Whether it was looked, in eval mode, which activations are changed in place later.
    """

    def __init__(self, student: Capture[Kept], teacher: Capture[Kept], examined: bool) -> None:
        self._captures = {"student": student, "teacher": teacher}
        self._examined = examined
        self._hooks: ExitStack | None = None
        self._graph = False

    def __enter__(self) -> Features:
        with ExitStack() as stack:
            for capture in self._captures.values():
                stack.enter_context(capture)
            self._hooks = stack.pop_all()
        self._graph = torch.is_grad_enabled()
        return self

    def __exit__(self, *exception: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*exception)

    @property
    def student(self) -> list[Tensor]:
        """The student's L activations."""
        return self._read("student")

    @property
    def teacher(self) -> list[Tensor]:
        """The teacher's L activations."""
        return self._read("teacher")

    def _read(self, side: str) -> list[Tensor]:
        return [self._one(side, i, name) for i, name in enumerate(self._captures[side].names)]

    def _one(self, side: str, i: int, name: str) -> Tensor:
        calls = self._captures[side].calls(i)
        expected = got = ""
        if len(calls) > 1:
            expected = "one call of the layer in the with-block"
            got = f"{len(calls)}; use one block per forward, and pair a module that runs once in it"
        elif calls[0].x._version != calls[0].version:
            expected = "an activation that is left as it was"
            got = "one changed in place later (by nn.ReLU(inplace=True) or +=); "
            if self._examined:  # in eval mode, where an in-place dropout does nothing
                got += "it was not in eval mode on example_inputs: use inplace=False"
            else:
                got += "pass example_inputs to pair_layers, which has a copy kept, or inplace=False"
        elif side == "student" and self._graph and not calls[0].graph:
            expected = "a layer that runs with gradients, as the with-block does"
            got = (
                "none: reentrant activation checkpointing (pass use_reentrant=False to checkpoint)"
                " or no_grad (put the whole block under it)"
            )
        if expected:
            raise RuntimeError(message("LayerPairs.capture", side, expected, got, layer=name))
        return calls[0].x


# --- compiled networks -------------------------------------------------------------------------

COMPILED = (
    "an uncompiled network, whose layers can be seen",
    "a compiled one; call .measure() on the meter, which runs the original module, or pass plain "
    "tensors to lwkd.ops.layer_discrepancy",
)


def compiled_module(network: nn.Module) -> str | None:
    """Return the name of the first compiled module of a network, or None."""
    for name, module in network.named_modules():
        if (
            "_orig_mod" in module._modules
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        ):
            return str(name)
    return None


# --- running a network without leaving a trace -------------------------------------------------


@contextmanager
def untouched(*networks: nn.Module, evaluate: bool = True) -> Iterator[None]:
    """Run networks in eval mode, without gradients and uncompiled, and leave them as they were.

    Modes, buffers (such as BatchNorm's statistics), ``.grad`` and torch's generators are what they
    were before, also after an exception. Buffers are copied meanwhile.

    Args:
        networks: The modules that will run.
        evaluate: Put them in eval mode meanwhile.

    >>> net = nn.BatchNorm1d(3).train()
    >>> with untouched(net):
    ...     _ = net(torch.ones(2, 3)), net.training
    >>> net.training, int(net.num_batches_tracked)
    (True, 0)
    """
    modules = {m: m.training for network in networks for m in network.modules()}
    buffers = [(m, dict(m._buffers.items()), set(m._non_persistent_buffers_set)) for m in modules]
    values = [
        (b, None if b.is_inference() else b._version, b.clone())
        for _, named, _ in buffers
        for b in named.values()
        if b is not None and not is_lazy(b)
    ]
    with ExitStack() as stack:
        _fork_generators(stack, networks)
        if any(compiled_module(network) is not None for network in networks):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.callback(_restore, modules, buffers, values)
        for module in modules:
            module.training = module.training and not evaluate
        yield


def _restore(
    modules: Mapping[nn.Module, bool],
    buffers: Sequence[tuple[nn.Module, dict[str, Tensor | None], set[str]]],
    values: Sequence[tuple[Tensor, int | None, Tensor]],
) -> None:
    for module, training in modules.items():
        module.training = training
    for buffer, version, value in values:
        # What is unchanged is left alone, for a graph may hold it; F.batch_norm counts no version.
        same = version is not None and buffer._version == version
        if not same or not (buffer.is_meta or torch.equal(buffer, value)):
            with torch.inference_mode(version is None), torch.no_grad():
                buffer.copy_(value)
    for module, named, transient in buffers:
        if list(module._buffers.keys()) != list(named):  # the forward registered or deleted some
            module._buffers.clear()
        for name, b in named.items():
            module._buffers[name] = b
        module._non_persistent_buffers_set = transient


def _fork_generators(stack: ExitStack, networks: Sequence[nn.Module]) -> None:
    """Have the CPU's generator, and those of the networks' devices, restored at the end."""
    devices: dict[str, set[int]] = {}
    for network in networks:
        for x in (*network.parameters(), *network.buffers()):
            if x.device.type not in ("cpu", "meta"):
                devices.setdefault(x.device.type, set()).add(x.device.index or 0)
    stack.enter_context(torch.random.fork_rng(devices=[]))
    for kind, indices in devices.items():
        stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))


def run(
    op: str, network: nn.Module, inputs: object, side: str = "network", argument: str = "inputs"
) -> Any:
    """Call a network with inputs on its own device.

    Args:
        op: The public name of the caller, for errors.
        network: The module to call.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments. No list: there
            are networks whose one argument is a list.
        side: What the caller calls the network, for errors.
        argument: What the caller calls the inputs, for errors.

    Returns:
        What the network returned.

    Raises:
        TypeError: If inputs are none of these.
        ValueError: If the network has lazy modules that have not run yet: they would not be left
            as they were.

    >>> run("example", nn.Linear(2, 3), torch.zeros(1, 2)).shape
    torch.Size([1, 3])
    """
    for name, module in network.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            expected = "a network without uninitialised lazy modules (run it once before)"
            raise ValueError(message(op, side, expected, type(module).__name__, layer=name))
    home = next((x.device for x in (*network.parameters(), *network.buffers())), None)
    if isinstance(inputs, Tensor):
        return network(_move(inputs, home))
    if isinstance(inputs, tuple):
        return network(*(_move(x, home) for x in inputs))
    if isinstance(inputs, Mapping):
        return network(**{name: _move(x, home) for name, x in inputs.items()})
    expected = "a tensor, a tuple of arguments or a dict of keyword arguments"
    raise TypeError(message(op, argument, expected, type(inputs)))


def _move(x: Any, device: torch.device | None) -> Any:
    if isinstance(x, Tensor):
        return x if device is None else x.to(device)
    if type(x) in (tuple, list):
        return type(x)(_move(item, device) for item in x)
    if type(x) is dict:
        return {key: _move(item, device) for key, item in x.items()}
    return x
