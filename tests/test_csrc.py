"""lwkd._C: what was built, what runs, and the split of the work."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cases import Target

TILE = 4096


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
