"""python -m lwkd transfer: every method end to end on the digits, on little of everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lwkd import cli
from lwkd.cli import digits, transfer_digits


@pytest.mark.parametrize("method", transfer_digits.METHODS)
def test_it_reports_and_draws(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    options = ["--method", method, "--seeds", "2", "--epochs", "2", "--images", "60"]
    assert cli.main(["transfer", *options, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for arm in transfer_digits.ARMS:
        assert f"{arm}, digits 5 to 9" in text
    assert ("teacher, digits 5 to 9" in text) == (method not in ("delta", "l2sp"))
    assert text.count("downscale") == 5
    assert out.stat().st_size > 10_000
    assert out.with_name("picture-degradation.png").stat().st_size > 10_000


def test_arms_start_alike() -> None:
    """The same weights and the same images: before the first step all arms measure the same."""
    pytest.importorskip("sklearn")
    settings = transfer_digits.Settings(seeds=1, epochs=1, images=40, source_epochs=1)
    result = transfer_digits.run(settings)
    first = [[r["distance"] for r in result.layer_rows if (r["arm"], r["epoch"]) == (arm, 0)]
             for arm in transfer_digits.ARMS]  # fmt: skip
    assert first[0] == first[1] == first[2] == [0.0] * 3  # copies of their source
    assert len(result.accuracy_rows) == 2 * 3


def test_weights_are_of_the_seed_and_no_generator_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    first, again = (digits.fresh((2, 2, 2), 3, "cpu") for _ in "12")
    assert torch.equal(first.stage1[0].weight, again.stage1[0].weight)
    heads = [transfer_digits.with_new_head(first, seed).head.weight for seed in (5, 5, 6)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--method", "dleta"],
            "--method: expected one of delta, l2sp, .*did you mean 'delta'",
        ),
        (["--images", "5"], "--images: expected 20 to 600, got 5"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--device", "gpu"], "--device"),
    ],
)
def test_errors(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["transfer", *options]) == 1
    assert re.search(text, capsys.readouterr().err)
