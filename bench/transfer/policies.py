"""Which policy serves a student best: all of them on the digits, against one rate, paired by seed.

    python -m bench.transfer.policies --record bench/transfer/results/policies.jsonl
    python -m bench.transfer.policies --show bench/transfer/results/policies.jsonl

Every arm distils the same students (same weights, same batches, same base schedule) and differs in
the multipliers alone. What is compared is the accuracy on the 450 test images, arm minus uniform,
seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from bench.conftest import commit
from lwkd import policy
from lwkd.cli import digits
from lwkd.layers import pair_layers

# By name, the options of `policy.bind`; None: one rate.
ARMS: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "ratio": {"policy": "ratio"},
    "power 1": {"policy": "power", "gamma": 1.0},
    "power 0.5": {"policy": "power", "gamma": 0.5},
    "power -0.5": {"policy": "power", "gamma": -0.5},
    "power -1": {"policy": "power", "gamma": -1.0},
    "relative": {"policy": "relative"},
    "softmax": {"policy": "softmax"},
}
# Training images, and epochs of a student: all of them, and so few that the teacher matters.
SIZES = ((None, 20), (128, 60))


def study(seeds: int, limit: int | None, epochs: int) -> Iterable[dict[str, Any]]:
    """Yield a row for every arm and seed."""
    train, test = digits.load_digits("cpu", limit)
    everything, _ = digits.load_digits("cpu")
    teacher = digits.train_teacher(everything, digits.Settings(), lambda: None)
    start = digits.fresh((8, 16, 32), 0, "cpu")
    layers = pair_layers(start, teacher, example_inputs=train[0][:2]).names
    for seed in range(seeds):
        start = digits.fresh((8, 16, 32), seed, "cpu")
        for arm, options in ARMS.items():
            student = copy.deepcopy(start)
            chosen = None if options is None else policy.bind(**options)[1]
            settings = digits.Settings(epochs=epochs, policy=chosen, limit=limit)
            kind = digits.ARMS[0 if options is None else 1]
            *_, last = digits.distil(student, teacher, layers, kind, seed, train, settings)
            yield {
                "data": "digits",
                "train_images": len(train[0]),
                "epochs": epochs,
                "arm": arm,
                "seed": seed,
                "accuracy": digits.accuracy(student, test),
                "distances": last[1].tolist(),
                "multipliers": last[2].tolist(),
            }


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracy, and the difference from one rate in points, paired by seed, as Markdown."""
    lines = ["| training images | arm | accuracy | minus uniform, points |", "|--:|---|--:|--:|"]
    for images in sorted({row["train_images"] for row in rows}, reverse=True):
        of = {
            arm: {r["seed"]: r["accuracy"] for r in rows
                  if r["arm"] == arm and r["train_images"] == images}
            for arm in ARMS
        }  # fmt: skip
        for arm, found in of.items():
            gains = [100 * (value - of["uniform"][seed]) for seed, value in found.items()]
            error = stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else float("nan")
            gain = "–" if arm == "uniform" else f"{fmean(gains):+.2f} ± {error:.2f}"
            lines.append(f"| {images} | {arm} | {100 * fmean(found.values()):.2f} % | {gain} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the recorded rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
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
        for limit, epochs in SIZES:
            for row in study(args.seeds, limit, epochs):
                rows.append({**common, **row})
                if args.record:
                    with args.record.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
