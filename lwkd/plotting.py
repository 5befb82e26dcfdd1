"""Figures from recorded rows: plain lists of dicts in, a matplotlib figure out.

matplotlib is imported at the first figure and not before. Figures are built from its objects,
without pyplot: nothing global is touched, no display is needed, and a notebook shows them as they
are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lwkd.ops.checks import message, suggest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Curve = list[tuple[float, float, float]]  # x, mean, standard deviation (0 for one value)

# Okabe & Ito 2008: distinct for colour-blind readers. More layers than these take viridis.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _FAINT = "#222222", "#8a8a8a"
_LABELS = 12  # with more layers only the first and the last are named


def layer_curves(
    layer_rows: Sequence[Row],
    accuracy_rows: Sequence[Row] = (),
    *,
    title: str = "",
    measured: str = "layer-wise",
    x: str = "epoch",
    distance: str = "",
) -> Figure:
    """Draw distances and rates of the layers over time, and what they do to the accuracy.

    Three panels: the distance of each layer to its teacher (log scale; the arm ``measured`` solid,
    other arms dashed), the multiplier of each layer's learning rate in ``measured`` (log scale),
    and the accuracy of every arm. Lines are means over seeds; bands, in the last panel, one
    standard deviation to either side. A layer has one colour in all panels.

    Args:
        layer_rows: Dicts with the keys "arm", "seed", ``x``, "layer", "distance", "multiplier", in
            the order of the layers. Values that are not finite are left out.
        accuracy_rows: Dicts with "arm", "seed", ``x`` and "accuracy" in [0, 1]. Without any, the
            panel is left out.
        title: One line that says what is seen.
        measured: The arm whose rates followed the distances.
        x: The key of the time axis, also its label.
        distance: Of what the distances are, for example "attention maps".

    Returns:
        A ``matplotlib.figure.Figure``; `save` writes it.

    Raises:
        ValueError: No rows, a row without one of the keys, or no rows of the arm ``measured``.
        RuntimeError: matplotlib is not installed.

    >>> rows = [dict(arm="layer-wise", seed=0, epoch=e, layer=n, distance=d / e, multiplier=1 / e)
    ...         for e in (1, 2, 3) for n, d in (("conv1", 0.3), ("conv2", 0.6))]
    >>> figure = layer_curves(rows, title="both approach their teacher", distance="Jacobians")
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['Distance to the teacher: Jacobians', 'Multiplier of the learning rate']
    """
    op = "plotting.layer_curves"
    _require(op, "layer_rows", layer_rows, ("arm", "seed", x, "layer", "distance", "multiplier"))
    arms = list(dict.fromkeys(row["arm"] for row in layer_rows))
    if measured not in arms:
        got = repr(measured) + suggest(measured, arms)
        raise ValueError(message(op, "measured", f"one of the arms {arms}", got))
    if accuracy_rows:
        _require(op, "accuracy_rows", accuracy_rows, ("arm", "seed", x, "accuracy"))
    panels = 3 if accuracy_rows else 2
    figure = _new_figure(width=4.6 * panels, height=4.4)
    axes = figure.subplots(1, panels)
    layers = list(dict.fromkeys(row["layer"] for row in layer_rows))
    colours = _colours(len(layers))
    _draw_layers(axes[0], layer_rows, "distance", layers, colours, measured, x)
    mine = [row for row in layer_rows if row["arm"] == measured]
    _draw_layers(axes[1], mine, "multiplier", layers, colours, measured, x)
    axes[1].axhline(1.0, color=_FAINT, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    heading = "Distance to the teacher" + (f": {distance}" if distance else "")
    _dress(axes[0], heading, _arms_note(layer_rows, measured), x)
    note = "dotted: 1, the uniform rate"
    if len(layers) > _LABELS:
        note += "; colours: dark first layer, light last"
    _dress(axes[1], "Multiplier of the learning rate", note, x)
    if accuracy_rows:
        seeds = len({row["seed"] for row in accuracy_rows})
        note = f"mean of {seeds} seeds, band: ± standard deviation" if seeds > 1 else "one seed"
        _draw_arms(axes[2], accuracy_rows, measured, x)
        _dress(axes[2], "Test accuracy, %", note, x)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    return figure


def trace_by_layer(rows: Sequence[Row], *, title: str = "") -> Figure:
    """Draw the trace of every layer's Hessian block, network beside network, with error bars.

    Args:
        rows: Dicts with the keys "network", "layer", "trace" and "stderr", in the order of the
            layers. Bars are two standard errors to either side, points without one hollow; layers
            whose trace is not positive are drawn below zero where any is (then the scale is linear,
            else logarithmic); those that are not finite are named below the title.
        title: One line that says what is seen.

    Returns:
        A ``matplotlib.figure.Figure``; `save` writes it.

    Raises:
        ValueError: No rows, or a row without one of the keys.
        RuntimeError: matplotlib is not installed.

    >>> rows = [dict(network=n, layer=l, trace=t, stderr=0.1 * t)
    ...         for n, k in (("student", 1), ("teacher", 2)) for l, t in (("a", k), ("b", 3 * k))]
    >>> trace_by_layer(rows).axes[0].get_title(loc="left")
    'tr H of every layer'
    """
    op = "plotting.trace_by_layer"
    _require(op, "rows", rows, ("network", "layer", "trace", "stderr"))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = _new_figure(width=max(6.0, 0.55 * len(layers) * max(len(networks), 2)), height=4.4)
    axes = figure.subplots()
    notes = {"bars: two standard errors to either side": None}
    wide = 0.6 / len(networks)
    for k, (network, colour) in enumerate(zip(networks, _colours(len(networks)), strict=True)):
        own = [row for row in rows if row["network"] == network and math.isfinite(row["trace"])]
        places = [layers.index(row["layer"]) + wide * (k - (len(networks) - 1) / 2) for row in own]
        for sure in (True, False):
            some = [(x, row["trace"], 2 * row["stderr"]) for x, row in zip(places, own, strict=True)
                    if math.isfinite(row["stderr"]) == sure]  # fmt: skip
            if not sure:
                if not some:
                    continue
                notes["hollow: one probe"] = None
            x, y, error = zip(*some, strict=True) if some else ((), (), ())
            axes.errorbar(
                x, y, error if sure else None, fmt="o", color=colour, markersize=7, capsize=4,
                elinewidth=1.6, mfc=colour if sure else "white", label=network if sure else None,
            )  # fmt: skip
    lost = [row["layer"] for row in rows if not math.isfinite(row["trace"])]
    if lost:
        notes[f"not finite: {', '.join(dict.fromkeys(lost))}"] = None
    if all(row["trace"] > 0 for row in rows if math.isfinite(row["trace"])):
        axes.set_yscale("log")
        _plain_ticks(axes)
    else:
        axes.axhline(0.0, color=_FAINT, linewidth=1)
    _dress(axes, "tr H of every layer", "; ".join(notes), "")
    axes.set_xticks(range(len(layers)), layers)
    if len(layers) > _LABELS:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.legend(frameon=False, fontsize=10, labelcolor=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    return figure


def degradation_curves(
    rows: Sequence[Row], *, measure: str = "accuracy", title: str = ""
) -> Figure:
    """Draw how networks fare as their inputs get worse, a panel a kind of degradation.

    Lines are means over the rows that share model, degradation and severity (seeds); bands one
    standard deviation to either side.

    Args:
        rows: From :func:`lwkd.degradation.degradation_report`: dicts with "model", "degradation",
            "severity" and ``measure``.
        measure: "accuracy", "nll" or "calibration_error".
        title: One line that says what is seen.

    Returns:
        A ``matplotlib.figure.Figure``; `save` writes it.

    Raises:
        ValueError: No rows, or a row without one of the keys.
        RuntimeError: matplotlib is not installed.

    >>> rows = [dict(model=m, degradation="noise", severity=s, accuracy=0.9 - s / 10)
    ...         for m in ("plain", "DELTA") for s in range(6)]
    >>> degradation_curves(rows).axes[0].get_title(loc="left")
    'noise'
    """
    op = "plotting.degradation_curves"
    _require(op, "rows", rows, ("model", "degradation", "severity", measure))
    kinds = list(dict.fromkeys(row["degradation"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = _new_figure(width=max(6.0, 3.6 * len(kinds)), height=4.2)
    percent = 100 if measure in ("accuracy", "calibration_error") else 1
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for model, colour in zip(models, _colours(len(models)), strict=True):
            own = (r for r in rows if r["model"] == model and r["degradation"] == kind)
            curve = _curve(own, measure, "severity")
            at, mean, spread = ([p[i] * (percent if i else 1) for p in curve] for i in range(3))
            low, high = ([m + s * k for m, s in zip(mean, spread, strict=True)] for k in (-1, 1))
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(at, mean, color=colour, linewidth=2.2, marker="o", markersize=4, label=model)
        _dress(axes, kind, "", "severity")
    unit = ", %" if percent == 100 else ", nats"
    panels[0].set_ylabel(measure.replace("_", " ") + unit, fontsize=10.5, color=_INK)
    panels[0].legend(frameon=False, fontsize=10, labelcolor=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of the name chooses the format.

    Args:
        figure: From this module.
        path: A file name such as "out/demo.png"; folders are made.

    Returns:
        The path.

    Raises:
        ValueError: An ending that matplotlib does not know.
        OSError: The file cannot be written.
    """
    path = check(path)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def check(path: str | Path) -> Path:
    """Raise what `save` would raise, before there is a figure: after hours it would be late.

    Args:
        path: As for `save`; its folders are made, and a file that is there is left as it is.

    Returns:
        The path.

    Raises:
        ValueError: An ending that matplotlib does not know.
        OSError: The file cannot be written.
        RuntimeError: matplotlib is not installed.
    """
    path = Path(path)
    known = sorted(_new_figure(1, 1).canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        expected = f"a name that ends in one of {', '.join(known)}"
        raise ValueError(message("plotting.save", "path", expected, repr(str(path))))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    path.open("ab").close()
    if new:
        path.unlink()
    return path


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise RuntimeError(
            "lwkd.plotting needs matplotlib, which is not installed: pip install lwkd[plot]"
        ) from None
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _require(op: str, argument: str, rows: Sequence[Row], keys: Iterable[str]) -> None:
    if not rows:
        raise ValueError(message(op, argument, "at least one row", "none"))
    for i, row in enumerate(rows):
        for key in keys:
            if key not in row:
                got = f"row {i} with {sorted(row)}"
                raise ValueError(message(op, argument, f"the key {key!r} in every row", got))


def _colours(count: int) -> list[Any]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](0.8 * i / (count - 1)) for i in range(count)]


