"""The Triton kernels of the attention kind: every branch of them, and machine code of them all.

Without a GPU they run under Triton's interpreter. `python -m tests.kernels.test_attention` compiles
them for two architectures, which needs no GPU but a process in which the interpreter is off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from lwkd.kernels import attention, common
from lwkd.kernels.common import ANY, PLANE, ROWS, log1p

from tests import oracle, tolerances
from tests.kernels import machine_code

DEVICE = "cpu" if common.INTERPRET else "cuda"
F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # conftest restores it


# --- inputs ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One layer: shapes as [N, C, *space], how each lies in memory, masks and folds."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    layout: str = "contiguous"
    order: int | None = None  # how the student is to be walked
    mask: str = ""
    tokens: Any = None
    channel_dim: int = 1


CASES = {
    "7x7, eight channels in a row": Case((2, 128, 7, 7), (2, 130, 7, 7), order=PLANE),
    "few channels": Case((2, 3, 9, 11), (2, 1, 9, 11), order=PLANE, mask="contiguous"),
    "channels split over programs": Case((1, 150, 8, 8), (1, 70, 8, 8), order=PLANE),
    "more positions than a tile": Case((1, 9, 20, 21), (1, 2, 46, 46), order=PLANE),
    "few positions": Case((5, 3, 2, 2), (5, 40, 2, 1), order=ANY, mask="permuted"),
    "channels last": Case((3, 40, 5, 3), (3, 136, 4, 3), "channels_last", ROWS),
    "channels last, wide": Case((2, 264, 3, 3), (2, 256, 3, 3), "channels_last", ROWS),
    "channels last, cropped": Case((2, 16, 4, 5), (2, 24, 5, 4), "cropped rows", ROWS, "cropped"),
    "planes, cropped": Case((2, 16, 6, 9), (2, 10, 9, 6), "cropped", ANY),
    "every second": Case((2, 5, 3, 4, 3), (2, 4, 3, 2, 3), "strided", ANY, mask="cropped"),
    "batch innermost": Case((6, 5, 4, 9), (6, 7, 4, 9), "batch inside", ANY),
    "off by one element": Case((2, 8, 8, 8), (2, 16, 8, 8), "offset", PLANE),
    "expanded": Case((4, 6, 5, 8), (4, 6, 5, 8), "expanded", ANY),
    "a volume": Case((2, 5, 6, 5, 4), (2, 6, 3, 7, 4), mask="contiguous", order=PLANE),
    "a line": Case((2, 9, 70), (2, 4, 33), order=PLANE, mask="permuted"),
    "tokens": Case(
        (2, 13, 24), (2, 7, 16), order=ROWS, tokens=((3, 4, 1), (2, 3, 1)), channel_dim=2
    ),
    "tokens, channels first": Case(
        (2, 128, 37), (2, 5, 36), order=PLANE, tokens=((6, 6, 1), (4, 9, 0)), channel_dim=1
    ),
}  # fmt: skip
OPTIONS = (
    {"p": 2.0, "divergence": "l2"},
    {"p": 1.0, "divergence": "js", "beta": 0.3},
    {"p": 1.7, "divergence": "l2"},
    {"p": 2.0, "divergence": "js"},
    {"p": 1.0, "divergence": "l2"},
    {"p": 3.0, "divergence": "js", "beta": 0.8},
)
DTYPES = ((F32, F32), (B16, B16), (F16, F16), (F64, F64), (B16, F64))


def samples() -> list[Any]:
    """Every case in float32, in bfloat16 and in one other dtype or mix, with options in turn."""
    out = []
    for i, name in enumerate(CASES):
        for j in (0, 1, 2 + i % 3):
            kinds = "/".join(str(d).removeprefix("torch.") for d in DTYPES[j])
            option = OPTIONS[(i + 2 * j) % len(OPTIONS)]
            out.append(pytest.param(name, DTYPES[j], option, id=f"{name}, {kinds}"))
    return out


def lay(x: Tensor, layout: str) -> Tensor:
    """The values of x in other memory; what surrounds them is NaN."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "cropped rows":
        return lay(x.movedim(1, -1), "cropped").movedim(-1, 1)
    if layout in ("permuted", "batch inside"):
        order = [*range(x.dim())][::-1] if layout == "permuted" else [*range(1, x.dim()), 0]
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    if layout == "expanded":
        return x[:1, :, :, :1].expand(x.shape)
    size, cut = list(x.shape), [slice(None)] * x.dim()
    if layout == "offset":
        big = torch.zeros(x.numel() + 1).to(x)
        return big[1:].view(x.shape).copy_(x)
    if layout == "cropped":
        size[2:-1], size[-1] = [n + 2 for n in x.shape[2:-1]], x.shape[-1] + (x.dim() > 3) * 3
        size[1] += x.dim() == 3
        cut = [slice(s - n, s) for s, n in zip(size, x.shape, strict=True)]
    elif layout == "strided":
        size, cut = [2 * n for n in size], [slice(None, None, 2)] * x.dim()
    big = torch.zeros(size).to(x) if x.dtype == torch.bool else torch.full(size, float("nan")).to(x)
    return big[tuple(cut)].copy_(x)


