"""Figures: what is drawn, read back from the figure."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lwkd import plotting

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies
to_hex = pytest.importorskip("matplotlib.colors").to_hex

Rows = list[dict[str, Any]]


def rows(layers: int = 3, arms: tuple[str, ...] = ("uniform", "layer-wise")) -> Rows:
    return [
        {
            "arm": arm, "seed": seed, "epoch": epoch, "layer": f"layer{i}",
            "distance": (1 + i + seed) / (1 + epoch), "multiplier": 1 / (1 + epoch * i),
        }
        for arm in arms for seed in range(2) for epoch in range(4) for i in range(layers)
    ]  # fmt: skip


def accuracies() -> Rows:
    return [
        {"arm": arm, "seed": seed, "epoch": epoch, "accuracy": 0.9 + seed / 50 - 0.1 / (epoch + 1)}
        for arm in ("uniform", "layer-wise") for seed in range(2) for epoch in range(4)
    ]  # fmt: skip


def test_lines_are_means_over_seeds_in_one_colour_a_layer() -> None:
    figure = plotting.layer_curves(rows(), accuracies(), title="what is seen")
    distances, rates, accuracy = figure.axes
    assert figure.get_suptitle() == "what is seen"
    assert len(distances.lines) == 2 * 3  # an arm each
    solid = [line for line in distances.lines if line.get_linestyle() == "-"]
    assert len(solid) == 3
    # seeds 0 and 1 of layer 1 at epoch 3: (2 + 3) / 2 / 4
    assert solid[1].get_ydata()[3] == pytest.approx(0.625)
    named = {t.get_text(): t.get_color() for t in distances.texts}
    for i, line in enumerate(solid):
        assert named[f"layer{i}"] == line.get_color()
    curves = [line for line in rates.lines if len(line.get_xdata()) == 4]
    assert [line.get_color() for line in curves] == [line.get_color() for line in solid]
    assert len({to_hex(line.get_color()) for line in solid}) == 3
    labels = [t.get_text() for t in accuracy.texts]
    assert "layer-wise 88.5" in labels  # the mean of 87.5 and 89.5
    assert "uniform 88.5" in labels
    assert len(accuracy.collections) == 2  # the bands


def test_without_accuracies_there_are_two_panels() -> None:
    assert len(plotting.layer_curves(rows(), measured="uniform").axes) == 2


def traces(sign: float = 1.0) -> Rows:
    return [
        {"network": network, "layer": f"layer{i}", "trace": sign * (1 + i) * k, "stderr": 0.1 * k}
        for k, network in enumerate(("student", "teacher"), 1) for i in range(3)
    ]  # fmt: skip


def test_traces_have_error_bars_of_two_standard_errors() -> None:
    (axes,) = plotting.trace_by_layer(traces(), title="what is seen").axes
    assert axes.get_yscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["layer0", "layer1", "layer2"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["student", "teacher"]
    points, _, (bars,) = axes.containers[1]
    assert list(points.get_ydata()) == [2.0, 4.0, 6.0]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((1.6, 2.4))
    left, right = (c[0].get_xdata() for c in axes.containers)
    assert all(a < i < b for i, (a, b) in enumerate(zip(left, right, strict=True)))


def test_traces_below_zero_take_a_linear_scale() -> None:
    rows = traces(-1.0)
    rows[0]["stderr"] = rows[1]["trace"] = math.nan
    (axes,) = plotting.trace_by_layer(rows).axes
    assert axes.get_yscale() == "linear"
    texts = " ".join(text.get_text() for text in (*axes.texts, axes.title, axes._left_title))
    assert "hollow: one probe" in texts
    assert "not finite: layer1" in texts
    hollow = [c[0] for c in axes.containers if c[0].get_markerfacecolor() == "white"]
    assert [list(points.get_ydata()) for points in hollow] == [[-1.0]]
    with pytest.raises(ValueError, match=r"plotting\.trace_by_layer: rows: expected at least one"):
        plotting.trace_by_layer([])
    with pytest.raises(ValueError, match="the key 'stderr' in every row"):
        plotting.trace_by_layer([{"network": "a", "layer": "b", "trace": 1.0}])


def test_zero_and_not_finite_values_are_left_out() -> None:
    data = rows(layers=2)
    for row in data:
        if row["layer"] == "layer0" and row["epoch"] > 1:
            row["distance"] = math.nan if row["epoch"] == 2 else 0.0
    axes = plotting.layer_curves(data).axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2, 4, 4]


def test_many_layers_are_named_by_the_first_and_the_last() -> None:
    axes = plotting.layer_curves(rows(layers=30)).axes[0]
    assert {t.get_text() for t in axes.texts} >= {"layer0", "layer29"}
    assert not any(t.get_text() == "layer15" for t in axes.texts)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=13).map(sorted))
def test_labels_keep_their_order_and_distance_inside_the_axes(heights: list[float]) -> None:
    gap = min(0.065, 1 / max(len(heights) - 1, 1))
    out = plotting._spread(heights, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(out))
    assert out[0] >= -1e-9
    assert out[-1] <= 1 + 1e-9


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert plotting._spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("name", ["a/b/demo.png", "demo.svg", "demo.pdf"])
def test_save_makes_folders_and_knows_formats(tmp_path: Path, name: str) -> None:
    path = plotting.save(plotting.layer_curves(rows(), accuracies()), tmp_path / name)
    assert path.stat().st_size > 5000


def test_save_refuses_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xyz"):
        plotting.save(plotting.layer_curves(rows()), tmp_path / "demo.xyz")


def test_a_check_says_what_saving_would_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "old.png").write_bytes(b"picture")
    for name in ("old.png", "new.PNG", "new/folder.svg"):
        assert plotting.check(tmp_path / name) == tmp_path / name
    assert {p.name for p in tmp_path.rglob("*")} == {"taken", "old.png", "new"}
    assert (tmp_path / "old.png").read_bytes() == b"picture"
    with pytest.raises(ValueError, match=r"path: expected a name that ends in one of .*svg"):
        plotting.check(tmp_path / "demo")
    with pytest.raises(OSError, match="taken"):
        plotting.check(tmp_path / "taken/demo.png")


def test_errors_name_argument_and_key() -> None:
    with pytest.raises(ValueError, match="layer_rows: expected at least one row"):
        plotting.layer_curves([])
    bad = rows()
    del bad[5]["layer"]
    with pytest.raises(
        ValueError, match=r"layer_rows: expected the key 'layer' in every row.*row 5"
    ):
        plotting.layer_curves(bad)
    with pytest.raises(ValueError, match="accuracy_rows: expected the key 'accuracy'"):
        plotting.layer_curves(rows(), rows())
    with pytest.raises(ValueError, match=r"measured: expected .* did you mean 'layer-wise'"):
        plotting.layer_curves(rows(), measured="layerwise")


def test_importing_is_free_and_pyplot_is_never_touched() -> None:
    code = (
        "import sys, lwkd.plotting as p; assert 'matplotlib' not in sys.modules;"
        "r = [dict(arm='a', seed=0, epoch=0, layer='l', distance=1., multiplier=1.)];"
        "p.layer_curves(r, measured='a'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install lwkd\[plot\]"):
        plotting.layer_curves(rows())
