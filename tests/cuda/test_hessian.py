"""The CUDA kernels of the Hessian kind, executed on the host against float64 definitions.

As tests/cuda/test_attention.py: the kernels' own sources, compiled for the host.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from lwkd.ops import philox
from tests import cases, tolerances
from tests.cuda.compiler import compiles_and_links
from tests.cuda.emulation import compile_driver
from tests.cuda.emulation.hessian import EmulatedProbes
from tests.ops import test_hessian as battery
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emulation") / "hessian.so"
    return compile_driver(out, "-O2", "-shared", "-fPIC", driver="hessian.cpp")


@pytest.fixture(scope="module")
def gpu(library: Path) -> EmulatedProbes:
    return EmulatedProbes(library, seed=1)


def test_many_words_are_the_same(gpu: EmulatedProbes) -> None:
    """More than a block of threads has; 30,000 words, which the emulator makes in a second."""
    like = torch.empty(32 * 30_001)
    assert torch.equal(gpu.rademacher(like, 7, 3, 9), philox.signs(like, 7, 3, 9))


def test_seeds_layers_probes_lengths(gpu: EmulatedProbes) -> None:
    for seed, length in itertools.product((0, -1, 2**40 + 5), battery.LENGTHS):
        for layer, probe in ((0, 0), (2**32 - 1, 5), (3, 2**32 - 1)):
            like = torch.empty(length, dtype=torch.bfloat16)
            got = gpu.rademacher(like, seed, layer, probe)
            assert torch.equal(got, philox.signs(like, seed, layer, probe)), (seed, length)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_dtype_and_layout(gpu: EmulatedProbes, layout: str) -> None:
    """Faults 2 and 6: what surrounds a tensor, or lies between its elements, is NaN."""
    for dtype in battery.DTYPES:
        h = cases.LAYOUTS[layout](cases.draw((3, 5, 4, 7), dtype, 1))
        signs = gpu.rademacher(h, 5, 2, 1)
        assert signs.stride() == torch.empty_like(h).stride()
        assert torch.equal(signs, philox.signs(h, 5, 2, 1))
        for k in range(2):
            got = gpu.probe_dot([h, h], [0, 4], 3, k, 0)
            for layer, value in zip((0, 4), got.tolist(), strict=True):
                want = battery.exact(h, 3, layer, k)
                assert abs(value - want) <= tolerances.probe_dot(h, want), (dtype, layer)


def test_lengths_and_alignment(gpu: EmulatedProbes) -> None:
    """Tails behind packs and warps, data that is not aligned, more items than a table holds."""
    for dtype, shift in itertools.product(battery.DTYPES, (0, 1)):
        hvps = [cases.draw((k + shift,), dtype, k)[shift:] for k in (*battery.LENGTHS, 40_000)]
        got = gpu.probe_dot(hvps, range(len(hvps)), -9, 4, 0)
        for layer, h in enumerate(hvps):
            want = battery.exact(h, -9, layer, 4)
            assert abs(float(got[layer]) - want) <= tolerances.probe_dot(h, want), (dtype, layer)


def test_probes_of_one_tensor(gpu: EmulatedProbes) -> None:
    h = [cases.draw((3, 5, 40), F64, 1), cases.draw((3, 7), F32, 2)]
    got = gpu.probe_dot(h, [0, 1], 8, 6, 3)
    for layer, k in itertools.product(range(2), range(3)):
        want = battery.exact(h[layer][k], 8, layer, 6 + k)
        assert float(got[layer, k]) == pytest.approx(want, rel=1e-12)


def test_nothing(gpu: EmulatedProbes) -> None:
    got = gpu.probe_dot([torch.empty(0, 3), torch.ones(2)], [0, 1], 1, 0, 0)
    assert got.tolist() == [0.0, battery.exact(torch.ones(2), 1, 1, 0)]
    assert gpu.rademacher(torch.empty(0), 1, 0, 0).shape == (0,)


def test_the_order_of_threads_does_not_matter(library: Path) -> None:
    """Fault 8: bit for bit the same, whatever the emulator's seed lets run first."""
    hvps = [cases.draw((70_001,), F32, 1), cases.draw((33, 7), F32, 2)]
    results = [EmulatedProbes(library, seed).probe_dot(hvps, [0, 1], 1, 0, 0) for seed in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_compiles_and_links(tmp_path: Path) -> None:
    compiles_and_links("hessian", tmp_path, kernels=6)
