"""Turn the recorded rows, bench/results/*.jsonl, into the README's tables.

python -m bench.compare            write the tables between the README's markers
python -m bench.compare --check    exit with 1 where the README does not show the recorded rows
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from bench.cases import (
    CHANNEL_CASE,
    CPU_CASES,
    FACTORS_CASES,
    GPU_CASES,
    JOINT_CASES,
    METER_CASES,
    PROBE_CASES,
    ROWS_CASES,
    STEP_CASE,
    StepCase,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BENCH = Path(__file__).parent
OURS, FLOOR = "lwkd", "floor"
# Column -> the rivals it shows the fastest of.
RIVALS = {
    "torch.compile": ("compile",),
    "eager": ("eager", "eager norm"),
    "at_loss": ("at_loss",),
    "torchdistill": ("torchdistill",),
}
JACOBIAN_RIVALS = {
    "torch.compile": ("compile",),
    "eager": ("eager", "eager norm"),
    "vmap(grad)": ("vmap(grad)",),
    "ghost norm": ("ghost norm",),
}
HESSIAN_RIVALS = {
    "torch.compile": ("compile",),
    "stored signs": ("stored signs",),
    "torch's signs": ("torch's signs", "PyHessian's way"),
}
CHANNEL_RIVALS = {"a pass a filter": ("a pass a filter",)}
KINDS = (RIVALS, JACOBIAN_RIVALS, HESSIAN_RIVALS, CHANNEL_RIVALS)
UNMEASURED, ABSENT = "unmeasured", "–"
_JACOBIAN: tuple[Any, ...] = (*ROWS_CASES, *FACTORS_CASES, *METER_CASES)
# Device -> the cases of every kind's table.
CASES: dict[str, tuple[Sequence[Any], ...]] = {
    device: (own, *([case for case in kind if case.device == device]
                    for kind in (_JACOBIAN, (*PROBE_CASES, *JOINT_CASES), (CHANNEL_CASE,))))
    for device, own in (("cpu", CPU_CASES), ("cuda", GPU_CASES))
}  # fmt: skip
# What every row says; a pass over a whole step has no gbps, but says so.
KEYS = (
    "date", "commit", "device", "model", "malloc", "torch", "python", "served_by",
    "case", "mode", "rival", "seconds", "to_floor", "to_ours", "gbps", "samples_per_s",
)  # fmt: skip

Row = dict[str, Any]
Machine = tuple[str, str, str]  # device, model, malloc
Measured = dict[tuple[str, str, str], Row]  # by case, mode, rival
Columns = Mapping[str, Sequence[str]]


def _row(line: str, where: str) -> Row:
    """One recorded line; raises ValueError that says where the line stands."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a whole JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a whole JSON object: {line[:40]}")
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise ValueError(f"{where}: a row without {', '.join(missing)}")
    return row


def read(folder: Path) -> dict[Machine, Measured]:
    """The newest row of every case, mode and rival, machine by machine."""
    rows: list[Row] = []
    for file in sorted(folder.glob("*.jsonl")):
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        rows += [_row(line, f"{file}, line {i}") for i, line in lines if line.strip()]
    machines: dict[Machine, Measured] = {}
    for row in sorted(rows, key=lambda r: r["date"]):  # stable: of one day the last line counts
        machine = (row["device"], row["model"], row["malloc"])
        machines.setdefault(machine, {})[row["case"], row["mode"], row["rival"]] = row
    return machines


def _fastest(measured: Measured, case: str, mode: str, rivals: Iterable[str]) -> Row | None:
    rows = [measured.get((case, mode, rival)) for rival in rivals]
    return min((r for r in rows if r), key=lambda r: r["to_ours"], default=None)


def best_rival(measured: Measured, case: str, mode: str) -> Row | None:
    """The fastest of the rivals in the same run, if there were any."""
    columns = [rivals for kind in KINDS for rivals in kind.values()]
    everyone = dict.fromkeys(rival for rivals in columns for rival in rivals)
    return _fastest(measured, case, mode, everyone)


def _wins(measured: Measured, cases: Iterable[Any]) -> dict[str, float]:
    """How many times longer than ours the best rival takes, row by row."""
    wins = {}
    for case in cases:
        for mode in case.modes:
            best = best_rival(measured, case.name, mode)
            if best is not None:
                wins[f"{case.title} {mode}"] = best["to_ours"]
    return wins


