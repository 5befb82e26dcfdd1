"""The Triton kernels of Jacobian factors: what tests/ops cannot see, and their machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from lwkd.kernels import common, factors, factors_items, factors_tiles

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
    s: list[Item], t: list[Item], way: str, contraction: int = DIRECT, mean: bool = False,
    layers: list[int] | None = None,
) -> Any:  # fmt: skip
    flat = [[item[k] for item in items] for items in (s, t) for k in (0, 1)]
    forms = [w for pair in zip(s, t, strict=True) for item in pair for w in form_of(item)]
    layers = list(range(len(s))) if layers is None else layers
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
    got = measure(s, t, way, contraction)
    # Of norms that are nearly equal, what float32 leaves of each shows in their difference.
    room = 2e-8 * want.sqrt() if way == "norms" else 0 * want
    assert ((got - want).abs() <= 2e-6 * want + room).all(), (got, want)


def test_a_wrong_guess_of_c_is_mended() -> None:
    """What d is at a row where a is 0 says nothing of the gradients."""
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


@pytest.mark.parametrize("contraction", [GRAM, DIRECT])
@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_teacher_whose_rows_cancel(contraction: int, left: float) -> None:
    """c is guessed far too small, until ‖cG_T‖ is what rounding leaves of ‖G_S‖."""
    s, t = dense(8, 20, 17, 1, F64), dense(8, 20, 17, 5, F64)
    for x in t:
        x[:, 4:] = x[:, :4]
    t.d[:, 4:] *= left - 1
    s, t = (Factors(*(x.float() for x in item)) for item in (s, t))
    want = distance(gradient(s).cpu(), gradient(t).cpu(), "normalized")
    got = measure(s, t, "normalized", contraction)
    # What the rounding of a product, or of a square, is to the rest of the sum.
    rtol = 2e-6 + 8 * torch.finfo(F32).eps / (left**2 if contraction == GRAM else left)
    assert ((got - want).abs() <= min(rtol, 1.0) * want).all(), (got, want)


def test_a_student_that_is_nothing() -> None:
    """At a distance of 1, whatever c its parameters share."""
    for contraction in (GRAM, DIRECT):
        s = [dense(5, 20, 17, k) for k in (1, 2)]
        t = [Factors(3 * x.a, 7 * x.d) for x in (dense(5, 20, 17, 3), dense(5, 20, 17, 5))]
        t[1] = Factors(t[1].a / 50, t[1].d)
        s = [x._replace(d=torch.zeros_like(x.d)) for x in s]
        for pair in ((s, t), (t, s)):
            planned, d, keep = plan(*pair, "normalized", contraction, layers=[0, 0])
            planned.run()
            del keep
            torch.testing.assert_close(d[0], torch.ones_like(d[0]))


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_cancel_to_nothing(way: str) -> None:
    """A gram rounds the square of nothing to less than 0."""
    s, t = dense(40, 20, 17, 1), dense(40, 20, 17, 5)
    for item in (s, t):
        for x, sign in zip(item, (1, -1), strict=True):
            x[:, 20:] = sign * x[:, :20]
    d = measure(s, t, way, GRAM)
    assert ((d >= 0) & (d <= 4)).all(), d


def test_near_embeddings_keep_their_digits() -> None:
    """Where both look up the same, and where a row or two do not."""
    for moved in (0, 2):
        s = embedding(1)
        t = Factors(s.a.clone(), (1.1 * (s.d + 1e-5 * embedding(2).d)).float())
        t.a[:, :moved] += 1
        t.d[:, :moved] *= 1e-4
        s.d[:, :moved] *= 1e-4
        for way in ("normalized", "difference"):
            want = distance(*(gradient(x, 9).cpu() for x in (s, t)), way)
            got = measure(s, t, way, GRAM)
            torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


LAYOUTS = {  # how an item is read: ACROSS, VECTOR, CONV
    "columns": (False, 4, 0),
    "rows": (True, 4, 0),
    "odd columns": (False, 1, 0),
    "a bias": (True, 1, 0),
    "pointwise": (True, 4, 0),
    "pointwise, channels last": (False, 4, 0),
    "channels first": (True, 1, 1),
    "channels last": (False, 1, 1),
    "cut out": (True, 1, 2),
    "depthwise": (True, 1, 1),
}


def layout(name: str) -> Item:
    a, d = dense(24, 16, 8, 1)
    image, back = (cases.draw((2, c, 4, 4), F32, c).to(DEVICE) for c in (8, 12))
    if name.endswith("last"):
        image, back = (x.contiguous(memory_format=torch.channels_last) for x in (image, back))
    if name == "cut out":
        back = cases.draw((2, 12, 4, 8), F32, 3).to(DEVICE)[..., :4]
    if name == "depthwise":
        return ConvFactors(image, back[:, :8], (3, 3), (1, 1), (1, 1), (1, 1), 8, False)
    if name.startswith("pointwise"):
        return ConvFactors(image, back, (1, 1), (1, 1), (0, 0), (1, 1), 1, False)
    if name.startswith("channels") or name == "cut out":
        return ConvFactors(image, back, (3, 3), (1, 1), (1, 1), (1, 1), 2, False)
    return {
        "columns": Factors(a, d),
        "rows": Factors(a.mT.contiguous().mT, d.mT.contiguous().mT),
        "odd columns": Factors(a[..., :15], d),
        "a bias": Factors(a.new_ones(1).expand(2, 24, 1), d.mT.contiguous().mT),
    }[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    """What is adjacent in memory is read side by side, and the distance is that of the values."""
    item = layout(name)
    planned, *keep = plan([item], [item], "normalized")
    found = next(c for _, _, c in planned.launches() if "BT" in c)
    del keep
    assert (found["ACROSS"], found["VECTOR"], found["CONV"]) == LAYOUTS[name]
    other = type(item)(item[0] * 0.9, item[1] * 0.9, *item[2:])
    other[1][:, 1:] *= 1.3
    want = distance(*(gradient(x).cpu() for x in (item, other)), "normalized")
    for contraction in (GRAM, DIRECT):
        got = measure(item, other, "normalized", contraction)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def test_64_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 4: the kernels that 2³¹ elements of a sample would use, on fewer."""
    items = [(conv(1), conv(2)), (dense(4, 3, 5, 1), dense(4, 3, 5, 4)),
             (dense(4, 1, 5, 1), dense(4, 1, 5, 4))]  # fmt: skip
    monkeypatch.setattr(factors_items, "index_of", lambda _: tl.int64)
    for s, t in items:
        want = distance(gradient(s).cpu(), gradient(t).cpu(), "normalized")
        for contraction in (GRAM, DIRECT):
            got = measure(s, t, "normalized", contraction)
            torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


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
            "sums_kernel", "guess_kernel", *("gram_kernel", "finish_kernel") * 3, "mean_kernel",
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

