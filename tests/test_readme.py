"""What the README tells a user to paste runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def plain(width: int) -> nn.Module:
    """As VGG and AlexNet: the ReLU changes in place what the convolution put out."""
    return chain(width, lambda a, b: [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(inplace=True)])


def normed(width: int) -> nn.Module:
    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    return chain(width, stage)


def residual(width: int) -> nn.Module:
    return chain(width, lambda a, b: [Residual(a, b)])


def chain(width: int, stage: Callable[[int, int], list[nn.Module]]) -> nn.Module:
    sizes = [3, width, 2 * width, 4 * width]
    layers = [m for a, b in pairwise(sizes) for m in stage(a, b)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 5))


class Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b)
        self.skip, self.relu = nn.Conv2d(a, b, 1, 2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.skip(x)
        out: Tensor = self.relu(y)
        return out


@pytest.mark.parametrize("network", [plain, normed, residual])
def test_the_loop_runs_as_pasted(network: Callable[[int], nn.Module]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    data = torch.randn(8, 3, 16, 16)
    student = network(4)
    names: dict[str, Any] = {
        "student": student,
        "teacher": network(8),
        "loader": [(data, torch.arange(8) % 5)] * 4,
    }
    before = [p.detach().clone() for p in student.parameters()]
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert not names["teacher"].training
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(p.isfinite().all() for p in student.parameters())
    rates = names["rates"]
    assert (rates.multipliers != 1).any()
    assert len(set(rates.get_last_lr())) > 1
    with names["pairs"].capture() as features:
        student(data)
        names["teacher"](data)
    names |= {"student_features": features.student, "teacher_features": features.teacher}
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert names["d"].shape == (len(names["pairs"]),)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
