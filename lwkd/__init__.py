"""Layer-wise student-teacher distances for PyTorch, and the learning rates that they drive."""

from lwkd import losses, ops
from lwkd._version import __version__
from lwkd.layers import LayerPair, LayerPairs, pair_layers
from lwkd.meters import AttentionMeter, JacobianMeter
from lwkd.schedule import LayerwiseLR, param_groups_layerwise

__all__ = [
    "AttentionMeter",
    "JacobianMeter",
    "LayerPair",
    "LayerPairs",
    "LayerwiseLR",
    "__version__",
    "losses",
    "ops",
    "pair_layers",
    "param_groups_layerwise",
]
