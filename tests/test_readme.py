"""What the README tells a user to paste runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lwkd
from lwkd import degradation, losses
from lwkd.cli import digits, transfer_digits

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


def _rows(title: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.M)[2:]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def _names() -> dict[str, Any]:
    """What a loop has when a loss is due: a batch through a source network and its copy."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(OrderedDict(
            stage1=nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),
            stage2=nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()),
            head=nn.Sequential(nn.Flatten(), nn.Linear(128, 5)),
        ))
        for _ in "st"
    )  # fmt: skip
    layers = ["stage1", "stage2"]
    pairs = lwkd.pair_layers(student, teacher.eval(), layers)
    images, labels = torch.rand(6, 3, 16, 16).requires_grad_(), torch.arange(6) % 5
    with pairs.capture() as features:
        logits, teacher_logits = student(images), teacher(images)
    loader = [(images.detach(), labels)]
    return {
        "F": F, "degradation": degradation, "losses": losses, "lwkd": lwkd, "dataset":
        TensorDataset(*loader[0]), "features": features, "images": images,
        "importance": losses.channel_importance(student, loader, layers), "labels": labels,
        "layers": layers, "loader": loader, "logits": logits,
        "loss": F.cross_entropy(logits, labels), "pairs": pairs, "student": student,
        "teacher": teacher, "teacher_logits": teacher_logits,
        "teacher_loss": F.cross_entropy(teacher_logits, labels),
    }  # fmt: skip


METHODS = _rows("Methods")


@pytest.mark.parametrize("line", [row[1].strip("`") for row in METHODS])
def test_every_method_of_the_table_runs(line: str) -> None:
    names = _names()
    found = eval(line, names)
    if isinstance(found, losses.LossTerms):
        found.total.backward()
        assert any(p.grad is not None and p.grad.any() for p in names["student"].parameters())
    if line.startswith("lwkd.") and "Meter" in line:
        assert found.shape == (2,)
        assert (found > 0).all()
    if line.startswith("lwkd.freeze"):
        assert not names["student"].stage1[0].weight.requires_grad


def test_the_table_names_every_loss_and_meter_and_command() -> None:
    lines = " ".join(row[1] for row in METHODS)
    meters = {name for name in lwkd.__all__ if name.endswith("Meter")}
    assert {name for name in losses.__all__ if name not in lines} == {
        "LossTerms", "ChannelImportance"}  # fmt: skip
    assert {name for name in meters if name not in lines} == set()
    commands = [c for row in METHODS for c in re.findall(r"`python -m lwkd (.*?)`", row[2])]
    methods = {c.split()[2] for c in commands if c.startswith("transfer --method")}
    assert methods == set(transfer_digits.METHODS)
    kinds = {c.split()[2] for c in commands if c.startswith("demo --kind")}
    assert kinds | {digits.Settings().kind} == set(digits.KINDS)


@pytest.mark.parametrize("missing", ["images.requires_grad_()", "no_grad"])
@pytest.mark.parametrize("of", ["GradientAttentionTransfer", 'JacobianMatching(of="label")'])
def test_what_is_said_of_losses_by_the_image(of: str, missing: str) -> None:
    """In the plain loop, without what the text under the table asks for, they raise."""
    section = README.split("\n## Methods\n")[1].split("\n## ")[0]
    assert missing in section.split("|")[-1]
    (line,) = (row[1].strip("`") for row in METHODS if of in row[1])
    names = _names()
    images = names["images"].detach().requires_grad_(missing == "no_grad")
    student, teacher = names["student"], names["teacher"]
    with torch.set_grad_enabled(missing != "no_grad"):
        names["teacher_logits"] = teacher(images)
    names |= {"images": images, "logits": student(images)}
    for side in ("", "teacher_"):
        names[f"{side}loss"] = F.cross_entropy(names[f"{side}logits"], names["labels"])
    with pytest.raises((ValueError, RuntimeError), match=r"lwkd\.losses\."):
        eval(line, names)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
