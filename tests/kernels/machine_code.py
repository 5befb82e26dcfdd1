"""Machine code of Triton kernels: it needs no GPU, but a process without the interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from lwkd.kernels import common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

ARCHITECTURES = (80, 90)
Launches = dict[str, tuple[Any, dict[str, Any]]]


def check_module(module: str, kernels: set[str]) -> None:
    """Run a test module whose main calls `report`: every kernel compiles, with wide loads."""
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-m", module]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(int(size) > 1000 for _, _, size, _ in lines), done.stdout
    assert not [line for line in lines if line[3] == "narrow"], done.stdout
    compiled = {(kernel, architecture) for kernel, architecture, _, _ in lines}
    assert compiled == {(k, f"sm_{a}") for k in kernels for a in ARCHITECTURES}, done.stdout


def report(launches: Launches) -> None:
    """Compile every launch for every architecture, a line each."""
    for kernel, arguments in launches.values():
        for architecture in ARCHITECTURES:
            compiled = compile_kernel(kernel, arguments, architecture)
            row = kernel.__name__, f"sm_{architecture}", len(compiled.asm["cubin"])
            print(*row, loads(compiled, arguments), flush=True)


def launches_of(plans: Iterable[common.Plan]) -> Launches:
    """One launch of every kernel and set of constants, and the writer of the table."""
    found: Launches = {}
    for plan in plans:
        for kernel, _, arguments in plan.launches():
            constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
            found[kernel.__name__ + str(constants)] = kernel, arguments
    found["write_table"] = common.write_table, {"COUNT": common.MANY}
    return found


def compile_kernel(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    signature, constants = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = arguments[parameter.name]
        else:
            signature[parameter.name] = {"table": "*i64"}.get(
                parameter.name, parameter.annotation_type or ("i64",) * arguments.get("COUNT", 0)
            )
    source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
    target = GPUTarget("cuda", architecture, 32)
    wanted = {name: arguments.get(name, value) for name, value in common.OPTIONS.items()}
    return triton.compile(source, target=target, options=wanted)


def loads(compiled: Any, arguments: dict[str, Any]) -> str:
    """Whether 16 bytes are read at a time where that was planned."""
    if arguments.get("VECTOR", 1) == 1:
        return "any"
    ptx = compiled.asm["ptx"]
    return "wide" if re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx) else "narrow"


def check_that_no_value_compiles_again(kernels: list[Any]) -> None:
    """Addresses and sizes differ from call to call; a captured graph cannot wait for a compiler."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    table = torch.empty(8, dtype=torch.int64)
    for kernel in kernels:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen = {
            str(bind(*[table, *[v] * (len(kernel.params) - 1)])[1]).replace(f", {v})", ", _)")
            for v in (0, 1, 16, 17, 2**40)
        }
        assert len(seen) == 1, (kernel.__name__, seen)
    bind = create_function_from_signature(
        common.write_table.signature, common.write_table.params, backend
    )
    words = [(0, 1, 2), (16, 2**58, 2**31), (2**32 - 1, 8, 5)]
    assert len({str(bind(table, 3 * w[0], common.encode(w), 3)[1]) for w in words}) == 1
