"""KnowledgeDistillation against its formula, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lwkd.losses import KnowledgeDistillation

CASES = [(0.0, 1.0), (0.5, 4.0), (0.9, 0.5), (1.0, 20.0)]


def oracle(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, tau: float
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the closed forms; target as probabilities [N, C]."""
    n = len(student)
    p = student.exp() / student.exp().sum(1, keepdim=True)
    ce = -(target * p.log()).sum() / n
    soft = [(x / tau).exp() / (x / tau).exp().sum(1, keepdim=True) for x in (teacher, student)]
    kl = (soft[0] * (soft[0] / soft[1]).log()).sum() / n
    gradient = (1 - alpha) * (p * target.sum(1, keepdim=True) - target) / n
    gradient = gradient + alpha * tau * (soft[1] - soft[0]) / n
    return (1 - alpha) * ce + alpha * tau**2 * kl, gradient


def draw(n: int = 6, c: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * c)
    student, teacher = (3 * torch.randn(n, c, generator=g, dtype=torch.float64) for _ in "st")
    target = torch.randint(c, (n,), generator=g)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


@pytest.mark.parametrize(("alpha", "tau"), CASES)
@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradient(alpha: float, tau: float, soft: bool) -> None:
    student, teacher, target = draw()
    onehot = torch.eye(5, dtype=torch.float64)[target]
    probabilities = 0.8 * onehot + 0.04 if soft else onehot
    terms = KnowledgeDistillation(alpha, tau)(student, teacher, probabilities if soft else target)
    terms.total.backward()
    value, gradient = oracle(student.detach(), teacher, probabilities, alpha, tau)
    torch.testing.assert_close(terms.total.detach(), value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-13)
    assert terms.per_layer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, target = draw(64, 10, dtype)
    terms = KnowledgeDistillation(0.5, 2.0)(student, teacher, target)
    terms.total.backward()
    onehot = torch.eye(10, dtype=torch.float64)[target]
    value, gradient = oracle(student.detach().double(), teacher.double(), onehot, 0.5, 2.0)
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total.detach().double(), value, rtol=1e-6, atol=0)
    assert student.grad is not None
    # One rounding to the student's dtype, and the float32 exponentials of arguments up to 16.
    roundoff = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
    assert (student.grad.double() - gradient).abs().max() <= roundoff * gradient.abs().max()


def test_the_teacher_gets_no_gradient_and_equal_logits_cost_nothing() -> None:
    student, _, _ = draw()
    teacher = student.detach().clone().requires_grad_()
    terms = KnowledgeDistillation(alpha=1.0, tau=3.0)(student, teacher)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-16  # 1e-2 where they differ


def test_a_term_of_weight_zero_is_not_computed() -> None:
    student, teacher, target = draw()
    nan = torch.full_like(teacher, float("nan"))
    assert KnowledgeDistillation(alpha=0.0)(student, nan, target).total.isfinite()
    assert KnowledgeDistillation(alpha=0.1)(student, nan, target).total.isnan()


def test_an_ignored_sample_stays_in_the_second_term() -> None:
    student, teacher, target = draw()
    target[0] = -100
    kd = KnowledgeDistillation(0.5, 2.0)
    part = KnowledgeDistillation(0.0)(student[1:], teacher[1:], target[1:]).total
    whole = KnowledgeDistillation(1.0, 2.0)(student, teacher).total
    torch.testing.assert_close(kd(student, teacher, target).total, 0.5 * part + 0.5 * whole)


def test_where_all_samples_are_left_out_the_first_term_is_0() -> None:
    student, teacher, target = draw()
    target[:] = -100
    total = KnowledgeDistillation(0.5, 2.0)(student, teacher, target).total
    want = 0.5 * KnowledgeDistillation(1.0, 2.0)(student, teacher).total
    torch.testing.assert_close(total, want)
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, student)[0])