def moved(x: Tensor) -> Tensor:
    """x on the tested device, with the strides and the misalignment that it has."""
    if DEVICE == "cpu":
        return x
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    start = x.storage_offset() if x.storage_offset() == 1 else 0
    room = torch.zeros(size + start, dtype=x.dtype, device=DEVICE)
    out = room.as_strided(x.shape, x.stride(), start)
    return out.copy_(x) if 0 not in x.stride() else x.to(DEVICE)[:1, :, :, :1].expand(x.shape)


class Inputs(NamedTuple):
    """A layer of one case, on the tested device."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    layouts: tuple[list[int], list[int]]
    space: list[int]


def make(case: Case, dtypes: tuple[torch.dtype, torch.dtype], seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    xs, layouts, spaces = [], [], []
    for side, shape in enumerate((case.student, case.teacher)):
        x = torch.randn(shape, generator=g).mul_(3).round_().div_(2).to(dtypes[side])
        x = lay(x, "contiguous" if side and case.layout == "expanded" else case.layout)
        xs.append(moved(x))
        h, w, prefix = case.tokens[side] if case.tokens else (0, 0, 0)
        layouts.append([case.channel_dim, prefix, h, w])
        rest = [n for d, n in enumerate(shape) if d not in (0, case.channel_dim)]
        spaces.append([h, w] if h else rest)
    space = [min(a, b) for a, b in zip(*spaces, strict=True)]
    keep = None
    if case.mask:
        keep = torch.rand(case.student[0], *space, generator=g) > 0.3
        keep[-1] = False
        keep = moved(lay(keep[:, None], case.mask)[:, 0])
    return Inputs(*xs, keep, tuple(layouts), space)


def layouts(layers: list[Inputs], side: int) -> list[int]:
    return [n for x in layers for n in x.layouts[side]]


def forward(
    layers: list[Inputs], option: dict[str, Any], mean: bool = False
) -> tuple[Tensor, Tensor]:
    mask = [torch.empty(0, dtype=torch.bool) if x.mask is None else x.mask for x in layers]
    return attention.forward(
        [x.student for x in layers], [x.teacher for x in layers],
        mask if any(m.dim() > 1 for m in mask) else [],
        layouts(layers, 0), layouts(layers, 1),
        option["p"], int(option["divergence"] == "js"), option.get("beta", 0.5), mean,
    )  # fmt: skip


def backward(
    grad: Tensor, layers: list[Inputs], maps: Tensor, option: dict[str, Any]
) -> list[list[Tensor]]:
    """The gradients of all students, then of all teachers."""
    count = len(layers)
    mask = [torch.empty(0, dtype=torch.bool) if x.mask is None else x.mask for x in layers]
    xs = [x.student for x in layers] + [x.teacher for x in layers]
    grads = attention.backward(
        grad, xs, mask, maps, [*range(count)] * 2, [0] * count + [1] * count,
        layouts(layers, 0) + layouts(layers, 1),
        [n for x in layers for n in [1] * (3 - len(x.space)) + x.space],
        option["p"], int(option["divergence"] == "js"), option.get("beta", 0.5),
    )  # fmt: skip
    for x, g in zip(xs, grads, strict=True):
        assert (g.dtype, g.shape) == (x.dtype, x.shape)
        assert g.stride() == torch.empty_like(x).stride()
    return [grads[:count], grads[count:]]


def close(got: Tensor, want: Tensor, bound: Tensor) -> None:
    got, want = got.detach().cpu().double(), want.cpu()
    assert got.shape == want.shape
    worst = ((got - want).abs() / bound.cpu().clamp_min(1e-300)).max() if got.numel() else 0
    assert worst <= 1, f"{float(worst)} of the bound"


def judge(case: Case, x: Inputs, weight: Tensor, option: dict[str, Any]) -> tolerances.Verdict:
    mask = None if x.mask is None else [x.mask.cpu()]
    return tolerances.judge(
        [x.student.cpu()], [x.teacher.cpu()], weight.cpu(), mask=mask, tokens=case.tokens,
        channel_dim=case.channel_dim, **option,
    )  # fmt: skip


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtypes", "option"), samples())
def test_values_and_gradients(name: str, dtypes: Any, option: dict[str, Any]) -> None:
    """Faults 2, 6, 11, 12: every walk through memory, every dtype, against the float64 oracle."""
    case = CASES[name]
    x = make(case, dtypes)
    if case.order is not None:
        view = common.view_of(x.student, x.layouts[0])
        assert common.Walk([view], F64 in dtypes, 1, 1).order == case.order
    n = x.student.shape[0]
    weight = torch.randn(1, n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = judge(case, x, weight, option)
    d, maps = forward([x], option)
    assert d.dtype == maps.dtype == tolerances.compute_dtype([x.student], [x.teacher])
    close(d, want.value, want.value_bound)
    grads = backward(weight.to(d.dtype), [x], maps, option)
    for got, exact, bound in zip(grads, want.gradients, want.gradient_bounds, strict=True):
        close(got[0], exact[0], bound[0])
    mean, same = forward([x], option, mean=True)
    assert torch.equal(same, maps)
    close(mean, *tolerances.mean(want, tolerances.U[d.dtype]))


def test_one_call_for_layers_of_every_kind() -> None:
    """Layers of different dtype, walk and size in one call equal the layers one by one, bitwise."""
    pairs = [(B16, B16), (F32, F32), (F16, F32)]
    names = [n for n, c in CASES.items() if c.student[0] == 2 and c.tokens is None]
    layers = [make(CASES[n], pairs[i % 3], seed=i) for i, n in enumerate(names)]
    option = OPTIONS[0]
    d, maps = forward(layers, option)
    g = torch.randn(2, len(layers)).to(DEVICE).t()  # strided, as autograd may hand it on
    grads = backward(g, layers, maps, option)
    at = 0
    for i, x in enumerate(layers):
        alone, own = forward([x], option)
        assert torch.equal(d[i : i + 1], alone), names[i]
        assert torch.equal(maps[at : at + own.numel()], own), names[i]
        at += own.numel()
        for side, got in enumerate(backward(g[i : i + 1].contiguous(), [x], own, option)):
            assert torch.equal(grads[side][i], got[0]), names[i]
    assert at == maps.numel()


@pytest.mark.parametrize("option", OPTIONS[:4])
def test_maps_of_zeros_and_below_eps(option: dict[str, Any]) -> None:
    """A map of zeros is uniform over what is kept (js) or 0 (l2); below eps the norm is eps."""
    case = Case((4, 4, 6, 6), (4, 3, 5, 7), mask="contiguous")
    for dtypes in ((F32, F32), (F64, F64)):
        x = make(case, dtypes)
        x.student[0], x.student[1], x.teacher[1] = 0, 0, 0
        x.student[2] *= 1e-7 if option["p"] == 2 else 1e-14
        weight = torch.tensor([[0.5, -2.0, 3.0, 1.0]], device=DEVICE)
        want = judge(case, x, weight, option)
        d, maps = forward([x], option)
        close(d, want.value, want.value_bound)
        grads = backward(weight.to(d.dtype), [x], maps, option)
        for got, exact, bound in zip(grads, want.gradients, want.gradient_bounds, strict=True):
            close(got[0], exact[0], bound[0])


def test_gradients_are_rounded_to_nearest() -> None:
    """What a half or bfloat16 gradient holds is the float32 gradient, rounded once."""
    for dtype in (F16, B16):
        for option in OPTIONS[:3]:
            x = make(CASES["few channels"], (dtype, dtype))
            wide = x._replace(student=x.student.float(), teacher=x.teacher.float())
            maps = forward([wide], option)[1]
            weight = torch.tensor([[0.3, 1e-39]], device=DEVICE)  # also where numbers are subnormal
            for got, want in zip(
                backward(weight, [x], maps, option), backward(weight, [wide], maps, option),
                strict=True,
            ):  # fmt: skip
                assert torch.equal(got[0], want[0].to(dtype))


@triton.jit
def log1p_kernel(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, log1p(tl.load(x + i)))


def test_log1p() -> None:
    """To four roundings, however small its argument."""
    u = torch.logspace(-20, 3, 64, dtype=F64, device=DEVICE)
    for x in (u, -u.clamp_max(0.99), torch.zeros_like(u)):
        y = torch.empty_like(x)
        log1p_kernel[(1,)](x, y, enable_fp_fusion=False)
        close(y, x.log1p(), 4 * tolerances.U[F64] * x.log1p().abs())


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_exact_lane(p: float) -> None:
    """Small integers: the maps equal the oracle's bitwise, also where they are pooled by halves."""
    for i, (name, case) in enumerate(CASES.items()):
        if case.tokens or name == "a volume":
            continue
        shape = (*case.teacher[:2], *case.student[2:])
        x = make(case._replace(teacher=shape), DTYPES[i % 4])
        x = x._replace(student=x.student.mul(2), teacher=x.teacher.mul(2))
        _, maps = forward([x], {"p": p, "divergence": "l2"})
        space, n = x.student.shape[2:], x.student.shape[0]
        keep = oracle.keep_of(None if x.mask is None else x.mask.cpu(), n, space, "cpu")
        want = [oracle.map_of(y.cpu().double(), p, space, keep) for y in (x.student, x.teacher)]
        assert torch.equal(maps.cpu().double(), torch.cat([m.flatten() for m in want])), name
    s = torch.arange(2 * 3 * 6 * 4.0, device=DEVICE).reshape(2, 3, 6, 4)
    t = torch.ones(2, 1, 3, 2, device=DEVICE)
    _, maps = forward([Inputs(s, t, None, ([1, 0, 0, 0], [1, 0, 0, 0]), [3, 2])], OPTIONS[0])
    want = s.square().sum(1).reshape(2, 3, 2, 2, 2).sum((2, 4)) / 4
    assert torch.equal(maps[:12], want.flatten())


