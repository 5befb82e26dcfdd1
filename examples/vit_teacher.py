"""Distil a vision transformer into a convolutional network, with a rate per layer.

    pip install lwkd[examples]
    python examples/vit_teacher.py

The teacher's blocks put out tokens, the student's stages maps: `tokens=` folds the ones to the
others' grid. What lwkd adds to a training loop is marked with numbers.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lwkd


class ViT(nn.Module):
    """16 patches of 2×2 pixels and a class token, through torch's own encoder layers."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True,
                                       norm_first=True)
            for _ in range(depth)
        ))  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, 10] of images [N, 1, 8, 8]."""
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.blocks(tokens)[:, 0])


def student_network() -> nn.Module:
    """Two stages, at 8×8 and at 4×4 positions, and a linear head."""
    stage1 = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    stage2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 12, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    return nn.Sequential(OrderedDict(stage1=stage1, stage2=stage2, head=head))


def main(epochs: int = 15) -> float:
    """Train the teacher, then its student; return the student's test accuracy."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on images this small, several threads only wait for each other
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    batches = DataLoader(TensorDataset(images[:1347], labels[:1347]), batch_size=64, shuffle=True)

    teacher, student = ViT(), student_network()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    teacher.eval().requires_grad_(False)

    pairs = lwkd.pair_layers(student, teacher, {"stage1": "blocks.0", "stage2": "blocks.2"})  # 1
    groups = lwkd.param_groups_layerwise(student, pairs, lr=0.05)  # 2
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = lwkd.LayerwiseLR(optimizer, pairs)  # 3
    transfer = lwkd.losses.AttentionTransfer(  # 4: 17 tokens: one in front, 4×4 patches
        beta=3.0, channel_dim=(1, -1), tokens=(None, (4, 4, 1))
    )
    distil = lwkd.losses.KnowledgeDistillation(alpha=0.5, tau=4.0)
    for epoch in range(1, epochs + 1):
        student.train()
        for x, y in batches:
            with pairs.capture() as features:  # 5
                logits, guide = student(x), teacher(x)
            terms = transfer(features.student, features.teacher)
            optimizer.zero_grad()
            (distil(logits, guide, y).total + terms.total).backward()
            optimizer.step()
            rates.update(terms.per_layer.detach())  # 6
            rates.step()
        student.eval()
        with torch.no_grad():
            accuracy = float((student(images[1347:]).argmax(1) == labels[1347:]).float().mean())
        shown = [round(m, 2) for m in rates.multipliers.tolist()]
        print(f"epoch {epoch}: test accuracy {accuracy:.3f}, multipliers {shown}")
    return accuracy


if __name__ == "__main__":
    main()
