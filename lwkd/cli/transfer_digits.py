"""Transfer on scikit-learn's digits: from five of them to the other five, of few images.

A source network knows the digits 0 to 4. It is fine-tuned on a few images of the digits 5 to 9,
under a new head: plainly; by a transfer method, with one rate; and by the same method with a rate
per layer. All three start from the same weights and see the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lwkd.cli import digits
from lwkd.cli.digits import Batch, Network, Row
from lwkd.degradation import degradation_report
from lwkd.groups import param_groups_layerwise
from lwkd.layers import LayerPairs, pair_layers
from lwkd.losses import DELTA, L2, KnowledgeDistillation, TeacherLogits, channel_importance
from lwkd.meters import AttentionMeter
from lwkd.schedule import LayerwiseLR

METHODS = {"delta": "DELTA", "tlkd": "TL+KD"}
ARMS = ("plain", "uniform", "layer-wise")
STUDENT, TEACHER = (8, 16, 32), (24, 48, 96)
LAYERS = ("stage1", "stage2", "stage3")
BODY_LR, HEAD_LR, BATCH = 0.01, 0.1, 20
IMAGES = 600  # of the new digits, at the most


@dataclass(frozen=True)
class Settings:
    """What one run does.

    Attributes:
        method: One of METHODS.
        seeds: How many times each arm is trained, each time on other images.
        images: To fine-tune on, of all five digits together.
        epochs: Of fine-tuning.
        source_epochs: Of the source networks.
        device: Where everything runs.
    """

    method: str = "delta"
    seeds: int = 3
    images: int = 100
    epochs: int = 40
    source_epochs: int = 8
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """What a run has measured.

    Attributes:
        source_accuracy: Of the source network on test images of its own digits.
        teacher_accuracy: TL+KD: of the teacher on those of the new ones, by seed.
        layer_rows: Dicts of arm, seed, epoch, layer, distance, multiplier.
        accuracy_rows: Dicts of arm, seed, epoch, accuracy.
        degradation_rows: Of :func:`lwkd.degradation.degradation_report`, with the seed.
    """

    source_accuracy: float
    teacher_accuracy: list[float] = field(default_factory=list)
    layer_rows: list[Row] = field(default_factory=list)
    accuracy_rows: list[Row] = field(default_factory=list)
    degradation_rows: list[Row] = field(default_factory=list)

    def final(self, arm: str) -> tuple[float, float | None]:
        """Return mean and standard deviation over the seeds of an arm's last test accuracies."""
        last = max(row["epoch"] for row in self.accuracy_rows)
        values = [r["accuracy"] for r in self.accuracy_rows
                  if r["arm"] == arm and r["epoch"] == last]  # fmt: skip
        return mean(values), stdev(values) if len(values) > 1 else None


def load(device: str) -> tuple[Batch, Batch, Batch, Batch]:
    """Return what to train and to test on, of the digits 0 to 4, then of 5 to 9 (labels 0 to 4)."""
    found = []
    for old in (True, False):
        for images, labels in digits.load_digits(device):
            own = (labels < 5) == old
            found.append((images[own], labels[own] % 5))
    return found[0], found[1], found[2], found[3]


def pretrained(widths: Sequence[int], data: Batch, settings: Settings) -> Network:
    """Return a network that knows the old digits, in eval mode."""
    network = digits.fresh(widths, 0, settings.device, classes=5)
    digits.train(network, data, settings.source_epochs, _nothing)
    return network


def with_new_head(network: Network, seed: int) -> Network:
    """Return a copy of a network under a head that knows nothing."""
    student = copy.deepcopy(network).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(student.head.in_features, 5)
    student.head = head.to(student.head.weight.device)
    return student


def total_ticks(settings: Settings) -> int:
    """Return how often `run` calls ``tick``."""
    return settings.seeds * len(ARMS) * (settings.epochs + 1)


def _nothing() -> None:
    """What a loop calls that nobody watches."""


