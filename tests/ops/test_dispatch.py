"""The ops as PyTorch sees them: opcheck, torch.compile, fake tensors, determinism, growth."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lwkd
from tests import cases, oracle
from tests.cases import LAYOUTS, NAMES, Target, each_target, fast_target
from tests.growth import live_tensors, resident
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
NAMESPACES = ("lwkd", "lwkd_reference", "lwkd_triton")
OPS = (
    "attention", "attention_backward", "attention_maps", "jacobian_factors", "jacobian_rows",
    "jacobian_rows_backward", "probe_dot", "rademacher",
)  # fmt: skip
# A backend that PyTorch traces through without generating code, and in which a triton kernel of
# the interpreter is one opaque call as any other.
EAGER = "aot_eager"


def grown(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


# --- opcheck -------------------------------------------------------------------------------------


def attention_samples() -> list[tuple[Any, ...]]:
    """Arguments of lwkd::attention: layouts, sides, folding, masks, both divergences."""
    layout = [1, 0, 0, 0]
    x, y = (cases.draw(s, torch.float32, i) for i, s in enumerate(((2, 3, 4, 5), (2, 4, 3, 6))))
    z = cases.draw((2, 13, 6), torch.bfloat16, 3)
    mask = torch.rand(2, 3, 5) < 0.7
    none = torch.empty(0, dtype=torch.bool)
    last, strided = LAYOUTS["channels_last"], LAYOUTS["strided"]
    return [
        ([grown(x)], [y], [], layout, layout, 2.0, 0, 0.5, True),
        ([grown(last(x))], [grown(strided(y))], [mask], layout, layout, 1.0, 1, 0.3, False),
        ([x, grown(z)], [x.double(), y], [none, none], [*layout, 2, 1, 3, 4], layout * 2, 3.0, 1,
         0.5, True),
        ([x], [y], [mask.mT.contiguous().mT], layout, layout, 1.5, 0, 0.5, False),
        ([grown(x[:0])], [y[:0]], [], layout, layout, 2.0, 0, 0.5, True),
    ]  # fmt: skip


def backward_samples(namespace: str) -> list[tuple[Any, ...]]:
    """Arguments of lwkd::attention_backward, with the maps that the forward makes."""
    out = []
    for (
        student,
        teacher,
        mask,
        s_layout,
        t_layout,
        p,
        divergence,
        beta,
        mean,
    ) in attention_samples():
        student, teacher = ([x.detach() for x in xs] for xs in (student, teacher))
        args = (student, teacher, mask, s_layout, t_layout, p, divergence, beta, mean)
        d, maps = getattr(torch.ops, namespace).attention(*args)
        grad = torch.ones((), dtype=d.dtype).expand(d.shape)  # strides of 0
        n = len(student)
        space = []
        shapes = [(3, 5)] if n == 1 else [(4, 5), (3, 4)]
        if n == 2:  # layer 1 is a grid of tokens 3×4 against 3×6
            shapes = [(4, 5), (3, 4)]
            teacher = [teacher[0], teacher[1]]
        for s in shapes:
            space += [1, *s]
        xs = [*student, *teacher]
        out.append((grad, xs, mask, maps, [*range(n)] * 2, [0] * n + [1] * n,
                    [*s_layout, *t_layout], space, p, divergence, beta))  # fmt: skip
    return out


def map_samples() -> list[tuple[Any, ...]]:
    x, z = cases.draw((2, 3, 4, 5), torch.float32, 1), cases.draw((2, 5, 6), torch.float16, 2)
    return [
        ([grown(x)], [1], 2.0),
        ([grown(LAYOUTS["permuted"](x)), LAYOUTS["cropped"](z)], [3, 2], 1.0),
        ([grown(x.double()), z[:0]], [2, 1], 3.0),
    ]


def rows_samples() -> list[tuple[Any, ...]]:
    """Arguments of lwkd::jacobian_rows: all three ways, layouts, mixed dtypes, nothing."""
    x, y = (cases.draw((3, 4, 5), torch.float32, i) for i in range(2))
    half, last = x.bfloat16(), LAYOUTS["channels_last"]
    return [
        ([grown(x), half], [y, grown(y.double())], 1, True),
        ([grown(last(x))], [grown(LAYOUTS["strided"](y))], 0, False),
        ([grown(half)], [y[:, :2]], 2, True),
        ([grown(x[:0])], [y[:0]], 1, False),
    ]


def rows_backward_samples(namespace: str) -> list[tuple[Any, ...]]:
    """Arguments of lwkd::jacobian_rows_backward, with the sums that the forward makes."""
    out = []
    for student, teacher, how, mean in rows_samples():
        student, teacher = ([x.detach() for x in xs] for xs in (student, teacher))
        d, sums = getattr(torch.ops, namespace).jacobian_rows(student, teacher, how, mean)
        grad = torch.ones((), dtype=d.dtype).expand(d.shape)  # strides of 0
        n, xs, others = len(student), [*student, *teacher], [*teacher, *student]
        layers, sides = [*range(n)] * 2, [0] * n + [1] * n
        out.append((grad, xs, [] if how == 2 else others, sums, layers, sides, how))
    return out


def factor_samples() -> list[tuple[Any, ...]]:
    a, d = (cases.draw((2, 4, k), torch.float32, k) for k in (3, 5))
    x = cases.draw((2, 4, 6), torch.bfloat16, 1)
    dense, conv = [0] * 15, [2, 2, 0, 1, 1, 3, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    return [
        ([a], [d], [2 * a], [d + 1], [0], dense * 2, [0], 1, True),
        ([a, x], [d, x], [a, x.double()], [d, 2 * x], [0, 1], dense * 2 + conv * 2, [1, 0], 0,
         False),
        ([a[:0]], [d[:0]], [a[:0]], [d[:0]], [0], dense * 2, [0], 2, False),
    ]  # fmt: skip


def rademacher_samples() -> list[tuple[Any, ...]]:
    x = cases.draw((3, 5, 4, 4), torch.float32, 1)
    return [(x, 7, 0, 0), (LAYOUTS["channels_last"](x).bfloat16(), -1, 2**32 - 1, 3),
            (LAYOUTS["strided"](x.double()), 2**40, 1, 1), (x[:0], 0, 0, 0)]  # fmt: skip


def probe_samples() -> list[tuple[Any, ...]]:
    x, y = cases.draw((3, 5, 4, 4), torch.float32, 1), cases.draw((3, 300), torch.bfloat16, 2)
    return [
        ([grown(x), y], [0, 1], 7, 0, 0),
        ([grown(LAYOUTS["channels_last"](x)), grown(y.double())], [3, 2**32 - 1], -1, 5, 3),
        ([LAYOUTS["strided"](x)], [0], 2**40, 0, 3),
        ([grown(x[:0])], [1], 0, 0, 0),
    ]


def test_every_overload_is_checked() -> None:
    found = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("lwkd")}
    assert found == {f"{namespace}::{op}" for namespace in NAMESPACES for op in OPS}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace: str, op: str) -> None:
    """Fault 14: schema, autograd registration, fake against real, ahead-of-time autograd."""
    if namespace == "lwkd_triton":
        target = Target("triton", "cpu")
        if cases.why_not(target):
            pytest.skip(cases.why_not(target))
        target.require()
    overload = getattr(getattr(torch.ops, namespace), op).default
    samples = {
        "attention": attention_samples,
        "attention_backward": lambda: backward_samples(namespace),
        "attention_maps": map_samples,
        "jacobian_factors": factor_samples,
        "jacobian_rows": rows_samples,
        "jacobian_rows_backward": lambda: rows_backward_samples(namespace),
        "probe_dot": probe_samples,
        "rademacher": rademacher_samples,
    }[op]()
    for args in samples[: 2 if namespace == "lwkd_triton" else None]:
        result = torch.library.opcheck(overload, args)
        assert set(result.values()) == {"SUCCESS"}
        assert len(result) == 4


# --- fake and meta tensors -----------------------------------------------------------------------


@each_target
def test_fake_tensors_have_the_strides_of_real_ones(target: Target) -> None:
    """Faults 14, 26: shapes, dtypes and strides of every output, for every layout; and nothing
    on the way asks a tensor for its values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = ("permuted", "strided") if target.slow else LAYOUTS
    for layout, case in itertools.product(names, (cases.CASES[1], cases.CASES[11])):
        x = cases.make(case, "bf16/f32", layout, target.device)
        mode = FakeTensorMode()
        outputs = []
        for convert, context in ((lambda y: y, nullcontext()), (mode.from_tensor, mode)):
            s, t = ([grown(convert(y)) for y in xs] for xs in (x.student, x.teacher))
            with context:
                d = target.distance(s, t, **x.options)
                outputs.append([d, *torch.autograd.grad(d.sum(), s + t)])
        for a, b in zip(*outputs, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), layout


