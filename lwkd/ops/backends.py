"""Loads the compiled libraries, binds Triton, and says what is live and why the rest is not.

Every op stands in three namespaces with one schema, one fake and one autograd formula:

* ``torch.ops.lwkd``: what the dispatcher chooses: C++ on CPU and CUDA C++ (else Triton) on GPU
  where they are built, the reference everywhere else;
* ``torch.ops.lwkd_reference``: plain PyTorch on every device;
* ``torch.ops.lwkd_triton``: Triton, on a CPU tensor only under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lwkd.ops.checks import message

BACKENDS = ("reference", "compiled", "triton")
_BUILD = "reinstall with a C++ compiler: pip install --no-build-isolation --force-reinstall lwkd"


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
    if not path.exists():
        why = build_info().get("cuda_reason") or "it was not built"
        return Library(False, f"lwkd._C_cuda is missing: {why}")
    reason = _cuda_mismatch(build_info().get("cuda", ""), torch.version.cuda)
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
    triton: str  # "module.function" in lwkd.kernels
    setup_context: Callable[..., None] | None
    backward: Callable[[Any], Callable[..., Any]]  # given the namespace's ops


def register(formula: Formula) -> None:
    """Define an op in the three namespaces, with its reference, Triton kernel, fake, autograd."""
    name = formula.schema.split("(")[0]
    module, _, function = formula.triton.partition(".")

    def triton(*args: Any) -> Any:
        return getattr(kernels(module), function)(*args)

    for namespace, library in LIBRARIES.items():
        library.define(formula.schema)
        generic = triton if namespace == "lwkd_triton" else formula.reference
        library.impl(name, generic, "CompositeExplicitAutograd")
        if namespace == "lwkd" and TRITON.live and not CUDA.live and torch.version.cuda:
            library.impl(name, triton, "CUDA")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, formula.fake, lib=library)
        torch.library.register_autograd(
            qualified,
            formula.backward(getattr(torch.ops, namespace)),
            setup_context=formula.setup_context,
            lib=library,
        )


def unavailable(backend: str, device: str) -> str:
    """Say why ``backend`` cannot serve tensors on ``device`` (a type), or nothing if it can."""
    if backend == "compiled":
        library = {"cpu": CPU, "cuda": CUDA}.get(device)
        return f"no compiled kernels for {device}" if library is None else library.reason
    if backend == "triton":
        if not TRITON.live:
            return TRITON.reason
        if device == "cpu" and not interpreting():
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


def choose(op: str, backend: str | None, device: torch.device) -> Any:
    """Return the namespace that serves ``backend``; one asked for and absent raises."""
    if backend is None:
        return torch.ops.lwkd
    if backend not in BACKENDS:
        raise ValueError(message(op, "backend", f"None or one of {BACKENDS}", repr(backend)))
    reason = unavailable(backend, device.type)
    if reason:
        raise RuntimeError(message(op, "backend", f"{backend!r} on {device.type}", reason))
    if backend == "compiled":
        return torch.ops.lwkd
    return torch.ops.lwkd_reference if backend == "reference" else torch.ops.lwkd_triton


LIBRARIES = {
    name: torch.library.Library(name, "DEF") for name in ("lwkd", "lwkd_reference", "lwkd_triton")
}
TRITON = _find_triton()
CPU = _load_cpu()
CUDA = _load_cuda()
