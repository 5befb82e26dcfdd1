"""Layer-wise student-teacher distances for PyTorch, and the learning rates that they drive."""

from lwkd import losses, ops
from lwkd._version import __version__
from lwkd.curvature import TraceEstimate, hessian_trace
from lwkd.frozen import freeze
from lwkd.layers import LayerPair, LayerPairs, pair_layers
from lwkd.meters import AttentionMeter, HessianMeter, JacobianMeter
from lwkd.schedule import LayerwiseLR, param_groups_layerwise

__all__ = [
    "AttentionMeter",
    "HessianMeter",
    "JacobianMeter",
    "LayerPair",
    "LayerPairs",
    "LayerwiseLR",
    "TraceEstimate",
    "__version__",
    "freeze",
    "hessian_trace",
    "losses",
    "ops",
    "pair_layers",
    "param_groups_layerwise",
]
