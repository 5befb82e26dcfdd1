"""Factored rows against gradients that are built, in float64, from the definition."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lwkd
from lwkd.ops import ConvFactors, Factors, factors
from tests import cases, tolerances
from tests.cases import DTYPES, Target
from tests.ops.battery import one_thread

__all__ = ["one_thread"]  # a fixture
F64, F32 = torch.float64, torch.float32
each_target = cases.each_target
contractions = pytest.mark.parametrize("contraction", ["gram", "direct"])

# --- the oracle: G, built by the definition ------------------------------------------------------


def gradient(item: Any, rows: int = 0) -> Tensor:
    """The gradients of an item's parameters, [N, everything], in float64."""
    if isinstance(item, Factors):
        a, d = item
        if a.dtype == torch.int64:
            out = torch.zeros(len(a), rows, d.shape[2], dtype=F64)
            for n, t in itertools.product(range(a.shape[0]), range(a.shape[1])):
                out[n, a[n, t]] += d[n, t].double()
            return out.flatten(1)
        a, d = a.double(), d.double()
        if a.dim() == 3:
            return torch.einsum("nto,nti->noi", d, a).flatten(1)
        return torch.einsum("ngto,ngti->ngoi", d, a).flatten(1)
    if isinstance(item, ConvFactors):
        return convolution(item).flatten(1)
    return torch.cat([gradient(part, rows) for part in item], 1)


def convolution(item: ConvFactors) -> Tensor:
    """By autograd, sample by sample: the weight's gradient of the convolution itself."""
    space = len(item.kernel_size)
    plain = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
    back = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1]
    x, d = item.x.double(), item.d.double()
    first, second = (x, d) if item.transposed else (d, x)
    weight = torch.zeros(
        first.shape[1], second.shape[1] // item.groups, *item.kernel_size, dtype=F64
    ).requires_grad_()
    out = []
    for n in range(len(x)):
        if item.transposed:
            y = back(x[n : n + 1], weight, None, item.stride, item.padding, 0, item.groups,
                     item.dilation)  # fmt: skip
            extra = [a - b for a, b in zip(d.shape[2:], y.shape[2:], strict=True)]
            y = back(x[n : n + 1], weight, None, item.stride, item.padding, extra, item.groups,
                     item.dilation)  # fmt: skip
            loss = (y * d[n : n + 1]).sum()
        else:
            y = plain(x[n : n + 1], weight, None, item.stride, item.padding, item.dilation,
                      item.groups)  # fmt: skip
            loss = (y * d[n : n + 1]).sum()
        out.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(out)


def distance(s: Tensor, t: Tensor, way: str) -> Tensor:
    """D [N] of gradients [N, K] in float64."""
    ns, nt = (x.norm(dim=1, keepdim=True) for x in (s, t))
    if way == "norms":
        return ((ns - nt) / (ns + nt)).square()[:, 0].nan_to_num(0.0)
    if way == "difference":
        return (s - t).square().sum(1)
    return (s / ns.clamp_min(1e-12) - t / nt.clamp_min(1e-12)).square().sum(1)


WAYS: dict[str, dict[str, Any]] = {
    "normalized": {"normalize": True},
    "difference": {"normalize": False},
    "norms": {"compare": "norms"},
}
ways = pytest.mark.parametrize("way", WAYS)

# --- items ---------------------------------------------------------------------------------------

N = 3


