"""Versions, the build, and which backend serves which op on which device, and why not.

Runs whatever is broken or missing: no compiled library, no GPU, no extras.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
from typing import Any

import torch

from lwkd._version import __version__
from lwkd.cli import table
from lwkd.ops import backends
from lwkd.ops.checks import message, suggest

DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m lwkd info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print what is known."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def collect() -> dict[str, Any]:
    """Return all facts as plain types: versions, cpu_level, build, devices, ops."""
    return {
        "versions": versions(),
        "cpu_level": cpu_level(),
        "build": backends.build_info(),
        "devices": devices(),
        "ops": [_serving(op, device) for op in op_names() for device in DEVICES],
    }


def versions() -> dict[str, str | None]:
    """Return the versions that matter; None: not there."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "lwkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
    }


def cpu_level() -> str | None:
    """Return the instruction-set level that the compiled CPU kernels run at, None without them."""
    return str(importlib.import_module("lwkd._C").cpu_level()) if backends.CPU.live else None


def devices() -> dict[str, str]:
    """Return what there is to run on, by torch's names."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        size = f"{facts.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{i}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {size}"
    return found


def check_device(command: str, name: str) -> None:
    """Raise where there is no such device, before anything runs on it.

    Args:
        command: Whose option ``--device`` is, for the message.
        name: What was asked for: "cpu", "cuda" or one of `devices`.

    Raises:
        ValueError: Nothing of that name is here.
    """
    there = list(devices())
    names = [*there, "cuda"] if len(there) > 1 else there
    if name not in names:
        why = f", and torch {torch.__version__} sees no CUDA device" if len(there) == 1 else ""
        got = repr(name) + (why if name.startswith("cuda") else suggest(name, names))
        raise ValueError(message(command, "--device", f"one of {', '.join(names)}", got))


def op_names() -> list[str]:
    """Return the ops that the dispatcher knows, without their namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("lwkd::") for n in names if n.startswith("lwkd::"))


def why_not(backend: str, device: str, op: str) -> str:
    """Say why a backend does not serve an op on a device, or nothing if it does."""
    try:
        reason = backends.unavailable(backend, device)
    except Exception as error:  # a broken installation is what this command is for
        return f"{type(error).__name__}: {error}"
    if reason:
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if backend == "compiled" and not _has_kernel(op, device):
        return f"the compiled library has no kernel of {op}"
    if backend == "triton" and not hasattr(torch.ops.lwkd_triton, op):
        return f"there is no Triton kernel of {op}"
    return ""


def _has_kernel(op: str, device: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has(f"lwkd::{op}", device.upper()))


def _serving(op: str, device: str) -> dict[str, Any]:
    reasons = {b: why_not(b, device, op) for b in backends.BACKENDS}
    order = ["compiled", "reference"]
    if device == "cuda":
        order.insert(0 if op in backends.TRITON_FIRST else 1, "triton")
    chosen = next((b for b in order if not reasons[b]), None)
    missing = {b: r for b, r in reasons.items() if r}
    return {"op": op, "device": device, "served_by": chosen, "unavailable": missing}


def _print(facts: dict[str, Any]) -> None:
    rows = [(k, v or "none") for k, v in facts["versions"].items()]
    rows.append(("CPU kernels run at", facts["cpu_level"] or "not loaded"))
    rows += [(f"device {name}", text) for name, text in facts["devices"].items()]
    rows += [(f"built with: {k}", v) for k, v in facts["build"].items() if v]
    table.show(("what", "is"), rows, title="this installation")
    header = ("op", "device", "served by", *backends.BACKENDS)
    table.show(
        header,
        [
            (
                row["op"],
                row["device"],
                row["served_by"] or "nothing",
                *("no" if b in row["unavailable"] else "yes" for b in backends.BACKENDS),
            )
            for row in facts["ops"]
        ],
        title="which backend serves which op, and which can be asked for",
    )
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in facts["ops"]:
        for backend, reason in row["unavailable"].items():
            reasons.setdefault((backend, row["device"], reason), []).append(row["op"])
    if reasons:
        print("\nwhy not")
    for (backend, device, reason), ops in reasons.items():
        some = "" if len(ops) == len(op_names()) else f" ({', '.join(ops)})"
        print(f"  {backend} on {device}{some}: {reason}")
