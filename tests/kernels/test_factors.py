"""The Triton kernels of Jacobian factors: what tests/ops cannot see, and their machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lwkd.kernels import common, factors

from lwkd.ops.factors import ConvFactors, Factors, Item, form_of
from tests import cases
from tests.kernels import machine_code
from tests.ops.test_factors import distance, gradient

DEVICE = "cpu" if common.INTERPRET else "cuda"
F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
WAYS = {"difference": 0, "normalized": 1, "norms": 2}
GRAM, DIRECT = 0, 1


def dense(rows: int, inputs: int, outputs: int, seed: int, dtype: torch.dtype = F32) -> Factors:
    shapes = (2, rows, inputs), (2, rows, outputs)
    return Factors(*(cases.draw(s, dtype, seed + k).to(DEVICE) for k, s in enumerate(shapes)))


def conv(seed: int, dtype: torch.dtype = F32) -> ConvFactors:
    x, d = (cases.draw(s, dtype, seed).to(DEVICE) for s in ((2, 4, 6, 6), (2, 6, 6, 6)))
    return ConvFactors(x, d, (3, 3), (1, 1), (1, 1), (1, 1), 2, False)


def embedding(seed: int, dtype: torch.dtype = F32) -> Factors:
    rows = torch.arange(80, device=DEVICE).reshape(2, 40) * seed % 7
    return Factors(rows, cases.draw((2, 40, 5), dtype, seed).to(DEVICE))


def plan(
    s: list[Item], t: list[Item], way: str, contraction: int = DIRECT, mean: bool = False
) -> Any:
    flat = [[item[k] for item in items] for items in (s, t) for k in (0, 1)]
    forms = [w for pair in zip(s, t, strict=True) for item in pair for w in form_of(item)]
    layers = list(range(len(s)))
    return factors.plan_distances(*flat, layers, forms, [contraction] * len(s), WAYS[way], mean)


def measure(s: Item, t: Item, way: str, contraction: int) -> Tensor:
    planned, d, keep = plan([s], [t], way, contraction)
    planned.run()
    del keep
    return d[0].double().cpu()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("contraction", [GRAM, DIRECT])
def test_work_in_parts(way: str, contraction: int) -> None:
    """Several blocks of rows, of inputs and of outputs, and steps of each."""
    s, t = dense(70, 80, 68, 1), dense(70, 80, 68, 5)
    want = distance(gradient(s).cpu(), gradient(t).cpu(), way)
    torch.testing.assert_close(measure(s, t, way, contraction), want, rtol=2e-6, atol=0)


def test_a_wrong_guess_of_c_is_mended() -> None:
    """Once: what d is at a row where a is 0 says nothing of the gradients."""
    s, t = dense(9, 20, 17, 1), dense(9, 20, 17, 1)
    t = t._replace(d=t.d + 1e-3 * dense(9, 20, 17, 7).d)
    t.d[:, 0] *= 1e3
    for x in (s, t):
        x.a[:, 0] *= 1e-9
    want = distance(gradient(s).cpu(), gradient(t).cpu(), "normalized")
    for contraction in (GRAM, DIRECT):
        torch.testing.assert_close(
            measure(s, t, "normalized", contraction), want, rtol=2e-6, atol=0
        )


def test_short_dtypes_lose_nothing_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has 8 or 11 bits is multiplied in TF32; float32 where torch says so."""
    for dtype, precision, want in ((B16, "highest", "tf32"), (F16, "highest", "tf32"),
                                   (F32, "highest", "ieee"), (F32, "high", "tf32")):  # fmt: skip
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        planned, *_ = plan([dense(20, 17, 18, 1, dtype)], [dense(20, 17, 18, 5, dtype)], "norms")
        found = [c["PREC"] for _, _, c in planned.launches() if "PREC" in c]
        assert found == [want]


def test_a_call_is_a_few_launches() -> None:
    """Layers of one kind share them, 64 as well as two."""
    for count in (2, 64):
        s = [dense(4, 3, 5, k) for k in range(count)]
        planned, *keep = plan(s, s, "normalized", GRAM, True)
        assert [kernel.__name__ for kernel, _, _ in planned.launches()] == [
            "sums_kernel", "guess_kernel", "gram_kernel", "finish_kernel", "gram_kernel",
            "finish_kernel", "mean_kernel",
        ]  # fmt: skip
        del keep


def test_nothing_large_is_allocated() -> None:
    """Neither T × T nor inputs × outputs: sums of tiles, and of pieces of rows."""
    s = dense(512, 256, 256, 1, B16)
    for contraction in (GRAM, DIRECT):
        _, _, keep = plan([s], [s], "normalized", contraction)
        sizes = [x.numel() for x in keep if isinstance(x, Tensor)]
        assert 50 * max(sizes) <= 256 * 256, sizes


def test_repeats_bitwise() -> None:
    """Fault 13: the same call gives the same bits."""
    for contraction in (GRAM, DIRECT):
        first: list[Tensor] = []
        for _ in range(2 if DEVICE == "cpu" else 1000):
            d = measure(conv(1), conv(5), "normalized", contraction)
            first = first or [d]
            assert torch.equal(first[0], d)


# --- machine code ---------------------------------------------------------------------------------

KERNELS = [name for name in vars(factors) if name.endswith("_kernel")]


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """Machine code for sm_80 and sm_90 of every kernel, in a process without the interpreter."""
    wanted = {*KERNELS, "sums_kernel", "write_table"}
    machine_code.check_module("tests.kernels.test_factors", wanted)


def launches_to_compile() -> machine_code.Launches:
    """One launch of every kernel and set of constants that a spread of calls needs."""
    large = (dense(128, 64, 64, 1, B16), dense(128, 64, 64, 2, B16))
    others = [
        (dense(128, 64, 64, 1), dense(128, 64, 64, 2)),
        (conv(1), conv(2)),
        (dense(8, 1, 9, 1), dense(8, 1, 9, 2)),
        (embedding(1), embedding(3)),
        (dense(8, 5, 9, 1, F64), dense(8, 5, 9, 2, F16)),
    ]
    plans = []
    for way in WAYS:
        items = [large, *others] if way == "normalized" else [large]
        both = [list(side) for side in zip(*items, strict=True)]
        plans += [plan(*both, way, contraction, True)[0] for contraction in (GRAM, DIRECT)]
    return machine_code.launches_of(plans)


if __name__ == "__main__":
    DEVICE = "cpu"  # planned there, launched nowhere
    machine_code.check_that_no_value_compiles_again([vars(factors)[name] for name in KERNELS])
    machine_code.report(launches_to_compile())
