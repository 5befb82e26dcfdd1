"""The scripts of examples/ run as a user runs them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_distil_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(EXAMPLES / "distil_digits.py"))["main"](epochs=4)
    text = capsys.readouterr().out
    assert accuracy > 0.85  # chance is 0.1
    assert "stage2         2x12x4x4  stage2" in text
    assert text.count("test accuracy") == 4


def test_delta_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(EXAMPLES / "delta_digits.py"))["main"](epochs=4)
    assert accuracy > 0.5  # chance is 0.2
    assert capsys.readouterr().out.count("test accuracy") == 4


def test_vit_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(EXAMPLES / "vit_teacher.py"))["main"](epochs=3)
    assert accuracy > 0.6  # chance is 0.1
    assert capsys.readouterr().out.count("test accuracy") == 3
