"""AttentionTransfer against the paper's and the authors' formulas, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd.losses import AttentionTransfer
from lwkd.ops import layer_discrepancy

SHAPES = [((3, 4, 6, 6), (3, 7, 6, 6)), ((3, 2, 4, 8), (3, 5, 8, 8)), ((3, 5, 1, 3), (3, 1, 1, 3))]


def draw(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> tuple[list[Tensor], ...]:
    g = torch.Generator().manual_seed(5)
    pairs = [
        [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in p] for p in shapes
    ]
    return [s.requires_grad_() for s, _ in pairs], [t for _, t in pairs]


def distances(student: list[Tensor], teacher: list[Tensor], p: float = 2.0) -> list[Tensor]:
    """D_l [N] in float64 by plain operations."""
    out = []
    for s, t in zip(student, teacher, strict=True):
        maps = [x.double().abs().pow(p).sum(1) for x in (s, t)]
        size = tuple(min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True))
        q = [F.normalize(F.adaptive_avg_pool2d(m[:, None], size).flatten(1)) for m in maps]
        out.append((q[0] - q[1]).square().sum(1))
    return out


def positions(shapes: Any = SHAPES) -> list[int]:
    return [min(s[2], t[2]) * min(s[3], t[3]) for s, t in shapes]


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("convention", ["code", "paper"])
def test_value_and_gradient(convention: str, p: float) -> None:
    student, teacher = draw()
    terms = AttentionTransfer(7.0, convention=convention, p=p)(student, teacher)
    d = distances(student, teacher, p)
    if convention == "code":
        total = 7.0 * sum(x.mean() / n for x, n in zip(d, positions(), strict=True))
    else:
        total = 7.0 * sum(0.5 * x.sqrt().mean() for x in d)
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.per_layer, torch.stack([x.mean() for x in d]))
    expected = torch.autograd.grad(total, student)
    got = torch.autograd.grad(terms.total, student)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_code_is_what_the_authors_compute() -> None:
    """Their at() has the mean over channels and their at_loss the mean over all entries."""
    student, teacher = draw(shapes=SHAPES[:1])
    s, t = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student[0], teacher[0]))
    total = AttentionTransfer(1e3)(student, teacher).total
    torch.testing.assert_close(total, 1e3 * (s - t).pow(2).mean())


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_equal_networks_are_at_zero_with_gradient_zero(convention: str) -> None:
    student, _ = draw(torch.float32)
    terms = AttentionTransfer(convention=convention)(student, [x.detach() for x in student])
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(x.grad is not None and x.grad.count_nonzero() == 0 for x in student)


def test_one_equal_sample_leaves_the_others_gradient() -> None:
    student, teacher = draw(shapes=[((2, 4, 3, 3), (2, 4, 3, 3))])
    teacher[0][0] = student[0].detach()[0]
    AttentionTransfer(convention="paper")(student, teacher).total.backward()
    assert student[0].grad is not None
    assert student[0].grad[0].count_nonzero() == 0
    assert student[0].grad[1].isfinite().all()
    assert student[0].grad[1].count_nonzero() > 0


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_a_nan_comes_out(convention: str) -> None:
    """Fault 10: nothing swallows it."""
    student, teacher = draw(torch.float32)
    with torch.no_grad():
        student[1][0, 0, 0, 0] = float("nan")
    terms = AttentionTransfer(convention=convention)(student, teacher)
    assert terms.total.isnan()
    assert terms.per_layer is not None
    assert terms.per_layer.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_per_layer_is_the_distance_of_the_op(convention: str) -> None:
    student, teacher = draw(torch.bfloat16)
    terms = AttentionTransfer(123.0, convention=convention)(student, teacher)
    assert terms.per_layer is not None
    assert terms.per_layer.dtype == torch.float32
    torch.testing.assert_close(terms.per_layer, layer_discrepancy(student, teacher))


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_the_teacher_gets_no_gradient(convention: str) -> None:
    student, teacher = draw()
    teacher = [t.requires_grad_() for t in teacher]
    AttentionTransfer(convention=convention)(student, teacher).total.backward()
    assert [t.grad for t in teacher] == [None, None, None]


def test_per_layer_can_be_trained_through() -> None:
    student, teacher = draw()
    terms = AttentionTransfer()(student, teacher)
    assert terms.per_layer is not None
    got = torch.autograd.grad(terms.per_layer.sum(), student)
    expected = torch.autograd.grad(sum(x.mean() for x in distances(student, teacher)), student)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_tokens_channels_last_and_mask() -> None:
    """A transformer's tokens against an image grid: the same numbers as on the folded tensors."""
    student, teacher = draw(shapes=[((3, 4, 2, 3), (3, 6, 4, 6))])
    tokens = teacher[0].flatten(2).mT
    prefixed = torch.cat([torch.full((3, 2, 6), 9.0, dtype=tokens.dtype), tokens], 1)
    mask = torch.tensor([[[True, False, True], [True, True, False]]]).expand(3, 2, 3)
    got = AttentionTransfer(tokens=(None, (4, 6, 2)))(student, [prefixed], mask=[mask])
    same = AttentionTransfer()(student, teacher, mask=[mask])
    torch.testing.assert_close(got.total, same.total)
    maps = [x.square().sum(1) for x in (student[0], teacher[0])]
    maps = [F.adaptive_avg_pool2d(m, (2, 3)) * mask for m in maps]
    q = [F.normalize(m.flatten(1)) for m in maps]
    torch.testing.assert_close(same.total, 1e3 * (q[0] - q[1]).square().sum(1).mean() / 6)