def test_maps_alone() -> None:
    """attention_maps: one call, each tensor in its own precision; a NaN stays where it was."""
    xs, dims = [], []
    for i, case in enumerate(CASES.values()):
        xs.append(make(case, (DTYPES[i % 5][0], F32), seed=i).student)
        dims.append(case.channel_dim)
    for x in xs:
        if 0 not in x.stride():
            x[(0,) * x.dim()], x[(-1,) * x.dim()] = float("nan"), float("inf")
    xs.append(torch.empty(3, 0, 2, 2, device=DEVICE))  # no channel: a sum of nothing
    xs.append(torch.empty(0, 4, 2, device=DEVICE))
    xs.append(torch.empty(2, 4, 0, 3, device=DEVICE, dtype=F64))
    dims += [1, 1, 1]
    for p in (1.0, 2.0, 2.5):
        got = attention.maps(xs, dims, p)
        want = oracle.attention_maps([x.cpu() for x in xs], p=p, channel_dim=dims)
        bounds = tolerances.attention_maps(xs, [m.to(DEVICE) for m in want], p, dims)
        for x, m, e, b in zip(xs, got, want, bounds, strict=True):
            assert m.is_contiguous()
            assert m.dtype == (F64 if x.dtype == F64 else F32)
            assert torch.equal(m.isnan().cpu(), e.isnan())
            assert torch.equal(m.isinf().cpu(), e.isinf())
            close(m.nan_to_num(0, 0, 0), e.nan_to_num(0, 0, 0), b.nan_to_num(1, 1, 1))


