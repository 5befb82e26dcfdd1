"""Layer-wise student-teacher distances for PyTorch, and the learning rates that they drive."""

from lwkd import ops
from lwkd._version import __version__

__all__ = ["__version__", "ops"]
