"""A teacher's logits, computed once for a whole data set."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lwkd.hooks import first_tensor, run, untouched
from lwkd.names import unwrap
from lwkd.ops.checks import message

_OP = "losses.TeacherLogits"
_TRIES = 8  # items that are drawn twice before the teacher runs


class TeacherLogits(Dataset[tuple[Any, Any, Tensor]]):
    """A data set with its teacher's logits: items (x, y) become (x, y, z_T).

    The teacher runs once, in eval mode, over every item; training reads its logits from memory.
    That is right only where an item is the same every time. Under random augmentation the logits
    would be of other images than the student sees: such a data set is refused, unless ``seeds``
    says to draw every item's augmentation from a seed of its own, the same in every epoch
    [Beyer et al. 2022: consistent teaching]. ``views`` of them are kept, and ``set_view`` takes the
    next one, in every epoch say.

    Args:
        dataset: Items (x, y) by index 0 … len − 1, x a floating tensor.
        teacher: The network; wrappers are looked through.
        seeds: None: items are the same every time. An int: item i of view v is drawn with torch's
            CPU, Python's and NumPy's generator seeded from (seeds, v, i), and these restored.
        views: How many augmentations of an item to keep, with ``seeds``.
        batch_size: Of the teacher's forward passes.

    Raises:
        ValueError: An empty data set, random augmentation without ``seeds`` or on a GPU, views
            without seeds, an argument out of range, logits that are not [N, C] or not finite.
        TypeError: A data set without a length, items that are no (tensor, target).

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.rand(10, 4), torch.arange(10) % 3)
    >>> cached = TeacherLogits(data, nn.Linear(4, 3))
    >>> x, y, z = next(iter(DataLoader(cached, batch_size=5)))
    >>> z.shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        teacher: nn.Module,
        *,
        seeds: int | None = None,
        views: int = 1,
        batch_size: int = 256,
    ) -> None:
        for name, value in (("views", views), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ValueError(message(_OP, name, "an int ≥ 1", repr(value)))
        if seeds is not None and type(seeds) is not int:
            raise ValueError(message(_OP, "seeds", "None or an int", repr(seeds)))
        if views > 1 and seeds is None:
            expected = "1 without seeds: an item is the same every time"
            raise ValueError(message(_OP, "views", expected, views))
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            expected = "a data set of items by index, with a length"
            raise TypeError(message(_OP, "dataset", expected, type(dataset).__name__))
        if not len(dataset):
            raise ValueError(message(_OP, "dataset", "one item at least", "none"))
        self.dataset, self._seeds, self._views, self._view = dataset, seeds, views, 0
        self._marks = torch.empty(views, len(dataset), dtype=torch.float64)
        self._refuse_random()
        network = unwrap(teacher)
        with untouched(network):
            found = [self._run(network, view, batch_size) for view in range(views)]
        self.logits = torch.stack(found)
        """[views, N, C], on the CPU."""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        index = range(len(self))[index]
        x, y = self._item(self._view, index)
        if not _same(_mark(x), self._marks[self._view, index]):
            expected = "the item that the logits are of"
            got = "another one: random augmentation takes seeds="
            raise ValueError(message(_OP, "dataset", expected, f"at index {index} {got}"))
        return x, y, self.logits[self._view, index]

    def set_view(self, view: int) -> None:
        """Take the items, and their logits, of view ``view`` modulo ``views`` from now on.

        Workers of a DataLoader see it when they start: not with ``persistent_workers``.
        """
        self._view = view % self._views

    def _item(self, view: int, index: int) -> tuple[Tensor, Any]:
        if self._seeds is None:
            item = self.dataset[index]
        else:
            with _seeded((self._seeds * 1_000_003 + view) * 1_000_000_007 + index):
                item = self.dataset[index]
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        if not pair or not isinstance(item[0], Tensor) or not item[0].is_floating_point():
            expected = "items (x, y), x a floating tensor"
            raise TypeError(message(_OP, "dataset", expected, type(item).__name__))
        return item[0], item[1]

    def _refuse_random(self) -> None:
        for index in range(min(len(self), _TRIES)):
            marks = [_mark(self._item(0, index)[0]) for _ in "12"]
            if not _same(*marks):
                expected = "items that are the same every time, or seeds= to draw them from"
                if self._seeds is not None:
                    expected = "items drawn by torch's CPU, Python's or NumPy's generator"
                got = f"item {index}, which is another one the second time"
                raise ValueError(message(_OP, "dataset", expected, got))

    def _run(self, network: nn.Module, view: int, batch_size: int) -> Tensor:
        """The teacher's logits [N, C] of one view."""
        found = []
        for indices in torch.arange(len(self)).split(batch_size):
            xs = [self._item(view, int(i))[0] for i in indices]
            self._marks[view, indices] = torch.stack([_mark(x) for x in xs])
            z = first_tensor(run(_OP, network, torch.stack(xs), "teacher", "dataset"))
            if z is None or z.dim() != 2 or len(z) != len(xs) or not bool(z.isfinite().all()):
                got = (
                    "none" if z is None else f"shape {list(z.shape)}, finite: {z.isfinite().all()}"
                )
                raise ValueError(message(_OP, "teacher", f"finite logits [{len(xs)}, C]", got))
            found.append(z.cpu())
        return torch.cat(found)


def _mark(x: Tensor) -> Tensor:
    """A number that another image, or the same one flipped or shifted, does not have."""
    places = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    return (x.detach().flatten().double() * (places * 0.6180339887498949).frac()).sum().cpu()


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a == b) | ((a - b).abs() <= 1e-9 * b.abs()) | (a.isnan() & b.isnan()))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU, Python's and, where loaded, NumPy's generator, and restore them."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed: the GPUs' too
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