# --- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["l2", "js"])
def test_equal_operands_are_at_a_distance_of_zero(divergence: str) -> None:
    """Exactly 0 in the same layout, wherever in memory they lie: loads may differ, sums may not."""
    option = {"p": 2.0, "divergence": divergence, "beta": 0.4}
    layers = []
    for i, (name, case) in enumerate(CASES.items()):
        if case.student[0] != 2:
            continue
        case = case._replace(tokens=case.tokens and (case.tokens[0],) * 2, teacher=case.student)
        x = make(case, (DTYPES[i % 3][0],) * 2, seed=i)
        x.student.mul_(0.7071)
        flat = torch.zeros(x.student.numel() + 1).to(x.student)
        dense = case.layout in ("contiguous", "offset")
        twin = flat[1:].view(x.student.shape) if dense else torch.empty_like(x.student)
        twin = moved(lay(x.student.cpu(), case.layout)) if not dense else twin.copy_(x.student)
        assert twin.stride() == x.student.stride(), name
        layers.append(x._replace(teacher=twin))
    d, _ = forward(layers, option)
    assert torch.equal(d, torch.zeros_like(d))
    x = torch.zeros(65, device=DEVICE)
    pair = [x[:64].view(1, 1, 64)], [x[1:].view(1, 1, 64)]
    plan, *_ = attention.plan_forward(*pair, [], [1, 0, 0, 0], [1, 0, 0, 0], 2.0, 0, 0.5, False)
    assert [arguments.get("VECTOR") for _, _, arguments in plan.launches()] == [1, None]


