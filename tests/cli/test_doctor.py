"""``doctor`` passes here, and does not pass a kernel that is wrong."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from lwkd.cli import definition, doctor
from lwkd.ops import attention_maps, backends, layer_discrepancy

PYTHON = ["env", "-u", "TRITON_INTERPRET", "OMP_NUM_THREADS=1", sys.executable]


def test_it_passes_here() -> None:
    done = subprocess.run([*PYTHON, "-m", "lwkd", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        assert f"reference  cpu     {dtype}" in done.stdout
        assert not backends.CPU.live or f"compiled   cpu     {dtype}" in done.stdout


MUTANTS = """
import torch
from lwkd.cli import doctor, main
from lwkd.ops import attention_reference as r

torch.set_num_threads(1)

def nan_swallowed(*args):
    distance, maps = r.forward(*args)
    return distance.nan_to_num(0.0), maps

def never_zero(*args):
    distance, maps = r.forward(*args)
    return distance + 1e-9, maps

def mask_dropped(student, teacher, mask, *args):
    return r.forward(student, teacher, [], *args)

def one_sample_short(*args):
    distance, maps = r.forward(*args)
    return distance[..., :-1], maps

def raises(*args):
    raise RuntimeError("no such kernel image")

mutants = {
    "distance": ("attention", lambda *a: (r.forward(*a)[0] * 1.00001, r.forward(*a)[1])),
    "nan": ("attention", nan_swallowed),
    "never zero": ("attention", never_zero),
    "mask": ("attention", mask_dropped),
    "shape": ("attention", one_sample_short),
    "raises": ("attention", raises),
    "gradient": ("attention_backward", lambda *a: [g * 1.00002 for g in r.backward(*a)]),
    "not finite": ("attention_backward", lambda *a: [g / 0 for g in r.backward(*a)]),
    "maps": ("attention_maps", lambda *a: [m * 1.00001 for m in r.maps(*a)]),
}
for name, (op, kernel) in mutants.items():
    library = torch.library.Library("lwkd_reference", "IMPL")
    library.impl(op, kernel, "CPU")
    print(name, "caught" if doctor.examine("reference", "cpu", torch.float32).faults else "MISSED")
    library._destroy()
clean = doctor.examine("reference", "cpu", torch.float32)
print("clean", "wrong" if clean.faults else "passed", flush=True)
library = torch.library.Library("lwkd_reference", "IMPL")
library.impl("attention", nan_swallowed, "CPU")
raise SystemExit(main(["doctor"]))
"""


def test_a_wrong_kernel_does_not_pass() -> None:
    done = subprocess.run([*PYTHON, "-c", MUTANTS], capture_output=True, text=True)
    assert done.stdout.count(" caught\n") == 9, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert "clean passed" in done.stdout
    assert done.returncode == 1
    assert "FAILED: 8 of" in done.stdout  # two divergences, four dtypes
    assert "js: a NaN went in, [False, False, False] came out" in done.stdout


def test_a_value_that_is_not_finite_is_infinitely_wrong() -> None:
    for value in (math.nan, math.inf):
        diagnosis = doctor.Diagnosis("reference", "cpu", torch.float32)
        diagnosis.compare("map", "here", torch.tensor([1.0, value]), torch.ones(2).double())
        assert diagnosis.worst["map"] == math.inf
        assert len(diagnosis.faults) == 1


def test_gradients_are_allowed_one_rounding_and_no_more() -> None:
    want = torch.tensor([1.0], dtype=torch.float64)
    for steps, wrong in ((0, 0), (1, 1)):
        got = torch.tensor([1.0 + steps * 2**-7], dtype=torch.bfloat16)
        diagnosis = doctor.Diagnosis("reference", "cpu", torch.bfloat16)
        diagnosis.compare("gradient", "here", got, want)
        assert len(diagnosis.faults) == wrong


@pytest.mark.parametrize("case", definition.CASES, ids=lambda c: c.name)
def test_layouts_read_back_what_they_store(case: definition.Case) -> None:
    for name, values in zip(case.layouts, case.values(), strict=True):
        for value in values:
            layout = definition.layout(name, value)
            assert torch.equal(layout.view(layout.store(value)), value)


def test_the_sliced_layout_is_strided_and_misaligned() -> None:
    x = torch.ones(2, 3, 4, 4)
    stored = definition.layout("sliced", x).store(x)
    assert not stored.is_contiguous()
    assert stored.data_ptr() % 16 == 4


def test_the_definition_by_hand() -> None:
    """m = (9, 16) and (16, 9): q = (9, 16)/√337; P = (9, 16)/25, M = (½, ½)."""
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    assert definition.distance(x, x.flip(2)).item() == pytest.approx(2 * 49 / 337)
    p, q = 9 / 25, 16 / 25
    js = math.log(2) + p * math.log(p) + q * math.log(q)
    got = definition.distance(x, x.flip(2), divergence="js").item()
    assert got == pytest.approx(js)
    assert layer_discrepancy([x], [x.flip(2)], channel_dim=1, divergence="js").item() == (
        pytest.approx(js)
    )
    assert attention_maps([x], channel_dim=1)[0].tolist() == [[9.0, 16.0]]
