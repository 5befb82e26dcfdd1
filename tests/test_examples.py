"""The scripts of examples/ run as a user runs them."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def tested_in_eval_mode() -> Iterator[None]:
    """More images than a batch are the test images: in eval mode, without gradients."""
    seen: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        if any(len(x) > 64 for x in args if isinstance(x, Tensor)):
            seen.append(module.training or torch.is_grad_enabled())

    hook = register_module_forward_pre_hook(look)
    yield
    hook.remove()
    assert seen
    assert not any(seen)


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
