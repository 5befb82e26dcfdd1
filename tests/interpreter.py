"""Triton's interpreter without what it does again at every step; what it checks becomes more.

It does a kernel's every scalar addition in numpy, behind ten times as much Python. Of that this
leaves out what has no effect, or the same one as before; each part only where this Triton has it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def quicken() -> None:
    """Change the interpreter of this process."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # no Triton, no kernels
        return
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        _patch_the_language_once(interpreter, tl)
    if hasattr(interpreter, "_get_np_dtype"):
        _look_dtypes_up(interpreter)
    semantic = type(interpreter.interpreter_semantic)
    if hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        semantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def _patch_the_language_once(interpreter: Any, tl: Any) -> None:
    """A launch patches the language for all it calls: their calls need not look for it again."""
    patch = interpreter._patch_lang

    @functools.cache
    def languages(kernel: Any) -> list[Any]:
        values = kernel.__globals__.values()
        return [v for v in values if inspect.ismodule(v) and v in (tl, tl.core)]

    def patch_once(kernel: Any) -> Any:
        if any(tl.core.is_builtin(x.load) for x in languages(kernel)):
            return patch(kernel)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _look_dtypes_up(interpreter: Any) -> None:
    find = interpreter._get_np_dtype
    known = functools.cache(find)
    interpreter._get_np_dtype = lambda kind: (find if kind.scalar.is_ptr() else known)(kind.scalar)


def _refuse_overflow(semantic: Any, x: Any, y: Any, operation: Any) -> None:
    """Raise where a sum, difference or product of integers below 64 bits does not fit.

    The interpreter's own way takes ten operations of the language, and drops what they find.
    """
    kind = x.type.scalar
    if kind.int_bitwidth >= 64:
        return
    run = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = run(x.handle.data, y.handle.data, dtype=np.int64, casting="unsafe")
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    if exact.size and not (low <= exact.min() and exact.max() <= high):
        raise OverflowError(f"{operation.__name__}: {kind} holds {low} to {high}, not {exact}")
