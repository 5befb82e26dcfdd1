"""Distil a small network on real images, offline, with one rate and with a rate per layer.

scikit-learn's bundled digits; under a minute on two cores. Both arms start from the same weights
and see the same batches; what is printed at the end is what came out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import fmean

from lwkd import plotting, policy
from lwkd.cli import digits, options, table
from lwkd.cli.info import check_device

# The schedule ends near 0: a rate of fixed point would be all zeros.
FORMS = {"distance": ".4f", "multiplier": ".2f", "rate": ".1e"}
MATCHED = {"attention": "attention maps", "jacobian": "Jacobians", "hessian": "Hessian traces"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m lwkd demo``."""
    defaults = digits.Settings()
    parser.add_argument(
        "--kind", default=defaults.kind,
        help="what the rates follow, layer by layer: distances of attention maps (attention, the "
        "default), of their gradients by the image (jacobian), or of Hessian traces (hessian)",
    )  # fmt: skip
    parser.add_argument("--device", default=defaults.device, help="cpu (default), cuda, cuda:1")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="students per arm")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="of a student")
    parser.add_argument("--policy", help=f"{', '.join(policy.POLICIES)} (default {policy.DEFAULT})")
    parser.add_argument("--out", default="out/demo.png", help="where the picture goes")


def main(args: argparse.Namespace) -> int:
    """Run the demo and report."""
    _check(args)
    settings = digits.Settings(
        kind=args.kind, seeds=args.seeds, epochs=args.epochs, policy=args.policy, device=args.device
    )
    start = time.perf_counter()
    with table.progress("training", digits.total_ticks(settings)) as tick:
        result = digits.run(settings, tick)
    report(result, settings)
    figure = plotting.layer_curves(
        result.layer_rows,
        result.accuracy_rows,
        title=headline(result, args.kind),
        measured=digits.ARMS[1],
        distance=MATCHED[args.kind],
    )
    pictures = [plotting.save(figure, args.out)]
    if result.trace_rows:
        path = Path(args.out)
        figure = plotting.trace_by_layer(
            result.trace_rows, title="Curvature after training, on the test images"
        )
        pictures.append(plotting.save(figure, path.with_name(f"{path.stem}-traces{path.suffix}")))
    names = ", ".join(map(str, pictures))
    print(f"\npicture: {names}   ({time.perf_counter() - start:.0f} s)")
    return 0


def _check(args: argparse.Namespace) -> None:
    options.at_least_one("demo", args, ("seeds", "epochs"))
    options.one_of("demo", "--kind", args.kind, digits.KINDS)
    if args.policy is not None:
        options.one_of("demo", "--policy", args.policy, policy.POLICIES)
    check_device("demo", args.device)
    digits.require()
    options.a_picture("demo", args.out)


def report(result: digits.Result, settings: digits.Settings) -> None:
    """Print the pairs, what happened to each layer, and the accuracies."""
    print(f"\nlayer pairs\n{result.pairs}")
    uniform = change(result, digits.ARMS[0], result.layers[0], "rate")
    table.show(
        ("layer", "distance, uniform", "distance, layer-wise", "multiplier", "rate, layer-wise"),
        layer_table(result),
        title=f"first batch → last epoch, mean of {settings.seeds} seed(s); one rate: {uniform}",
        align="lrrrr",
    )
    rows = [("teacher", f"{100 * result.teacher_accuracy:.1f} %")]
    rows += [(f"student, {arm}", _percent(*result.final(arm))) for arm in digits.ARMS]
    table.show(("", "test accuracy"), rows, title="450 test images", align="lr")
    print(f"\n{verdict(result)}")


def layer_table(result: digits.Result) -> list[tuple[str, ...]]:
    """Return, per layer, its distance in both arms, its multiplier and rate, first → last."""
    uniform, layerwise = digits.ARMS
    columns = ((uniform, "distance"), *((layerwise, k) for k in ("distance", "multiplier", "rate")))
    return [
        (layer, *(change(result, arm, layer, key) for arm, key in columns))
        for layer in result.layers
    ]


def change(result: digits.Result, arm: str, layer: str, key: str) -> str:
    """Return "first → last" of a layer's distance, multiplier or rate, means over the seeds."""
    rows = [r for r in result.layer_rows if r["arm"] == arm and r["layer"] == layer]
    ends = min(r["epoch"] for r in rows), max(r["epoch"] for r in rows)
    means = (fmean(r[key] for r in rows if r["epoch"] == end) for end in ends)
    return " → ".join(format(m, FORMS[key]) for m in means)


def verdict(result: digits.Result) -> str:
    """Say in one sentence which arm was better, if the seeds can tell."""
    (uniform, a), (layerwise, b) = (result.final(arm) for arm in digits.ARMS)
    points = 100 * (layerwise - uniform)
    if abs(points) < 0.005:
        return "Layer-wise rates and one rate reach the same accuracy."
    text = f"Layer-wise rates are {abs(points):.2f} points {'above' if points > 0 else 'below'}"
    text += " one rate"
    if a is None or b is None:
        return f"{text}; one seed cannot tell whether that is more than chance."
    spread = 100 * math.hypot(a, b)
    inside = "within" if abs(points) <= spread else "beyond"
    return f"{text}: {inside} the spread of the seeds ({spread:.2f} points)."


def headline(result: digits.Result, kind: str = "attention") -> str:
    """Return the picture's title: what it shows, in numbers."""
    uniform, layerwise = (_percent(*result.final(arm)) for arm in digits.ARMS)
    how = {"jacobian": " by Jacobians", "hessian": ", rates by curvature"}.get(kind, "")
    text = f"Distilling digits{how}: test accuracy {layerwise} with layer-wise rates"
    return f"{text}, {uniform} with one"


def _percent(mean: float, spread: float | None) -> str:
    return f"{100 * mean:.1f} %" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f} %"
