"""Distillation and transfer losses; each returns ``LossTerms(total, per_layer)``."""

from lwkd.losses.attention import AttentionTransfer
from lwkd.losses.channels import ChannelImportance, channel_importance
from lwkd.losses.decay import L2, L2SP
from lwkd.losses.delta import DELTA
from lwkd.losses.distillation import KnowledgeDistillation
from lwkd.losses.jacobian import GradientAttentionTransfer, JacobianMatching
from lwkd.losses.teacher_logits import TeacherLogits
from lwkd.losses.terms import LossTerms

__all__ = [
    "DELTA",
    "L2",
    "L2SP",
    "AttentionTransfer",
    "ChannelImportance",
    "GradientAttentionTransfer",
    "JacobianMatching",
    "KnowledgeDistillation",
    "LossTerms",
    "TeacherLogits",
    "channel_importance",
]
