"""How networks fare as their inputs get worse: accuracy, likelihood and calibration by severity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.hooks import first_tensor, run, untouched
from lwkd.names import unwrap
from lwkd.ops.checks import message

Row = dict[str, Any]
LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.05, 0.1, 0.15, 0.2, 0.3),
    "blur": (0.02, 0.04, 0.06, 0.08, 0.1),
    "contrast": (0.75, 0.5, 0.35, 0.2, 0.1),
    "downscale": (0.8, 0.65, 0.5, 0.35, 0.25),
}
"""What severities 1 to 5 are: the noise's standard deviation, the blur's in shares of the shorter
side, the share of the contrast that is left, the share of height and width."""
SEVERITIES = (0, 1, 2, 3, 4, 5)
BINS = 15
_REPORT = "degradation.degradation_report"


def degrade(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Return images made worse in one way.

    * "noise": x + σ·g, g ~ N(0, 1), cut to [0, 1];
    * "blur": a Gaussian of σ·min(H, W) pixels, the border replicated;
    * "contrast": m + c·(x − m), m the image's mean;
    * "downscale": to a share of the size, with antialiasing, and back, bilinear.

    The kinds are of Hendrycks & Dietterich 2019; the levels (`LEVELS`) are ours, relative to the
    image's size.

    Args:
        images: Floating [N, C, H, W] in [0, 1], before any normalisation.
        kind: As above.
        severity: 0 (the images as they are) to 5.
        seed: Of the noise; torch's generators are left alone.

    Returns:
        A tensor like ``images``.

    Raises:
        ValueError: An unknown kind, a severity out of range, no [N, C, H, W].
        TypeError: ``images`` is no floating tensor.

    >>> degrade(torch.rand(2, 3, 8, 8), "downscale", 3).shape
    torch.Size([2, 3, 8, 8])
    """
    op = "degradation.degrade"
    if kind not in LEVELS:
        raise ValueError(message(op, "kind", f"one of {tuple(LEVELS)}", repr(kind)))
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(message(op, "severity", "an int from 0 to 5", repr(severity)))
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(message(op, "images", "a floating tensor [N, C, H, W] in [0, 1]", got))
    if images.dim() != 4:
        raise ValueError(message(op, "images", "[N, C, H, W]", list(images.shape)))
    if severity == 0 or images.numel() == 0:
        return images.clone()
    level = LEVELS[kind][severity - 1]
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(images.shape, generator=generator).to(images)
        return (images + level * noise).clamp(0, 1)
    if kind == "blur":
        return _blurred(images, level * min(images.shape[2:]))
    if kind == "contrast":
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + level * (images - mean)
    size = [max(1, round(level * s)) for s in images.shape[2:]]
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[2:], mode="bilinear")


def _blurred(images: Tensor, sigma: float) -> Tensor:
    radius = max(1, int(3 * sigma + 0.5))
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-places.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    n, c, h, w = images.shape
    x = images.reshape(n * c, 1, h, w)
    x = F.pad(x, [radius] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, weights.reshape(1, 1, -1, 1)), weights.reshape(1, 1, 1, -1))
    return x.reshape(images.shape)


def calibration_error(logits: Tensor, target: Tensor, bins: int = BINS) -> float:
    """The expected calibration error: Σ_b |b|/N · |accuracy(b) − confidence(b)|.

    Over equal bins of the confidence, the largest softmax probability. Source: Guo et al. 2017.

    Args:
        logits: [N, C].
        target: Class indices [N].
        bins: How many.

    >>> calibration_error(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
    0.5
    """
    confidence, found = logits.double().softmax(1).max(1)
    right = (found == target).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, place, right - confidence)
    return float(gap.abs().sum() / max(len(logits), 1))


def degradation_report(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    *,
    kinds: Sequence[str] = tuple(LEVELS),
    severities: Sequence[int] = SEVERITIES,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Measure networks on images that get worse.

    Args:
        models: Networks by name, all over the same classes. They run in eval mode and are left as
            they were.
        loader: Batches (images [N, C, H, W] in [0, 1], class indices [N]).
        kinds: Of `degrade`.
        severities: 0 to 5.
        transform: What the networks' inputs go through after they were degraded: normalisation.
        seed: Of the noise; all networks see the same images.

    Returns:
        Rows of model, degradation, severity, images, accuracy, nll (mean cross-entropy, nats) and
        calibration_error; for :func:`lwkd.plotting.degradation_curves`.

    Raises:
        ValueError: No models, no batches, logits that are not [N, C], and as `degrade`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> batch = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    >>> rows = degradation_report({"student": net}, [batch], kinds=["noise"], severities=[0, 5])
    >>> [(row["degradation"], row["severity"]) for row in rows]
    [('noise', 0), ('noise', 5)]
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(message(_REPORT, "models", "networks by name", repr(models)))
    batches = list(loader)
    if not batches:
        raise ValueError(message(_REPORT, "loader", "one batch at least", "none"))
    rows: list[Row] = []
    for name, model in models.items():
        with untouched(unwrap(model)):
            clean: Row | None = None  # the same for all kinds
            for kind, severity in product(kinds, severities):
                scores = clean
                if severity or clean is None:
                    worse = partial(degrade, kind=kind, severity=severity)
                    scores = _scores(*_logits(name, model, batches, worse, transform, seed))
                clean = clean if severity else scores
                own = {"model": name, "degradation": kind, "severity": severity}
                rows.append(own | (scores or {}))
    return rows


def _logits(
    name: str, model: nn.Module, batches: Sequence[Any], worse: Callable[..., Tensor],
    transform: Callable[[Tensor], Tensor] | None, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A network's logits on all batches made worse, and the classes."""
    logits, labels = [], []
    for b, (images, target) in enumerate(batches):
        x = worse(images, seed=seed + b)
        x = x if transform is None else transform(x)
        z = first_tensor(run(_REPORT, unwrap(model), x, "models", "loader"))
        if z is None or z.dim() != 2 or len(z) != len(target):
            got = f"{'none' if z is None else list(z.shape)} from {name!r}"
            raise ValueError(message(_REPORT, "models", f"logits [{len(target)}, C]", got))
        logits.append(z)
        labels.append(target.to(z.device))
    return torch.cat(logits), torch.cat(labels)


def _scores(logits: Tensor, target: Tensor) -> Row:
    return {
        "images": len(target),
        "accuracy": float((logits.argmax(1) == target).double().mean()),
        "nll": float(F.cross_entropy(logits.double(), target)),
        "calibration_error": calibration_error(logits, target),
    }
