"""Time the ops on this machine, against plain PyTorch and torch.compile.

Forward and, where the op has a gradient, forward + backward to the student, on shapes of common
networks in float32. All three must agree before anything is timed. Medians of interleaved runs:
CUDA events on a GPU, the clock on a CPU. GB/s counts what has to be moved at least: both networks'
operands read once, for the backward the student's read again and its gradient written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lwkd.cli import table
from lwkd.cli.info import check_device, collect, devices, versions
from lwkd.cli.workloads import FULL, QUICK, Workload
from lwkd.ops.checks import message, suggest

Run = Callable[[], list[Tensor]]
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m lwkd bench``."""
    parser.add_argument(
        "--kind",
        default="attention",
        help="of distance: attention (the default), jacobian or hessian",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.kind not in FULL:
        got = repr(args.kind) + suggest(args.kind, FULL)
        raise ValueError(message("bench", "--kind", f"one of {', '.join(FULL)}", got))
    check_device("bench", device)
    workloads = (QUICK if args.quick else FULL)[args.kind]
    passes = [(w, backward) for w in workloads for backward in (False, True)[: 1 + w.gradients]]
    rows: list[Row] = []
    on_gpu = device.startswith("cuda")
    with (
        torch.cuda.device(device) if on_gpu else nullcontext(),
        table.progress(f"timing on {device}", len(passes)) as tick,
    ):
        for workload, backward in passes:
            rows += measure(workload, device, backward, not args.no_compile, args.quick)
            tick()
    machine = {**versions(), "device": _name(device), "threads": torch.get_num_threads()}
    machine["backend"] = _serving(device.split(":")[0], {w.op for w in workloads})
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
    else:
        _print(machine, rows)
    return 0


def measure(
    workload: Workload, device: str, backward: bool, compiled: bool, quick: bool = False
) -> list[Row]:
    """Time the contenders on one workload.

    Args:
        workload: The shapes.
        device: Where.
        backward: Also the gradient with respect to the student; not every op has one.
        compiled: Whether torch.compile takes part.
        quick: Three rounds instead of up to thirty.

    Returns:
        A dict for each contender: case, pass, contender, ms, gb_per_s, ratio (its time over
        lwkd's), error (why it could not run, else None).

    Raises:
        RuntimeError: The contenders do not agree.
    """
    student, teacher = workload.tensors(device)
    functions: dict[str, Callable[..., Tensor]] = {
        "lwkd": workload.fused,
        "PyTorch": workload.plain,
    }
    if compiled:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(workload.plain, dynamic=False)
    runs: dict[str, Run] = {}
    errors: dict[str, str | None] = dict.fromkeys(functions)
    want: list[Tensor] = []
    for name, function in functions.items():
        run = partial(_step, function, student, teacher, backward)
        try:
            got = run()
        except Exception as error:
            if name == "lwkd":
                raise
            text = str(error).strip() or "no message"
            errors[name] = f"{name}: {type(error).__name__}: {text.splitlines()[0]}"
            continue
        want = want or got
        _agree(workload.name, name, got, want)
        runs[name] = run
    seconds = _interleaved(runs, device, rounds=3 if quick else 30, budget=0.2 if quick else 8.0)
    moved = 4 * sum(x.numel() for x in (*student, *teacher))
    moved += 4 * 2 * sum(x.numel() for x in student) if backward else 0
    return [
        {
            "case": workload.name,
            "pass": "forward + backward" if backward else "forward",
            "contender": name,
            "ms": 1e3 * seconds[name] if name in seconds else None,
            "gb_per_s": moved / seconds[name] / 1e9 if name in seconds else None,
            "ratio": seconds[name] / seconds["lwkd"] if name in seconds else None,
            "error": errors[name],
        }
        for name in functions
    ]


def _step(
    function: Callable[..., Tensor],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    backward: bool,
) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        d = function(student, teacher)
        return [d, *torch.autograd.grad(d.sum(), student)] if backward else [d]


def _agree(case: str, name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Nothing is timed that computes something else."""
    for x, y in zip(got, want, strict=True):
        worst = float((x - y).detach().abs().max())
        if not worst <= 1e-3 * float(y.detach().abs().max()):
            raise RuntimeError(f"{case}: {name} and lwkd do not agree, by {worst:.2g}")


def _interleaved(runs: dict[str, Run], device: str, rounds: int, budget: float) -> dict[str, float]:
    """Return the median seconds of a call; the contenders take turns, so that drifts cancel."""
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    repeats = {}
    for name, run in runs.items():
        clock(run, 2)  # warm caches, allocator and clocks
        repeats[name] = max(1, min(1000, int(2e-3 / max(clock(run, 1), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, run in runs.items():
            taken[name].append(clock(run, repeats[name]))
    return {name: median(values) for name, values in taken.items()}


def _cpu_seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(run: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def _serving(device: str, names: set[str]) -> str:
    """Say which backend serves these ops; "compiled and triton" where they differ."""
    served = {
        o["served_by"] for o in collect()["ops"] if o["device"] == device and o["op"] in names
    }
    return " and ".join(sorted(map(str, served)))


def _name(device: str) -> str:
    index = device if ":" in device or device == "cpu" else f"{device}:0"
    return devices().get(index, device)


def _print(machine: dict[str, Any], rows: Sequence[Row]) -> None:
    print(f"{machine['device']}; torch {machine['torch']}, {machine['threads']} CPU threads")
    print(
        f"lwkd {machine['lwkd']} runs its {machine['backend']} kernels; float32, median of a call"
    )
    cells = [
        (
            row["case"],
            row["pass"],
            row["contender"],
            *(
                "-" if row[key] is None else format(row[key], form)
                for key, form in (("ms", ".3f"), ("gb_per_s", ".1f"), ("ratio", ".2f"))
            ),
        )
        for row in rows
    ]
    header = ("case", "pass", "who", "ms", "GB/s", "time / lwkd's")
    table.show(header, cells, align="lllrrr")
    for error in dict.fromkeys(r["error"] for r in rows if r["error"]):
        print(f"did not run: {error}")
