"""What the suite promises: a skip that breaks a promise fails, extras are extras, many examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import conftest

ROOT = Path(__file__).resolve().parents[1]


class Item(SimpleNamespace):
    """A test, as far as conftest looks at it."""

    def get_closest_marker(self, name: str) -> int | None:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.reasons.append(mark.kwargs["reason"])


GPU, TWO = {"gpu": 1}, {"gpu": 1, "two_gpus": 1}


@pytest.mark.parametrize(
    ("marks", "gpus", "required", "reasons"),
    [
        ({}, 0, False, []),
        (GPU, 0, False, ["no CUDA GPU on this machine"]),
        (GPU, 0, True, []),  # it runs, and fails
        (GPU, 1, True, []),
        (TWO, 0, False, ["no CUDA GPU on this machine"]),
        (TWO, 0, True, []),
        (TWO, 1, False, ["one GPU: another device is unproven"]),
        (TWO, 1, True, ["one GPU: another device is unproven"]),
        (TWO, 2, True, []),
    ],
)
def test_what_is_skipped(
    marks: dict[str, int],
    gpus: int,
    required: bool,
    reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(conftest, "REQUIRE_GPU", required)
    item = Item(marks=marks, reasons=[])
    conftest.pytest_collection_modifyitems([item])
    assert item.reasons == reasons


@pytest.mark.parametrize(
    ("marks", "gpus", "required", "outcome"),
    [
        (GPU, 1, True, "failed"),
        (GPU, 0, False, "skipped"),
        ({}, 1, True, "skipped"),
        (TWO, 1, True, "skipped"),  # nobody has promised a second one
        (TWO, 2, True, "failed"),
        (TWO, 0, True, "failed"),
    ],
)
def test_a_skip_where_a_gpu_was_promised_is_a_failure(
    marks: dict[str, int],
    gpus: int,
    required: bool,
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(conftest, "REQUIRE_GPU", required)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr="")
    hook = conftest.pytest_runtest_makereport(Item(marks=marks, nodeid="x"), None)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(SimpleNamespace(get_result=lambda: report))
    assert report.outcome == outcome


# A machine with a GPU has torch, numpy, pytest and pytest-benchmark; the extras it may lack.
COLLECT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hypothesis", "sklearn", "matplotlib", "rich"}:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import pytest
options = ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "-q", "--collect-only"]
raise SystemExit(pytest.main([*options, "-m", "gpu", "tests", "lwkd", "bench"]))
"""


@pytest.mark.slow
def test_what_needs_a_gpu_needs_no_extras() -> None:
    command = ["env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", sys.executable, "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    for file in ("tests/cuda/test_attention_gpu.py", "tests/kernels/test_attention.py",
                 "tests/ops/test_attention.py", "bench/test_attention.py"):  # fmt: skip
        assert f"{file}::" in done.stdout, file


def test_the_sanitizers_run_what_is_there() -> None:
    """A test that is left out by name is still called that, and no folder has moved."""
    script = (ROOT / "tests/sanitize.sh").read_text()
    names = re.findall(r"(?<![\w/])tests/[\w/.]+(?:::\w+)?", script.split("growth=")[1])
    assert {"tests/ops", "tests/test_csrc.py", "tests/meters", "tests/losses"} < set(names)
    for name in names:
        file, _, function = name.partition("::")
        assert (ROOT / file).exists(), file
        assert not function or f"def {function}(" in (ROOT / file).read_text()
    assert "|| true" not in script


def test_examples_are_as_many_as_promised(request: pytest.FixtureRequest) -> None:
    """2,000 a change, 100,000 a release; counted where the whole suite runs."""
    hypothesis = pytest.importorskip("hypothesis")
    functions = [getattr(item, "function", None) for item in request.session.items]
    properties = [f for f in functions if hasattr(f, "_hypothesis_internal_use_settings")]
    files = {f.__module__ for f in properties}
    if not {"tests.test_policy", "tests.ops.test_attention_random"} <= files:
        pytest.skip("a part of the suite says nothing about the whole")
    total = sum(f._hypothesis_internal_use_settings.max_examples for f in properties)
    release = hypothesis.settings().max_examples >= 10_000
    assert total >= (100_000 if release else 2_000)
