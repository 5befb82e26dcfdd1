"""Knowledge distillation on logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.losses.terms import LossTerms
from lwkd.ops.checks import message, number

_OP = "losses.KnowledgeDistillation"


class KnowledgeDistillation(nn.Module):
    """Cross-entropy with the labels, and the divergence from the teacher's softened outputs.

    ``total = (1 − α)·CE(z_S, y) + α·τ²·KL(softmax(z_T/τ) ‖ softmax(z_S/τ))``

    with logits z_S, z_T [N, C], both terms the mean over the batch; τ² keeps the size of the
    second term's gradient independent of τ. Source: Hinton, Vinyals & Dean 2015.

    Args:
        alpha: Weight of the teacher, in [0, 1]. A term of weight 0 is not computed.
        tau: Temperature, positive.

    Raises:
        ValueError: alpha or tau out of its range.
        TypeError: alpha or tau is no number.

    >>> kd = KnowledgeDistillation(alpha=0.5, tau=4.0)
    >>> student = torch.zeros(2, 3, requires_grad=True)
    >>> terms = kd(student, torch.zeros(2, 3), torch.tensor([0, 2]))
    >>> round(terms.total.item(), 4)  # ½·ln 3: the student agrees with the teacher
    0.5493
    """

    def __init__(self, alpha: float = 0.5, tau: float = 4.0) -> None:
        super().__init__()
        number(_OP, "alpha", alpha, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        number(_OP, "tau", tau, "a positive finite number", lambda v: 0 < v < math.inf)
        self.alpha, self.tau = float(alpha), float(tau)
        self.layers = None  # it compares none

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss.

        Args:
            student_logits: [N, C], floating; more dimensions are to be flattened into N.
            teacher_logits: [N, C], constant: no gradient flows into it. −inf leaves a class out.
            target: Class indices [N] (int64; −100 leaves a sample out of the first term) or
                probabilities [N, C]. May be None where alpha = 1.

        Returns:
            ``total``, float32 (float64 if the student's logits are), and ``per_layer=None``. An
            empty batch has loss 0, and so has the first term where it leaves all samples out.

        Raises:
            ValueError: Logits that are not [N, C], heads of different size, a target of the wrong
                shape or device, out of range (on a GPU torch says so, later), or none where
                alpha < 1.
            TypeError: Logits that are no floating tensors, a target that is no tensor.
        """
        self._check(student_logits, teacher_logits, target)
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
        total = student.sum() * 0 if student.numel() == 0 else student.new_zeros(())
        if student.numel() and self.alpha < 1:
            total = total + (1 - self.alpha) * _cross_entropy(student, target)
        if student.numel() and self.alpha > 0:
            log_s = F.log_softmax(student / self.tau, dim=1)
            log_t = F.log_softmax(teacher / self.tau, dim=1)
            kl = F.kl_div(log_s, log_t, reduction="none", log_target=True)
            kl = torch.where(log_t == -math.inf, 0.0, kl)  # of probability 0: 0·log 0 = 0
            total = total + self.alpha * self.tau**2 * kl.sum() / len(student)
        return LossTerms(total, None)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"alpha={self.alpha}, tau={self.tau}"

    def _check(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
        for argument, x in (("student_logits", student), ("teacher_logits", teacher)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(message(_OP, argument, "a floating tensor", got))
            if x.dim() != 2:
                raise ValueError(message(_OP, argument, "[N, C]", f"shape {list(x.shape)}"))
        if student.shape != teacher.shape:
            expected = f"{list(student.shape)}, as student_logits: heads over the same classes"
            raise ValueError(message(_OP, "teacher_logits", expected, list(teacher.shape)))
        if teacher.device != student.device:
            expected = f"a tensor on {student.device}, as student_logits"
            raise ValueError(message(_OP, "teacher_logits", expected, teacher.device))
        if self.alpha < 1:
            _check_target(student, target)


def _check_target(student: Tensor, target: Tensor | None) -> None:
    n, c = student.shape
    expected = f"class indices [{n}] or probabilities [{n}, {c}]"
    if target is None:
        raise ValueError(message(_OP, "target", f"{expected}, as alpha < 1", None))
    if not isinstance(target, Tensor):
        raise TypeError(message(_OP, "target", expected, type(target).__name__))
    indices = target.dtype == torch.int64 and list(target.shape) == [n]
    if not indices and not (target.is_floating_point() and target.shape == student.shape):
        got = f"{target.dtype} {list(target.shape)}"
        raise ValueError(message(_OP, "target", expected, got))
    if target.device != student.device:
        raise ValueError(message(_OP, "target", f"a tensor on {student.device}", target.device))


def _cross_entropy(student: Tensor, target: Tensor | None) -> Tensor:
    """The mean over the samples that count, 0 where none does."""
    assert target is not None  # _check_target has seen to it
    if target.is_floating_point():
        return F.cross_entropy(student, target.to(student.dtype))
    try:
        total = F.cross_entropy(student, target, reduction="sum")
    except IndexError as error:  # a GPU does not say so here, and looking first would wait for it
        expected = f"class indices in [0, {student.shape[1]}), or −100"
        raise ValueError(message(_OP, "target", expected, str(error))) from error
    return total / (target != -100).sum().clamp(min=1)
