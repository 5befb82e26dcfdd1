"""Meters: what each kind needs from two networks, gathered while they run."""

from lwkd.meters.attention import AttentionMeter
from lwkd.meters.hessian import HessianMeter
from lwkd.meters.jacobian import JacobianMeter

__all__ = ["AttentionMeter", "HessianMeter", "JacobianMeter"]
