"""Fine-tune a copy of a network on few images, near its features (DELTA), with a rate per layer.

    pip install lwkd[examples]
    python examples/delta_digits.py

A network that knows the digits 0 to 4 learns 5 to 9 from 100 images. What lwkd adds to a training
loop is marked with numbers.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lwkd


def network() -> nn.Module:
    """Two stages, at 8×8 and at 4×4 positions, and a linear head."""
    stage1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
    stage2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 5))
    layers = {"stage1": stage1, "pool": nn.MaxPool2d(2), "stage2": stage2, "head": head}
    return nn.Sequential(OrderedDict(layers))


def train(model: nn.Module, batches: DataLoader, epochs: int, parameters=None) -> None:
    """Plain training, of all parameters or of some."""
    optimizer = torch.optim.Adam(parameters or model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def main(epochs: int = 20) -> float:
    """Train the source network, then fine-tune its copy; return the copy's test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on images this small, several threads only wait for each other
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    old, new = labels < 5, labels >= 5
    x, y = images[new], labels[new] - 5
    batches = DataLoader(TensorDataset(x[:100], y[:100]), batch_size=20, shuffle=True)

    source = network()
    train(source, DataLoader(TensorDataset(images[old], labels[old]), 64, shuffle=True), epochs)
    model = copy.deepcopy(source)
    model.head[1] = nn.Linear(512, 5)
    train(model, batches, epochs, model.head.parameters())  # the head alone, on features that stay
    source.eval().requires_grad_(False)

    layers = ["stage1", "stage2"]
    importance = lwkd.losses.channel_importance(model, batches, layers)  # 1: one pass a channel
    delta = lwkd.losses.DELTA(importance.weights, alpha=0.01)  # 2
    head = lwkd.losses.L2(model, ["head"], beta=0.01)
    pairs = lwkd.pair_layers(model, source, delta.layers)  # 3
    groups = lwkd.param_groups_layerwise(model, pairs, lr=0.01, rest_lr=0.05)  # 4: rest: the head
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = lwkd.LayerwiseLR(optimizer, pairs)  # 5
    for epoch in range(1, epochs + 1):
        model.train()
        for bx, by in batches:
            with pairs.capture() as features:  # 6
                logits, _ = model(bx), source(bx)
            terms = delta(features.student, features.teacher)
            optimizer.zero_grad()
            (F.cross_entropy(logits, by) + terms.total + head().total).backward()
            optimizer.step()
            rates.update(terms.per_layer.detach())  # 7: the loss has measured the distances
            rates.step()
        model.eval()
        with torch.no_grad():
            accuracy = float((model(x[100:]).argmax(1) == y[100:]).float().mean())
        shown = [round(m, 2) for m in rates.multipliers.tolist()]
        print(f"epoch {epoch}: test accuracy {accuracy:.3f}, multipliers {shown}")
    return accuracy


if __name__ == "__main__":
    main()
