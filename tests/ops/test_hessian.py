"""Probes that are never stored, bit for bit the same everywhere, and distances of traces."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import lwkd
from lwkd.ops import hessian, philox
from tests import cases, tolerances
from tests.cases import LAYOUTS, Target, each_target, fast_target
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
F64, F32 = torch.float64, torch.float32
DTYPES = (F64, F32, torch.float16, torch.bfloat16)
SEEDS = (0, 7, 2**32 + 5, 2**63 + 11, 2**64 - 1, -2)
# Around a word, a block, a vector, a task of the CPU kernels.
LENGTHS = (1, 3, 31, 32, 33, 127, 128, 129, 1000, 4095, 4096, 4097, 9001)


def rademacher(target: Target, like: Tensor, **options: Any) -> Tensor:
    target.require()
    return lwkd.ops.rademacher(like.to(target.device), backend=target.backend, **options).cpu()


def dot(target: Target, hvps: list[Tensor], **options: Any) -> Tensor:
    target.require()
    hvps = [h.to(target.device) for h in hvps]
    return lwkd.ops.probe_dot(hvps, backend=target.backend, **options).cpu()


def exact(h: Tensor, seed: int, layer: int, probe: int) -> float:
    """By the definition, in float64."""
    return float((philox.signs(h, seed, layer, probe).double() * h.double()).sum())


# --- the signs -----------------------------------------------------------------------------------


@pytest.mark.slow
@each_target
def test_a_million_words_are_the_same(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if target.slow:  # a program takes the interpreter as long for 1,024 blocks as for one
        target.require()
        kernels = importlib.import_module("lwkd.kernels.hessian")
        monkeypatch.setattr(kernels, "_BLOCKS", 1024)
        monkeypatch.setattr(kernels, "_TILE", 1024 * 128)
    like = torch.empty(32_000_000, dtype=torch.bfloat16)
    got = rademacher(target, like, seed=2**63 + 3, layer=1, probe=9)
    assert torch.equal(got, philox.signs(like, 2**63 + 3, 1, 9))


@each_target
def test_seeds_layers_probes_lengths(target: Target) -> None:
    for seed, length in itertools.product(SEEDS, (1, 129) if target.slow else LENGTHS):
        for layer, probe in ((0, 0), (3, 2**32 - 1), (2**32 - 1, 5)):
            like = torch.empty(length)
            got = rademacher(target, like, seed=seed, layer=layer, probe=probe)
            assert torch.equal(got, philox.signs(like, seed, layer, probe)), (seed, length, layer)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_target
def test_signs_follow_the_elements_not_the_memory(target: Target, layout: str) -> None:
    for dtype in DTYPES[:: 3 if target.slow else 1]:
        like = LAYOUTS[layout](cases.draw((3, 5, 4, 7), dtype, 1).to(target.device))
        target.require()
        got = lwkd.ops.rademacher(like, seed=5, layer=2, backend=target.backend)
        assert got.dtype == dtype
        assert got.stride() == torch.empty_like(like).stride()
        assert torch.equal(got.cpu(), philox.signs(like.cpu(), 5, 2))


def test_the_words_of_the_compiled_library() -> None:
    """The known answers of tests/ops/test_philox.py, and blocks beyond 2³²."""
    Target("compiled", "cpu").require()
    from lwkd import _C

    g = torch.Generator().manual_seed(1)
    for _ in range(1000):
        key, counter = (torch.randint(2**32, (k,), generator=g).tolist() for k in (2, 4))
        want = philox.words(key, [torch.tensor(c) for c in counter]).tolist()
        assert _C.philox(key, counter) == want


# --- their products ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@each_target
def test_products_of_every_dtype_and_layout(target: Target, layout: str) -> None:
    target.require()
    for dtype in DTYPES[:: 3 if target.slow else 1]:
        h = LAYOUTS[layout](cases.draw((3, 5, 4, 7), dtype, 1).to(target.device))
        got = lwkd.ops.probe_dot([h, h], seed=3, probe=1, backend=target.backend).cpu()
        assert got.dtype == (F64 if dtype == F64 else F32)
        for layer in (0, 1):
            want = exact(h.cpu(), 3, layer, 1)
            bound = tolerances.probe_dot(h.cpu(), want)
            assert abs(float(got[layer]) - want) <= bound, (dtype, layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_in_another_order(dtype: torch.dtype) -> None:
    """As second derivatives of convolutions and matrices lie: runs that are read side by side."""
    Target("compiled", "cpu").require()
    g = torch.Generator().manual_seed(5)
    for shape, order in (
        ((40, 33, 3, 3), (1, 0, 2, 3)), ((31, 17, 5), (0, 2, 1)), ((300, 70), (1, 0)),
        ((17, 256), (1, 0)), ((33, 257), (1, 0)), ((3, 40, 300), (0, 2, 1)),
        ((2, 20, 6, 50), (0, 2, 3, 1)), ((5, 300, 1, 7), (3, 2, 1, 0)),
        ((128, 3, 7, 7), (1, 0, 2, 3)),
    ):  # fmt: skip
        h = torch.randint(-9, 10, [shape[d] for d in order], generator=g).to(dtype)
        h = h.permute(sorted(range(len(order)), key=order.__getitem__))
        assert h.shape == shape
        got = lwkd.ops.probe_dot([h, h[:, 1:]], seed=-7, probe=3, backend="compiled")
        assert got.tolist() == [exact(x, -7, layer, 3) for layer, x in enumerate((h, h[:, 1:]))]
        several = torch.stack([h, -h.flip(0)])
        several = several.transpose(0, 1).clone().transpose(0, 1)
        both = torch.ops.lwkd.probe_dot([several], [4], -7, 3, 2)
        assert both.tolist() == [[exact(x, -7, 4, 3 + k) for k, x in enumerate(several)]]


@each_target
def test_lengths(target: Target) -> None:
    for dtype in (F32, F64):
        hvps = [cases.draw((k,), dtype, k) for k in LENGTHS] + [cases.draw((), dtype, 1)]
        got = dot(target, hvps, seed=-9, probe=2**32 - 1)
        for layer, h in enumerate(hvps):
            want = exact(h, -9, layer, 2**32 - 1)
            assert abs(float(got[layer]) - want) <= tolerances.probe_dot(h, want), (dtype, layer)


@each_target
def test_whole_numbers_are_summed_exactly(target: Target) -> None:
    """The exact lane: every backend gives the same bits."""
    g = torch.Generator().manual_seed(3)
    hvps = [torch.randint(-99, 100, (k, 37), generator=g).float() for k in (1, 30, 300)]
    got = dot(target, hvps, seed=4)
    assert got.tolist() == [exact(h, 4, i, 0) for i, h in enumerate(hvps)]


@each_target
def test_a_probe_with_itself(target: Target) -> None:
    """A diagonal Hessian: one probe gives its trace."""
    diagonal = [cases.draw((k, 3), F64, k).abs() for k in (5, 50)]
    hvps = [philox.signs(x, 1, i, 6) * x for i, x in enumerate(diagonal)]
    got = dot(target, hvps, seed=1, probe=6)
    torch.testing.assert_close(got, torch.stack([x.sum() for x in diagonal]), rtol=1e-13, atol=0)


@each_target
def test_nothing_and_nan(target: Target) -> None:
    nan = torch.ones(300)
    nan[200] = torch.nan
    got = dot(target, [torch.empty(0, 3), nan, torch.full((5,), torch.inf)], seed=0)
    assert got[0] == 0
    assert not got[1:].isfinite().any()


def test_any_thread_count_gives_the_same_bits() -> None:
    Target("compiled", "cpu").require()
    hvps = [cases.draw((300, 401), F32, 1), cases.draw((7,), F32, 2)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(lwkd.ops.probe_dot(hvps, seed=1, backend="compiled"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_elements_beyond_31_bits() -> None:
    """Fault 4: signs of elements 2³¹ and on, without the memory for them."""
    Target("compiled", "cpu").require()
    rows, each = 2**19, 4096
    last = torch.zeros(rows + 1, dtype=F64).index_fill_(0, torch.tensor([rows]), 1.0)
    (q,) = lwkd.ops.probe_dot([last[:, None].expand(-1, each)], seed=2, backend="compiled")
    blocks = torch.arange(2**24, 2**24 + each // 128)
    zero = torch.zeros_like(blocks)
    bits = philox.words((2, 0), [blocks, zero, zero, zero])[..., None] >> torch.arange(32) & 1
    assert float(q) == float((2 * bits - 1).sum())


# --- derivatives ---------------------------------------------------------------------------------


@each_target
def test_derivatives(target: Target) -> None:
    """Linear: the gradient is the signs, and there is a second derivative by the weights."""
    target.require()
    hvps = [cases.draw(s, F64, 1).to(target.device).requires_grad_() for s in ((4, 5), (3,))]
    d = lwkd.ops.probe_dot(hvps, seed=3, probe=2, backend=target.backend)
    weight = torch.tensor([2.0, -3.0], dtype=F64, device=target.device, requires_grad=True)
    grads = torch.autograd.grad(d, hvps, weight, create_graph=True)
    for layer, (g, h) in enumerate(zip(grads, hvps, strict=True)):
        want = philox.signs(h.detach().cpu(), 3, layer, 2) * float(weight[layer])
        assert torch.equal(g.detach().cpu(), want)
    (second,) = torch.autograd.grad(grads[0].sum(), weight)
    assert float(second[0]) == float(philox.signs(hvps[0].detach().cpu(), 3, 0, 2).sum())


@fast_target
def test_derivatives_of_the_distance(target: Target) -> None:
    target.require()
    s, t = (cases.draw((3, 4, 5), F64, k).to(target.device).requires_grad_() for k in (1, 2))

    def distance(s: Tensor, t: Tensor) -> Tensor:
        return lwkd.ops.layer_discrepancy([s], [t], kind="hessian", seed=4, backend=target.backend)

    assert torch.autograd.gradcheck(distance, (s, t))


# --- distances of traces -------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@each_target
def test_the_distance_of_products(target: Target, normalize: bool) -> None:
    target.require()
    s = [cases.draw((4, k, 3), F64, k) for k in (5, 7)]
    t = [cases.draw((2, k, 2), F64, 9 + k) for k in (6, 7)]
    traces = [
        [sum(exact(h[k], 8, i, k) for k in range(len(h))) / len(h) for i, h in enumerate(hvps)]
        for hvps in (s, t)
    ]
    got = lwkd.ops.layer_discrepancy(
        [x.to(target.device) for x in s], [x.to(target.device) for x in t], kind="hessian",
        seed=8, normalize=normalize, backend=target.backend,
    ).cpu()  # fmt: skip
    for i, (a, b) in enumerate(zip(*traces, strict=True)):
        want = abs(a - b) / (abs(a) + abs(b)) if normalize else (
            abs(a / s[i][0].numel() - b / t[i][0].numel()))  # fmt: skip
        assert float(got[i]) == pytest.approx(want, rel=1e-11)


def test_the_distance_of_traces() -> None:
    s, t = torch.tensor([3.0, 0.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 5.0])
    d = lwkd.ops.trace_discrepancy(s, t, [2] * 4, [4] * 4)
    assert d.tolist() == pytest.approx([0.5, 0.0, 1.0, 1.0])
    d = lwkd.ops.trace_discrepancy(s, t, [2] * 4, torch.tensor([4] * 4), normalize=False)
    assert d.tolist() == [1.25, 0.0, 0.75, 1.25]


# --- bad input -----------------------------------------------------------------------------------


def test_errors() -> None:
    x, ops = torch.ones(2, 3), lwkd.ops
    two = torch.ones(2)
    for call, kind, text in (
        (lambda: ops.rademacher([x], seed=0), TypeError, r"like \(layer 0\): expected a tensor"),
        (lambda: ops.rademacher(x.int(), seed=0), TypeError, "expected float64, float32"),
        (lambda: ops.rademacher(x, seed=2**64), ValueError, "seed: expected an int of 64 bits"),
        (lambda: ops.rademacher(x, seed=0.5), ValueError, "seed: expected an int of 64 bits"),
        (lambda: ops.rademacher(x, seed=0, layer=-1), ValueError, r"layer: expected .*\[0, 2³²\)"),
        (lambda: ops.rademacher(x, seed=0, probe=2**32), ValueError, "probe: expected an int in"),
        (lambda: ops.rademacher(x, seed=0, backend="cuda"), ValueError, "backend: expected None"),
        (lambda: ops.probe_dot(x, seed=0), TypeError, "hvps: expected a list of tensors"),
        (lambda: ops.probe_dot([], seed=0), ValueError, "hvps: expected at least one tensor"),
        (lambda: ops.probe_dot([x, x.bool()], seed=0), TypeError, r"hvps \(layer 1\)"),
        (lambda: distance([x], [x], reduction="none"), ValueError, "reduction: expected 'mean'"),
        (lambda: distance([x], [x, x]), ValueError, "teacher: expected 1 tensors"),
        (lambda: distance([x, x[:1]], [x, x]), ValueError, r"student \(layer 1\): expected 2 pro"),
        (lambda: distance([x], [x[:0]]), ValueError, r"teacher \(layer 0\): expected Hessian-vec"),
        (lambda: distance([x], [x], normalize=1), TypeError, "normalize: expected True or False"),
        (lambda: distance([x], [x], p=2.0), TypeError, "options: expected those of kind='hessian'"),
        (lambda: ops.trace_discrepancy(two, two[:1], [1, 1], [1]), ValueError, "tr_t: expected"),
        (lambda: ops.trace_discrepancy(two, [1.0], [1, 1], [1]), TypeError, "tr_t: expected a fl"),
        (lambda: ops.trace_discrepancy(two, two, [1], [1, 1]), ValueError, "numel_s: expected 2"),
        (lambda: ops.trace_discrepancy(two, two, [1, 1], [1, 0]), ValueError, "numel_t: expected"),
    ):
        with pytest.raises(kind, match=text):
            call()


def distance(*args: Any, **options: Any) -> Tensor:
    return lwkd.ops.layer_discrepancy(*args, kind="hessian", **options)


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    lwkd.ops.probe_dot([lwkd.ops.rademacher(torch.ones(5), seed=1)], seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_64_bits() -> None:
    assert hessian.seed_of("op", 2**64 - 1) == -1
    assert hessian.seed_of("op", -(2**63)) == -(2**63)
