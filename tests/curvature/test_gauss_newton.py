"""The Hessian of losses by the outputs: columns and random vectors against autograd, float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.curvature.gauss_newton import known_loss, output_hessian
from lwkd.ops import philox
from tests import cases

F64 = torch.float64
N, C = 4, 5
LOGITS = cases.draw((N, C), F64, 1)
INDICES = torch.tensor([2, 0, 4, 3])
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=F64)
SHARES = torch.softmax(cases.draw((N, C), F64, 7), 1)
GRID = cases.draw((2, 3, 2, 2), F64, 2)
GRID_INDICES = torch.tensor([[[0, 2], [1, -100]], [[2, 2], [0, 1]]])
ONES = (cases.draw((N, C), F64, 3) > 0).double()

# name: (loss, outputs, target)
LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "cross-entropy": (F.cross_entropy, LOGITS, INDICES),
    "its module": (nn.CrossEntropyLoss(), LOGITS, INDICES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LOGITS, INDICES),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.2), LOGITS, INDICES),
    "weighted": (nn.CrossEntropyLoss(WEIGHT), LOGITS, INDICES),
    "weighted, smoothed, sum": (
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3, reduction="sum"), LOGITS, INDICES
    ),
    "weighted, smoothed": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3), LOGITS, INDICES),
    "ignored": (
        partial(F.cross_entropy, ignore_index=4, weight=WEIGHT, label_smoothing=0.1),
        LOGITS, INDICES,
    ),
    "shares": (F.cross_entropy, LOGITS, SHARES),
    "shares, weighted, smoothed": (
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), LOGITS, SHARES
    ),
    "positions": (F.cross_entropy, GRID, GRID_INDICES),
    "positions, weighted": (nn.CrossEntropyLoss(WEIGHT[:3]), GRID, GRID_INDICES),
    "squared error": (F.mse_loss, LOGITS, ONES),
    "squared error, sum": (nn.MSELoss(reduction="sum"), GRID, GRID - 1),
    "binary, logits": (F.binary_cross_entropy_with_logits, LOGITS, ONES),
    "binary, logits, weighted": (
        nn.BCEWithLogitsLoss(WEIGHT, pos_weight=2 * WEIGHT), LOGITS, SHARES
    ),
    "binary": (nn.BCELoss(), LOGITS.sigmoid(), ONES),
    "binary, weighted, sum": (nn.BCELoss(WEIGHT, reduction="sum"), LOGITS.sigmoid(), SHARES),
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", LOSSES)


def blocks(name: str) -> Tensor:
    """[N, K, K]: the Hessian by every sample's outputs."""
    loss, output, target = LOSSES[name]
    n, k = len(output), output[0].numel()
    full = torch.autograd.functional.hessian(lambda z: loss(z, target), output)
    full = full.reshape(n, k, n, k)
    for i, j in itertools.permutations(range(n), 2):
        assert not full[i, :, j].any()  # samples are their own
    return torch.stack([full[i, :, i] for i in range(n)])


def hessian_of(name: str) -> Any:
    loss, output, target = LOSSES[name]
    return output_hessian("test", loss, output, target)


@each_loss
def test_columns_make_the_hessian(name: str) -> None:
    """A backward pass a column, positions of a sample apart: the sum is the block exactly."""
    total = sum(
        torch.einsum("nk,nl->nkl", v.flatten(1), v.flatten(1)) for v in hessian_of(name).columns()
    )
    torch.testing.assert_close(total, blocks(name), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@each_loss
def test_vectors_have_it_as_their_mean_square(name: str) -> None:
    """Every entry to 5 standard errors of 4,000 probes."""
    h, want = hessian_of(name), blocks(name)
    drawn = torch.stack([h.vectors(3, k).flatten(1) for k in range(4000)])
    products = torch.einsum("pnk,pnl->pnkl", drawn, drawn)
    noise = products.std(0) / len(drawn) ** 0.5
    assert ((products.mean(0) - want).abs() <= 5 * noise + 1e-9 * want.abs()).all()


def test_vectors_of_cross_entropy_are_its_columns_with_signs() -> None:
    h = hessian_of("cross-entropy")
    z = philox.signs(LOGITS, 2**63 + 1, philox.OUTPUTS, 6)
    want = sum(z[:, c, None] * column for c, column in enumerate(h.columns()))
    torch.testing.assert_close(h.vectors(2**63 + 1, 6), want)


def test_vectors_of_elementwise_losses_are_signs() -> None:
    v = hessian_of("squared error").vectors(5, 2)
    signs = philox.signs(LOGITS, 5, philox.OUTPUTS, 2)
    torch.testing.assert_close(v, signs * (2 / LOGITS.numel()) ** 0.5)


def test_losses_that_are_known() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(x, y)

    for loss, known in (
        (F.cross_entropy, True), (nn.MSELoss(), True), (partial(F.mse_loss, reduction="sum"), True),
        (lambda x, y: F.cross_entropy(x, y), False), (Own(), False), (F.l1_loss, False),
        (partial(F.cross_entropy, LOGITS), False),
        (partial(F.mse_loss, weight=torch.ones(1)), False), (nn.KLDivLoss(), False),
    ):  # fmt: skip
        assert (known_loss(loss) is not None) == known, loss
    with pytest.raises(ValueError, match=r"loss_fn: expected cross-entropy, .* got KLDivLoss"):
        output_hessian("test", nn.KLDivLoss(), LOGITS, SHARES)
