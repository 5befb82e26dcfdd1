"""Bad input: errors that name op, argument, layer, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import lwkd
from lwkd.ops import backends
from lwkd.ops.checks import message, suggest
from tests import cases
from tests.cases import Target

X, Y = cases.draw((2, 3, 4, 4), torch.float32, 1), cases.draw((2, 5, 4, 4), torch.float32, 2)
TOKENS = cases.draw((2, 10, 8), torch.float32, 3)
NAN = float("nan")
BOOL = torch.bool
META = {"device": "meta"}

# name: (student, teacher, options, exception, argument, layer, expected, got)
OPERANDS: dict[str, tuple[Any, ...]] = {
    "lengths": ([X, X], [Y], {}, ValueError, "teacher", None, "2 tensors, as many as student", "1"),
    "empty lists": ([], [], {}, ValueError, "student", None, "at least one tensor",
                    "an empty list"),
    "no list": (X, [Y], {}, TypeError, "student", None, "a list of tensors", "Tensor"),
    "a generator": ([X], iter([Y]), {}, TypeError, "teacher", None, "a list of tensors",
                    "list_iterator"),
    "no tensor": ([X, X], [Y, None], {}, TypeError, "teacher", 1, "a tensor", "NoneType"),
    "an array": ([X.numpy()], [Y], {}, TypeError, "student", 0, "a tensor", "ndarray"),
    "integers": ([X, X], [Y, Y.long()], {}, TypeError, "teacher", 1,
                 "float64, float32, float16 or bfloat16", "torch.int64"),
    "booleans": ([X > 0], [Y], {}, TypeError, "student", 0, "float64, float32, float16 or bfloat16",
                 "torch.bool"),
    "complex": ([X.to(torch.complex64)], [Y], {}, TypeError, "student", 0,
                "float64, float32, float16 or bfloat16", "torch.complex64"),
    "sparse": ([X.to_sparse()], [Y], {}, TypeError, "student", 0, "a dense tensor",
               "torch.sparse_coo"),
    "batches": ([X], [Y[:1]], {}, ValueError, "teacher", 0, "batch size 2", "[1, 5, 4, 4]"),
    "batches of layers": ([X, X[:1]], [Y, Y[:1]], {}, ValueError, "student", 1, "batch size 2",
                          "[1, 3, 4, 4]"),
    "scalars": ([X.sum()], [Y.sum()], {}, ValueError, "student", 0, "batch size", "[]"),
    "no space": ([X, X[:, :, 0, 0]], [Y, Y], {}, ValueError, "student", 1,
                 "[N, C, *space] with one to three space dimensions", "shape [2, 3]"),
    "too much space": ([X], [Y[..., None, None]], {}, ValueError, "teacher", 0,
                       "[N, C, *space] with one to three space dimensions", "[2, 5, 4, 4, 1, 1]"),
    "other dimensions": ([X], [Y[..., None]], {}, ValueError, "teacher", 0,
                         "2 space dimension(s), as the student's", "shape [2, 5, 4, 4, 1]"),
    "tokens and a grid": ([TOKENS], [Y], {"channel_dim": (2, 1)}, ValueError, "teacher", 0,
                          "1 space dimension(s)", "tokens=(student, teacher) folds"),
    "which dimension": ([X, TOKENS], [Y, TOKENS], {}, ValueError, "channel_dim", 1,
                        "an int for three-dimensional activations", "None"),
    "devices of a pair": ([X], [Y.to("meta")], {}, ValueError, "teacher", None,
                          "tensors on cpu, as student's", "meta"),
    "devices of a list": ([X, X.to("meta")], [Y, Y], {}, ValueError, "student", 1,
                          "a tensor on cpu, as layer 0", "meta"),
}  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "kind": ({"kind": "atention"}, ValueError, "kind", None, "('attention', 'jacobian', 'hessian')",
             "'atention'"),
    "reduction": ({"reduction": "sum"}, ValueError, "reduction", None, "('mean', 'none')", "'sum'"),
    "divergence": ({"divergence": "kl"}, ValueError, "divergence", None, "('l2', 'js')", "'kl'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend", None,
                "('reference', 'compiled', 'triton')", "'cuda'"),
    "p below 1": ({"p": 0.5}, ValueError, "p", None, "a finite number ≥ 1", "0.5"),
    "p NaN": ({"p": NAN}, ValueError, "p", None, "a finite number ≥ 1", "nan"),
    "p infinite": ({"p": float("inf")}, ValueError, "p", None, "a finite number ≥ 1", "inf"),
    "beta 0": ({"beta": 0.0, "divergence": "js"}, ValueError, "beta", None, "in (0, 1)", "0.0"),
    "beta 1": ({"beta": 1}, ValueError, "beta", None, "a number in (0, 1)", "1"),
    "beta NaN": ({"beta": NAN}, ValueError, "beta", None, "a number in (0, 1)", "nan"),
    "an unknown option": ({"temperature": 2}, TypeError, "options", None,
                          "those of kind='attention'", "'temperature'"),
    "channels of the batch": ({"channel_dim": 0}, ValueError, "channel_dim", 0,
                              "a dimension of [2, 3, 4, 4] other than the batch's", "0"),
    "channels too far": ({"channel_dim": [(1, 4)]}, ValueError, "channel_dim", 0,
                         "a dimension of [2, 5, 4, 4]", "4"),
    "channels before": ({"channel_dim": -5}, ValueError, "channel_dim", 0, "a dimension of", "-5"),
    "three sides": ({"channel_dim": (1, 1, 1)}, ValueError, "channel_dim", None,
                    "a (student, teacher) pair", "(1, 1, 1)"),
    "channels of too many": ({"channel_dim": [1, 1]}, ValueError, "channel_dim", None,
                             "a list of 1, one a layer", "2"),
    "one fold": ({"tokens": (2, 2, 0)}, ValueError, "tokens", None,
                 "a (student, teacher) pair, each None or (h, w, prefix)", "(2, 2, 0)"),
    "half a fold": ({"tokens": ((2, 2), None)}, ValueError, "tokens", None,
                    "each None or (h, w, prefix)", "((2, 2), None)"),
    "no rows": ({"tokens": ((0, 4, 0), None)}, ValueError, "tokens", None,
                "each None or (h, w, prefix)", "((0, 4, 0), None)"),
    "a fold of a grid": ({"tokens": ((4, 4, 0), None)}, ValueError, "student", 0,
                         "tokens [N, 16, D] (prefix 0 + 4×4)", "[2, 3, 4, 4]"),
    "masks of too many": ({"mask": [None, None]}, ValueError, "mask", None,
                          "a list of 1, one a layer", "2"),
    "a mask of numbers": ({"mask": [torch.ones(2, 4, 4)]}, ValueError, "mask", 0,
                          "None or bool [2, 4, 4] (the common space)", "torch.float32 [2, 4, 4]"),
    "a mask of channels": ({"mask": [torch.ones(2, 3, 4, 4, dtype=BOOL)]}, ValueError, "mask", 0,
                           "None or bool [2, 4, 4]", "[2, 3, 4, 4]"),
    "a mask that is no list": ({"mask": 3}, TypeError, "mask", None, "a list of 1", "int"),
    "a mask that is no tensor": ({"mask": [[True]]}, TypeError, "mask", 0,
                                 "None or a dense bool tensor", "list"),
    "a sparse mask": ({"mask": [torch.ones(2, 4, 4, dtype=BOOL).to_sparse()]}, TypeError, "mask", 0,
                      "None or a dense bool tensor", "torch.sparse_coo"),
    "p of words": ({"p": "2"}, TypeError, "p", None, "a finite number ≥ 1", "'2'"),
    "no beta": ({"beta": None}, TypeError, "beta", None, "a number in (0, 1)", "None"),
    "a list of divergences": ({"divergence": ["l2"]}, ValueError, "divergence", None,
                              "one of ('l2', 'js')", "['l2']"),
    "a list of kinds": ({"kind": ["attention"]}, ValueError, "kind", None,
                        "one of ('attention', 'jacobian', 'hessian')", "['attention']"),
    "a misspelt option": ({"chanel_dim": 1}, TypeError, "options", None, "channel_dim, tokens",
                          "'chanel_dim'; did you mean 'channel_dim'?"),
    "half a dimension": ({"channel_dim": 1.0}, TypeError, "channel_dim", None, "None, an int", "1"),
    "half dimensions": ({"channel_dim": [1.5]}, TypeError, "channel_dim", None, "an int", "[1.5]"),
    "a triple": ({"channel_dim": [(1, 1, 1)]}, TypeError, "channel_dim", None,
                 "a (student, teacher) pair", "[(1, 1, 1)]"),
    "no folds": ({"tokens": 5}, ValueError, "tokens", None, "each None or (h, w, prefix)", "5"),
    "half rows": ({"tokens": ((4.0, 4, 0), None)}, ValueError, "tokens", None,
                  "each None or (h, w, prefix)", "((4.0, 4, 0), None)"),
    "a mask elsewhere": ({"mask": [torch.ones(2, 4, 4, dtype=BOOL, **META)]}, ValueError, "mask",
                         0, "a tensor on cpu", "meta"),
}  # fmt: skip


def pattern(op: str, argument: str, layer: Any, expected: str, got: str) -> str:
    where = "" if layer is None else re.escape(f" (layer {layer})")
    start = rf"^lwkd\.{re.escape(op)}: {argument}{where}: expected .*"
    return start + re.escape(expected) + ".*, got .*" + re.escape(got)


def raises(f: Any, exception: type[Exception], match: str, *inputs: Any) -> None:
    """The one error, and nothing has changed."""
    tensors = [x for xs in inputs if isinstance(xs, (list, tuple)) for x in xs]
    tensors = [x for x in tensors if isinstance(x, Tensor) and x.device.type == "cpu"]
    before = [(x.clone(), x._version) for x in tensors]
    generator = torch.get_rng_state()
    with pytest.raises(exception, match=match) as caught:
        f()
    assert type(caught.value) is exception
    assert "\n" not in str(caught.value)
    for x, (old, version) in zip(tensors, before, strict=True):
        assert x._version == version
        same = x.to_dense().equal(old.to_dense()) if x.is_sparse else x.equal(old)
        assert same
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("backend", [None, "reference", "compiled"])
@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name: str, backend: str | None) -> None:
    """Faults 8 (mixed devices) and all others: the same error whatever would have served."""
    student, teacher, options, exception, *parts = OPERANDS[name]
    match = pattern("ops.layer_discrepancy", *parts) if "folds" not in parts[-1] else parts[-1]
    match = match if "folds" not in parts[-1] else re.escape(parts[-1])

    def call() -> None:
        lwkd.ops.layer_discrepancy(student, teacher, backend=backend, **options)

    raises(call, exception, match, student, teacher)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options, exception, *parts = OPTIONS[name]

    def call() -> None:
        lwkd.ops.layer_discrepancy([X], [Y], **options)

    raises(call, exception, pattern("ops.layer_discrepancy", *parts), [X], [Y])


ROWS: dict[str, tuple[Any, ...]] = {
    "shapes": ([X, X], [X, Y], {}, ValueError, "teacher", 1, "shape [2, 3, 4, 4], as the student's",
               "[2, 5, 4, 4]"),
    "no rows": ([X[:, 0, 0, 0]], [X], {"compare": "norms"}, ValueError, "student", 0,
                "rows [N, ...]", "shape [2]"),
    "batches": ([X], [X[:1]], {}, ValueError, "teacher", 0, "batch size 2", "[1, 3, 4, 4]"),
    "integers": ([X], [X.int()], {}, TypeError, "teacher", 0, "float64, float32", "torch.int32"),
    "normalize": ([X], [X], {"normalize": 1}, TypeError, "normalize", None, "True or False", "1"),
    "compare": ([X], [X], {"compare": "angles"}, ValueError, "compare", None,
                "one of ('difference', 'norms')", "'angles'"),
    "of another kind": ([X], [X], {"divergence": "js"}, TypeError, "options", None,
                        "those of kind='jacobian': normalize, compare", "'divergence'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    student, teacher, options, exception, *parts = ROWS[name]

    def call() -> None:
        lwkd.ops.layer_discrepancy(student, teacher, kind="jacobian", **options)

    match = pattern("ops.layer_discrepancy", *parts)
    raises(call, exception, match, student, teacher)


MAPS: dict[str, tuple[Any, ...]] = {
    "no list": (X, {}, TypeError, "xs", None, "a list of tensors", "Tensor"),
    "empty": ([], {}, ValueError, "xs", None, "at least one tensor", "an empty list"),
    "integers": ([X, X.int()], {}, TypeError, "xs", 1, "float64, float32", "torch.int32"),
    "p below 1": ([X], {"p": 0.99}, ValueError, "p", None, "a finite number ≥ 1", "0.99"),
    "no space": ([X[..., 0, 0]], {}, ValueError, "xs", 0, "[N, C, *space]", "shape [2, 3]"),
    "which dimension": ([TOKENS], {}, ValueError, "channel_dim", 0, "an int", "None"),
    "too far": ([X], {"channel_dim": [7]}, ValueError, "channel_dim", 0, "a dimension of", "7"),
    "lengths": ([X, Y], {"channel_dim": [1]}, ValueError, "channel_dim", None, "a list of 2", "1"),
    "devices": ([X, Y.to("meta")], {}, ValueError, "xs", 1, "a tensor on cpu", "meta"),
    "of a tuple": ([X, Y], {"channel_dim": (1, 1, 1)}, ValueError, "channel_dim", None,
                   "a list of 2", "3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_maps(name: str) -> None:
    xs, options, exception, *parts = MAPS[name]
    match = pattern("ops.attention_maps", *parts)
    raises(lambda: lwkd.ops.attention_maps(xs, **options), exception, match, xs)


def test_channels_of_tokens_out_of_range() -> None:
    match = pattern("ops.layer_discrepancy", "channel_dim", 0, "None, 1, 2, -1 or -2", "5")
    call = {"tokens": ((2, 2, 0), (2, 2, 0)), "channel_dim": 5}
    raises(lambda: lwkd.ops.layer_discrepancy([TOKENS], [TOKENS], **call), ValueError, match)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)])
    match = pattern("ops.layer_discrepancy", "student", 0, "a dense tensor", "a nested tensor")
    raises(lambda: lwkd.ops.layer_discrepancy([nested], [Y]), TypeError, match)


NCHW = [1, 0, 0, 0]
G, M = torch.ones(1), torch.ones(2 * 2 * 16)
SUMS = torch.ones(1, 2, 3, dtype=torch.float64)
# What torch.ops is given reaches the kernels as it is: (op, arguments, what the error says).
DIRECT: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "lists": ("attention", ([X, X], [Y], [], NCHW * 2, NCHW, 2.0, 0, 0.5, True), "teacher"),
    "no layers": ("attention", ([], [], [], [], [], 2.0, 0, 0.5, True), ""),
    "short layout": ("attention", ([X], [Y], [], [1], NCHW, 2.0, 0, 0.5, True), "layout"),
    "channels": ("attention", ([X], [Y], [], [9, 0, 0, 0], NCHW, 2.0, 0, 0.5, True), "student"),
    "fold": ("attention", ([X], [Y], [], [1, 0, 2, 2], NCHW, 2.0, 0, 0.5, True), "student"),
    "integers": ("attention", ([X.int()], [Y], [], NCHW, NCHW, 2.0, 0, 0.5, True), "student"),
    "batches": ("attention", ([X], [Y[:1]], [], NCHW, NCHW, 2.0, 0, 0.5, True), "batch size 2"),
    "mask": ("attention", ([X], [Y], [torch.ones(2, 3, 3, dtype=BOOL)], NCHW, NCHW, 2.0, 0, 0.5,
                           True), "mask"),
    "maps, lengths": ("attention_maps", ([X, X], [1], 2.0), "channel_dims"),
    "maps, channels": ("attention_maps", ([X], [77], 2.0), "xs"),
    "back, nothing": ("attention_backward", (G, [], [], M, [], [], [], [1, 4, 4], 2.0, 0, 0.5), ""),
    "back, maps": ("attention_backward", (G, [X], [], M[1:], [0], [0], NCHW, [1, 4, 4], 2.0, 0,
                                          0.5), "maps"),
    "back, grad": ("attention_backward", (G.double(), [X], [], M, [0], [0], NCHW, [1, 4, 4], 2.0, 0,
                                          0.5), "grad"),
    "back, layers": ("attention_backward", (G, [X], [], M, [1], [0], NCHW, [1, 4, 4], 2.0, 0, 0.5),
                     "xs"),
    "rows, lists": ("jacobian_rows", ([X, X], [X], 1, True), "teacher"),
    "rows, shapes": ("jacobian_rows", ([X], [Y], 1, True), "the student's shape"),
    "rows, how": ("jacobian_rows", ([X], [X], 3, True), "how"),
    "rows, integers": ("jacobian_rows", ([X.int()], [X], 1, True), "student"),
    "rows back, sums": ("jacobian_rows_backward", (G, [X], [X], M, [0], [0], 1), "sums"),
    "rows back, others": ("jacobian_rows_backward", (G, [X], [], SUMS, [0], [0], 1), "other row"),
    "rows back, layers": ("jacobian_rows_backward", (G, [X], [X], SUMS, [1], [0], 1), "layers"),
    "rows back, grad": ("jacobian_rows_backward", (G[:0], [X], [X], SUMS, [0], [0], 1), "grad"),
    "rows back, shapes": ("jacobian_rows_backward", (G, [X], [Y], SUMS, [0], [0], 1), "others"),
    "back, space": ("attention_backward", (G, [X[..., :2, :]], [], M, [0], [0], NCHW, [1, 4, 4],
                                           2.0, 0, 0.5), "xs"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECT)
def test_calls_by_torch_ops(name: str) -> None:
    """The kernels read memory by what they are told, so they look at it first."""
    Target("compiled", "cpu").require()
    op, arguments, said = DIRECT[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=said):
        getattr(torch.ops.lwkd, op)(*arguments)


def test_an_error_leaves_gradients_and_graphs_alone() -> None:
    """After an error the same tensors serve a right call as if nothing had been."""
    x = X.clone().requires_grad_()
    h = x * 2
    with pytest.raises(ValueError, match="batch size 2"):
        lwkd.ops.layer_discrepancy([h], [Y[:1]])
    assert x.grad is None
    lwkd.ops.layer_discrepancy([h], [Y]).sum().backward()
    fresh = X.clone().requires_grad_()
    lwkd.ops.layer_discrepancy([fresh * 2], [Y]).sum().backward()
    assert torch.equal(x.grad, fresh.grad)


def test_errors_under_compile_are_the_same() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return lwkd.ops.layer_discrepancy([x], [y], p=0.5)

    with pytest.raises(Exception, match="a finite number ≥ 1"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(X, Y)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_a_backend_that_has_no_such_device(backend: str) -> None:
    x = X.to("meta")
    match = rf"^lwkd\.ops\.layer_discrepancy: backend: expected '{backend}' on meta, got no .* meta"
    with pytest.raises(RuntimeError, match=match):
        lwkd.ops.layer_discrepancy([x], [x], backend=backend)


def test_the_vocabulary() -> None:
    assert message("f", "x", 1, 2) == "lwkd.f: x: expected 1, got 2"
    assert message("f", "x", 1, 2, layer="a") == "lwkd.f: x (layer 'a'): expected 1, got 2"
    assert suggest("divergance", ["divergence", "p"]) == "; did you mean 'divergence'?"
    assert suggest("q", ["divergence"]) == ""
    assert backends.BACKENDS == ("reference", "compiled", "triton")
