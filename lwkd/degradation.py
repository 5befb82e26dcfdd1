"""How networks fare as their inputs get worse: accuracy, likelihood and calibration by severity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.hooks import first_tensor, run, untouched
from lwkd.names import unwrap
from lwkd.ops.checks import choice, message

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
ROUNDING = 1e-3  # that images may be out of [0, 1], less than a step of 8 bits
BATCHES = "batches (images [N, C, H, W] in [0, 1], class indices [N])"
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
        ValueError: An unknown kind, a severity out of range, no [N, C, H, W], values out of [0, 1].
        TypeError: ``images`` is no floating tensor.

    >>> degrade(torch.rand(2, 3, 8, 8), "downscale", 3).shape
    torch.Size([2, 3, 8, 8])
    """
    op = "degradation.degrade"
    choice(op, "kind", kind, tuple(LEVELS))
    _check_severity(op, "severity", severity)
    _check_images(op, "images", images)
    return _worse(images, kind, severity, seed)


def _check_severity(op: str, argument: str, severity: object) -> None:
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(message(op, argument, "an int from 0 to 5", repr(severity)))


def _check_images(op: str, argument: str, images: object) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(message(op, argument, "a floating tensor [N, C, H, W] in [0, 1]", got))
    if images.dim() != 4:
        raise ValueError(message(op, argument, "[N, C, H, W]", list(images.shape)))
    if images.numel():
        low, high = (float(x) for x in images.aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            expected = "images in [0, 1] (normalise afterwards: transform= of degradation_report)"
            raise ValueError(message(op, argument, expected, f"{low:.4g} to {high:.4g}"))


def _worse(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    if severity == 0 or images.numel() == 0:
        return images.clone()
    level = LEVELS[kind][severity - 1]
    x = images.to(torch.promote_types(images.dtype, torch.float32))  # antialiasing wants it
    if kind == "noise":
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        x = (x + level * noise).clamp(0, 1)
    elif kind == "blur":
        x = _blurred(x, level * min(x.shape[2:]))
    elif kind == "contrast":
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + level * (x - mean)
    else:
        size = [max(1, round(level * s)) for s in x.shape[2:]]
        small = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = F.interpolate(small, x.shape[2:], mode="bilinear")
    return x.to(images.dtype)


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

    Returns:
        The error; NaN where a logit is.

    >>> calibration_error(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
    0.5
    """
    return float(_gaps(logits, target, bins).abs().sum() / max(len(logits), 1))


def _gaps(logits: Tensor, target: Tensor, bins: int) -> Tensor:
    """Right answers minus their confidences, summed by bin."""
    confidence, found = logits.double().softmax(1).max(1)
    right = (found == target).double()
    place = (confidence.nan_to_num() * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return gap.index_add_(0, place, right - confidence)


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
        loader: Batches (images [N, C, H, W] in [0, 1], class indices [N]), of which one at a time
            is held.
        kinds: Of `degrade`.
        severities: 0 to 5.
        transform: What the networks' inputs go through after they were degraded: normalisation.
        seed: Of the noise, that of batch b is seed + b; all networks see the same images.

    Returns:
        Rows of model, degradation, severity, images, accuracy, nll (mean cross-entropy, nats) and
        calibration_error; for :func:`lwkd.plotting.degradation_curves`. NaN logits are wrong
        answers, and the other two are NaN.

    Raises:
        ValueError: No models, kinds, severities or images, labels that are not [N], logits
            that are not [N, C] or fewer than classes, and as `degrade`.
        TypeError: Models that are no networks by name, a loader of anything but such pairs, and as
            `degrade`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> batch = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    >>> rows = degradation_report({"student": net}, [batch], kinds=["noise"], severities=[0, 5])
    >>> [(row["degradation"], row["severity"]) for row in rows]
    [('noise', 0), ('noise', 5)]
    """
    networks = _networks(models)
    cells = _cells(kinds, severities)
    if not isinstance(loader, Iterable):
        raise TypeError(message(_REPORT, "loader", BATCHES, type(loader).__name__))
    parameters = (x for n in networks.values() for x in (*n.parameters(), *n.buffers()))
    home = next((x.device for x in parameters), None)
    sums: dict[tuple[str, str, int], Tensor] = {}
    count = 0
    with untouched(*networks.values()):
        for b, batch in enumerate(loader):
            images, target = _pair(batch)
            if not len(images):
                continue
            count += len(images)
            images = images if home is None else images.to(home)
            # Clean images are the same for all kinds.
            for kind, severity in dict.fromkeys((k if s else "", s) for k, s in cells):
                worse = _worse(images, kind, severity, seed + b)
                for name, network in networks.items():
                    x = worse.clone()  # which the network, or transform, may change in place
                    own = _sums(name, network, x if transform is None else transform(x), target)
                    place = name, kind, severity
                    sums[place] = sums[place] + own if place in sums else own
    if not count:
        raise ValueError(message(_REPORT, "loader", "one batch at least", "no images"))
    return [
        {"model": name, "degradation": kind, "severity": severity, "images": count}
        | _scores(sums[name, kind if severity else "", severity], count)
        for name in networks
        for kind, severity in cells
    ]


def _networks(models: object) -> dict[str, nn.Module]:
    expected = "networks by name"
    if not isinstance(models, Mapping):
        raise TypeError(message(_REPORT, "models", expected, type(models).__name__))
    if not models:
        raise ValueError(message(_REPORT, "models", expected, "none"))
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            got = f"{type(model).__name__} of name {name!r}"
            raise TypeError(message(_REPORT, "models", f"{expected}, each an nn.Module", got))
    return {name: unwrap(model) for name, model in models.items()}


def _cells(kinds: Sequence[str], severities: Sequence[int]) -> list[tuple[str, int]]:
    """Every kind at every severity, once."""
    for argument, values in (("kinds", kinds), ("severities", severities)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(message(_REPORT, argument, f"a list of {argument}", repr(values)))
        if not values:
            raise ValueError(message(_REPORT, argument, "one at least", repr(values)))
        for value in values:
            if argument == "kinds":
                choice(_REPORT, argument, value, tuple(LEVELS))
            else:
                _check_severity(_REPORT, argument, value)
    return list(dict.fromkeys(product(kinds, severities)))


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    """A batch's images and class indices."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(message(_REPORT, "loader", BATCHES, got))
    images, target = batch
    _check_images(_REPORT, "loader", images)
    if not isinstance(target, Tensor) or target.is_floating_point():
        got = f"{target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(message(_REPORT, "loader", BATCHES, f"labels {got}"))
    if target.shape != images.shape[:1]:
        got = f"labels {list(target.shape)} for {len(images)} images"
        raise ValueError(message(_REPORT, "loader", BATCHES, got))
    if bool((target < 0).any()):
        raise ValueError(message(_REPORT, "loader", BATCHES, f"a label {int(target.min())}"))
    return images, target.long()


def _sums(name: str, network: nn.Module, x: Any, target: Tensor) -> Tensor:
    """Right answers, negative log-likelihood and `_gaps` of a batch, in one tensor."""
    z = first_tensor(run(_REPORT, network, x, "models", "loader"))
    top = int(target.max())
    if z is None or z.dim() != 2 or len(z) != len(target) or z.shape[1] <= top:
        got = f"{'none' if z is None else list(z.shape)} from {name!r}"
        expected = f"logits [{len(target)}, C], C > {top} for the labels"
        raise ValueError(message(_REPORT, "models", expected, got))
    target = target.to(z.device)
    right = (z.argmax(1) == target) & ~z.isnan().any(1)
    nll = F.cross_entropy(z.double(), target, reduction="sum")
    return torch.cat([right.sum().double()[None], nll[None], _gaps(z, target, BINS)])


def _scores(sums: Tensor, count: int) -> Row:
    right, nll, *gaps = (sums / count).tolist()
    return {"accuracy": right, "nll": nll, "calibration_error": sum(map(abs, gaps))}
