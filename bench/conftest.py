"""Options, the machine's description, and the two fixtures that time rivals side by side."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lwkd.ops import backends

REQUIRE_GPU = os.environ.get("LWKD_REQUIRE_GPU") == "1"
OURS, FLOOR, _COPY = "lwkd", "floor", "copy"
Calls = Sequence[Callable[[], object]]
Row = dict[str, Any]

_rows = pytest.StashKey[list[Row]]()
_clock = pytest.StashKey["Clock"]()

# --- options -----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lwkd benchmarks")
    group.addoption(
        "--quick", action="store_true", help="tiny shapes, no torch.compile: a smoke test"
    )
    group.addoption("--rounds", type=int, default=15, help="rounds a case (default 15)")
    group.addoption("--record", metavar="FILE", help="append the rows to this .jsonl file")
    group.addoption("--commit", default=None, help="what to record as commit (default: ask git)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record") and config.getoption("quick"):
        raise pytest.UsageError("--record keeps measured rows; those of --quick are none")
    config.stash[_rows] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = not (torch.cuda.is_available() or REQUIRE_GPU)
    for item in items:
        if absent and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
        if {"cpu_benchmark", "gpu_benchmark"} & set(getattr(item, "fixturenames", ())):
            item.stash[_clock] = clock = Clock()
            item.add_marker(pytest.mark.benchmark(timer=clock.now))


# --- where the numbers come from ---------------------------------------------------------------


def malloc() -> str:
    """Which malloc fills fresh tensors: glibc's default, glibc told to keep its pages, or other."""
    if os.environ.get("LD_PRELOAD"):
        return Path(os.environ["LD_PRELOAD"].split()[0].split(":")[0]).name
    kept = os.environ.get("MALLOC_MMAP_MAX_") == "0" and "MALLOC_TRIM_THRESHOLD_" in os.environ
    return "tuned" if kept else "default"


def commit() -> str:
    """The commit of the working tree, with + where it has changes."""

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "-s") else "")


def _processor() -> str:
    """The processor, with the numbers that tell generations of one name apart."""
    file = Path("/proc/cpuinfo")
    text = file.read_text().split("\n\n")[0] if file.exists() else ""
    said = dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.MULTILINE))
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said:
        name += f" (family {said['cpu family']}, model {said['model']})"
    level = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {level}"


def environment(device: str) -> Row:
    """What a row must say so that its number can be judged."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device,
        "model": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "malloc": malloc() if device == "cpu" else "",
        "served_by": backends.serving(device),
    }


# --- timing ------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is told how long something took.

    pytest-benchmark reads it before and after the call it times, so that it reports what was
    measured elsewhere: by CUDA events, or for one call of a batch.
    """

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        return self._time

    def advance(self, seconds: float) -> None:
        self._time += seconds


class Race:
    """Times rivals in turn, round after round, so that noise hits all of them.

    Every round runs each rival once (a batch of calls where one call is short), beginning with
    another one each time. A row's ratios are medians over the rounds of the ratios within a round.
    """

    device = "cpu"
    batch_seconds = 1e-2

    def __init__(self, benchmark: Any, request: pytest.FixtureRequest) -> None:
        self._benchmark = benchmark
        self._clock = request.node.stash[_clock]
        self._rows = request.config.stash[_rows]
        self._rounds = request.config.getoption("rounds")
        self.quick = bool(request.config.getoption("quick"))
        self._used: dict[str, int] = {}

    def __call__(
        self,
        case: Any,
        mode: str,
        rivals: Mapping[str, Calls],
        *,
        moved: int | None = None,
        info: Row | None = None,
    ) -> None:
        """Time the rivals and record a row each.

        Args:
            case: What is measured.
            mode: Which pass of it.
            rivals: Calls by name, "lwkd" and (except where a GPU's copy gives it) "floor" among
                them; those of one name are one call on several sets of inputs, taken in turn.
            moved: Bytes that the floor moves, for GB/s; None where that says nothing.
            info: More to record, with every row.
        """
        counts = {name: self._calibrate(name, calls) for name, calls in rivals.items()}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        order = list(rivals)

        def run_round() -> None:
            gc.collect()
            gc.disable()
            for name in order:
                times[name].append(self._time(name, rivals[name], counts[name]))
            order.append(order.pop(0))
            gc.enable()

        self._benchmark.group = f"{self.device}: {case.title}"
        self._benchmark.pedantic(
            lambda: self._clock.advance(times[OURS][-1]),
            setup=run_round,
            rounds=2 if self.quick else self._rounds,
        )
        common = {**environment(self.device), "case": case.name, "mode": mode, **(info or {})}
        common.update(self._conclude(times, moved))
        for name in times:
            row = {**common, "rival": name, **_figures(times, name, case.samples, moved)}
            self._rows.append(row)
            if name == OURS:
                self._benchmark.extra_info.update(row)

    def _conclude(self, times: dict[str, list[float]], moved: int | None) -> Row:
        """What the rounds have shown beside the rivals' times."""
        return {}

    def _calibrate(self, name: str, calls: Calls) -> int:
        """Warm every call up, and say how many calls make a batch long enough to be timed."""
        for call in calls:
            call()
        if self.quick:
            return 1
        once = self._time(name, calls, len(calls))
        if once < self.batch_seconds:
            once = min(once, *(self._time(name, calls, len(calls)) for _ in range(2)))
        return max(1, min(1000, round(self.batch_seconds / once)))

    def _batch(self, name: str, calls: Calls, count: int) -> list[Callable[[], object]]:
        start = self._used.get(name, 0)
        self._used[name] = start + count
        return [calls[(start + i) % len(calls)] for i in range(count)]

    def _time(self, name: str, calls: Calls, count: int) -> float:
        """Seconds a call, after one that is not timed: a loop does the same thing step by step."""
        first, *batch = self._batch(name, calls, count + 1)
        first()
        start = time.perf_counter()
        for call in batch:
            call()
        return (time.perf_counter() - start) / count


