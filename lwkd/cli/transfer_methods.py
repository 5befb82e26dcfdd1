"""The methods that ``python -m lwkd transfer`` compares with plain fine-tuning.

A method is made for a student and says of a batch what to add up. DELTA's, L2-SP's and the
distillation's constants are the papers'; those of the other two were searched on four other seeds,
by the accuracy on new digits that were neither trained nor tested on (100 images, 40 epochs, one
rate; plain: 92.7 %): ATTENTION of 0.3, 1, 3, 10, 30, 100 (93.1 % at 30), JACOBIAN of 0.1, 0.3, 1,
3, 10, 30 (94.2 % at 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lwkd import losses
from lwkd.cli.digits import Batch, Network
from lwkd.layers import LayerPairs

LAYERS = ("stage1", "stage2", "stage3")
ATTENTION, JACOBIAN = 30.0, 1.0


class Terms(NamedTuple):
    """The losses of a batch, and what the method measured on the way.

    Attributes:
        plain: Cross-entropy.
        total: The method's.
        per_layer: Distances [L]; None: the method has none.
    """

    plain: Tensor
    total: Tensor
    per_layer: Tensor | None


class Method(ABC):
    """What one method adds to fine-tuning on some data.

    Attributes:
        guide: The network that the student is compared to.
        data: Items (x, y), or (x, y, the teacher's logits).
    """

    guide: nn.Module
    data: Dataset[Any]

    def __init__(self, source: Network, data: Batch) -> None:
        self.guide, self.data = source, TensorDataset(*data)

    def start(self, student: Network, pairs: LayerPairs) -> None:
        """Begin with a student, a copy of the source network under a new head."""
        self._student, self._pairs = student, pairs

    @abstractmethod
    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """The losses of a batch."""

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The student's logits, and both networks' features."""
        with self._pairs.capture() as features:
            logits = self._student(x)
            with torch.no_grad():
                self.guide(x)
        return logits, features.student, features.teacher


class Delta(Method):
    """Features near the source's, channel by channel, as the loss rises without a channel."""

    def __init__(self, source: Network, probe: Network, data: Batch) -> None:
        super().__init__(source, data)
        train_head(probe, data)
        self._delta = losses.DELTA(losses.channel_importance(probe, [data], LAYERS).weights)

    def start(self, student: Network, pairs: LayerPairs) -> None:
        """Prepare the head's decay."""
        super().start(student, pairs)
        self._head = losses.L2(student, ["head"])

    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """Cross-entropy, the features' distance, and the decay of the head."""
        x, y = batch
        logits, *features = self._run(x)
        plain, terms = F.cross_entropy(logits, y), self._delta(*features)
        return Terms(plain, plain + terms.total + self._head().total, terms.per_layer)


class StartingPoint(Method):
    """Weights near those that they start from."""

    def start(self, student: Network, pairs: LayerPairs) -> None:
        """Prepare the decay."""
        super().start(student, pairs)
        self._decay = losses.L2SP(student, self.guide, head=["head"], layers=LAYERS)

    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """Cross-entropy and the decay."""
        x, y = batch
        plain, terms = F.cross_entropy(self._student(x), y), self._decay()
        return Terms(plain, plain + terms.total, terms.per_layer)


class Attention(Method):
    """The attention maps of a teacher: a larger network, fine-tuned on the same images."""

    _loss = losses.AttentionTransfer(ATTENTION, layers=LAYERS)

    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """Cross-entropy and the maps' distance."""
        x, y = batch
        logits, *features = self._run(x)
        plain, terms = F.cross_entropy(logits, y), self._loss(*features)
        return Terms(plain, plain + terms.total, terms.per_layer)


class Jacobian(Method):
    """The teacher's Jacobians: of the label's output by the image."""

    _loss = losses.JacobianMatching(JACOBIAN, alpha=0.0)

    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """Cross-entropy and the Jacobians' distance."""
        x, y = batch[0].clone().requires_grad_(), batch[1]
        logits = self._student(x)
        plain, terms = F.cross_entropy(logits, y), self._loss(logits, self.guide(x), x, y)
        return Terms(plain, plain + terms.total, None)


class Distillation(Method):
    """The teacher's logits, computed once."""

    _loss = losses.KnowledgeDistillation()

    def __init__(self, teacher: Network, data: Batch) -> None:
        super().__init__(teacher, data)
        self.data = losses.TeacherLogits(self.data, teacher)

    def __call__(self, batch: Sequence[Tensor]) -> Terms:
        """Cross-entropy with the labels, and the divergence from the teacher."""
        x, y, z = batch
        logits = self._student(x)
        total = self._loss(logits, z.to(logits.device), y).total
        return Terms(F.cross_entropy(logits, y), total, None)


def train_head(network: Network, data: Batch) -> None:
    """Train a new head alone, on features that stay."""
    network.eval()
    network.requires_grad_(False).head.requires_grad_(True)
    parameters = network.head.parameters()
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(data[0]), data[1])
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
