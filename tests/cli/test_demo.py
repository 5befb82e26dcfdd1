"""The demo: both arms start alike, the rows are right, and the verdict is honest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from lwkd.cli import demo, digits, main

TINY = digits.Settings(seeds=2, epochs=2, teacher_epochs=2, limit=448)


@pytest.fixture(scope="module")
def result() -> digits.Result:
    return digits.run(TINY)


def pick(rows: list[dict[str, Any]], **keys: object) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[k] == v for k, v in keys.items())]


def test_every_arm_seed_epoch_and_layer_is_recorded_once(result: digits.Result) -> None:
    assert result.layers == ["stage1", "stage2", "stage3"]
    keys = [(r["arm"], r["seed"], r["epoch"], r["layer"]) for r in result.layer_rows]
    expected = [
        (arm, seed, epoch, layer)
        for seed in range(2) for arm in digits.ARMS for epoch in range(3) for layer in result.layers
    ]  # fmt: skip
    assert keys == expected
    assert len(result.accuracy_rows) == 2 * 2 * 2
    assert all(0 <= r["accuracy"] <= 1 for r in result.accuracy_rows)


def test_both_arms_start_with_the_same_weights_and_batch(result: digits.Result) -> None:
    first = [pick(result.layer_rows, arm=arm, epoch=0) for arm in digits.ARMS]
    assert [r["distance"] for r in first[0]] == [r["distance"] for r in first[1]]
    assert first[0][0]["distance"] != first[0][3]["distance"]  # another seed, another student


def test_the_jacobian_kind_trains_as_well() -> None:
    """Students approach their teacher in what is matched, and rates follow that."""
    found = digits.run(replace(TINY, kind="jacobian", seeds=1))
    for arm in digits.ARMS:
        rows = pick(found.layer_rows, arm=arm)
        means = [fmean(r["distance"] for r in pick(rows, epoch=e)) for e in (0, 2)]
        assert means[1] < 0.9 * means[0]
        assert 0 < means[1] < means[0] <= 2  # of normalised gradients: not the maps' distances
    last = pick(found.layer_rows, arm="layer-wise", epoch=2)
    assert len({r["multiplier"] for r in last}) == len(last)
    assert "digits by Jacobians: test" in demo.headline(found, "jacobian")


def test_the_hessian_kind_follows_the_curvature(tmp_path: Path) -> None:
    """Measured three times an epoch; the traces of both students and the teacher at the end."""
    settings = replace(TINY, kind="hessian", seeds=1)
    found = digits.run(settings)
    assert all(0 <= r["distance"] <= 1 for r in found.layer_rows)
    last = pick(found.layer_rows, arm="layer-wise", epoch=2)
    assert len({r["multiplier"] for r in last}) == len(last)
    names = [(r["network"], r["layer"]) for r in found.trace_rows]
    assert names == [(n, layer) for n in (*digits.ARMS, "teacher") for layer in found.layers]
    assert all(r["trace"] > 0 and r["stderr"] > 0 for r in found.trace_rows)
    assert "digits, rates by curvature: test" in demo.headline(found, "hessian")


def test_only_the_layerwise_arm_changes_rates(result: digits.Result) -> None:
    assert {r["multiplier"] for r in pick(result.layer_rows, arm="uniform")} == {1.0}
    last = pick(result.layer_rows, arm="layer-wise", epoch=2)
    assert len({r["multiplier"] for r in last}) == len(last)


def test_the_rate_is_the_base_rate_times_the_multiplier(result: digits.Result) -> None:
    first = pick(result.layer_rows, epoch=0)
    assert [r["rate"] for r in first] == pytest.approx([TINY.lr] * len(first))
    uniform, layerwise = (pick(result.layer_rows, arm=arm, epoch=1) for arm in digits.ARMS)
    assert len({r["rate"] for r in uniform}) == 1  # all layers, both seeds: the cosine's
    for row in layerwise:
        # Means over an epoch of a product of two that fall: close to the product of the means.
        product = row["multiplier"] * uniform[0]["rate"]
        assert row["rate"] == pytest.approx(product, rel=0.1)
        assert row["rate"] != uniform[0]["rate"]


def test_students_approach_their_teacher(result: digits.Result) -> None:
    for arm in digits.ARMS:
        rows = pick(result.layer_rows, arm=arm)
        means = [fmean(r["distance"] for r in pick(rows, epoch=e)) for e in (0, 2)]
        assert means[1] < 0.8 * means[0]


def test_a_run_can_be_repeated(result: digits.Result) -> None:
    """Same machine and build: the same rows, and nobody's generator or threads are touched."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = digits.run(replace(TINY, seeds=1))
    assert again.layer_rows == pick(result.layer_rows, seed=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_teacher_is_left_alone() -> None:
    """In eval mode, its statistics untouched: both arms have one and the same teacher."""
    train, test = digits.load_digits("cpu", 128)
    with digits.one_thread():
        teacher = digits.train_teacher(train, TINY, lambda: None)
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        digits.accuracy(teacher, test)
        student = digits.fresh((8, 16, 32), 0, "cpu")
        list(digits.distil(student, teacher, ["stage1"], "layer-wise", 0, train, TINY))
        digits.accuracy(student, test)
    assert not teacher.training
    assert student.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_ticks_are_counted() -> None:
    settings = digits.Settings(seeds=1, epochs=1, teacher_epochs=2, limit=64)
    ticks: list[int] = []
    digits.run(settings, lambda: ticks.append(1))
    assert len(ticks) == digits.total_ticks(settings)


def test_the_split_is_fixed_and_disjoint() -> None:
    train, test = digits.load_digits("cpu")
    assert train[0].shape == (1347, 1, 8, 8)
    assert test[0].shape == (450, 1, 8, 8)
    assert torch.equal(train[0], digits.load_digits("cpu")[0][0])
    assert 0 <= train[0].min() < train[0].max() == 1
    whole = torch.cat([train[0], test[0]]).flatten(1).double()
    from sklearn import datasets

    bundled = torch.tensor(datasets.load_digits().data) / 16
    assert torch.equal(whole.sum(1).sort()[0], bundled.sum(1).sort()[0])


def test_the_command_prints_tables_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    options = ["--seeds", "1", "--epochs", "1", "--policy", "power", "--out", str(out)]
    assert main(["demo", *options]) == 0
    text = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "student layer  shape" in text
    assert text.count("→") >= 12  # four per layer
    table = text.split("; one rate: ")[1].split("\n\n")[0].split("\n")
    assert table[0].startswith("5.0e-02 → ")
    assert table[1].endswith("  rate, layer-wise")
    assert max(map(len, table)) <= 100
    assert table[3].startswith("stage1 ")
    assert "1.00 → " in table[3]
    assert "5.0e-02 → " in table[3]
    for line in ("teacher ", "student, uniform", "student, layer-wise"):
        assert line in text
    assert "one seed cannot tell" in text or "reach the same accuracy" in text


def made_up(uniform: list[float], layerwise: list[float]) -> digits.Result:
    rows = [
        {"arm": arm, "seed": seed, "epoch": epoch, "accuracy": value if epoch == 2 else 0.1}
        for arm, values in zip(digits.ARMS, (uniform, layerwise), strict=True)
        for seed, value in enumerate(values) for epoch in (1, 2)
    ]  # fmt: skip
    return digits.Result("", ["stage1"], 0.99, [], rows)


@pytest.mark.parametrize(
    ("uniform", "layerwise", "text"),
    [
        ([0.90, 0.92], [0.96, 0.98], "6.00 points above one rate: beyond the spread"),
        ([0.96, 0.98], [0.90, 0.92], "6.00 points below one rate: beyond the spread"),
        ([0.90, 0.98], [0.91, 0.97], "reach the same accuracy"),
        ([0.90, 0.98], [0.92, 0.98], "1.00 points above one rate: within the spread"),
        ([0.90], [0.95], "5.00 points above one rate; one seed cannot tell"),
    ],
)
def test_the_verdict_is_honest(uniform: list[float], layerwise: list[float], text: str) -> None:
    assert text in demo.verdict(made_up(uniform, layerwise))


def test_mean_and_spread_are_over_the_last_epoch() -> None:
    assert made_up([0.9, 0.92, 0.94], [0.5] * 3).final("uniform") == pytest.approx((0.92, 0.02))
    assert made_up([0.9], [0.5]).final("uniform") == (0.9, None)
    assert "92.0 ± 2.0 %" in demo.headline(made_up([0.9, 0.92, 0.94], [0.5] * 3))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--epochs", "-1"], "--epochs: expected at least 1, got -1"),
        (
            ["--kind", "jacobean"],
            "--kind: expected one of attention, jacobian, hessian, got 'jacobean'; did",
        ),
        (["--device", "cuda:99"], "--device: expected one of cpu"),
        (["--device", "gpu"], "--device: expected one of cpu"),
        (["--out", "demo.xyz"], "path: expected a name that ends in one of "),
        (["--out", "demo"], "png, ps, raw"),
        (["--out", "taken/demo.png"], "--out: expected a file that can be written, got 'taken/"),
        (["--out", "folder.png"], "got 'folder.png': Is a directory"),
    ],
)
def test_wrong_options(
    argv: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before anything is trained."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "run", None)
    (tmp_path / "taken").touch()
    (tmp_path / "folder.png").mkdir()
    assert main(["demo", *argv]) == 1
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("error: lwkd.")
    assert error.count("\n") == 1


def test_a_picture_that_is_there_survives_a_run_that_does_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "run", stop)
    (tmp_path / "old.png").write_bytes(b"picture")
    for name in ("old.png", "new.png"):
        with pytest.raises(KeyboardInterrupt):
            main(["demo", "--out", str(tmp_path / name)])
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("module", "text"),
    [("sklearn", "pip install lwkd[examples]"), ("matplotlib.figure", "pip install lwkd[plot]")],
)
def test_without_an_extra_it_says_what_to_install(
    module: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(digits, "run", None)  # nothing is trained before that
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    assert text in capsys.readouterr().err