def _curve(rows: Iterable[Row], key: str, x: str) -> Curve:
    """Return (x, mean, standard deviation) over the rows that share an x, in its order."""
    values = defaultdict(list)
    for row in rows:
        if math.isfinite(row[key]):
            values[float(row[x])].append(float(row[key]))
    return [(at, fmean(v), stdev(v) if len(v) > 1 else 0.0) for at, v in sorted(values.items())]


def _draw_layers(
    axes: Axes,
    rows: Sequence[Row],
    key: str,
    layers: Sequence[str],
    colours: Sequence[Any],
    measured: str,
    x: str,
) -> None:
    """One line a layer and arm, named at its right end."""
    ends = []
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for layer, colour in zip(layers, colours, strict=True):
        for arm in arms:
            own = arm == measured or len(arms) == 1
            curve = _curve((r for r in rows if r["layer"] == layer and r["arm"] == arm), key, x)
            curve = [point for point in curve if point[1] > 0]  # a log scale has no 0
            if not curve:
                continue
            axes.plot(
                [p[0] for p in curve], [p[1] for p in curve], color=colour,
                linewidth=2.2 if own else 1.2, linestyle="-" if own else (0, (4, 2)),
                alpha=1.0 if own else 0.7,
            )  # fmt: skip
            if own:
                ends.append((layer, *curve[-1][:2], colour))
    axes.set_yscale("log")
    _plain_ticks(axes)
    _name_ends(axes, ends if len(ends) <= _LABELS else [ends[0], ends[-1]])


