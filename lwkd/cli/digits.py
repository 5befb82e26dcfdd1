"""The demo's experiment: a small network distilled on scikit-learn's bundled digits.

1,797 images of 8×8 pixels in 10 classes, 1,347 to train and 450 to test in a fixed split. A
convolutional teacher is trained once. Then, for each seed, the same student with the same data
order is trained twice on cross-entropy and a distance to the teacher, layer by layer: at one rate,
and with `LayerwiseLR` on the same distances. They are those of attention maps, or of Jacobians: of
the gradients by the image of each map's entry that is the teacher's largest. Or the rates follow
the curvature: the loss is that of attention maps, the distances are those of Hessian traces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.curvature import hessian_trace
from lwkd.layers import pair_layers
from lwkd.losses import AttentionTransfer, JacobianMatching
from lwkd.meters import HessianMeter
from lwkd.policy import Policy
from lwkd.schedule import LayerwiseLR, param_groups_layerwise

ARMS = ("uniform", "layer-wise")
# And β: of 3, 10, 30 the best; of 0.1, 0.3, 1, 3 the largest that costs the uniform arm nothing.
KINDS = {"attention": 3.0, "jacobian": 0.3, "hessian": 3.0}
EVERY = 7  # steps between two measurements of Hessian traces, three an epoch
BATCH = 64
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    Attributes:
        kind: One of KINDS: what of both networks the rates follow.
        seeds: How many students each arm trains.
        epochs: Of a student.
        teacher_epochs: Of the teacher.
        policy: Of `LayerwiseLR`, a name or a callable; None is its default.
        device: Where everything runs.
        lr: The unscaled rate of both arms (SGD, momentum 0.9, cosine schedule): of 0.05, 0.1 and
            0.2 what serves the uniform arm best.
        beta: Weight of the distances; None is that of KINDS.
        limit: Use only so many training images, at least one batch of 64; None: all.
    """

    kind: str = "attention"
    seeds: int = 3
    epochs: int = 20
    teacher_epochs: int = 8
    policy: str | Policy | None = None
    device: str = "cpu"
    lr: float = 0.05
    beta: float | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Result:
    """What a run has measured.

    Attributes:
        pairs: The table of paired layers, as text.
        layers: The student's layer names.
        teacher_accuracy: On the test images, in [0, 1].
        layer_rows: Dicts of arm, seed, epoch, layer, distance, multiplier, rate (what the
            optimizer used): the first batch at epoch 0, then the means over each epoch.
        accuracy_rows: Dicts of arm, seed, epoch, accuracy on the test images.
        trace_rows: Of kind "hessian", dicts of network, layer, trace, stderr on the test images, of
            the teacher and of the last student of either arm.
    """

    pairs: str
    layers: list[str]
    teacher_accuracy: float
    layer_rows: list[Row] = field(default_factory=list)
    accuracy_rows: list[Row] = field(default_factory=list)
    trace_rows: list[Row] = field(default_factory=list)

    def final(self, arm: str) -> tuple[float, float | None]:
        """Return mean and standard deviation over the seeds of an arm's last test accuracies.

        The standard deviation is that of the sample, None for one seed.
        """
        last = max(row["epoch"] for row in self.accuracy_rows)
        rows = self.accuracy_rows
        values = [r["accuracy"] for r in rows if r["arm"] == arm and r["epoch"] == last]
        return mean(values), stdev(values) if len(values) > 1 else None


class Network(nn.Module):
    """Three convolutional stages at 8×8, 4×4 and 2×2 positions, and a linear head."""

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stage1 = _stage(1, widths[0])
        self.stage2 = _stage(widths[0], widths[1])
        self.stage3 = _stage(widths[1], widths[2])
        self.head = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, classes] of images [N, 1, 8, 8]."""
        x = F.max_pool2d(self.stage1(x), 2)
        x = self.stage3(F.max_pool2d(self.stage2(x), 2))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _stage(inside: int, outside: int) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


def require() -> None:
    """Raise where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "the digits come with scikit-learn, which is not installed: pip install lwkd[examples]"
        ) from None


