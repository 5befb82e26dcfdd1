"""The scripts of examples/ run as a user runs them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_distil_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(EXAMPLES / "distil_digits.py"))["main"](epochs=3)
    text = capsys.readouterr().out
    assert accuracy > 0.85  # chance is 0.1
    assert "stage2         2x12x4x4  stage2" in text
    assert text.count("test accuracy") == 3
