"""``bench``: rows for every contender, and nothing is timed that computes something else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lwkd.cli import bench, main, workloads
from lwkd.cli.workloads import FULL, QUICK


def test_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--quick", "--no-compile", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["machine"]["torch"] == torch.__version__
    assert out["machine"]["backend"] in ("compiled", "reference")
    assert len(out["rows"]) == len(QUICK["attention"]) * 2 * 2
    for row in out["rows"]:
        assert row["ms"] > 0
        assert row["error"] is None
        assert (row["ratio"] == 1.0) or row["contender"] != "lwkd"
    row = out["rows"][0]  # 4 samples of 8·64 + 16·16 and 16·64 + 32·16 floats, read once
    assert row["gb_per_s"] == pytest.approx(4 * 4 * 2304 / (row["ms"] * 1e6))
    row = out["rows"][2]  # the student's again, and its gradient
    assert row["gb_per_s"] == pytest.approx(4 * 4 * (2304 + 2 * 768) / (row["ms"] * 1e6))


def test_quick_jacobian(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows forward and backward, factors forward alone: their op has no gradient."""
    options = ["--kind", "jacobian", "--device", "cpu", "--quick", "--no-compile", "--json"]
    assert main(["bench", *options]) == 0
    out = json.loads(capsys.readouterr().out)
    seen = [(r["case"], r["pass"]) for r in out["rows"] if r["contender"] == "lwkd"]
    assert seen == [
        ("rows", "forward"),
        ("rows", "forward + backward"),
        ("linear", "forward"),
        ("convolutions", "forward"),
    ]
    assert all(r["ms"] > 0 and r["error"] is None for r in out["rows"])
    row = out["rows"][0]  # two layers, two sides, 4 samples of 3·8·8 floats
    assert row["gb_per_s"] == pytest.approx(4 * 4 * 4 * 192 / (row["ms"] * 1e6))
    row = out["rows"][4]  # two layers, two sides, 4 samples, 5 tokens of 8 + 6 floats
    assert row["gb_per_s"] == pytest.approx(4 * 4 * 4 * 70 / (row["ms"] * 1e6))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench.measure(QUICK["attention"][0], "cpu", False, compiled=False, quick=True)
    rows[1].update(ms=None, gb_per_s=None, ratio=None, error="PyTorch: RuntimeError: too old")
    machine = {"device": "x", "torch": "2", "threads": 1, "lwkd": "0", "backend": "compiled"}
    bench._print(machine, rows)
    text = capsys.readouterr().out
    assert "did not run: PyTorch: RuntimeError: too old" in text
    assert "two stages  forward  PyTorch      -     -" in text


@pytest.mark.slow
def test_torch_compile_takes_part() -> None:
    """In a process of its own: a compiler that is missing is a row with its error, no crash."""
    code = (
        "from lwkd.cli import bench\n"
        "for kind, workloads in bench.QUICK.items():\n"
        "    rows = bench.measure(workloads[-1], 'cpu', False, True, True)\n"
        "    assert [r['contender'] for r in rows] == ['lwkd', 'PyTorch', 'torch.compile']\n"
        "    assert rows[2]['ms'] or 'torch.compile: ' in rows[2]['error']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("workload", sum(FULL.values(), ()), ids=lambda w: w.name)
def test_both_ways_of_writing_it_agree_on_the_full_cases(workload: workloads.Workload) -> None:
    """One sample each, so that it is quick; gradients too."""
    small = replace(workload, batch=1)
    student, teacher = small.tensors("cpu")
    got, want = (
        bench._step(f, student, teacher, small.gradients) for f in (small.fused, small.plain)
    )
    assert len(got) == (1 + len(student) if small.gradients else 1)
    bench._agree(small.name, "PyTorch", got, want)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_contender_that_computes_something_else_is_refused(factor: float) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="case: other and lwkd do not agree"):
        bench._agree("case", "other", [x, factor * x], [x, x])


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:1", "cpu:0", "mps"])
def test_a_device_that_is_not_there_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["bench", "--device", name, "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: lwkd.bench: --device: expected one of cpu, got {name!r}")
    assert error.count("\n") == 1
    assert ("sees no CUDA device" in error) == name.startswith("cuda")


def test_an_unknown_kind_is_one_line_with_what_is_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "--kind", "jacobean", "--quick"]) == 1
    error = capsys.readouterr().err
    text = "--kind: expected one of attention, jacobian, hessian, got 'jacobean'"
    text += "; did you mean 'jacobian'?"
    assert error == f"error: lwkd.bench: {text}\n"
