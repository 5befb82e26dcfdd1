"""What the README tells a user to paste runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def network(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for i in range(3):
        layers += [nn.Conv2d(channels, width << i, 3, 1 + (i > 0), 1), nn.BatchNorm2d(width << i)]
        layers.append(nn.ReLU(inplace=True))
        channels = width << i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def test_the_loop_runs_as_pasted():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    images = torch.randn(8, 3, 16, 16)
    student = network(4)
    names = {
        "student": student,
        "teacher": network(8).eval(),
        "images": images,
        "loader": [(images, torch.arange(8) % 5)] * 4,
    }
    before = [p.detach().clone() for p in student.parameters()]
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    rates = names["rates"]
    assert (rates.multipliers != 1).any()
    assert len(set(rates.get_last_lr())) > 1
    with names["pairs"].capture() as features:
        student(images)
        names["teacher"](images)
    names |= {"student_features": features.student, "teacher_features": features.teacher}
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert names["d"].shape == (len(names["pairs"]),)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