def test_meta_tensors() -> None:
    x = torch.empty(4, 3, 8, 8, device="meta", requires_grad=True)
    d = lwkd.ops.layer_discrepancy([x], [x.detach()[:, :2, :4]], reduction="none")
    assert d.device.type == "meta"
    assert d.shape == (1, 4)
    d.sum().backward()
    assert x.grad.shape == x.shape


# --- torch.compile -------------------------------------------------------------------------------


def discrepancy(target: Target, **options: Any) -> Callable[..., Tensor]:
    def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        out = lwkd.ops.layer_discrepancy(
            [a * 1.0, b], [c, d * 2.0], backend=target.backend, **options
        )
        return out.square()

    return f


def quadruple(n: int, size: int, device: str) -> list[Tensor]:
    shapes = ((n, 3, size, 5), (n, 4, 6, 2), (n, 2, size, 7), (n, 4, 6, 2))
    return [grown(cases.draw(s, torch.float32, i).to(device)) for i, s in enumerate(shapes)]


COMPILED = [{"reduction": "mean"}, {"divergence": "js", "p": 1.5, "reduction": "none", "beta": 0.3}]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", COMPILED, ids=["l2", "js"])
@fast_target
def test_compile(target: Target, options: dict[str, Any], dynamic: bool) -> None:
    """Fault 14: one graph, forward and backward, bit for bit what eager gives."""
    target.require()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(EAGER)
    f = discrepancy(target, **options)
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=dynamic)
    count = 0
    for n, size in ((9, 13), (11, 17)):
        xs = quadruple(n, size, target.device)
        got, want = compiled(*xs), f(*xs)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got.sum(), xs), torch.autograd.grad(want.sum(), xs),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        count = count or counter.frame_count  # a float option makes dynamo start over: 1 or 2
    assert counter.frame_count - count <= (0 if dynamic else 1)  # a second shape makes it dynamic


