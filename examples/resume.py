"""Stop a training run at any moment and go on where it stopped, learning rates included.

    python examples/resume.py run.pt 200     # kill it when you like, then type it again

A checkpoint is written beside the old one and then renamed over it, so that a run killed while
writing leaves the old one whole. It holds tensors and plain types only: weights_only=True loads it.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lwkd


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that `path` holds either the old one or the new one, whole."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name points to it
    fresh.replace(path)


def network(width: int) -> nn.Module:
    """Two stages and a head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)),
    )


def train(path: Path, steps: int) -> nn.Module:
    """Train to `steps` steps in all, from the checkpoint if there is one; save after each."""
    torch.manual_seed(0)
    student, teacher = network(4), network(8).eval().requires_grad_(False)
    pairs = lwkd.pair_layers(student, teacher, ["0", "1"])
    groups = lwkd.param_groups_layerwise(student, pairs, lr=0.05, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = lwkd.LayerwiseLR(optimizer, pairs)
    meter = lwkd.AttentionMeter(pairs, every=2)
    parts = {"student": student, "optimizer": optimizer, "rates": rates, "meter": meter}
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(start, steps):
        batch = torch.Generator().manual_seed(step)  # the data of a step depend on the step alone
        x, y = torch.randn(8, 3, 8, 8, generator=batch), torch.randint(5, (8,), generator=batch)
        with meter:
            teacher(x)
            logits = student(x)
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        rates.update(meter.discrepancy())  # None at every other step: the meter was not due
        rates.step()
        save(path, {"step": step + 1} | {name: part.state_dict() for name, part in parts.items()})
    return student


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