def test_repeats_bitwise() -> None:
    """Fault 13: the same call gives the same bits."""
    names = ("7x7, eight channels in a row", "channels last, cropped", "a volume", "few channels")
    layers = [make(CASES[name], (F32, B16)) for name in names]
    g = torch.randn(len(layers), device=DEVICE)
    first = None
    for _ in range(2 if DEVICE == "cpu" else 1000):
        d, maps = forward(layers, OPTIONS[3], mean=True)
        students, teachers = backward(g, layers, maps, OPTIONS[3])
        now = [d, maps, *students, *teachers]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


@pytest.mark.parametrize("mean", [True, False])
def test_nothing_to_do(mean: bool) -> None:
    """Fault 9: no sample, no position, no channel."""
    plain = ([1, 0, 0, 0], [1, 0, 0, 0])
    shapes = [
        ((0, 3, 2, 2), (0, 4, 3, 3)),
        ((2, 3, 0, 2), (2, 4, 3, 3)),
        ((2, 0, 2, 2), (2, 0, 2, 1)),
    ]
    for s, t in shapes:
        xs = [torch.ones(x, device=DEVICE) for x in (s, t)]
        space = [min(a, b) for a, b in zip(s[2:], t[2:], strict=True)]
        layer = Inputs(*xs, None, plain, space)
        for option in OPTIONS[:2]:
            d, maps = forward([layer], option, mean)
            assert torch.equal(d, torch.zeros((1,) if mean else (1, s[0]), device=DEVICE))
            assert maps.numel() == 2 * s[0] * space[0] * space[1]
            for grads in backward(torch.ones_like(d), [layer], maps, option):
                assert torch.equal(grads[0], torch.zeros_like(grads[0]))


