"""Loads the compiled libraries, binds Triton, and says what is live and why the rest is not.

Every op stands in three namespaces with one schema, one fake and one autograd formula:

* ``torch.ops.lwkd``: what the dispatcher chooses: C++ on CPU and CUDA C++ (else Triton) on GPU
  where they are built, the reference everywhere else; TRITON_FIRST names the exceptions;
* ``torch.ops.lwkd_reference``: plain PyTorch on every device;
* ``torch.ops.lwkd_triton``: Triton, on a CPU tensor only under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lwkd.ops.checks import message

BACKENDS = ("reference", "compiled", "triton")
TRITON_FIRST = frozenset({"jacobian_factors"})
"""Ops that layer_discrepancy lets Triton serve on a GPU, if it is there: its kernels keep products
of matrices on the chip, the compiled ones have torch multiply."""
_BUILD = (
    "reinstall with a C++ compiler, from the source tree: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)


class Library(NamedTuple):
    """One compiled library: whether it is loaded, and why not."""

    live: bool
    reason: str


def _warn(text: str) -> None:
    warnings.warn(f"lwkd: {text}; run `python -m lwkd info`", RuntimeWarning, stacklevel=3)


def _load_cpu() -> Library:
    if importlib.util.find_spec("lwkd._C") is None:
        return Library(False, f"lwkd._C is not built; {_BUILD}")
    try:
        importlib.import_module("lwkd._C")
    except (ImportError, OSError) as error:
        reason = f"lwkd._C does not load under torch {torch.__version__}: {error}"
        _warn(f"the compiled CPU kernels are off, the reference serves: {reason}")
        return Library(False, reason)
    return Library(True, "")


def build_info() -> dict[str, str]:
    """Return what ``setup.py`` wrote into the library, or nothing where it is not loaded."""
    if not CPU.live:
        return {}
    return dict(importlib.import_module("lwkd._C").build_info())


def _cuda_mismatch(built: str, running: str) -> str:
    """Say why a library of CUDA ``built`` cannot serve a torch of CUDA ``running``, or nothing."""
    if built and built.split(".")[0] != running.split(".")[0]:
        return (
            f"lwkd._C_cuda was built with CUDA {built}, torch {torch.__version__} runs "
            f"CUDA {running}; rebuild with the matching nvcc"
        )
    return ""


def _load_cuda() -> Library:
    path = Path(__file__).resolve().parents[1] / "_C_cuda.so"
    if torch.version.cuda is None:
        return Library(False, f"torch {torch.__version__} has no CUDA")
    if not CPU.live:  # whose stamp says what the CUDA library was built with
        return Library(False, f"lwkd._C_cuda is not used without lwkd._C: {CPU.reason}")
    built, why = build_info().get("cuda", ""), build_info().get("cuda_reason", "")
    if not path.exists():
        return Library(False, f"lwkd._C_cuda is missing: {why or 'it was not built'}")
    if not built:
        return Library(False, f"{path.name} is of another build than lwkd._C, which says: {why}")
    reason = _cuda_mismatch(built, torch.version.cuda)
    if not reason:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            reason = f"lwkd._C_cuda does not load under torch {torch.__version__}: {error}"
    if reason:
        _warn(f"the compiled CUDA kernels are off: {reason}")
        return Library(False, reason)
    return Library(True, "")


def _find_triton() -> Library:
    if importlib.util.find_spec("triton") is None:
        return Library(False, "triton is not installed; pip install triton")
    return Library(True, "")


def kernels(name: str) -> ModuleType:
    """Import one module of Triton kernels, at its first use and not before."""
    if not TRITON.live:
        raise RuntimeError(message("ops", "backend", "triton", TRITON.reason))
    return importlib.import_module(f"lwkd.kernels.{name}")


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (``TRITON_INTERPRET=1``)."""
    return TRITON.live and bool(kernels("common").INTERPRET)


class Formula(NamedTuple):
    """Everything that is the same for an op in every namespace, and its kernels in Python."""

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    triton: str  # "module.function" in lwkd.kernels; "" where there is no such kernel
    inputs: Callable[..., Sequence[Tensor]]  # what of the arguments is differentiable
    save: Callable[..., None]  # (ctx, arguments, output)
    backward: Callable[..., Sequence[Tensor | None]]  # (ctx, namespace, *gradients)


