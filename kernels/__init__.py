"""Triton kernels, installed as ``lwkd.kernels``; imported at their first use and not before."""