def test_offsets_beyond_two_to_the_31() -> None:
    """Fault 4: strides of 2^31 elements, in memory that is mapped but for a few pages unused."""
    step = 2**31
    room = torch.empty(step + 64, dtype=F16, device=DEVICE)
    for strides in ((step, 8, 1), (16, step, 1), (1, 8, step), (step, 1, 4)):
        shape = [2 if s == step else 4 for s in strides]
        x = room.as_strided(shape, strides).copy_(torch.rand(shape))
        m = attention.maps([x], [1], 2.0)[0]
        close(m, x.double().square().sum(1), torch.full(m.shape, 1e-6))
        layer = Inputs(
            x, torch.ones(x.shape, device=DEVICE), None, ([1, 0, 0, 0],) * 2, [x.shape[2]]
        )
        d, maps = forward([layer], OPTIONS[0])
        dense = layer._replace(student=x.clone(memory_format=torch.contiguous_format))
        for a, b in zip(
            backward(torch.ones_like(d), [layer], maps, OPTIONS[0]),
            backward(torch.ones_like(d), [dense], maps, OPTIONS[0]), strict=True,
        ):  # fmt: skip
            assert torch.equal(a[0], b[0])


def test_64_bit_indices() -> None:
    """Fault 4: the kernels that 2^31 positions would use, on fewer."""
    names = ["more positions than a tile", "batch innermost", "a volume", "channels last, cropped"]
    names.append("tokens")
    for i, name in enumerate(names):
        x = make(CASES[name], (F32, F32), i)
        args = (
            [x.student],
            [x.teacher],
            [] if x.mask is None else [x.mask],
            *x.layouts,
            2.0,
            0,
            0.5,
        )
        plan, d, maps, keep = attention.plan_forward(*args, False)
        run_wide(plan)
        want, want_maps = attention.forward(*args, False)
        assert torch.equal(d, want), name
        assert torch.equal(maps, want_maps), name
        back = (
            torch.ones_like(d), [x.student, x.teacher], args[2], maps, [0, 0], [0, 1],
            x.layouts[0] + x.layouts[1], [1] * (3 - len(x.space)) + x.space, 2.0, 0, 0.5,
        )  # fmt: skip
        plan, grads, keep = attention.plan_backward(*back)
        run_wide(plan)
        for a, b in zip(grads, attention.backward(*back), strict=True):
            assert torch.equal(a, b), name
        del keep


def run_wide(plan: common.Plan) -> None:
    launches = plan.launches()
    table = plan.upload()
    for kernel, programs, arguments in launches:
        wide = {"INDEX": tl.int64} if "INDEX" in arguments else {}
        kernel[(programs,)](table, **(arguments | wide), **common.OPTIONS)


# --- the plan -------------------------------------------------------------------------------------


def test_a_call_is_a_few_launches() -> None:
    """Faults 5, 7, 8: layers share launches, whose grids are one-dimensional and of any length."""

    def kernels(plan: common.Plan) -> list[tuple[str, int]]:
        return [(kernel.__name__, programs) for kernel, programs, _ in plan.launches()]

    x = torch.empty(8, 16, 8, 8, dtype=B16, device=DEVICE)
    layout = [1, 0, 0, 0] * 64
    plan, *_ = attention.plan_forward([x] * 64, [x] * 64, [], layout, layout, 2.0, 0, 0.5, True)
    assert kernels(plan) == [("maps_kernel", 1024), ("distance_kernel", 512), ("mean_kernel", 64)]
    assert len(plan.words) < 2000
    maps = torch.empty(64 * 2 * 8 * 64, device=DEVICE)
    g = torch.ones(64, device=DEVICE)
    back = (g, [x] * 64, [], maps, [*range(64)], [0] * 64, layout, [1, 8, 8] * 64, 2.0, 0, 0.5)
    plan, *_ = attention.plan_backward(*back)
    assert kernels(plan) == [("slope_kernel", 512), ("spread_kernel", 512)]

    stages = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
    xs = [torch.empty(1, c, h, h, dtype=B16, device=DEVICE).expand(256, c, h, h) for c, h in stages]
    plan, *_ = attention.plan_forward(xs, xs, [], layout[:16], layout[:16], 2.0, 0, 0.5, True)
    names = [name for name, _ in kernels(plan)]
    assert names == ["maps_kernel", "gather_kernel", "distance_kernel", "mean_kernel"]

    x = torch.empty(70_000, 1, 1, 40, device=DEVICE)
    plan, *_ = attention.plan_forward([x], [x], [], layout[:4], layout[:4], 2.0, 0, 0.5, False)
    assert kernels(plan) == [("maps_kernel", 140_000), ("distance_kernel", 70_000)]

    x = torch.empty(1, 1, 32, device=DEVICE)
    plan, *_ = attention.plan_maps([x] * 2500, [1] * 2500, 2.0)
    parts = [arguments["items"] for _, _, arguments in plan.launches()]
    assert parts == [1024, 1024, 452]


