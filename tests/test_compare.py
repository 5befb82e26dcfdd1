"""The README's tables: from rows to Markdown, and what is wrong with a row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import accuracy, compare, traces
from bench.cases import CPU_CASES, STEP_CASE
from bench.transfer import curvature, jacobian, methods, policies, rows
from lwkd.cli import digits

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
CASE = CPU_CASES[0]


def row(rival: str = "lwkd", seconds: float = 0.002, **changes: Any) -> Row:
    return {
        "date": "2026-01-02", "commit": "abc1234", "device": "cpu", "model": "A CPU, 2 threads",
        "malloc": "default", "torch": "2.13.0", "python": "3.11.7", "served_by": "compiled",
        "case": CASE.name, "mode": "f", "rival": rival, "seconds": seconds,
        "to_floor": seconds / 0.001, "to_ours": seconds / 0.002, "gbps": 12.5,
        "samples_per_s": 16_000.0, **changes,
    }  # fmt: skip


def write(folder: Path, *rows: Row, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def lines(folder: Path, start: str) -> list[str]:
    text = compare.render(compare.read(folder))
    return [line for line in text.split("\n") if line.startswith(start)]


def test_a_row_becomes_a_line(tmp_path: Path) -> None:
    rivals = (row(), row("eager", 0.006), row("eager norm", 0.005), row("compile", 0.004))
    write(tmp_path, *rivals, row("floor", 0.001))
    first, second = lines(tmp_path, f"| {CASE.title} |")
    assert first == (
        f"| {CASE.title} | f | **2.00 ×** torch.compile | 2.00 ms | 2.00 | 4.00 | 5.00 | – | – "
        "| 12.5 | 16,000 |"
    )
    assert second.startswith(f"| {CASE.title} | f+b | unmeasured | – |")
    (heading,) = lines(tmp_path, "**CPU")
    assert "A CPU, 2 threads, torch 2.13.0, Python 3.11.7, default malloc, lwkd compiled" in heading
    assert "2026-01-02, commit abc1234" in heading
    (summary,) = lines(tmp_path, "Against")
    assert "2.00 × as fast in the geometric mean over 1 rows" in summary


def test_the_newest_row_counts(tmp_path: Path) -> None:
    """By date, whatever the file; of one day the last line."""
    write(tmp_path, row(seconds=0.004, date="2026-02-01"), row(seconds=0.003, date="2026-02-01"))
    write(tmp_path, row(seconds=0.009, date="2026-01-31"), name="z.jsonl")
    assert " 3.00 ms " in lines(tmp_path, f"| {CASE.title} | f |")[0]


def test_machines_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, row(), row(malloc="tuned", seconds=0.001), row(model="Another"))
    assert len(lines(tmp_path, "**CPU")) == 3
    times = [line.split(" | ")[3] for line in lines(tmp_path, f"| {CASE.title} | f |")]
    assert sorted(times) == ["1.00 ms", "2.00 ms", "2.00 ms"]


def test_what_no_gpu_has_measured_says_so(tmp_path: Path) -> None:
    write(tmp_path, row())
    assert lines(tmp_path, "**GPU") == ["**GPU: unmeasured**"]
    assert all("| unmeasured |" in x for x in lines(tmp_path, f"| {STEP_CASE.title} |"))


def test_a_step_on_a_gpu(tmp_path: Path) -> None:
    step = row(
        device="cuda", model="A GPU", malloc="", case=STEP_CASE.name, mode="step", gbps=None,
        to_floor=1.034, seconds=0.2, extra_memory=-0.01, host_synchronisations=0, copy_gbps=2500.0,
    )  # fmt: skip
    write(tmp_path, step)
    first, graph = lines(tmp_path, f"| {STEP_CASE.title} |")
    assert "| step | **+3.4%** | -1.0% | 0 | 200.00 ms | 16,000 |" in first
    assert "| step, graph | unmeasured |" in graph
    assert "copy 2,500 to 2,500 GB/s" in lines(tmp_path, "**GPU")[0]


@pytest.mark.parametrize("key", compare.KEYS)
def test_a_row_without_a_key_is_named(key: str, tmp_path: Path) -> None:
    bad = row()
    del bad[key]
    write(tmp_path, row(), bad)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: a row without {key}$"):
        compare.read(tmp_path)


def readme(folder: Path, between: str = "") -> Path:
    path = folder / "README.md"
    path.write_text(f"before\n{compare.BEGIN}\n{between}\n{compare.END}\nafter\n")
    return path


def run(folder: Path, *options: str) -> int:
    places = ["--results", str(folder), "--readme", str(folder / "README.md")]
    return compare.main([*places, *options])


@pytest.mark.parametrize("line", [json.dumps(row())[:40], "12", "{}]"])
def test_a_line_that_is_no_row_is_one_clear_error(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.jsonl").write_text(json.dumps(row()) + "\n\n" + line)
    before = readme(tmp_path).read_text()
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/cut.jsonl, line 3: not a whole JSON object" in error
    assert error.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == before


def test_check_tells_whether_the_readme_shows_the_rows(tmp_path: Path) -> None:
    write(tmp_path, row())
    path = readme(tmp_path)
    old = path.read_text()
    assert run(tmp_path, "--check") == 1
    assert path.read_text() == old  # a check writes nothing
    assert run(tmp_path) == 0
    text = path.read_text()
    assert text.startswith(f"before\n{compare.BEGIN}\n")
    assert text.endswith(f"\n{compare.END}\nafter\n")
    assert "| 2.00 ms |" in text
    assert run(tmp_path, "--check") == 0
    write(tmp_path, row(seconds=0.001))
    assert run(tmp_path, "--check") == 1


@pytest.mark.parametrize("text", ["", compare.BEGIN, f"{compare.END}{compare.BEGIN}"])
def test_a_readme_without_markers(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert run(tmp_path) == 2
    assert "README.md: one <!-- bench:begin -->" in capsys.readouterr().err


def test_the_readme_shows_what_was_recorded() -> None:
    """`python -m bench.compare` writes it."""
    assert compare.main(["--check"]) == 0


@pytest.mark.parametrize("study", [policies, jacobian, methods, curvature])
def test_the_tables_of_studies_are_those_of_the_recorded_rows(study: ModuleType) -> None:
    name = study.__name__.rpartition(".")[2]
    found = rows.read(ROOT / f"bench/transfer/results/{name}.jsonl")
    assert {r["arm"] for r in found} == set(study.ARMS)
    assert study.table(found) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_digits_is_that_of_the_recorded_rows() -> None:
    """And ours are within the contract of every difference and scale."""
    found = rows.read(ROOT / "bench/results/accuracy/jacobian.jsonl")
    assert accuracy.table(found) in (ROOT / "README.md").read_text(encoding="utf-8")
    limit = {"rows": (1e-5, 1e-5, 1e-4, 1e-2), "factors": (2e-6,) * 4}
    for row in (r for r in found if r["arm"] == "lwkd"):
        kind = row["distance"].split(",")[0]
        assert row["error"] <= limit[kind][accuracy.APART.index(row["apart"])], row


def test_the_table_of_traces_is_that_of_the_recorded_rows() -> None:
    """And the estimators keep what is promised, against joint probes and the best of the others."""
    found = rows.read(ROOT / "bench/results/traces/hessian.jsonl")
    assert traces.table(found) in (ROOT / "README.md").read_text(encoding="utf-8")
    ratios = []
    for network in {r["network"] for r in found}:
        own = {arm: t.seconds for arm, t in traces.times(
            [r for r in found if r["network"] == network]
        ).items()}  # fmt: skip
        others = [s for arm, s in own.items() if not arm.startswith("lwkd")]
        joint, linear = own["joint probes (PyHessian)"], "ViT" not in network
        assert joint >= (1000 if linear else 20) * own["lwkd auto"]
        assert joint >= (30 if linear else 20) * own["lwkd block"]
        ratios.append(min(others) / own["lwkd gauss_newton" if linear else "lwkd block, chunk=4"])
        assert ratios[-1] >= 1
    assert math.prod(ratios) ** (1 / len(ratios)) >= 2


def test_the_jacobian_study_trains() -> None:
    """At its smallest: both transfer losses come down in the arm that has them, and not in CE."""
    pytest.importorskip("sklearn")
    with digits.one_thread():
        found = list(jacobian.study(1, sizes=(5,), steps=40))
    left = {r["arm"]: r for r in found}
    assert len(found) == len(jacobian.ARMS)
    assert left["CE + activations"]["activations"] < left["CE"]["activations"]
    last = left["CE + activations + Jacobians"]
    assert last["jacobians"] < min(left[arm]["jacobians"] for arm in left if arm != last["arm"])
