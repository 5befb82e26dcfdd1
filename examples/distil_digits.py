"""Distil a small network on scikit-learn's digits, with a learning rate per layer.

    pip install lwkd[examples]
    python examples/distil_digits.py

What lwkd adds to a training loop is marked with numbers.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lwkd


def network(a: int, b: int) -> nn.Module:
    """Two stages, of a channels at 8×8 positions and of b at 4×4, and a linear head."""
    stage1 = nn.Sequential(nn.Conv2d(1, a, 3, padding=1), nn.ReLU())
    stage2 = nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * b, 10))
    layers = {"stage1": stage1, "pool": nn.MaxPool2d(2), "stage2": stage2, "head": head}
    return nn.Sequential(OrderedDict(layers))


def main(epochs: int = 10) -> float:
    """Train a teacher, then its student; return the student's test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on images this small, several threads only wait for each other
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    batches = DataLoader(TensorDataset(images[:1347], labels[:1347]), batch_size=64, shuffle=True)

    teacher, student = network(32, 64), network(6, 12)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    teacher.eval().requires_grad_(False)

    pairs = lwkd.pair_layers(student, teacher, example_inputs=images[:2])  # 1
    print(pairs)
    groups = lwkd.param_groups_layerwise(student, pairs, lr=0.1)  # 2
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = lwkd.LayerwiseLR(optimizer, pairs)  # 3
    transfer = lwkd.losses.AttentionTransfer(beta=3.0)
    for epoch in range(1, epochs + 1):
        student.train()
        for x, y in batches:
            with pairs.capture() as features:  # 4
                logits, _ = student(x), teacher(x)
            terms = transfer(features.student, features.teacher)
            optimizer.zero_grad()
            (F.cross_entropy(logits, y) + terms.total).backward()
            optimizer.step()
            rates.update(terms.per_layer.detach())  # 5: the loss has measured the distances
            rates.step()
        student.eval()
        with torch.no_grad():
            right = student(images[1347:]).argmax(1) == labels[1347:]
        shown = [round(m, 2) for m in rates.multipliers.tolist()]
        print(f"epoch {epoch}: test accuracy {right.float().mean():.3f}, multipliers {shown}")
    return float(right.float().mean())


if __name__ == "__main__":
    main()
