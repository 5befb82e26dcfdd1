"""Traces of the Hessian's diagonal blocks, layer by layer, and how sure they are."""

from lwkd.curvature.trace import TraceEstimate, hessian_trace

__all__ = ["TraceEstimate", "hessian_trace"]
