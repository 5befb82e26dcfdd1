"""How each module's parameters factor, and what the modules of a network were called with."""

from lwkd.factoring.calls import Calls
from lwkd.factoring.modules import exact_kind, factor, parameters, refuse_coupled, supports, whole
from lwkd.factoring.owners import Owner, by_parameter, flat, names, owners
from lwkd.factoring.sums import add

__all__ = [
    "Calls",
    "Owner",
    "add",
    "by_parameter",
    "exact_kind",
    "factor",
    "flat",
    "names",
    "owners",
    "parameters",
    "refuse_coupled",
    "supports",
    "whole",
]
