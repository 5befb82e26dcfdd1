"""lwkd._C: what was built, what runs, and the split of the work."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.cases import Target

TILE = 4096
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def library():
    Target("compiled", "cpu").require()
    from lwkd import _C

    return _C


def covered(tasks: list[tuple[int, int, int, int]]) -> dict[tuple[int, int], list]:
    """The pieces of every (layer, sample), in the order in which they are done."""
    pieces: dict[tuple[int, int], list] = {}
    for layer, n, begin, end in tasks:
        pieces.setdefault((layer, n), []).append((begin, end))
    return pieces


def test_build_info(library) -> None:
    info = library.build_info()
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in info.items())
    assert {"compiler", "target", "torch", "cuda", "cuda_reason", "sanitize"} <= set(info)
    assert info["target"] == "torch 2.10 stable ABI"
    assert bool(info["cuda"]) != bool(info["cuda_reason"])  # the version, or why there is none
    assert not info["cuda_reason"].startswith("nvcc failed")  # where it is found, it has to build


def test_cpu_level(library) -> None:
    assert library.cpu_level() in ("x86-64-v4", "x86-64-v3", "x86-64", "portable")
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert library.cpu_level() == "x86-64-v4"


SHAPES = [
    [(1, 1, 1)],
    [(3, 5, 7)],
    [(2, 64, TILE - 1), (2, 64, TILE), (2, 64, TILE + 1)],
    [(1, 1, 10 * TILE + 17), (4, 512, 49), (1, 3, 2)],
    [(8, 16, 64)] * 64,
    [(0, 5, 7), (2, 0, 9), (2, 5, 0), (1, 2, 3)],
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_plan_covers_every_position_once(library, shapes) -> None:
    """Fault 11: no position twice, none left out, tails included; nothing for empty layers."""
    tasks = library.plan(shapes)
    pieces = covered(tasks)
    wanted = {
        (layer, n) for layer, (samples, _, q) in enumerate(shapes) for n in range(samples) if q
    }
    assert set(pieces) == wanted
    for (layer, _), parts in pieces.items():
        ends = [end for _, end in parts]
        assert [begin for begin, _ in parts] == [0, *ends[:-1]]
        assert ends[-1] == shapes[layer][2]
        assert all(0 < end - begin <= TILE for begin, end in parts)
    assert tasks == sorted(tasks)


def test_the_plan_is_a_function_of_the_shapes_alone(library) -> None:
    """Fault 13: so that no result depends on how many threads there are."""
    shapes = [(4, 24, 65 * 67), (8, 3, 9), (1, 7, 3 * TILE)]
    plans = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        plans.append(library.plan(shapes))
    assert plans[0] == plans[1] == plans[2]
    # A layer is cut the same whatever stands beside it.
    alone = [library.plan([shape]) for shape in shapes]
    together = [(n, begin, end) for _, n, begin, end in plans[0]]
    assert together == [task[1:] for task in itertools.chain(*alone)]


def test_the_plan_beyond_32_bits(library) -> None:
    """Fault 4: positions, and the costs that the split adds up, are 64-bit."""
    positions = 2**31 + 5
    tasks = library.plan([(1, 2**20, positions)])
    assert len(tasks) == positions // TILE + 1
    assert tasks[-1] == (0, 0, positions - positions % TILE, positions)
    last = library.plan([(1, 2**40, 3), (1, 2**40, 3), (2, 1, 5)])
    assert last == [(0, 0, 0, 3), (1, 0, 0, 3), (2, 0, 0, 5), (2, 1, 0, 5)]


def test_the_plan_wants_triples(library) -> None:
    with pytest.raises(TypeError):
        library.plan([(1, 2)])


# --- one result on every instruction set ---------------------------------------------------------

SUMS = r"""
#include <cstdio>
#include <random>
#include "pieces.h"
using namespace lwkd;

// Bits of all sums and mixes of `count` numbers, by one of the versions.
#define LWKD_ALL(version)                                                              \
  template <typename A>                                                                \
  std::vector<double> all##version(const A* s, const A* t, int64_t count) {            \
    std::vector<double> out(8);                                                        \
    difference##version(s, t, count, out.data());                                      \
    products##version(s, t, count, out.data() + 1);                                    \
    squares##version(s, nullptr, count, out.data() + 4);                               \
    for (const A* other : {t, static_cast<const A*>(nullptr)}) {                       \
      std::vector<A> mixed(count);                                                     \
      mix##version(mixed.data(), s, other, count, 1.1, -0.9);                          \
      out.insert(out.end(), mixed.begin(), mixed.end());                               \
    }                                                                                  \
    return out;                                                                        \
  }
LWKD_ALL(_v2) LWKD_ALL(_v3) LWKD_ALL(_v4) LWKD_ALL()

template <typename A>
int differences() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  std::vector<A> s(70), t(70);
  for (auto* x : {&s, &t})
    for (A& value : *x) value = static_cast<A>(normal(random));
  int found = 0;
  for (int64_t count = 0; count <= 70; ++count) {
    const auto want = all_v2(s.data(), t.data(), count);
    const auto same = [&](const std::vector<double>& got) {
      return std::memcmp(got.data(), want.data(), want.size() * sizeof(double)) == 0;
    };
    found += !same(all(s.data(), t.data(), count));
    if (__builtin_cpu_supports("x86-64-v3")) found += !same(all_v3(s.data(), t.data(), count));
    if (__builtin_cpu_supports("x86-64-v4")) found += !same(all_v4(s.data(), t.data(), count));
  }
  return found;
}

int main() {
  std::printf("%d differences\n", differences<float>() + differences<double>());
  return level() < 3;  // nothing to compare
}
"""


def test_sums_are_the_same_bits_on_every_instruction_set(tmp_path: Path) -> None:
    """Vectors of two, four and eight doubles: one order of sums."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("one version only")
    (tmp_path / "sums.cpp").write_text(SUMS)
    command = ["g++", "-std=c++20", "-O2", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += ["sums.cpp", "-o", "sums", "-Wl,--unresolved-symbols=ignore-all"]  # no op is called
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./sums"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "0 differences\n"
    if done.returncode:
        pytest.skip("a processor without AVX2")
