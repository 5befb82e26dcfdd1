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

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lwkd.cli import digits
from lwkd.cli.digits import Batch, Network, Row
from lwkd.cli.transfer_methods import (
    LAYERS,
    Attention,
    Delta,
    Distillation,
    Jacobian,
    Method,
    StartingPoint,
)
from lwkd.degradation import degradation_report
from lwkd.groups import param_groups_layerwise
from lwkd.layers import pair_layers
from lwkd.meters import AttentionMeter
from lwkd.schedule import LayerwiseLR

METHODS = {
    "delta": "DELTA",
    "l2sp": "L2-SP",
    "attention": "attention transfer",
    "jacobian": "Jacobian matching",
    "tlkd": "TL+KD",
}
_TAUGHT: dict[str, Callable[[Network, Batch], Method]] = {
    "attention": Attention,
    "jacobian": Jacobian,
    "tlkd": Distillation,
}  # with a teacher; the others compare with the source network
ARMS = ("plain", "uniform", "layer-wise")
STUDENT, TEACHER = (8, 16, 32), (24, 48, 96)
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
        teacher_accuracy: Where there is one, of the teacher on those of the new ones, by seed.
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
        torch.default_generator.manual_seed(seed)  # and no GPU's
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
        larger = pretrained(TEACHER, old, settings) if settings.method in _TAUGHT else source
        result = Result(digits.accuracy(source, old_test))
        for seed in range(settings.seeds):
            order = torch.randperm(len(new[1]), generator=torch.Generator().manual_seed(seed))
            chosen = order[: settings.images].to(new[1].device)
            data = new[0][chosen], new[1][chosen]
            method = _method((source, larger), data, seed, settings)
            if settings.method in _TAUGHT:
                result.teacher_accuracy.append(digits.accuracy(method.guide, test))
            trained: dict[str, nn.Module] = {}
            for arm in ARMS:
                student = with_new_head(source, seed)
                for epoch, d, multipliers in _fine_tune(
                    student, method, data[0], arm, seed, settings
                ):
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


# --- one student ---------------------------------------------------------------------------------


def _method(networks: Sequence[Network], data: Batch, seed: int, settings: Settings) -> Method:
    """What the settings ask for, with the source network or a teacher made of the larger one."""
    source, larger = networks
    if settings.method == "delta":
        return Delta(source, with_new_head(source, seed), data)
    if settings.method == "l2sp":
        return StartingPoint(source, data)
    teacher = with_new_head(larger, seed)
    digits.train(teacher, data, settings.epochs, _nothing, BATCH)
    return _TAUGHT[settings.method](teacher, data)


def _fine_tune(
    student: Network, method: Method, images: Tensor, arm: str, seed: int, settings: Settings
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
    method.start(student, pairs)
    for epoch in range(settings.epochs + 1):
        own = meter.measure(images)  # without the method's losses, between epochs
        multipliers = rates.multipliers if rates is not None else torch.ones(len(LAYERS))
        yield epoch, own, multipliers
        if epoch == settings.epochs:
            return
        student.train()
        for batch in loader:
            terms = method(batch)
            optimizer.zero_grad()
            (terms.plain if arm == "plain" else terms.total).backward()
            optimizer.step()
            if rates is not None:
                rates.update(own if terms.per_layer is None else terms.per_layer.detach())
                rates.step()
            else:
                base.step()