class Op:
    """An op in the three namespaces: schema, kernels, fake and autograd, registered once.

    Autograd is the dispatcher's Autograd kernel, as torch.library.register_autograd makes it, but
    without flattening every argument of every call: that costs more than 64 small layers.
    """

    def __init__(self, formula: Formula) -> None:
        name = formula.schema.split("(")[0]
        module, _, function = formula.triton.partition(".")

        def triton(*args: Any) -> Any:
            return getattr(kernels(module), function)(*args)

        self._name, self._inputs = name, formula.inputs
        self._overloads: dict[str, Any] = {}
        self._nodes: dict[str, Any] = {}
        self.compiled: list[str] = []  # the devices for which there is a compiled kernel
        self._triton = bool(formula.triton)
        for namespace, library in LIBRARIES.items():
            if namespace == "lwkd_triton" and not self._triton:
                continue
            library.define(formula.schema)
            generic = triton if namespace == "lwkd_triton" else formula.reference
            library.impl(name, generic, "CompositeExplicitAutograd")
            if namespace == "lwkd":  # the compiled libraries are loaded by now
                has = torch._C._dispatch_has_kernel_for_dispatch_key
                self.compiled = [d for d in ("cpu", "cuda") if has(f"lwkd::{name}", d.upper())]
                wanted = self._triton and TRITON.live and torch.version.cuda
                if wanted and "cuda" not in self.compiled:
                    library.impl(name, triton, "CUDA")
            torch.library.register_fake(f"{namespace}::{name}", formula.fake, lib=library)
            overload = getattr(getattr(torch.ops, namespace), name).default
            node = _node(overload, namespace, formula)
            self._overloads[namespace], self._nodes[namespace] = overload, node
            library.impl(name, _autograd(overload, node, formula), "Autograd", with_keyset=True)

    def __call__(self, namespace: str, *args: Any) -> Any:
        """Run the op of one namespace, the short way where nothing traces the call."""
        overload = self._overloads[namespace]
        if torch.compiler.is_compiling():
            return overload(*args)
        inputs = self._inputs(*args)
        refuse_transforms(self._name, inputs)
        wanted = _wanted(inputs)
        if wanted:
            return self._nodes[namespace].apply(None, args, *wanted)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def choose(self, op: str, backend: str | None, device: torch.device) -> str:
        """Return the namespace that serves ``backend``; one asked for and absent raises."""
        namespace = choose(op, backend, device)
        wanted = backend is None and device.type == "cuda" and self._name in TRITON_FIRST
        if wanted and self._triton and TRITON.live:
            return "lwkd_triton"
        absent = ""
        if backend == "compiled" and device.type not in self.compiled:
            absent = f"the compiled library has no kernel of {self._name}"
        if backend == "triton" and not self._triton:
            absent = f"there is no Triton kernel of {self._name}"
        if absent:
            raise RuntimeError(message(op, "backend", f"{backend!r} on {device.type}", absent))
        return namespace


def refuse_transforms(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where a derivative is asked for that would come out as 0, silently."""
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )
    if dual or torch._C._are_functorch_transforms_active():
        got = "forward-mode differentiation" if dual else "a torch.func transform"
        expected = "reverse-mode differentiation, as by torch.autograd.grad"
        raise RuntimeError(message(f"ops.{name}", "derivative", expected, got))


def _wanted(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad] if torch.is_grad_enabled() else []


def _node(overload: Any, namespace: str, formula: Formula) -> Any:
    def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out = overload(*args) if keyset is None else overload.redispatch(keyset, *args)
            formula.save(ctx, args, out)
        return tuple(out) if isinstance(out, list) else out

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None, None, *formula.backward(ctx, namespace, *grads))

    # Made by name: anomaly mode and grad_fn show it.
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = f"{namespace}_{formula.schema.split('(')[0]}_"
    return type(name, (torch.autograd.Function,), parts)


def _autograd(overload: Any, node: Any, formula: Formula) -> Callable[..., Any]:
    name, many = formula.schema.split("(")[0], formula.schema.endswith("-> Tensor[]")

    def autograd(keyset: Any, *args: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        inputs = formula.inputs(*args)
        refuse_transforms(name, inputs)
        wanted = _wanted(inputs)
        if wanted:
            out = node.apply(below, args, *wanted)
            return list(out) if many else out
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(below, *args)

    return autograd


def unavailable(backend: str, device: str) -> str:
    """Say why ``backend`` cannot serve tensors on ``device`` (a type), or nothing if it can."""
    if backend == "compiled":
        library = {"cpu": CPU, "cuda": CUDA}.get(device)
        return f"no compiled kernels for {device}" if library is None else library.reason
    if backend == "triton":
        if not TRITON.live:
            return TRITON.reason
        # What is being compiled cannot import: there the kernels themselves refuse.
        if device == "cpu" and not torch.compiler.is_compiling() and not interpreting():
            return "triton runs on a CPU tensor only under its interpreter (TRITON_INTERPRET=1)"
        if device not in ("cpu", "cuda"):
            return f"no Triton kernels for {device}"
    return ""


def serving(device: str) -> str:
    """Name the backend that the dispatcher chooses for tensors on ``device``."""
    if device == "cpu" and CPU.live:
        return "compiled"
    if device == "cuda" and (CUDA.live or TRITON.live):
        return "compiled" if CUDA.live else "triton"
    return "reference"


def check_name(op: str, backend: object) -> None:
    """Raise unless this is the name of a backend, or None."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(message(op, "backend", f"None or one of {BACKENDS}", repr(backend)))


def choose(op: str, backend: str | None, device: torch.device) -> str:
    """Return the namespace that serves ``backend``; one asked for and absent raises."""
    check_name(op, backend)
    if backend is None:
        return "lwkd"
    reason = unavailable(backend, device.type)
    if reason:
        raise RuntimeError(message(op, "backend", f"{backend!r} on {device.type}", reason))
    return "lwkd" if backend == "compiled" else f"lwkd_{backend}"


LIBRARIES = {
    name: torch.library.Library(name, "DEF") for name in ("lwkd", "lwkd_reference", "lwkd_triton")
}
TRITON = _find_triton()
CPU = _load_cpu()
CUDA = _load_cuda()
