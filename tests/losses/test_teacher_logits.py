"""TeacherLogits: what a teacher says of every item, and of no other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lwkd.losses import KnowledgeDistillation, TeacherLogits

N = 11
X, Y = torch.rand(N, 3, 4, 4), torch.arange(N) % 5


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))


class Augmented(Dataset[Any]):
    """Flipped or not, shifted by noise: by all three generators."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = X[i] + 0.1 * torch.rand(())
        return (x.flip(2) if random.random() < 0.5 else x), Y[i]


def test_logits_of_every_item() -> None:
    net = teacher().train()
    data = TeacherLogits(TensorDataset(X, Y), net, batch_size=4)
    assert net.training
    want = net.eval()(X).detach()
    assert len(data) == N
    torch.testing.assert_close(data.logits[0], want)
    x, y, z = data[-1]
    assert torch.equal(x, X[-1])
    assert int(y) == int(Y[-1])
    torch.testing.assert_close(z, want[-1])
    batches = list(DataLoader(data, batch_size=4))
    torch.testing.assert_close(torch.cat([z for *_, z in batches]), want)
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    x, y, z = batches[0]
    KnowledgeDistillation()(student(x), z, y).total.backward()


def test_random_augmentation_is_refused() -> None:
    with pytest.raises(
        ValueError, match="dataset: expected items that are the same every time, or"
    ):
        TeacherLogits(Augmented(), teacher())


def test_augmentation_that_begins_later_is_seen() -> None:
    class Later(Augmented):
        on = False

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return (X[i].flip(2), Y[i]) if self.on else (X[i], Y[i])

    data = TeacherLogits(Later(), teacher())
    Later.on = True
    with pytest.raises(
        ValueError, match="at index 3 another one: random augmentation takes seeds="
    ):
        data[3]


def test_augmentation_from_seeds() -> None:
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    net = teacher()
    torch.set_rng_state(states[0])
    data = TeacherLogits(Augmented(), net, seeds=7, views=3)
    views = []
    for view in (0, 1, 2, 3):
        data.set_view(view)
        items = [data[i] for i in range(N)]
        views.append(torch.stack([x for x, *_ in items]))
        z = torch.stack([z for *_, z in items])
        torch.testing.assert_close(z, net.eval()(views[-1]).detach())
    assert torch.equal(views[0], views[3])  # modulo
    assert not torch.equal(views[0], views[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    again = TeacherLogits(Augmented(), net, seeds=7)
    assert torch.equal(again[4][0], views[0][4])
    assert not torch.equal(TeacherLogits(Augmented(), net, seeds=8)[4][0], views[0][4])


def test_the_generators_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    net = teacher()
    assert seeded == [0]  # torch.manual_seed is seen
    TeacherLogits(Augmented(), net, seeds=7)[0]
    assert seeded == [0]


def test_augmentation_that_seeds_do_not_reach() -> None:
    generator = torch.Generator()

    class Own(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return X[i] * torch.rand((), generator=generator), Y[i]

    with pytest.raises(ValueError, match="dataset: expected items drawn by torch's CPU, Python's"):
        TeacherLogits(Own(), teacher(), seeds=7)


def test_numpys_generator_is_seeded_too() -> None:
    numpy = pytest.importorskip("numpy")

    class ByNumpy(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return X[i] * float(numpy.random.rand()), Y[i]

    numpy.random.seed(5)
    want = numpy.random.rand()
    numpy.random.seed(5)
    data = TeacherLogits(ByNumpy(), teacher(), seeds=1)
    assert torch.equal(data[2][0], data[2][0])
    assert numpy.random.rand() == want


def test_workers_read_it() -> None:
    data = TeacherLogits(Augmented(), teacher(), seeds=7)
    loader = DataLoader(data, batch_size=N, num_workers=2)
    for _ in range(2):
        (batch,) = list(loader)
        assert torch.equal(batch[2], data.logits[0])


def test_errors() -> None:
    plain, net = TensorDataset(X, Y), teacher()

    def call(*args: Any, **options: Any) -> Any:
        return lambda: TeacherLogits(*args, **options)

    for run, kind, text in (
        (call(iter(plain), net), TypeError, "dataset: expected a data set of items by index"),
        (call([], net), ValueError, "dataset: expected one item at least"),
        (call(TensorDataset(X), net), TypeError, r"dataset: expected items \(x, y\)"),
        (call(TensorDataset(Y, Y), net), TypeError, "x a floating tensor"),
        (call(plain, net, views=2), ValueError, "views: expected 1 without seeds"),
        (call(plain, net, views=0, seeds=1), ValueError, "views: expected an int ≥ 1"),
        (call(plain, net, batch_size=0), ValueError, "batch_size: expected an int ≥ 1"),
        (call(plain, net, seeds=0.5), ValueError, "seeds: expected None or an int"),
        (call(plain, nn.Identity()), ValueError, r"teacher: expected finite logits \[11, C\]"),
        (call(TensorDataset(X * torch.nan, Y), net), ValueError, "finite: False"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            run()