def test_layers_beyond_one_search() -> None:
    """More rows than the smallest search takes, each found by its own programs."""
    xs = [torch.full((1, 2, 32 * (1 + i % 3)), float(i), device=DEVICE) for i in range(40)]
    for i, m in enumerate(attention.maps(xs, [1] * 40, 1.0)):
        assert torch.equal(m, torch.full_like(m, 2.0 * i)), i


def test_table_writer() -> None:
    """Every word arrives, the largest too."""
    words = [0, 1, 15, 16, 2**31 - 1, 2**31, 2**48 + 8, 2**59 - 1] * 8
    table = torch.zeros(70, dtype=torch.int64, device=DEVICE)
    common.write_table[(1,)](table, 3, common.encode(words), common.FEW)
    assert table.tolist() == [0] * 3 + words + [0] * 3


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Fault 26: no synchronisation, and a replay computes from what the inputs hold by then."""
    layers = [make(CASES[n], (F32, F32)) for n in ("7x7, eight channels in a row", "a volume")]
    option = OPTIONS[1]

    def step() -> list[Tensor]:
        d, maps = forward(layers, option, mean=True)
        students, teachers = backward(torch.ones_like(d), layers, maps, option)
        return [d, *students, *teachers]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(100):
        for x in layers:
            x.student.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


# --- machine code ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """Machine code for sm_80 and sm_90 of every kernel, in a process without the interpreter."""
    machine_code.check_module(
        "tests.kernels.test_attention", {*KERNELS, "write_table", "mean_kernel"}
    )


def launches_to_compile() -> machine_code.Launches:
    """One launch of every kernel and set of constants that a spread of calls needs."""
    plans = []
    for i, (case, dtypes) in enumerate(
        [
            ("7x7, eight channels in a row", (B16, B16)),
            ("channels last", (B16, B16)),
            ("every second", (F16, F16)),
            ("a volume", (B16, F64)),
            ("tokens", (F16, F16)),
        ]
    ):
        x, option = make(CASES[case], dtypes), OPTIONS[i % len(OPTIONS)]
        js, mask = int(option["divergence"] == "js"), [] if x.mask is None else [x.mask]
        args = (option["p"], js, 0.4)
        plan, d, maps, _ = attention.plan_forward(
            [x.student], [x.teacher], mask, *x.layouts, *args, i % 2 == 0
        )
        plans.append(plan)
        plan, *_ = attention.plan_backward(
            d, [x.student, x.teacher], mask, maps, [0, 0], [0, 1], x.layouts[0] + x.layouts[1],
            [1] * (3 - len(x.space)) + x.space, *args,
        )  # fmt: skip
        plans.append(plan)
    return machine_code.launches_of(plans)


KERNELS = [name for name in vars(attention) if name.endswith("_kernel")]

if __name__ == "__main__":
    DEVICE = "cpu"  # planned there, launched nowhere
    machine_code.check_that_no_value_compiles_again([vars(attention)[name] for name in KERNELS])
    machine_code.report(launches_to_compile())
