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


def test_only_the_layerwise_arm_changes_rates(result: digits.Result) -> None:
    assert {r["multiplier"] for r in pick(result.layer_rows, arm="uniform")} == {1.0}
    last = pick(result.layer_rows, arm="layer-wise", epoch=2)
    assert len({r["multiplier"] for r in last}) == len(last)


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
    assert text.count("→") >= 9  # three per layer
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
    ],
)
def test_wrong_options(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *argv]) == 1
    assert text in capsys.readouterr().err


def test_without_scikit_learn_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "pip install lwkd[examples]" in capsys.readouterr().err