@pytest.mark.parametrize("channel_dim", [(1, 3), (-3, -1), [(1, 3), (1, -1), (1, 3)]])
def test_channel_dims(channel_dim: Any) -> None:
    student, teacher = draw()
    last = [t.movedim(1, 3) for t in teacher]
    got = AttentionTransfer(channel_dim=channel_dim)(student, last)
    torch.testing.assert_close(got.total, AttentionTransfer()(student, teacher).total)


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_an_empty_batch_costs_nothing(convention: str) -> None:
    """Fault 9: an empty shard of a batch has loss 0, not NaN."""
    student = torch.empty(0, 4, 3, 3, requires_grad=True)
    terms = AttentionTransfer(convention=convention)([student], [torch.empty(0, 2, 3, 3)])
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert terms.per_layer is not None
    assert terms.per_layer.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": -1.0}, "beta: expected a finite number ≥ 0, got -1.0"),
        ({"beta": float("nan")}, "beta: expected a finite number ≥ 0"),
        ({"convention": "papr"}, "convention: expected .* did you mean 'paper'"),
        ({"p": 0.5}, "p: expected a finite number ≥ 1"),
        ({"backend": "cuda"}, "backend: expected None or one of .* got 'cuda'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"lwkd\.losses\.AttentionTransfer: " + text):
        AttentionTransfer(**options)


def test_a_beta_that_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"AttentionTransfer: beta: expected a finite .* got '1'"):
        AttentionTransfer(beta="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("convention", ["code", "paper"])
def test_it_compiles_without_a_graph_break(convention: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    student, teacher = draw(torch.float32)
    loss = AttentionTransfer(convention=convention)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    want, got = loss(student, teacher), compiled(student, teacher)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(terms.total, student) for terms in (got, want)]
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()


def test_wrong_lengths_and_types_are_named() -> None:
    student, teacher = draw()
    loss = AttentionTransfer()
    with pytest.raises(
        ValueError,
        match=r"AttentionTransfer: teacher: expected 3 tensors.* got 2",
    ):
        loss(student, teacher[:2])
    with pytest.raises(ValueError, match=r"mask: expected a list of 3"):
        loss(student, teacher, mask=[None])
    with pytest.raises(TypeError, match=r"teacher: expected a list of tensors"):
        loss(student, teacher[0])
    with pytest.raises(TypeError, match=r"teacher \(layer 1\): expected a tensor, got NoneType"):
        loss(student, [teacher[0], None, teacher[2]])
    with pytest.raises(ValueError, match=r"channel_dim \(layer 0\): expected an int for"):
        loss([x.flatten(2) for x in student], [x.flatten(2) for x in teacher])


def test_repr_shows_the_options() -> None:
    assert repr(AttentionTransfer(2.0)) == "AttentionTransfer(beta=2.0, convention='code', p=2.0)"