def load_digits(device: str, limit: int | None = None) -> tuple[Batch, Batch]:
    """Return (images, labels) to train and to test: float32 [N, 1, 8, 8] in [0, 1], int64 [N].

    Raises:
        RuntimeError: scikit-learn is not installed; the message says what to install.
    """
    require()
    from sklearn import datasets

    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64, device=device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    train, test = order[:1347][:limit], order[1347:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(data: Batch, generator: torch.Generator, size: int = BATCH) -> Iterator[Batch]:
    """Yield the full batches of one epoch in a new order; what is left over waits."""
    images, labels = data
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    for chosen in order[: len(order) // size * size].split(size):
        yield images[chosen], labels[chosen]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread: on tensors this small, several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(network: nn.Module, data: Batch) -> float:
    """Return the share of right answers in eval mode, and leave the mode as it was."""
    training = network.training
    right = (network.eval()(data[0]).argmax(1) == data[1]).float().mean()
    network.train(training)
    return float(right)


def fresh(widths: Sequence[int], seed: int, device: str, classes: int = 10) -> Network:
    """Return a network whose weights depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and no GPU's
        return Network(widths, classes).to(device)


def train(
    network: Network, data: Batch, epochs: int, tick: Callable[[], None], size: int = BATCH
) -> Network:
    """Train a network with Adam; return it in eval mode, its parameters frozen."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(epochs):
        for images, labels in batches(data, generator, size):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        tick()
    return network.eval().requires_grad_(False)


def train_teacher(data: Batch, settings: Settings, tick: Callable[[], None]) -> Network:
    """Train the teacher; return it in eval mode."""
    return train(fresh((24, 48, 96), 0, settings.device), data, settings.teacher_epochs, tick)


def run(settings: Settings, tick: Callable[[], None] = lambda: None) -> Result:
    """Train the teacher and the students of both arms.

    Args:
        settings: What to do.
        tick: Called once per epoch; there are `total_ticks`.

    Returns:
        The rows recorded.

    Raises:
        RuntimeError: scikit-learn is not installed.
        ValueError: An unknown policy.
    """
    data, test = load_digits(settings.device, settings.limit)
    with one_thread():
        return _run(settings, data, test, tick)


def _run(settings: Settings, data: Batch, test: Batch, tick: Callable[[], None]) -> Result:
    teacher = train_teacher(data, settings, tick)
    pairs = pair_layers(fresh((8, 16, 32), 0, settings.device), teacher, example_inputs=data[0][:2])
    result = Result(str(pairs), pairs.names, accuracy(teacher, test))
    for seed in range(settings.seeds):
        start = fresh((8, 16, 32), seed, settings.device)
        for arm in ARMS:
            student = copy.deepcopy(start)
            for epoch, *seen in distil(student, teacher, pairs.names, arm, seed, data, settings):
                where = {"arm": arm, "seed": seed, "epoch": epoch}
                columns = (pairs.names, *(column.tolist() for column in seen))
                keys = ("layer", "distance", "multiplier", "rate")
                result.layer_rows.extend(
                    {**where, **dict(zip(keys, values, strict=True))}
                    for values in zip(*columns, strict=True)
                )
                if epoch:
                    right = accuracy(student, test)
                    result.accuracy_rows.append({**where, "accuracy": right})
                    tick()
            if settings.kind == "hessian" and seed == settings.seeds - 1:
                result.trace_rows.extend(_traces(student, arm, test, pairs.names))
    if settings.kind == "hessian":
        result.trace_rows.extend(_traces(teacher, "teacher", test, pairs.names))
    return result


def _traces(network: Network, name: str, data: Batch, layers: Sequence[str]) -> list[Row]:
    """The traces of a network's layers, in eval mode, with their standard errors."""
    wanted = [p.requires_grad for p in network.parameters()]
    network.eval().requires_grad_(True)
    found = hessian_trace(network, F.cross_entropy, data, layers, probes=16)
    for p, before in zip(network.parameters(), wanted, strict=True):
        p.requires_grad_(before)
    columns = zip(layers, found.mean.tolist(), found.stderr.tolist(), strict=True)
    return [{"network": name, "layer": n, "trace": t, "stderr": e} for n, t, e in columns]


def total_ticks(settings: Settings) -> int:
    """Return how often `run` calls ``tick``."""
    return settings.teacher_epochs + len(ARMS) * settings.seeds * settings.epochs


def _curvature(
    meter: HessianMeter, student: Network, images: Tensor, labels: Tensor, last: Tensor
) -> Tensor:
    """The distances of Hessian traces, or the last ones where no measurement is due."""
    student.eval()  # in train mode BatchNorm couples the samples
    found = meter.discrepancy(images, labels, F.cross_entropy)
    student.train()
    return last if found is None else found


def distil(
    student: Network,
    teacher: Network,
    layers: Sequence[str],
    arm: str,
    seed: int,
    data: Batch,
    settings: Settings,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Train one student; yield (epoch, distances [L], multipliers, rates): `Result.layer_rows`."""
    pairs = pair_layers(student, teacher, list(layers))
    groups = param_groups_layerwise(student, pairs, lr=settings.lr, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    own = [next(g for g in optimizer.param_groups if g["name"] == layer) for layer in layers]
    steps = settings.epochs * (len(data[0]) // BATCH)
    base = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    layerwise = arm == "layer-wise"
    rates = LayerwiseLR(optimizer, pairs, policy=settings.policy, base=base) if layerwise else None
    beta = KINDS[settings.kind] if settings.beta is None else settings.beta
    jacobian = settings.kind == "jacobian"
    meter = HessianMeter(pairs, probes=4, every=EVERY) if settings.kind == "hessian" else None
    d = torch.empty(0)
    transfer = JacobianMatching(beta, of="map") if jacobian else AttentionTransfer(beta)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, settings.epochs + 1):
        seen = []
        for images, labels in batches(data, generator):
            x = images.requires_grad_(jacobian)
            with pairs.capture() as features, meter or nullcontext():
                logits = student(x)
                with torch.set_grad_enabled(jacobian):
                    teacher(x)
            both = features.student, features.teacher
            terms = transfer(*both, x) if jacobian else transfer(*both)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels) + terms.total).backward()
            if meter is None:
                d = terms.per_layer.detach()
            else:
                d = _curvature(meter, student, images, labels, d)
            m = rates.multipliers if rates is not None else torch.ones_like(d)
            rate = torch.tensor([group["lr"] for group in own]).to(d)
            seen.append(torch.stack([d, m, rate]))
            if epoch == 1 and len(seen) == 1:
                yield 0, d, m, rate
            optimizer.step()
            if rates is not None:
                rates.update(d)
                rates.step()
            else:
                base.step()
        yield epoch, *torch.stack(seen).mean(0)