@pytest.mark.parametrize("both", [False, True])
def test_classes_that_the_teacher_leaves_out(both: bool) -> None:
    """Of probability 0: the same as 1e4 below the others, or as without them in both."""
    student, teacher, _ = draw()
    low = teacher.clone()
    teacher[:, 2], low[:, 2] = -float("inf"), -1e4
    kd = KnowledgeDistillation(1.0, 2.0)
    if both:
        with torch.no_grad():
            student[:, 2] = -float("inf")
    total = kd(student, teacher).total
    (gradient,) = torch.autograd.grad(total, student)
    if both:
        rest = [0, 1, 3, 4]
        want = kd(student[:, rest], teacher[:, rest]).total
        assert gradient[:, 2].count_nonzero() == 0
    else:
        want = kd(student, low).total
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, student)[0])


def test_an_empty_batch_costs_nothing() -> None:
    student = torch.empty(0, 5, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    total = KnowledgeDistillation()(student, torch.empty(0, 5), target).total
    total.backward()
    assert total.item() == 0.0
    assert student.grad is not None


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"lwkd\.losses\.KnowledgeDistillation: alpha: expected"):
        KnowledgeDistillation(alpha=alpha)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf"), float("nan")])
def test_tau_out_of_range(tau: float) -> None:
    with pytest.raises(ValueError, match="tau: expected a positive finite number"):
        KnowledgeDistillation(tau=tau)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("alpha", r"a number in \[0, 1\]"), ("tau", "a positive finite number")],
)
def test_options_that_are_no_numbers(argument: str, expected: str) -> None:
    text = rf"KnowledgeDistillation: {argument}: expected {expected}, got 'a'"
    with pytest.raises(TypeError, match=text):
        KnowledgeDistillation(**{argument: "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "tau"), CASES)
def test_it_compiles_without_a_graph_break(alpha: float, tau: float) -> None:
    torch._dynamo.reset()
    student, teacher, target = draw()
    kd = KnowledgeDistillation(alpha, tau)
    compiled = torch.compile(kd, backend="aot_eager", fullgraph=True)
    terms = [f(student, teacher, target) for f in (kd, compiled)]
    torch.testing.assert_close(terms[1].total, terms[0].total)
    grads = [torch.autograd.grad(t.total, student)[0] for t in terms]
    torch.testing.assert_close(grads[1], grads[0])
    torch._dynamo.reset()


x, y = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((x, x[:, :5], y), ValueError, r"teacher_logits: expected \[4, 10\].*got \[4, 5\]"),
        ((x, x[:2], y), ValueError, r"teacher_logits: expected \[4, 10\].*got \[2, 10\]"),
        ((x[None], x[None], y), ValueError, r"student_logits: expected \[N, C\]"),
        ((x.long(), x, y), TypeError, "student_logits: expected a floating tensor"),
        ((x, x, None), ValueError, "target: expected class indices .* as alpha < 1, got None"),
        ((x, x, y[:3]), ValueError, r"target: expected .* got torch.int64 \[3\]"),
        ((x, x, y.int()), ValueError, r"target: expected .* got torch.int32 \[4\]"),
        ((x, x, x[:, :5]), ValueError, r"target: expected .* got torch.float32 \[4, 5\]"),
        ((x, x.to("meta"), y), ValueError, "teacher_logits: expected a tensor on cpu"),
        ((x, x, y.to("meta")), ValueError, "target: expected a tensor on cpu"),
        ((x, x, y + 10), ValueError, r"target: expected class indices in \[0, 10\), or −100, got"),
        ((x, x, y - 1), ValueError, r"target: expected class indices in \[0, 10\), or −100, got"),
        ((None, None, None), TypeError, "student_logits: expected a floating tensor, got NoneType"),
        ((x, [0.0], y), TypeError, "teacher_logits: expected a floating tensor, got list"),
        ((x, x, [0, 1, 2, 3]), TypeError, "target: expected class indices .* got list"),
    ],
)
def test_errors_name_the_argument(args: tuple[Any, ...], kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        KnowledgeDistillation()(*args)


def test_repr_shows_the_options() -> None:
    assert repr(KnowledgeDistillation(0.3, 2.0)) == "KnowledgeDistillation(alpha=0.3, tau=2.0)"