def test_compile_through_the_interpreter() -> None:
    """The Triton op is one opaque call in a compiled graph; on CPU its interpreter runs it."""
    target = Target("triton", "cpu")
    if cases.why_not(target):
        pytest.skip(cases.why_not(target))
    target.require()
    torch._dynamo.reset()
    f, xs = discrepancy(target, divergence="js"), quadruple(2, 4, "cpu")
    got, want = torch.compile(f, fullgraph=True, backend=EAGER)(*xs), f(*xs)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.sum(), xs[0])[0] for y in (got, want)))


@fast_target
def test_recompiles_are_bounded(target: Target) -> None:
    """Six shapes, two compilations: once as it is, once for every shape."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(EAGER)
    compiled = torch.compile(discrepancy(target), fullgraph=True, backend=counter)
    for n in (9, 11, 8, 14, 10, 12):  # sizes that nothing else has: equal ones share a symbol
        compiled(*quadruple(n, n + 10, target.device)).sum().backward()
    assert counter.frame_count <= 2


@fast_target
def test_compiled_maps_and_masks(target: Target) -> None:
    torch._dynamo.reset()
    x = grown(cases.draw((2, 3, 4, 5), torch.float32, 1).to(target.device))
    mask = torch.rand(2, 4, 5, device=target.device) < 0.5

    def f(x: Tensor) -> Tensor:
        (m,) = lwkd.ops.attention_maps([x], p=3.0)
        d = lwkd.ops.layer_discrepancy(
            [x], [x.flip(0).mT.contiguous().mT], mask=[mask], backend=target.backend
        )
        return m.mean() + d.sum()

    got, want = torch.compile(f, fullgraph=True, backend=EAGER)(x), f(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (got, want)))


@pytest.mark.slow
def test_inductor() -> None:
    """The compiler that people use, once, with code before and after the op, tokens and a grid."""
    torch._dynamo.reset()

    def f(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        h = torch.einsum("ncij,kc->nkij", x, w).relu()
        d = lwkd.ops.layer_discrepancy([h], [t.tanh()], tokens=(None, (4, 4, 1)), divergence="js")
        return d.sum() * 3

    xs = [cases.draw(s, torch.float32, i) for i, s in enumerate(((2, 3, 4, 4), (5, 3), (2, 17, 6)))]
    xs = [grown(x) for x in xs]
    got, want = torch.compile(f, fullgraph=True)(*xs), f(*xs)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, xs), torch.autograd.grad(want, xs), strict=True):
        torch.testing.assert_close(a, b)


# --- determinism ---------------------------------------------------------------------------------


def everything(target: Target, xs: list[Tensor], **options: Any) -> list[Tensor]:
    s, t = [grown(x) for x in xs[::2]], [grown(x) for x in xs[1::2]]
    d = target.distance(s, t, **options)
    return [d.detach(), *torch.autograd.grad(d.sum(), s + t), *target.maps(xs)]


def large(device: str, scale: int = 1) -> list[Tensor]:
    """Enough work that several threads share it: pooled, tiled, tailed."""
    shapes = ((4 * scale, 24, 65, 67), (4 * scale, 16, 65, 67), (4 * scale, 33, 20, 20),
              (4 * scale, 8, 31, 17))  # fmt: skip
    return [cases.draw(s, torch.float32, i).to(device) for i, s in enumerate(shapes)]


@each_target
@pytest.mark.parametrize("divergence", ["l2", "js"])
def test_bitwise_repeats(target: Target, divergence: str) -> None:
    """Fault 13: the same bits every time, forward and backward."""
    options = {"divergence": divergence, "p": 1.5}
    xs = large(target.device)
    if target.slow:
        xs = [x[:1, :3, :9, :10].contiguous() for x in xs]
    first = everything(target, xs, **options)
    for _ in range(1 if target.slow else 10):
        again = everything(target, xs, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("divergence", ["l2", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(divergence: str, dtype: torch.dtype) -> None:
    """The work is split by shape alone. (torch's own sums do differ from 1 to 2 threads.)"""
    target = Target("compiled", "cpu")
    xs = [x.to(dtype) for x in large("cpu")] + [x.to(dtype) for x in large("cpu")[:2]]
    xs[4] = xs[4].contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(target, xs, divergence=divergence))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@fast_target
