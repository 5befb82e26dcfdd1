"""Do rates by curvature serve a student better than rates by attention maps, or than one rate?

    python -m bench.transfer.curvature --record bench/transfer/results/curvature.jsonl
    python -m bench.transfer.curvature --show bench/transfer/results/curvature.jsonl

The experiment of `policies`: every arm distils the same students by the same loss, attention
transfer, and differs in the multipliers alone. Curvature is the distance of the Hessian traces,
measured three times an epoch (`digits.EVERY`), for the policy ``power`` in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.transfer import policies, rows

ARMS: policies.Arms = {
    "uniform": None,
    "attention maps, power 1": {"policy": "power", "gamma": 1.0},
    "curvature, power 1": {"policy": "power", "gamma": 1.0, "kind": "hessian"},
    "curvature, power -1": {"policy": "power", "gamma": -1.0, "kind": "hessian"},
}


def study(seeds: int) -> Iterable[rows.Row]:
    """Yield a row for every size, arm and seed."""
    return policies.study_of(ARMS, seeds)


def table(found: list[rows.Row]) -> str:
    """Return accuracy, and the difference from one rate in points, paired by seed, as Markdown."""
    return policies.table_of(ARMS, found)


if __name__ == "__main__":
    rows.main(__doc__.split("\n")[0], 10, study, table)
