"""Which transfer method serves a student that learns five new digits from 100 images.

    python -m bench.transfer.methods --record bench/transfer/results/methods.jsonl
    python -m bench.transfer.methods --show bench/transfer/results/methods.jsonl

The experiment of ``python -m lwkd transfer``, for every method: plain fine-tuning, the method with
one rate, and the method with a rate per layer, from the same weights, on the same images in the
same order. What is compared is the accuracy on the test images of the new digits, seed by seed, as
they are and made worse (`lwkd.degradation`: the mean over all kinds and severities 1 to 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from bench.transfer import rows
from lwkd.cli import transfer_digits

ARMS = transfer_digits.ARMS


def study(seeds: int) -> Iterable[rows.Row]:
    """Yield a row for every method, arm and seed."""
    for method in transfer_digits.METHODS:
        settings = transfer_digits.Settings(method=method, seeds=seeds)
        result = transfer_digits.run(settings)
        for seed in range(seeds):
            for arm in ARMS:
                place = arm, seed, settings.epochs
                last = [r["accuracy"] for r in result.accuracy_rows
                        if (r["arm"], r["seed"], r["epoch"]) == place]  # fmt: skip
                worse = [r for r in result.degradation_rows
                         if (r["model"], r["seed"]) == (arm, seed)]  # fmt: skip
                clean = next(r for r in worse if r["severity"] == 0)
                worse = [r for r in worse if r["severity"]]
                yield {
                    "data": "digits 0 to 4, then 5 to 9",
                    "images": settings.images,
                    "epochs": settings.epochs,
                    "method": transfer_digits.METHODS[method],
                    "arm": arm,
                    "seed": seed,
                    "teacher": result.teacher_accuracy[seed] if result.teacher_accuracy else None,
                    "accuracy": last[0],
                    "nll": clean["nll"],
                    "calibration_error": clean["calibration_error"],
                    "worse_accuracy": fmean(r["accuracy"] for r in worse),
                    "worse_nll": fmean(r["nll"] for r in worse),
                }


def table(found: list[rows.Row]) -> str:
    """Return accuracies, and differences in points paired by seed, as Markdown."""
    lines = [
        "| method | rates | accuracy | minus plain, points | minus one rate | "
        "calibration error | images made worse: accuracy | minus plain |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for method in dict.fromkeys(row["method"] for row in found):
        own = {arm: [r for r in found if (r["method"], r["arm"]) == (method, arm)] for arm in ARMS}
        for arm in ARMS:
            if arm == "plain" and len(lines) > 2:
                continue  # the same for all
            clean, worse = (
                {a: {r["seed"]: r[key] for r in own[a]} for a in ARMS}
                for key in ("accuracy", "worse_accuracy")
            )
            plain = arm == "plain"
            cells = [
                "plain fine-tuning" if plain else method,
                "one" if arm != "layer-wise" else "a layer",
                f"{100 * fmean(clean[arm].values()):.2f} %",
                "–" if plain else rows.gain(clean[arm], clean["plain"]),
                rows.gain(clean[arm], clean["uniform"]) if arm == "layer-wise" else "–",
                f"{100 * fmean(r['calibration_error'] for r in own[arm]):.1f} %",
                f"{100 * fmean(worse[arm].values()):.1f} %",
                "–" if plain else rows.gain(worse[arm], worse["plain"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    rows.main(__doc__.split("\n")[0], 10, study, table)