def _summary(wins: dict[str, float]) -> str:
    if not wins:
        return ""
    mean = exp(sum(log(w) for w in wins.values()) / len(wins))
    worst, best = min(wins, key=wins.__getitem__), max(wins, key=wins.__getitem__)
    return (
        f"Against the best rival of each row: {mean:.2f} × as fast in the geometric mean over "
        f"{len(wins)} rows, from {wins[worst]:.2f} × ({worst}) to {wins[best]:.2f} × ({best})."
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _line(measured: Measured, case: Any, mode: str, columns: Columns) -> list[str]:
    ours = measured.get((case.name, mode, OURS))
    if ours is None:
        return [case.title, mode, UNMEASURED, *[ABSENT] * (4 + len(columns))]
    best = best_rival(measured, case.name, mode)
    first = (
        ABSENT if best is None else f"**{best['to_ours']:.2f} ×** {_column(best['rival'], columns)}"
    )
    floors = [ours, *(_fastest(measured, case.name, mode, r) for r in columns.values())]
    cells = [f"{r['to_floor']:.2f}" if r else ABSENT for r in floors]
    gbps = ABSENT if ours["gbps"] is None else f"{ours['gbps']:.1f}"
    rates = [gbps, f"{ours['samples_per_s']:,.0f}"]
    return [case.title, mode, first, _time(ours["seconds"]), *cells, *rates]


def _column(rival: str, columns: Columns) -> str:
    return next(column for column, rivals in columns.items() if rival in rivals)


def _step_line(measured: Measured, case: StepCase, mode: str) -> list[str]:
    ours = measured.get((case.name, mode, OURS))
    if ours is None:
        return [case.title, mode, UNMEASURED, *[ABSENT] * 4]
    cost, memory = ours["to_floor"] - 1, ours.get("extra_memory")
    syncs = ours.get("host_synchronisations")
    return [
        case.title, mode, f"**{cost:+.1%}**", ABSENT if memory is None else f"{memory:+.1%}",
        ABSENT if syncs is None else str(syncs), _time(ours["seconds"]),
        f"{ours['samples_per_s']:,.0f}",
    ]  # fmt: skip


def _heading(machine: Machine, measured: Measured) -> str:
    device, model, malloc = machine
    newest = max(measured.values(), key=lambda r: r["date"])
    parts = [model, f"torch {newest['torch']}", f"Python {newest['python']}"]
    parts += [f"{malloc} malloc"] if malloc else []
    parts += [f"lwkd {newest['served_by']}", newest["date"], f"commit {newest['commit']}"]
    copies = [r["copy_gbps"] for r in measured.values() if r.get("copy_gbps")]
    if copies:
        parts.append(f"copy {min(copies):,.0f} to {max(copies):,.0f} GB/s")
    return f"**{'GPU' if device == 'cuda' else 'CPU'}: {', '.join(parts)}**"


def _section(title: str, measured: Measured, tables: Sequence[Sequence[Any]]) -> list[str]:
    """The tables of one machine: attention, Jacobians, Hessians, channel weights."""
    out = [title, ""]
    for cases, columns in zip(tables, KINDS, strict=True):
        if not cases:
            continue
        summary = _summary(_wins(measured, cases))
        head = ["Case", "Pass", "as fast as the best rival", "lwkd", "lwkd / floor"]
        head += [f"{column} / floor" for column in columns] + ["GB/s", "samples/s"]
        lines = [_line(measured, case, mode, columns) for case in cases for mode in case.modes]
        if not measured:
            head, lines = head[:3], [line[:3] for line in lines]
        out += [*([summary, ""] if summary else []), *_table(head, lines), ""]
    return out


def render(machines: dict[Machine, Measured]) -> str:
    """All tables, as Markdown."""
    out = [
        "Pass f is the forward without gradients, f+b the forward with the gradient of every "
        "student layer. A time over the floor's: the floor reads every input once (f) and reads "
        "the student's again and writes as much (f+b); of factors it is the library's products of "
        "the contraction with the fewest operations, of a meter a forward and a backward of both "
        "networks, of joint probes the Hessian-vector products alone, of channel weights what is "
        "above the layers. Medians of ratios within a round.",
        "",
    ]
    for device, label in (("cpu", "CPU"), ("cuda", "GPU")):
        cases = CASES[device]
        here = {m: rows for m, rows in sorted(machines.items()) if m[0] == device}
        for machine, measured in here.items():
            out += _section(_heading(machine, measured), measured, cases)
        if not here:
            out += _section(f"**{label}: {UNMEASURED}**", {}, cases)
        if device == "cuda":
            head = ["Case", "Pass", "time against a uniform rate", "memory", "host syncs", "lwkd"]
            for measured in here.values() or [{}]:
                lines = [_step_line(measured, STEP_CASE, mode) for mode in STEP_CASE.modes]
                out += [*_table([*head, "samples/s"], lines), ""]
    return "\n".join(out).rstrip()


def splice(text: str, tables: str) -> str:
    """Put the tables between the markers; raises ValueError where there are none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"one {BEGIN} and, after it, one {END} are needed")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--readme", type=Path, default=BENCH.parent / "README.md")
    options = parser.parse_args(arguments)
    try:
        machines = read(options.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for machine, measured in sorted(machines.items()):
        print(_heading(machine, measured).strip("*"))
        every = [case for cases in CASES[machine[0]] for case in cases]
        print(_summary(_wins(measured, every)) or "no rivals were measured")
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = splice(old, render(machines))
    except ValueError as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print(f"{options.readme} is out of date: python -m bench.compare", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