KERNELS = {
    name: found
    for module in (factors, factors_tiles)
    for name, found in vars(module).items()
    if name.endswith("_kernel")
}


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """Machine code for sm_80 and sm_90 of every kernel, in a process without the interpreter."""
    wanted = {*KERNELS, "sums_kernel", "write_table"}
    machine_code.check_module("tests.kernels.test_factors", wanted)


def launches_to_compile() -> machine_code.Launches:
    """One launch of every kernel and set of constants that a spread of calls needs."""
    short = [dense(128, 64, 64, k, B16) for k in (1, 2)]
    thin, rows = ([make(k) for k in (1, 3)] for make in (lambda k: dense(8, 1, 9, k), embedding))
    every = [short, thin, rows, *([layout(name)] * 2 for name in LAYOUTS)]
    every += [[dense(128, 64, 64, 1, F64), dense(128, 64, 64, 2, F16)]]
    every += [[embedding(k, dtype) for k in (1, 3)] for dtype in (B16, F64)]
    few = [short, thin, rows, *([layout(name)] * 2 for name in ("columns", "channels first"))]
    plans = []
    for way in WAYS:
        both = [list(side) for side in zip(*(every if way == "normalized" else few), strict=True)]
        plans += [plan(*both, way, contraction, True)[0] for contraction in (GRAM, DIRECT)]
    return machine_code.launches_of(plans)


if __name__ == "__main__":
    DEVICE = "cpu"  # planned there, launched nowhere
    machine_code.check_that_no_value_compiles_again(list(KERNELS.values()))
    machine_code.report(launches_to_compile())