def run(settings: Settings, tick: Callable[[], None] = lambda: None) -> Result:
    """Train the source networks and, for every seed, the students of all arms.

    Args:
        settings: What to do.
        tick: Called once per epoch of fine-tuning; there are `total_ticks`.

    Returns:
        The rows recorded.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    old, old_test, new, test = load(settings.device)
    with digits.one_thread():
        source = pretrained(STUDENT, old, settings)
        larger = pretrained(TEACHER, old, settings) if settings.method == "tlkd" else source
        result = Result(digits.accuracy(source, old_test))
        for seed in range(settings.seeds):
            order = torch.randperm(len(new[1]), generator=torch.Generator().manual_seed(seed))
            chosen = order[: settings.images].to(new[1].device)
            data = new[0][chosen], new[1][chosen]
            method: _Delta | _TLKD
            if settings.method == "delta":
                method = _Delta(source, data, seed)
            else:
                method = _TLKD(larger, data, seed, settings)
                result.teacher_accuracy.append(digits.accuracy(method.guide, test))
            trained: dict[str, nn.Module] = {}
            for arm in ARMS:
                student = with_new_head(source, seed)
                for epoch, d, multipliers in _fine_tune(student, method, arm, seed, settings):
                    where = {"arm": arm, "seed": seed, "epoch": epoch}
                    result.layer_rows.extend(
                        {**where, "layer": name, "distance": a, "multiplier": m}
                        for name, a, m in zip(LAYERS, d.tolist(), multipliers.tolist(), strict=True)
                    )
                    accuracy = digits.accuracy(student, test)
                    result.accuracy_rows.append({**where, "accuracy": accuracy})
                    tick()
                trained[arm] = student
            rows = degradation_report(trained, [test], seed=seed)
            result.degradation_rows.extend({**row, "seed": seed} for row in rows)
    return result


# --- the methods ---------------------------------------------------------------------------------


class Terms(NamedTuple):
    """Losses of a batch, without and with the method, and what the method measured on the way."""

    plain: Tensor
    total: Tensor
    per_layer: Tensor | None


class _Delta:
    """Features near the source's, channel by channel, as the loss rises without a channel."""

    def __init__(self, source: Network, data: Batch, seed: int) -> None:
        self.guide: nn.Module = source
        self.data: Dataset[Any] = TensorDataset(*data)
        self.images = data[0]
        probe = with_new_head(source, seed)
        _train_head(probe, data)
        self._delta = DELTA(channel_importance(probe, [data], LAYERS).weights)

    def __call__(self, student: Network, pairs: LayerPairs, batch: Sequence[Tensor]) -> Terms:
        x, y = batch
        with pairs.capture() as features:
            logits = student(x)
            with torch.no_grad():
                self.guide(x)
        plain = F.cross_entropy(logits, y)
        terms = self._delta(features.student, features.teacher)
        head = L2(student, ["head"])()
        return Terms(plain, plain + terms.total + head.total, terms.per_layer)


class _TLKD:
    """The outputs of a larger network that was fine-tuned on the same images, computed once."""

    def __init__(self, larger: Network, data: Batch, seed: int, settings: Settings) -> None:
        teacher = with_new_head(larger, seed)
        digits.train(teacher, data, settings.epochs, _nothing, BATCH)
        self.guide: nn.Module = teacher
        self.data: Dataset[Any] = TeacherLogits(TensorDataset(*data), teacher)
        self.images = data[0]
        self._kd = KnowledgeDistillation()

    def __call__(self, student: Network, pairs: LayerPairs, batch: Sequence[Tensor]) -> Terms:
        x, y, z = batch
        logits = student(x)
        total = self._kd(logits, z.to(logits.device), y).total
        return Terms(F.cross_entropy(logits, y), total, None)


def _train_head(network: Network, data: Batch) -> None:
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


def _fine_tune(
    student: Network, method: _Delta | _TLKD, arm: str, seed: int, settings: Settings
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train one student; yield (epoch, distances [L], multipliers [L]) of every epoch."""
    pairs = pair_layers(student, method.guide, list(LAYERS))
    groups = param_groups_layerwise(student, pairs, lr=BODY_LR, rest_lr=HEAD_LR, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(method.data, BATCH, shuffle=True, drop_last=True, generator=generator)
    base = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(loader))
    rates = LayerwiseLR(optimizer, pairs, base=base) if arm == "layer-wise" else None
    meter = AttentionMeter(pairs)
    images = method.images
    for epoch in range(settings.epochs + 1):
        own = meter.measure(images)  # without the method's losses, between epochs
        multipliers = rates.multipliers if rates is not None else torch.ones(len(LAYERS))
        yield epoch, own, multipliers
        if epoch == settings.epochs:
            return
        student.train()
        for batch in loader:
            terms = method(student, pairs, batch)
            optimizer.zero_grad()
            (terms.plain if arm == "plain" else terms.total).backward()
            optimizer.step()
            if rates is not None:
                rates.update(own if terms.per_layer is None else terms.per_layer.detach())
                rates.step()
            else:
                base.step()
