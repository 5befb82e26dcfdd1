"""Meters: what each kind needs from two networks, gathered while they run."""

from lwkd.meters.attention import AttentionMeter

__all__ = ["AttentionMeter"]