def draw(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return cases.draw(shape, dtype, seed)


class Conv(NamedTuple):
    inputs: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    extra: int = 0  # output_padding

    def item(self, seed: int, dtype: torch.dtype = F64) -> ConvFactors:
        c, *space = self.inputs
        out = []
        for k, size in enumerate(space):
            reach = self.dilation[k] * (self.kernel[k] - 1) + 1
            if self.transposed:
                out.append((size - 1) * self.stride[k] - 2 * self.padding[k] + reach + self.extra)
            else:
                out.append((size + 2 * self.padding[k] - reach) // self.stride[k] + 1)
        x = draw(N, c, *space, seed=seed, dtype=dtype)
        d = draw(N, self.outputs, *out, seed=seed + 1, dtype=dtype)
        return ConvFactors(
            x, d, self.kernel, self.stride, self.padding, self.dilation, self.groups,
            self.transposed,
        )  # fmt: skip


CONVS = {
    "1-d": Conv((4, 9), 6, (3,), (1,), (1,), (1,)),
    "1-d, strided, dilated": Conv((4, 17), 2, (3,), (2,), (0,), (3,)),
    "2-d": Conv((3, 6, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "2-d, everything": Conv((4, 9, 8), 6, (3, 2), (2, 3), (2, 1), (2, 1), 2),
    "pointwise": Conv((5, 4, 4), 7, (1, 1), (1, 1), (0, 0), (1, 1)),
    "depthwise": Conv((6, 5, 5), 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise, multiplied": Conv((3, 5, 5), 6, (3, 3), (2, 2), (1, 1), (1, 1), 3),
    "3-d": Conv((2, 4, 5, 3), 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    "transposed 1-d": Conv((3, 5), 4, (4,), (2,), (1,), (1,), transposed=True),
    "transposed": Conv((4, 4, 3), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, True),
    "transposed, longer": Conv((3, 4, 4), 2, (3, 3), (2, 2), (1, 1), (1, 1), 1, True, 1),
    "transposed 3-d": Conv((2, 2, 3, 2), 3, (2, 2, 2), (2, 1, 2), (0, 1, 0), (1, 1, 1), 1, True),
}


def items(name: str, seed: int, dtype: torch.dtype = F64) -> Any:
    if name in CONVS:
        return CONVS[name].item(seed, dtype)

    def of(*shape: int, k: int = 0) -> Tensor:
        return draw(*shape, seed=seed + k, dtype=dtype)

    bias = Factors(torch.ones(N, 1, 1, dtype=dtype), of(N, 1, 8, k=3))
    return {
        "dense": lambda: Factors(of(N, 5, 7), of(N, 5, 8, k=1)),
        "one row": lambda: Factors(of(N, 1, 7), of(N, 1, 8, k=1)),
        "many rows": lambda: Factors(of(N, 700, 3), of(N, 700, 2, k=1)),
        "groups": lambda: Factors(of(N, 4, 5, 3), of(N, 4, 5, 2, k=1)),
        "scale of a norm": lambda: Factors(of(N, 6, 5, 1), of(N, 6, 5, 1, k=1)),
        "a weight and a bias": lambda: (Factors(of(N, 5, 7), of(N, 5, 8, k=1)), bias),
        "nested": lambda: (
            CONVS["2-d"].item(seed, dtype),
            (bias, Factors(of(N, 2, 3), of(N, 2, 2, k=1))),
        ),
    }[name]()


NAMES = [*CONVS, "dense", "one row", "many rows", "groups", "scale of a norm",
         "a weight and a bias", "nested"]  # fmt: skip
FEW = ("2-d, everything", "depthwise", "transposed", "dense", "groups", "scale of a norm", "nested")


def there(target: Target, item: Any) -> Any:
    """An item on the target's device."""
    if isinstance(item, (Factors, ConvFactors)):
        return item._replace(
            **{
                name: x.to(target.device)
                for name, x in zip(item._fields[:2], item[:2], strict=True)
            }
        )
    return tuple(there(target, part) for part in item)


def layers(target: Target, s: list[Any], t: list[Any], **options: Any) -> Tensor:
    target.require()
    s, t = ([there(target, item) for item in items] for items in (s, t))
    return lwkd.ops.layer_discrepancy(
        s, t, kind="jacobian", backend=target.backend, **options
    ).cpu()


def measure(target: Target, s: list[Any], t: list[Any], contraction: str, way: str) -> Tensor:
    target.require()
    s, t = ([there(target, item) for item in items] for items in (s, t))
    return factors.discrepancy(
        "test", s, t, "none", target.backend, contraction=contraction, **WAYS[way]
    ).cpu()


def skip_long(target: Target, name: str, contraction: str, way: str = "normalized") -> None:
    """What the interpreter takes long for: of most items it tries one way."""
    if target.slow and (name, contraction) == ("many rows", "gram"):
        pytest.skip("a minute and a half in the interpreter")
    if target.slow and way != "normalized" and name not in FEW:
        pytest.skip("the interpreter tries this one normalized")


@ways
@contractions
@pytest.mark.parametrize("name", NAMES)
@each_target
def test_against_gradients_that_are_built(
    target: Target, name: str, contraction: str, way: str
) -> None:
    skip_long(target, name, contraction, way)
    s, t = items(name, 1), items(name, 20)
    want = distance(gradient(s), gradient(t), way)
    got = measure(target, [s], [t], contraction, way)
    torch.testing.assert_close(got[0], want, rtol=1e-11, atol=1e-14)


@ways
@each_target
def test_many_layers_in_one_call(target: Target, way: str) -> None:
    names = FEW if target.slow else NAMES
    s, t = ([items(name, k) for name in names] for k in (1, 20))
    want = torch.stack([distance(gradient(a), gradient(b), way) for a, b in zip(s, t, strict=True)])
    got = layers(target, s, t, reduction="none", **WAYS[way])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
    mean = layers(target, s, t, **WAYS[way])
    torch.testing.assert_close(mean, want.mean(1), rtol=1e-11, atol=1e-14)


@ways
@pytest.mark.parametrize("same", [True, False])
@each_target
def test_embeddings(target: Target, way: str, same: bool) -> None:
    """Rows that repeat, and rows that the teacher looks up and the student does not."""
    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(6, (N, 9), generator=g) for _ in "st"]
    s = Factors(rows[0], draw(N, 9, 5, seed=1))
    t = Factors(rows[0] if same else rows[1], draw(N, 9, 5, seed=2))
    want = distance(gradient(s, 6), gradient(t, 6), way)
    got = measure(target, [s], [t], "gram", way)[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


@each_target
def test_norms_of_parameters_of_other_shapes(target: Target) -> None:
    s = [items("dense", 1), CONVS["2-d"].item(3), items("groups", 5)]
    t = [items("many rows", 2), CONVS["transposed"].item(4), items("dense", 6)]
    want = torch.stack(
        [distance(*(F.pad(gradient(x), (0, 999))[:, :999] for x in pair), "norms")
         for pair in zip(s, t, strict=True)]
    )  # fmt: skip
    got = layers(target, s, t, compare="norms", reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


# --- digits --------------------------------------------------------------------------------------

APART = (1.0, 1e-2, 1e-4, 1e-6)
SCALES = (1.0, 1.1, 2.0, 100.0)


@contractions
@pytest.mark.parametrize("name", ["dense", "2-d", "2-d, everything", "groups", "transposed"])
@each_target
def test_nearly_equal_factors_keep_their_digits(
    target: Target, name: str, contraction: str
) -> None:
    """The contract: 2e-6 in float32, whatever is left of the difference."""
    s = items(name, 1, F32)
    for apart, scale in itertools.product(
        *(((1e-2, 1e-6), (1.1,)) if target.slow else (APART, SCALES))
    ):
        moved = [
            (x * (1 + apart * draw(*x.shape, seed=7 + k))).float() for k, x in enumerate(s[:2])
        ]
        # The teacher is larger in its activations, or in its gradients.
        k = len(name) % 2
        moved[k] = (scale * moved[k]).float()
        t = s._replace(**dict(zip(s._fields, moved, strict=False)))
        for way in ("normalized", "difference"):
            want = distance(gradient(s), gradient(t), way)
            got = measure(target, [s], [t], contraction, way)[0]
            off = ((got.double() - want).abs() / want).max()
            assert off <= tolerances.FACTORS[F32], (
                f"{target} {name} {way} {apart} {scale}: off by {off:.1e}"
            )


@contractions
@pytest.mark.parametrize("name", NAMES)
@each_target
def test_equal_factors_are_at_no_distance(target: Target, name: str, contraction: str) -> None:
    skip_long(target, name, contraction, "all")
    for dtype, way in itertools.product(
        (F32,) if target.slow else (F32, F64, torch.bfloat16), WAYS
    ):
        d = measure(target, [items(name, 1, dtype)], [items(name, 1, dtype)], contraction, way)
        assert torch.equal(d, torch.zeros_like(d)), (dtype, way)


@pytest.mark.parametrize("dtype", DTYPES)
@each_target
def test_dtypes(target: Target, dtype: str) -> None:
    kinds = DTYPES[dtype]
    s, t = ([items(name, 20 * side, kinds[side]) for name in ("dense", "2-d", "groups")]
            for side in (0, 1))  # fmt: skip
    got = layers(target, s, t, reduction="none")
    assert got.dtype == (F64 if F64 in kinds else F32)
    want = torch.stack(
        [distance(gradient(a), gradient(b), "normalized") for a, b in zip(s, t, strict=True)]
    )
    for i, pair in enumerate(zip(s, t, strict=True)):
        assert ((got[i].double() - want[i]).abs() <= allowed(target, *pair, want[i])).all()


def allowed(target: Target, s: Any, t: Any, want: Tensor) -> Tensor:
    """What D [N] may be off by."""
    kinds = {x.dtype for x in (*s[:2], *t[:2])}
    if str(target) != "triton-cuda" or not kinds <= {torch.float16, torch.bfloat16}:
        return tolerances.FACTORS[F64 if F64 in kinds else F32] * want
    both = [[x.double() for x in item[:2]] for item in (s, t)]
    for x, y in zip(*both, strict=True):
        c = x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
        y *= c.reshape(-1, *[1] * (y.dim() - 1))
    (a, d), (b, e) = both
    stacked = ((a, d - e), (a - b, e))
    products = sum(gradient(type(s)(x.abs(), y.abs(), *s[2:])) for x, y in stacked)
    g_s, v = (gradient(type(s)(*pair, *s[2:])) for pair in both)
    sizes = [x.norm(dim=1) for x in (products, g_s - v, g_s, v)]
    return tolerances.factors_in_tf32(*sizes)


@contractions
@pytest.mark.parametrize("apart", [1e-1, 1e-2])
@each_target
def test_near_factors_in_half_precision(target: Target, apart: float, contraction: str) -> None:
    for name, dtype in itertools.product(("dense", "2-d"), (torch.float16, torch.bfloat16)):
        s = items(name, 1, dtype)
        moved = [
            (1.1 * x * (1 + apart * draw(*x.shape, seed=7 + k))).to(dtype)
            for k, x in enumerate(s[:2])
        ]
        t = s._replace(**dict(zip(s._fields, moved, strict=False)))
        want = distance(gradient(s), gradient(t), "normalized")
        got = measure(target, [s], [t], contraction, "normalized")[0].double()
        assert ((got - want).abs() <= allowed(target, s, t, want)).all(), (name, dtype)


@ways
@each_target
def test_memory_of_any_layout(target: Target, way: str) -> None:
    """Expanded, transposed, channels-last and cut-out operands."""
    a, d = draw(N, 7, 5, seed=1).mT, draw(N, 1, 6, seed=2).expand(N, 5, 6)
    conv = CONVS["2-d"].item(3)
    last = conv._replace(
        x=conv.x.contiguous(memory_format=torch.channels_last), d=cases.LAYOUTS["strided"](conv.d)
    )
    s, t = [Factors(a, d), last], [Factors(draw(N, 5, 7, seed=4), draw(N, 5, 6, seed=5)), conv]
    want = torch.stack([distance(gradient(x), gradient(y), way) for x, y in zip(s, t, strict=True)])
    got = layers(target, s, t, reduction="none", **WAYS[way])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


@each_target
def test_gradients_that_are_nothing(target: Target) -> None:
    """Both zero: 0. One zero: 1."""
    s = items("dense", 1)
    zero = s._replace(d=torch.zeros_like(s.d))
    for pair, want in (((zero, zero), 0.0), ((zero, s), 1.0), ((s, zero), 1.0)):
        got = measure(target, [pair[0]], [pair[1]], "direct", "normalized")
        torch.testing.assert_close(got, torch.full_like(got, want))


@each_target
def test_nan_comes_out(target: Target) -> None:
    """Of its own sample alone."""
    for way, k in itertools.product(WAYS, (0, 1)):
        s, t = items("dense", 1), items("dense", 5)
        s[k][1, 2, 3] = float("nan")
        got = measure(target, [s], [t], "gram", way)[0]
        assert got.isnan().tolist() == [False, True, False], (way, k)


@each_target
def test_empty(target: Target) -> None:
    for shape in ((0, 4), (2, 0)):
        s = Factors(torch.ones(*shape, 3), torch.ones(*shape, 2))
        for way in WAYS:
            d = layers(target, [s], [s], **WAYS[way])
            assert d.tolist() == [0.0]


# --- which contraction ---------------------------------------------------------------------------


def test_the_contraction_with_fewer_operations_is_chosen() -> None:
    def of(rows: int, inputs: int, outputs: int) -> str:
        return factors.choose_contraction(
            Factors(torch.empty(1, rows, inputs), torch.empty(1, rows, outputs))
        )

    assert of(197, 768, 3072) == "gram"
    assert of(3136, 576, 64) == "direct"
    assert of(1, 2, 2) == "direct"
    assert of(1, 3, 3) == "gram"
    conv = Conv((256, 14, 14), 256, (3, 3), (1, 1), (1, 1), (1, 1)).item(1)
    assert factors.choose_contraction(conv) == "direct"
    conv = Conv((256, 4, 4), 256, (3, 3), (1, 1), (1, 1), (1, 1)).item(1)
    assert factors.choose_contraction(conv) == "gram"
    conv = Conv((64, 56, 56), 64, (3, 3), (1, 1), (1, 1), (1, 1)).item(1)
    assert factors.choose_contraction(conv) == "direct"


def test_no_derivative() -> None:
    s, t = items("dense", 1), items("dense", 2)
    with pytest.raises(RuntimeError, match="no derivative by factors; detach them"):
        lwkd.ops.layer_discrepancy([s._replace(a=s.a.requires_grad_())], [t], kind="jacobian")
    with torch.no_grad():
        lwkd.ops.layer_discrepancy([s], [t], kind="jacobian")


# --- bad input -----------------------------------------------------------------------------------

A, D = torch.ones(2, 4, 3), torch.ones(2, 4, 5)
OK = Factors(A, D)
CONV = Conv((3, 6, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1)).item(1, F32)
CONV = CONV._replace(x=CONV.x[:2], d=CONV.d[:2])
ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "rows and factors": ([OK, A], [OK, OK], TypeError, "student (layer 1): expected Factors"),
    "no list": (OK, [OK], TypeError, "student: expected a list of factors"),
    "lengths": ([OK, OK], [OK], ValueError, "teacher: expected 2 items, as many as student, got 1"),
    "parameters": ([(OK, OK)], [(OK,)], ValueError, "teacher (layer 0): expected 2 parameters"),
    "N": ([OK, Factors(A[:1], D[:1])], [OK, OK], ValueError,
          "student.a (layer 1): expected batch size 2"),
    "T": ([Factors(A, D[:, :3])], [OK], ValueError,
          "student (layer 0): expected the same N, groups and T in a and d"),
    "T of the pair": ([OK], [Factors(A[:, :3], D[:, :3])], ValueError,
                      "teacher (layer 0): expected T = 4, as the student's, got 3"),
    "shapes": ([OK], [Factors(A[..., :2], D)], ValueError,
               "teacher (layer 0): expected a parameter of the student's shape [3, 5, 1] "
               "(compare='norms' takes any), got [2, 5, 1]"),
    "dimensions": ([Factors(A[0], D[0])], [OK], ValueError, "a [N, T, d_in] and d [N, T, d_out]"),
    "integers": ([Factors(A, D.int())], [OK], TypeError, "student.d (layer 0): expected float64"),
    "indices": ([Factors(A.long(), D)], [OK], ValueError, "indices [N, T] and d [N, T, d_out]"),
    "forms": ([OK], [CONV], TypeError, "teacher (layer 0): expected Factors, as student, got Conv"),
    "an embedding": ([OK], [Factors(torch.zeros(2, 4, dtype=torch.int64), D)], TypeError,
                     "teacher (layer 0): expected Factors, as student, got embedding"),
    "devices": ([OK], [Factors(A.to("meta"), D.to("meta"))], ValueError,
                "teacher.a (layer 0): expected a tensor on cpu"),
    "no tensor": ([Factors(A, None)], [OK], TypeError, "student.d (layer 0): expected a dense"),
    "positions": ([CONV._replace(padding=(0, 1))], [CONV], ValueError,
                  "student.d (layer 0): expected 4 positions along space dimension 0, got 6"),
    "groups": ([CONV._replace(groups=2)], [CONV], ValueError, "channels that 2 groups divide"),
    "ways": ([CONV], [CONV._replace(x=CONV.x[:, :, :4, :3], padding=(2, 2))], ValueError,
             "input, stride, padding, dilation, groups as the student's (6, 5), (1, 1), (1, 1), "
             "(1, 1), 1, False, got (4, 3), (1, 1), (2, 2)"),
    "settings": ([CONV._replace(stride=(1,))], [CONV], ValueError, "one number a space dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    student, teacher, exception, text = ERRORS[name]
    with pytest.raises(exception) as caught:
        lwkd.ops.layer_discrepancy(student, teacher, kind="jacobian")
    assert type(caught.value) is exception
    assert text in str(caught.value)
    assert str(caught.value).startswith("lwkd.ops.layer_discrepancy: ")


# --- norms alone ---------------------------------------------------------------------------------


@contractions
@each_target
def test_squares(target: Target, contraction: str) -> None:
    """‖G_n‖² of every kind of item, a tuple's added."""
    target.require()
    names = FEW if target.slow else [name for name in NAMES if name != "many rows"]
    kept = [items(name, 3) for name in names]
    rows = torch.randint(6, (N, 9), generator=torch.Generator().manual_seed(1))
    kept.append(Factors(rows, draw(N, 9, 5, seed=1)))
    want = torch.stack([gradient(item, 6).square().sum(1) for item in kept])
    moved = [there(target, item) for item in kept]
    got = factors.squares("test", moved, target.backend, contraction=contraction).cpu()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    chosen = factors.squares("test", moved, target.backend).cpu()
    torch.testing.assert_close(chosen, want, rtol=1e-11, atol=0)