def test_layers_do_not_depend_on_their_neighbours(target: Target) -> None:
    """One call for all layers gives each the bits of a call of its own."""
    xs = large(target.device)
    together = target.distance(xs[::2], xs[1::2], reduction="none")
    for i in range(2):
        alone = target.distance([xs[2 * i]], [xs[2 * i + 1]], reduction="none")
        assert torch.equal(together[i], alone[0])


@each_target
def test_generators_are_left_alone(target: Target) -> None:
    xs = [x[:1, :3, :5, :5].contiguous() for x in large(target.device)]
    before = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if target.device == "cuda" else None
    everything(target, xs)
    assert torch.equal(torch.get_rng_state(), before)
    if cuda is not None:
        assert torch.equal(torch.cuda.get_rng_state(), cuda)


# --- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NAMES[:2])
def test_ten_thousand_calls_leave_nothing_behind(backend: str) -> None:
    """Fault 18: live tensors +0, resident memory below 1 MiB, without grad and with errors too."""
    target = Target(backend, "cpu")
    s, t = grown(cases.draw((2, 3, 4, 4), torch.float32, 1)), torch.ones(2, 2, 4, 4)

    def call(i: int) -> None:
        d = target.distance([s], [t], divergence=("l2", "js")[i % 2])
        if i % 4 < 2:
            torch.autograd.grad(d.sum(), s, create_graph=i % 4 == 0)
        elif i % 4 == 2:
            target.maps([s])
        else:
            with torch.no_grad(), pytest.raises(ValueError, match="batch size"):
                target.distance([s], [t[:1]])

    for i in range(400):
        call(i)
    tensors, memory = live_tensors(), resident()
    for i in range(10_000 if backend == "compiled" else 1_000):
        call(i)
    assert live_tensors() <= tensors
    assert resident() - memory < 2**20


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    """It imports torch alone."""
    source = Path(oracle.__file__).read_text()
    assert "lwkd." not in source.split('"""', 2)[2]
    assert "import lwkd" not in source
