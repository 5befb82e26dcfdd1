"""Distillation and transfer losses; each returns ``LossTerms(total, per_layer)``."""

from lwkd.losses.attention import AttentionTransfer
from lwkd.losses.distillation import KnowledgeDistillation
from lwkd.losses.jacobian import GradientAttentionTransfer, JacobianMatching
from lwkd.losses.terms import LossTerms

__all__ = [
    "AttentionTransfer",
    "GradientAttentionTransfer",
    "JacobianMatching",
    "KnowledgeDistillation",
    "LossTerms",
]
