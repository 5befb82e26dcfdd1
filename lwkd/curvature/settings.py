"""The options of hessian_trace."""

from __future__ import annotations

from typing import Any, NamedTuple

from lwkd.ops.checks import choice, flag, message, number
from lwkd.ops.hessian import seed_of

ESTIMATORS = ("auto", "gauss_newton", "split", "block", "hutchinson")


class Settings(NamedTuple):
    """The options of hessian_trace, checked."""

    estimator: str
    probes: int
    seed: int
    tol: float | None
    most: int
    chunk: int
    exact: bool


def check_options(
    op: str,
    estimator: str,
    probes: object,
    seed: object,
    tol: Any,
    max_probes: Any,
    chunk: Any,
    exact: Any,
) -> Settings:
    """Raise unless these are options of hessian_trace."""
    choice(op, "estimator", estimator, ESTIMATORS)
    flag(op, "exact", exact)
    if type(probes) is not int or probes < 1:
        raise ValueError(message(op, "probes", "an int ≥ 1", repr(probes)))
    if type(chunk) is not int or chunk < 1:
        raise ValueError(message(op, "chunk", "an int ≥ 1", repr(chunk)))
    if tol is not None:
        number(op, "tol", tol, "None or a finite number > 0", lambda v: 0 < v < float("inf"))
    if max_probes is not None and (tol is None or type(max_probes) is not int or max_probes < 2):
        expected = "None, or with tol an int ≥ 2"
        raise ValueError(message(op, "max_probes", expected, repr(max_probes)))
    if exact and (estimator not in ("auto", "gauss_newton") or tol is not None):
        expected = "False for random estimators; exact=True is gauss_newton's, without tol"
        raise ValueError(message(op, "exact", expected, f"True, {estimator!r}, tol={tol}"))
    most = max_probes if max_probes is not None else 100 * probes
    return Settings(estimator, probes, seed_of(op, seed), tol, most, chunk, exact)
