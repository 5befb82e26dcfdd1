"""What the studies have in common: rows of JSON, kept as they come, and differences by seed."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from bench.conftest import commit
from lwkd.cli import digits

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the recorded rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_error(values: Iterable[float]) -> str:
    """Return "mean ± standard error"."""
    found = list(values)
    error = stdev(found) / sqrt(len(found)) if len(found) > 1 else float("nan")
    return f"{fmean(found):+.2f} ± {error:.2f}"


def gain(values: Mapping[int, float], base: Mapping[int, float]) -> str:
    """Return by how many points shares of one are above those of the same seeds in ``base``."""
    return mean_error(100 * (value - base[seed]) for seed, value in values.items())


def main(
    title: str,
    seeds: int,
    study: Callable[[int], Iterable[Row]],
    table: Callable[[list[Row]], str],
) -> None:
    """Run a study from the command line, on one thread, or show what one has recorded.

    Args:
        title: What ``--help`` says.
        seeds: How many, if nothing else is said.
        study: Yields its rows for so many seeds.
        table: Of rows, as Markdown.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--record", type=Path, help="append the rows to this .jsonl file")
    parser.add_argument("--commit", default=None, help="what to record (default: ask git)")
    parser.add_argument("--show", type=Path, help="measure nothing: the table of this .jsonl file")
    args = parser.parse_args()
    if args.show:
        print(table(read(args.show)))
        return
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": args.commit or commit(),
        "torch": torch.__version__,
    }
    rows = []
    with digits.one_thread():
        for row in study(args.seeds):
            rows.append({**common, **row})
            if args.record:
                with args.record.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
