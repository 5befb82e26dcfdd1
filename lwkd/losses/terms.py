"""What every loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """A loss, and the layer distances that it has computed on the way.

    Attributes:
        total: The scalar to differentiate.
        per_layer: The distances [L] for ``LayerwiseLR.update(terms.per_layer.detach())``, before
            any weight of the loss; None for a loss without layers.
    """

    total: Tensor
    per_layer: Tensor | None
