"""The CUDA kernels of Jacobian factors, executed on the host against float64 definitions.

As tests/cuda/test_attention.py: the kernels' own sources, compiled for the host; what torch
multiplies on a GPU, plain loops multiply. There is room for so little at a time that every case
works in several chunks of samples, groups, rows and outputs.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lwkd.ops import factors
from lwkd.ops.factors import Factors
from tests import cases
from tests.cuda.compiler import compiles_and_links
from tests.cuda.emulation import ROOT, compile_driver
from tests.cuda.emulation.factors import EmulatedFactors
from tests.ops import test_factors as battery
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
F32, F64 = torch.float32, torch.float64


class Emulation:
    """A target of the battery: the op's boundary as always, the emulator behind it."""

    backend, device, slow = None, "cpu", False

    def __init__(self, path: Path, seed: int) -> None:
        self.op = EmulatedFactors(path, seed)

    def __str__(self) -> str:
        return "emulated"

    def require(self) -> None:
        pass

    def choose(self, *_: Any) -> None:
        pass

    def __call__(self, namespace: None, *args: Any) -> Tensor:
        return self.op.jacobian_factors(*args)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emulation") / "factors.so"
    return compile_driver(out, "-O2", "-shared", "-fPIC", driver="factors.cpp")


@pytest.fixture
def target(library: Path) -> Iterator[Emulation]:
    emulation = Emulation(library, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "FACTORS", emulation)
        yield emulation


# --- the battery of every backend ----------------------------------------------------------------


@battery.ways
@battery.contractions
@pytest.mark.parametrize("name", battery.NAMES)
def test_against_gradients_that_are_built(
    target: Any, name: str, contraction: str, way: str
) -> None:
    battery.test_against_gradients_that_are_built(target, name, contraction, way)


@battery.ways
def test_many_layers_in_one_call(target: Any, way: str) -> None:
    battery.test_many_layers_in_one_call(target, way)


@battery.ways
@pytest.mark.parametrize("same", [True, False])
def test_embeddings(target: Any, way: str, same: bool) -> None:
    battery.test_embeddings(target, way, same)


def test_norms_of_parameters_of_other_shapes(target: Any) -> None:
    battery.test_norms_of_parameters_of_other_shapes(target)


@battery.contractions
@pytest.mark.parametrize("name", ["dense", "2-d", "2-d, everything", "groups", "transposed"])
def test_nearly_equal_factors_keep_their_digits(target: Any, name: str, contraction: str) -> None:
    battery.test_nearly_equal_factors_keep_their_digits(target, name, contraction)


@battery.contractions
@pytest.mark.parametrize("name", [x for x in battery.NAMES if x != "many rows"])
def test_equal_factors_are_at_no_distance(target: Any, name: str, contraction: str) -> None:
    battery.test_equal_factors_are_at_no_distance(target, name, contraction)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dtypes(target: Any, dtype: str) -> None:
    battery.test_dtypes(target, dtype)


@battery.ways
def test_memory_of_any_layout(target: Any, way: str) -> None:
    battery.test_memory_of_any_layout(target, way)


def test_gradients_that_are_nothing(target: Any) -> None:
    battery.test_gradients_that_are_nothing(target)


def test_nan_comes_out(target: Any) -> None:
    battery.test_nan_comes_out(target)


def test_empty(target: Any) -> None:
    battery.test_empty(target)


@battery.contractions
def test_squares(target: Any, contraction: str) -> None:
    battery.test_squares(target, contraction)


# --- chunks --------------------------------------------------------------------------------------


@battery.ways
@battery.contractions
def test_work_in_parts(target: Any, contraction: str, way: str) -> None:
    """More samples, groups, rows and outputs than a chunk holds."""
    for shapes in (((70, 40, 9), (70, 40, 11)), ((3, 50, 7, 30), (3, 50, 7, 20)),
                   ((2, 5, 90), (2, 5, 80))):  # fmt: skip
        s, t = (Factors(*(cases.draw(x, F64, 10 * side + k) for k, x in enumerate(shapes)))
                for side in (1, 2))  # fmt: skip
        want = battery.distance(battery.gradient(s), battery.gradient(t), way)
        got = battery.measure(target, [s], [t], contraction, way)[0]
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


@battery.contractions
def test_a_teacher_of_any_size(target: Any, contraction: str) -> None:
    """Larger in one factor and smaller in the other: c is shared between them."""
    s = battery.items("dense", 1, F32)
    for up, down in itertools.product((1e-6, 1.0, 1e6), repeat=2):
        near = s._replace(a=up * s.a, d=(down * s.d * (1 + 1e-4 * cases.draw(s.d.shape, F32, 9))))
        for way in ("normalized", "norms") if up * down != 1 else battery.WAYS:
            want = battery.distance(battery.gradient(s), battery.gradient(near), way)
            got = battery.measure(target, [s], [near], contraction, way)[0].double()
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-12 if way == "norms" else 0)


def test_the_order_of_threads_does_not_matter(library: Path) -> None:
    """Fault 8: bit for bit the same, whatever the emulator's seed lets run first."""
    s, t = ([battery.items(name, k, F32) for name in battery.FEW] for k in (1, 20))
    results = []
    for seed in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factors, "FACTORS", Emulation(library, seed))
            results.append(battery.layers(Emulation(library, seed), s, t, reduction="none"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- the sources themselves ----------------------------------------------------------------------


_SANITIZED = """
import sys
import pytest
from tests.cuda import test_factors as t
target = t.Emulation(sys.argv[1], seed=1)
t.factors.FACTORS = target
for way in t.battery.WAYS:
    t.battery.test_many_layers_in_one_call(target, way)
    t.battery.test_embeddings(target, way, False)
    for contraction in ("gram", "direct"):
        t.test_work_in_parts(target, contraction, way)
t.battery.test_memory_of_any_layout(target, "normalized")
t.battery.test_empty(target)
"""


def test_no_sanitizer_has_anything_to_say(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan, in a process that has loaded them before anything else."""
    runtime = [_runtime(name) for name in ("libasan.so", "libubsan.so")]
    if not all(runtime):
        pytest.skip("this g++ has no sanitizers' runtime")
    flags = ["-O1", "-shared", "-fPIC", "-fsanitize=address,undefined"]
    path = compile_driver(tmp_path / "factors.so", *flags, driver="factors.cpp")
    settings = [f"LD_PRELOAD={' '.join(runtime)}", "ASAN_OPTIONS=detect_leaks=0",
                "UBSAN_OPTIONS=halt_on_error=1", "OMP_NUM_THREADS=1"]  # fmt: skip
    done = subprocess.run(
        ["env", *settings, sys.executable, "-c", _SANITIZED, str(path)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def _runtime(name: str) -> str:
    out = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True,
                         check=False).stdout.strip()  # fmt: skip
    return out if Path(out).is_absolute() else ""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_compiles_and_links(tmp_path: Path) -> None:
    compiles_and_links("factors", tmp_path, kernels=12)
