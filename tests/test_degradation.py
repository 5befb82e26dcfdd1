"""Degradations against their definitions, and what the report says of networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.degradation import LEVELS, calibration_error, degradation_report, degrade

X = torch.rand(5, 2, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
each_kind = pytest.mark.parametrize("kind", LEVELS)


@each_kind
def test_severities(kind: str) -> None:
    """0 is the image itself; more is further from it; nothing is changed in place."""
    before = X.clone()
    away = []
    for severity in range(6):
        y = degrade(X, kind, severity)
        assert y.shape == X.shape
        assert y.dtype == X.dtype
        away.append(float((y - X).square().mean()))
    assert away[0] == 0
    assert away == sorted(away)
    assert away[2] > 0  # the least blur of an image as small as this is none
    assert torch.equal(X, before)
    assert degrade(X[:0], kind, 3).shape == (0, 2, 12, 10)


def test_noise() -> None:
    state = torch.get_rng_state()
    grey = torch.full((1, 1, 300, 300), 0.5, dtype=torch.float64)
    noise = degrade(grey, "noise", 2, seed=3) - 0.5
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(degrade(grey, "noise", 2, seed=3) - 0.5, noise)
    assert not torch.equal(degrade(grey, "noise", 2, seed=4) - 0.5, noise)
    assert torch.equal(state, torch.get_rng_state())
    white = degrade(torch.ones(1, 1, 9, 9), "noise", 5)
    assert float(white.max()) == 1


def test_blur() -> None:
    """A point becomes the Gaussian; a constant stays."""
    x = torch.zeros(1, 1, 41, 61, dtype=torch.float64)
    x[0, 0, 20, 30] = 1
    y = degrade(x, "blur", 4)[0, 0]
    sigma = 0.08 * 41
    places = torch.arange(-10, 11, dtype=torch.float64)
    g = torch.exp(-places.square() / (2 * sigma**2))
    g /= g.sum()
    torch.testing.assert_close(y[10:31, 20:41], g[:, None] * g)
    flat = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64)
    torch.testing.assert_close(degrade(flat, "blur", 5), flat)


def test_contrast() -> None:
    y = degrade(X, "contrast", 3)
    for a, b in zip(X, y, strict=True):
        torch.testing.assert_close(b, a.mean() + 0.35 * (a - a.mean()))


def test_downscale() -> None:
    small = F.interpolate(X, (6, 5), mode="bilinear", antialias=True)
    want = F.interpolate(small, (12, 10), mode="bilinear")
    torch.testing.assert_close(degrade(X, "downscale", 3), want)


def test_calibration_error() -> None:
    """Bin by bin, written out."""
    logits = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    target = torch.randint(4, (200,), generator=torch.Generator().manual_seed(3))
    p = logits.double().softmax(1)
    want = 0.0
    for b in range(15):
        inside = [i for i in range(200) if b / 15 <= float(p[i].max()) < (b + 1) / 15]
        if inside:
            right = sum(int(p[i].argmax()) == int(target[i]) for i in inside)
            sure = sum(float(p[i].max()) for i in inside)
            want += abs(right - sure) / 200
    assert calibration_error(logits, target) == pytest.approx(want, rel=1e-12)
    assert calibration_error(torch.full((4, 2), 0.0), torch.tensor([0, 0, 1, 1])) == 0


class Brightness(nn.Module):
    """Says 1 where an image is brighter than half, and is unsure by how far it is from it."""

    def forward(self, x: Tensor) -> Tensor:
        z = 10 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-z, z], 1)


def test_report() -> None:
    net = Brightness().train()
    images = torch.cat([0.3 * torch.rand(6, 1, 8, 8), 1 - 0.3 * torch.rand(6, 1, 8, 8)])
    labels = torch.arange(12) // 6
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    rows = degradation_report({"a": net, "b": nn.DataParallel(net)}, iter(batches))
    assert net.training
    assert len(rows) == 2 * 4 * 6
    for row in rows:
        assert row["images"] == 12
        assert row["accuracy"] == 1.0
        assert math.isfinite(row["nll"])
    first = rows[0]
    assert (first["model"], first["degradation"], first["severity"]) == ("a", "noise", 0)
    assert first["nll"] == pytest.approx(float(F.cross_entropy(net(images), labels)), rel=1e-4)
    assert first["calibration_error"] == pytest.approx(
        calibration_error(net(images), labels), rel=1e-4
    )
    worse = degradation_report({"a": net}, batches, kinds=["contrast"], severities=[5])[0]
    want = float(F.cross_entropy(net(degrade(images, "contrast", 5)), labels))
    assert worse["nll"] == pytest.approx(want, rel=1e-4)
    flipped = degradation_report({"a": net}, batches, severities=[0], transform=lambda x: 1 - x)
    assert all(row["accuracy"] == 0 for row in flipped)


def test_errors() -> None:
    net, batch = Brightness(), (torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    for run, kind, text in (
        (lambda: degrade(X, "fog", 1), ValueError, "kind: expected one of"),
        (lambda: degrade(X, "blur", 6), ValueError, "severity: expected an int from 0 to 5"),
        (lambda: degrade(X, "blur", 1.5), ValueError, "severity"),
        (lambda: degrade(X[0], "blur", 1), ValueError, r"images: expected \[N, C, H, W\]"),
        (lambda: degrade((255 * X).byte(), "blur", 1), TypeError, "images: expected a floating"),
        (lambda: degradation_report({}, [batch]), ValueError, "models: expected networks by name"),
        (lambda: degradation_report({"a": net}, []), ValueError, "loader: expected one batch"),
        (lambda: degradation_report({"a": nn.Flatten(0)}, [batch]), ValueError,
         r"models: expected logits \[2, C\], got .* from 'a'"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
