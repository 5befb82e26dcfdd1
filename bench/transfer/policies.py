"""Which policy serves a student best: all of them on the digits, against one rate, paired by seed.

    python -m bench.transfer.policies --record bench/transfer/results/policies.jsonl
    python -m bench.transfer.policies --show bench/transfer/results/policies.jsonl

Every arm distils the same students (same weights, same batches, same base schedule) and differs in
the multipliers alone. What is compared is the accuracy on the 450 test images, arm minus uniform,
seed by seed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from bench.transfer import rows
from lwkd import policy
from lwkd.cli import digits
from lwkd.layers import pair_layers

# By name, the options of `policy.bind`; None: one rate.
Arms = dict[str, dict[str, Any] | None]
ARMS: Arms = {
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


def study(seeds: int) -> Iterable[rows.Row]:
    """Yield a row for every size, arm and seed."""
    return study_of(ARMS, seeds)


def study_of(arms: Arms, seeds: int) -> Iterable[rows.Row]:
    """The same of other arms, whose options may name the ``kind`` of distances too."""
    for limit, epochs in SIZES:
        yield from _study(arms, seeds, limit, epochs)


def _study(arms: Arms, seeds: int, limit: int | None, epochs: int) -> Iterable[rows.Row]:
    train, test = digits.load_digits("cpu", limit)
    everything, _ = digits.load_digits("cpu")
    teacher = digits.train_teacher(everything, digits.Settings(), lambda: None)
    start = digits.fresh((8, 16, 32), 0, "cpu")
    layers = pair_layers(start, teacher, example_inputs=train[0][:2]).names
    for seed in range(seeds):
        start = digits.fresh((8, 16, 32), seed, "cpu")
        for arm, options in arms.items():
            student, own = copy.deepcopy(start), dict(options or {})
            kind = own.pop("kind", "attention")
            chosen = policy.bind(**own)[1] if own else None
            settings = digits.Settings(kind=kind, epochs=epochs, policy=chosen, limit=limit)
            rates = digits.ARMS[0 if options is None else 1]
            *_, last = digits.distil(student, teacher, layers, rates, seed, train, settings)
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


def table(found: list[rows.Row]) -> str:
    """Return accuracy, and the difference from one rate in points, paired by seed, as Markdown."""
    return table_of(ARMS, found)


def table_of(arms: Arms, found: list[rows.Row]) -> str:
    """The same of other arms, "uniform" among them."""
    lines = ["| training images | arm | accuracy | minus uniform, points |", "|--:|---|--:|--:|"]
    for images in sorted({row["train_images"] for row in found}, reverse=True):
        of = {
            arm: {r["seed"]: r["accuracy"] for r in found
                  if r["arm"] == arm and r["train_images"] == images}
            for arm in arms
        }  # fmt: skip
        for arm, values in of.items():
            gain = "–" if arm == "uniform" else rows.gain(values, of["uniform"])
            mean = 100 * fmean(values.values())
            lines.append(f"| {images} | {arm} | {mean:.2f} % | {gain} |")
    return "\n".join(lines)


if __name__ == "__main__":
    rows.main(__doc__.split("\n")[0], 10, study, table)
