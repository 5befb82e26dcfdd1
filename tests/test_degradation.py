"""Degradations against their definitions, and what the report says of networks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

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


def test_half_precision() -> None:
    """Computed in float32, and rounded once."""
    for dtype in (torch.float16, torch.bfloat16):
        x = X.to(dtype)
        for kind in LEVELS:
            y = degrade(x, kind, 3)
            assert y.dtype == dtype
            assert torch.equal(y, degrade(x.float(), kind, 3).to(dtype))


class Broken(Brightness):
    """Has diverged: NaN for some images, at the class that is right."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return torch.where(z[:, 1:] > 0, z * z.new_tensor([1.0, math.nan]), z)


def test_a_network_that_diverged() -> None:
    images = torch.cat([0.3 * torch.rand(6, 1, 8, 8), 1 - 0.3 * torch.rand(6, 1, 8, 8)])
    batch = images, torch.arange(12) // 6
    rows = degradation_report({"bad": Broken(), "good": Brightness()}, [batch])
    alone = degradation_report({"good": Brightness()}, [batch])
    assert rows[24:] == alone
    for row in rows[:24]:
        assert row["accuracy"] == 0.5
        assert math.isnan(row["nll"])
        assert math.isnan(row["calibration_error"])
    assert math.isnan(calibration_error(Broken()(images), batch[1]))


class InPlace(Brightness):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.neg_().add_(1))


def test_a_network_that_changes_its_input() -> None:
    batch = torch.rand(9, 1, 6, 6), torch.arange(9) % 2
    both = degradation_report({"a": InPlace(), "b": Brightness()}, [batch])
    assert both[24:] == degradation_report({"b": Brightness()}, [batch])
    kept = batch[0].clone()
    degradation_report({"a": InPlace()}, [batch], severities=[0], transform=lambda x: x.sub_(0.5))
    assert torch.equal(batch[0], kept)


def test_one_batch_is_held_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            images = torch.rand(3, 1, 4, 4)
            alive.append(weakref.ref(images))
            yield images, torch.tensor([0, 1, 0])
            del images

    assert degradation_report({"a": Brightness()}, batches())[0]["images"] == 18


def test_batches_add_up() -> None:
    """The same rows from one batch or several, an empty one between them; noise is by the batch."""
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 7), (7, 7), (7, 20))]
    kinds = ["blur", "contrast", "downscale"]
    whole, sums = (
        degradation_report({"a": Brightness()}, loader, kinds=kinds)
        for loader in ([(images, labels)], parts)
    )
    for a, b in zip(whole, sums, strict=True):
        assert [*a.values()][:4] == [*b.values()][:4] == ["a", a["degradation"], a["severity"], 20]
        assert [*a.values()][4:] == pytest.approx([*b.values()][4:], rel=1e-6)
    row = degradation_report(
        {"a": Brightness()}, parts, kinds=["noise"], severities=[4, 4, 0], seed=5
    )[0]
    worse = [degrade(x, "noise", 4, seed=5 + b) for b, (x, _) in enumerate(parts)]
    want = float(F.cross_entropy(Brightness()(torch.cat(worse)), labels))
    assert row["nll"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shift", ["normalised", "bytes", "above", "nan"])
def test_images_out_of_range(shift: str) -> None:
    x = {
        "normalised": (X - 0.5) / 0.25, "bytes": 255 * X, "above": 1.01 * X / X.max(),
        "nan": X.where(X < 0.9, math.nan),
    }[shift]  # fmt: skip
    batch = x, torch.zeros(5, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"degrade: images: expected images in \[0, 1\].*transform="
    ):
        degrade(x, "blur", 1)
    with pytest.raises(
        ValueError, match=r"report: loader: expected images in \[0, 1\].*transform="
    ):
        degradation_report({"a": Brightness()}, [batch])
    degrade((X / X.max()).nextafter(torch.tensor(2.0, dtype=X.dtype)), "blur", 1)  # rounding


def test_errors() -> None:
    net, batch = Brightness(), (torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))

    def report(loader: Any, **options: Any) -> Any:
        return lambda: degradation_report({"a": net}, loader, **options)

    for run, kind, text in (
        (lambda: degrade(X, "fog", 1), ValueError, "kind: expected one of"),
        (lambda: degrade(X, "blur", 6), ValueError, "severity: expected an int from 0 to 5"),
        (lambda: degrade(X, "blur", 1.5), ValueError, "severity"),
        (lambda: degrade(X[0], "blur", 1), ValueError, r"images: expected \[N, C, H, W\]"),
        (lambda: degrade((255 * X).byte(), "blur", 1), TypeError, "images: expected a floating"),
        (lambda: degradation_report({}, [batch]), ValueError, "models: expected networks by name"),
        (lambda: degradation_report({"a": net}, []), ValueError, "loader: expected one batch"),
        (lambda: degradation_report({"a": nn.Flatten(0)}, [batch]), ValueError,
         r"models: expected logits \[2, C\], .*, got .* from 'a'"),
        (report([(batch[0], torch.tensor([0, 2]))]), ValueError, "C > 2 for the labels, got"),
        (report([(batch[0], batch[1][:1])]), ValueError, r"loader: .*labels \[1\] for 2 images"),
        (report([(batch[0], batch[1] - 1)]), ValueError, "loader: .*got a label -1"),
        (report([(batch[0], batch[1].float())]), TypeError, "loader: .*labels torch.float32"),
        (report([(batch[0].long(), batch[1])]), TypeError, "loader: expected a floating tensor"),
        (report([(*batch, batch[1])]), TypeError, "loader: expected batches .*got 3 items"),
        (report(batch), TypeError, "loader: expected batches .*got Tensor"),
        (report(None), TypeError, "loader: expected batches .*got NoneType"),
        (report([(batch[0][:0], batch[1][:0])]), ValueError, "loader: expected one batch at least"),
        (report([batch], kinds=[]), ValueError, r"kinds: expected one at least, got \[\]"),
        (report([batch], kinds="noise"), TypeError, "kinds: expected a list of kinds"),
        (report([batch], kinds=["fog"]), ValueError, r"report: kinds: expected one of .*'fog'"),
        (report([batch], severities=[]), ValueError, "severities: expected one at least"),
        (report([batch], severities=3), TypeError, "severities: expected a list of severities"),
        (report([batch], severities=[True]), ValueError, "report: severities: expected an int"),
        (lambda: degradation_report(net, [batch]), TypeError, "models: expected networks by name"),
        (lambda: degradation_report({"a": net, "b": net.forward}, [batch]), TypeError,
         "models: expected networks by name, each an nn.Module, got method of name 'b'"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