class GpuRace(Race):
    """The same on a GPU: times by CUDA events, one synchronise a rival and round.

    The launches of a batch are issued back to back, so that a row shows whichever takes longer, the
    kernels or their launching. A large copy runs in every round: its bandwidth, counting bytes read
    and written, is recorded with the rows, and gives the floor where no rival of that name is
    there.
    """

    device = "cuda"
    copied = 1 << 31  # bytes read and written

    def __call__(self, case: Any, mode: str, rivals: Mapping[str, Calls], **how: Any) -> None:
        source = torch.rand(self.copied // 8, device=self.device)
        target = torch.empty_like(source)
        copy = [lambda: target.copy_(source)]
        super().__call__(case, mode, {**rivals, _COPY: copy}, **how)

    def sets(self, size: int) -> int:
        """How many sets of inputs, of ``size`` bytes each, leave the L2 cache behind."""
        return 1 + 2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size

    def _conclude(self, times: dict[str, list[float]], moved: int | None) -> Row:
        copies = times.pop(_COPY)
        if FLOOR not in times and moved is not None:
            times[FLOOR] = [moved / self.copied * t for t in copies]
        return {"copy_gbps": self.copied / statistics.median(copies) * 1e-9}

    def _time(self, name: str, calls: Calls, count: int) -> float:
        batch = self._batch(name, calls, count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        for call in batch:
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / count


def _figures(times: dict[str, list[float]], name: str, samples: int, moved: int | None) -> Row:
    seconds = statistics.median(times[name])

    def ratio(other: str) -> float:
        pairs = zip(times[name], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "rounds": len(times[name]),
        "seconds": seconds,
        "to_floor": ratio(FLOOR),
        "to_ours": ratio(OURS),
        "gbps": None if moved is None else moved / seconds * 1e-9,
        "samples_per_s": samples / seconds,
    }


@pytest.fixture
def cpu_benchmark(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Race]:
    """Race rivals on the CPU: ``cpu_benchmark(case, mode, rivals, moved=bytes)``."""
    yield Race(benchmark, request)
    torch.compiler.reset()
    gc.collect()


@pytest.fixture
def gpu_benchmark(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[GpuRace]:
    """Race rivals on the GPU; without one a skip, or a failure where LWKD_REQUIRE_GPU=1."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA GPU on this machine although LWKD_REQUIRE_GPU=1")
    yield GpuRace(benchmark, request)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


# --- what the session leaves -------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section("throughput, rivals side by side")
    head = ("case", "mode", "rival", "ms", "× floor", "× lwkd", "GB/s", "samples/s")
    line = "{:<26} {:<17} {:<14} {:>10} {:>8} {:>8} {:>8} {:>10}"
    terminalreporter.write_line(line.format(*head))
    for r in rows:
        gbps = "" if r["gbps"] is None else f"{r['gbps']:.1f}"
        figures = (f"{r['seconds'] * 1e3:.4f}", f"{r['to_floor']:.2f}", f"{r['to_ours']:.2f}")
        names = (r["case"], r["mode"], r["rival"])
        terminalreporter.write_line(
            line.format(*names, *figures, gbps, f"{r['samples_per_s']:.0f}")
        )
    served = {f"{r['device']}: lwkd is {r['served_by']}, {r['model']}, {r['malloc']}" for r in rows}
    for text in sorted(served):
        terminalreporter.write_line(text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    file, rows = session.config.getoption("record"), session.config.stash[_rows]
    if file and rows:
        made_by = session.config.getoption("commit") or commit()
        with Path(file).open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({**row, "commit": made_by}) + "\n" for row in rows)
