"""Fine-tune a small network on a few real images, offline, by a transfer method.

scikit-learn's digits: a network that knows 0 to 4 learns 5 to 9, plainly, by the method, and by the
method with a rate per layer. What is printed at the end is what came out, also of images that get
worse.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean

from lwkd import plotting
from lwkd.cli import digits, options, table, transfer_digits
from lwkd.cli.info import check_device
from lwkd.ops.checks import message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m lwkd transfer``."""
    defaults = transfer_digits.Settings()
    methods = ", ".join(f"{key} ({name})" for key, name in transfer_digits.METHODS.items())
    parser.add_argument("--method", default=defaults.method, help=f"{methods}")
    parser.add_argument("--device", default=defaults.device, help="cpu (default), cuda, cuda:1")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="students per arm")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="of fine-tuning")
    parser.add_argument("--images", type=int, default=defaults.images, help="to fine-tune on")
    parser.add_argument("--out", default="out/transfer.png", help="where the pictures go")


def main(args: argparse.Namespace) -> int:
    """Run the study and report."""
    _check(args)
    settings = transfer_digits.Settings(
        method=args.method, seeds=args.seeds, epochs=args.epochs, images=args.images,
        device=args.device,
    )  # fmt: skip
    start = time.perf_counter()
    with table.progress("fine-tuning", transfer_digits.total_ticks(settings)) as tick:
        result = transfer_digits.run(settings, tick)
    report(result, settings)
    path = Path(args.out)
    name = transfer_digits.METHODS[args.method]
    layers = plotting.layer_curves(
        result.layer_rows, result.accuracy_rows, measured=transfer_digits.ARMS[2],
        title=f"{name} on {args.images} digits: {_arms(result)}", distance="attention maps",
    )  # fmt: skip
    worse = plotting.degradation_curves(
        result.degradation_rows, title=f"{name} on {args.images} digits: images that get worse"
    )
    pictures = [
        plotting.save(layers, path),
        plotting.save(worse, path.with_name(f"{path.stem}-degradation{path.suffix}")),
    ]
    names = ", ".join(map(str, pictures))
    print(f"\npictures: {names}   ({time.perf_counter() - start:.0f} s)")
    return 0


def _check(args: argparse.Namespace) -> None:
    options.at_least_one("transfer", args, ("seeds", "epochs"))
    options.one_of("transfer", "--method", args.method, transfer_digits.METHODS)
    low, high = transfer_digits.BATCH, transfer_digits.IMAGES
    if not low <= args.images <= high:
        raise ValueError(message("transfer", "--images", f"{low} to {high}", args.images))
    check_device("transfer", args.device)
    digits.require()
    options.a_picture("transfer", args.out)


def report(result: transfer_digits.Result, settings: transfer_digits.Settings) -> None:
    """Print the accuracies, and what becomes of them as images get worse."""
    rows = [("source network, digits 0 to 4", f"{100 * result.source_accuracy:.1f} %")]
    if result.teacher_accuracy:
        rows.append(("teacher, digits 5 to 9", f"{100 * fmean(result.teacher_accuracy):.1f} %"))
    for arm in transfer_digits.ARMS:
        mean, spread = result.final(arm)
        own = (
            f"{100 * mean:.1f} %" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f} %"
        )
        rows.append((f"{arm}, digits 5 to 9", own))
    title = f"{settings.images} training images, mean of {settings.seeds} seed(s)"
    table.show(("", "test accuracy"), rows, title=title, align="lr")
    table.show(
        ("degradation", "severity", *(f"{arm} {what}" for arm in transfer_digits.ARMS
                                      for what in ("acc.", "nll", "ece"))),
        degradation_table(result), title="as images get worse", align="lr" + 9 * "r",
    )  # fmt: skip


def degradation_table(result: transfer_digits.Result) -> list[tuple[str, ...]]:
    """Return, per degradation and severity, accuracy, nll and calibration error of every arm."""
    rows = result.degradation_rows
    places = dict.fromkeys((r["degradation"], r["severity"]) for r in rows)
    kinds = [kind for kind, _ in places]
    places = {place: None for place in places if place[1] or place[0] == kinds[0]}  # clean: once
    found = []
    for kind, severity in places:
        cells = []
        for arm in transfer_digits.ARMS:
            place = kind, severity, arm
            own = [r for r in result.degradation_rows
                   if (r["degradation"], r["severity"], r["model"]) == place]  # fmt: skip
            cells += [f"{100 * fmean(r['accuracy'] for r in own):.1f}",
                      f"{fmean(r['nll'] for r in own):.2f}",
                      f"{100 * fmean(r['calibration_error'] for r in own):.1f}"]  # fmt: skip
        found.append((kind if severity else "none", str(severity), *cells))
    return found


def _arms(result: transfer_digits.Result) -> str:
    return ", ".join(f"{arm} {100 * result.final(arm)[0]:.1f} %" for arm in transfer_digits.ARMS)