def _draw_arms(axes: Axes, rows: Sequence[Row], measured: str, x: str) -> None:
    """One line an arm with its band, named with its last value."""
    ends = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = arm == measured
        colour = _INK if own else _FAINT
        curve = _curve((r for r in rows if r["arm"] == arm), "accuracy", x)
        at, mean, spread = ([100 * p[i] if i else p[0] for p in curve] for i in range(3))
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [min(m + s, 100.0) for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(at, mean, color=colour, linewidth=2.2, linestyle="-" if own else (0, (4, 2)))
        if curve:
            ends.append((f"{arm} {mean[-1]:.1f}", at[-1], mean[-1], colour))
    # The first epochs would flatten everything that matters: show the upper part.
    settled = sorted(100 * r["accuracy"] for r in rows)[len(rows) // 10 :]
    if settled and settled[-1] > settled[0]:
        margin = 0.08 * (settled[-1] - settled[0])
        axes.set_ylim(settled[0] - margin, min(settled[-1] + margin, 100.5))
    _name_ends(axes, ends)


def _dress(axes: Axes, title: str, note: str, x: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=22)
    axes.text(
        0.0, 1.02, note, transform=axes.transAxes, fontsize=9.5, color=_FAINT, va="bottom"
    )  # fmt: skip
    axes.set_xlabel(x, fontsize=10.5, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(labelsize=9.5, colors=_INK, which="both")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _arms_note(rows: Sequence[Row], measured: str) -> str:
    others = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != measured]
    return f"solid: {measured}, dashed: {', '.join(others)}" if others else measured


def _plain_ticks(axes: Axes) -> None:
    """Label a log axis 0.1, 0.2, 0.5, 1 rather than with powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high > 8 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_ends(axes: Axes, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Write each line's name beside its right end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    forward = math.log if log else float
    span = forward(high) - forward(low)
    order = sorted(range(len(ends)), key=lambda i: (ends[i][2], -i))
    heights = [(forward(ends[i][2]) - forward(low)) / span for i in order]
    gap = min(0.065, 1.0 / max(len(ends) - 1, 1))
    for i, height in zip(order, _spread(heights, gap), strict=True):
        name, _, _, colour = ends[i]
        axes.annotate(
            name, xy=(1.0, height), xytext=(6, 0), xycoords="axes fraction",
            textcoords="offset points", color=colour, fontsize=10.5, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights in [0, 1] apart to at least ``gap``, each as little as needed.

    >>> [round(h, 2) for h in _spread([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    clusters: list[tuple[float, int]] = []  # (sum of heights, count): neighbours around one centre

    def centre(cluster: tuple[float, int]) -> float:
        half = gap * (cluster[1] - 1) / 2  # which stays inside the axes
        return max(half, min(cluster[0] / cluster[1], 1 - half))

    for height in heights:
        clusters.append((height, 1))
        while len(clusters) > 1:
            below, above = clusters[-2:]
            if centre(above) - centre(below) >= gap * (below[1] + above[1]) / 2:
                break
            clusters[-2:] = [(below[0] + above[0], below[1] + above[1])]
    return [centre(c) + gap * (i - (c[1] - 1) / 2) for c in clusters for i in range(c[1])]
