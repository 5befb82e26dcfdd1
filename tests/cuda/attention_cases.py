"""Inputs and float64 answers for the CUDA kernels of the attention kind, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12
NCHW = (1, 0, 0, 0)
# Half the distance between 1 and the next number; an fp32 sum here is at most 64 roundings deep.
UNIT = {torch.float64: 1.2e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
DEPTH = 64


class Case(NamedTuple):
    """The tensors and layouts of one call."""

    student: list[Tensor]
    teacher: list[Tensor]
    mask: list[Tensor]
    s_layout: list[int]
    t_layout: list[int]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.student, *self.teacher]

    @property
    def wide(self) -> bool:
        return any(x.dtype == torch.float64 for x in self.tensors)


def case(student: Tensor, teacher: Tensor, mask: Tensor | None = None, layout=NCHW, t_layout=None):
    """One layer."""
    masks = [] if mask is None else [mask]
    return Case([student], [teacher], masks, [*layout], [*(t_layout or layout)])


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


# --- layouts: each takes a dense [N, C, H, W] and gives its values in another shape of memory -----


def _misaligned(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def _inside(x: Tensor, *pads: int) -> Tensor:
    """The same values as a slice of something larger."""
    return F.pad(x, pads, value=7.0)[tuple(slice(0, s) for s in x.shape)]


def _every_other_channel(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "misaligned": _misaligned,
    "misaligned_channels_last": lambda x: _misaligned(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other_channel": _every_other_channel,
    "rows_of_a_larger_map": lambda x: _inside(x, 0, 3, 0, 1),
    "channels_of_a_wider_map": lambda x: _inside(x, 0, 0, 0, 0, 0, 3),
    "channels_of_a_wider_map_last": lambda x: _inside(
        x.permute(0, 2, 3, 1).contiguous(), 0, 8
    ).permute(0, 3, 1, 2),
    "every_other_sample": lambda x: torch.stack([x, x], dim=1).flatten(0, 1)[::2],
    "one_sample_expanded": lambda x: x[:1].expand_as(x),
    "one_channel_expanded": lambda x: x[:, :1].expand_as(x),
}


# --- the definition, in float64 -------------------------------------------------------------------


def canonical(x: Tensor, layout: Sequence[int]) -> Tensor:
    channel, prefix, h, w = layout
    x = x.movedim(channel, 1)
    return x[:, :, prefix:].unflatten(2, (h, w)) if h else x


def _pool(m: Tensor, space: Sequence[int]) -> Tensor:
    if list(m.shape[1:]) == list(space):
        return m
    if 0 in space or 0 in m.shape:
        return m[(slice(None), *(slice(0, s) for s in space))]
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(space) - 1]
    return pool(m.unsqueeze(1), tuple(space)).squeeze(1)


def _log(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x)).log()


def _l2(a: Tensor, b: Tensor) -> Tensor:
    def unit(m: Tensor) -> Tensor:
        return m / torch.linalg.vector_norm(m, dim=1, keepdim=True).clamp_min(EPS)

    return (unit(a) - unit(b)).square().sum(1)


def _js(a: Tensor, b: Tensor, keep: Tensor, beta: float) -> Tensor:
    def shares(m: Tensor) -> Tensor:
        total = m.sum(1, keepdim=True)
        uniform = keep / keep.sum(1, keepdim=True).clamp_min(1)
        return torch.where(total == 0, uniform, m / torch.where(total == 0, 1, total))

    ps, pt = shares(a), shares(b)
    mix = beta * ps + (1 - beta) * pt
    terms = beta * ps * (_log(ps) - _log(mix)) + (1 - beta) * pt * (_log(pt) - _log(mix))
    return terms.sum(1)


class Answer(NamedTuple):
    distance: Tensor  # [L, N]
    maps: list[Tensor]  # 2 L of [N, P]
    gradients: list[Tensor]  # of Σ weight·D, student's then teacher's


def answer(c: Case, p: float, divergence: int, beta: float, weight: Tensor) -> Answer:
    """Distances, maps and gradients of (weight·D).sum() from the definition, by autograd."""
    leaves = [x.detach().double().requires_grad_() for x in c.tensors]
    length, distances, maps = len(c.student), [], []
    for i in range(length):
        pair = [
            canonical(leaves[i], c.s_layout[4 * i : 4 * i + 4]),
            canonical(leaves[length + i], c.t_layout[4 * i : 4 * i + 4]),
        ]
        space = [min(a, b) for a, b in zip(pair[0].shape[2:], pair[1].shape[2:], strict=True)]
        both = [_pool(x.abs().pow(p).sum(1), space).flatten(1) for x in pair]
        keep = torch.ones_like(both[0], dtype=torch.bool)
        if c.mask and c.mask[i].dim() > 1:
            keep = c.mask[i].reshape(keep.shape)
        both = [torch.where(keep, m, torch.zeros_like(m)) for m in both]
        d = _l2(*both) if divergence == 0 else _js(both[0], both[1], keep, beta)
        distances.append(d)
        maps += [m.detach() for m in both]
    d = torch.stack(distances)
    grads = torch.autograd.grad((d * weight.double()).sum(), leaves)
    return Answer(d.detach(), maps, list(grads))


# --- one call, checked ----------------------------------------------------------------------------


def spaces(c: Case) -> list[int]:
    flat = []
    for i in range(len(c.student)):
        a = canonical(c.student[i], c.s_layout[4 * i : 4 * i + 4]).shape[2:]
        b = canonical(c.teacher[i], c.t_layout[4 * i : 4 * i + 4]).shape[2:]
        space = [min(x, y) for x, y in zip(a, b, strict=True)]
        flat += [1] * (3 - len(space)) + space
    return flat


def call(ops: Any, c: Case, p: float, divergence: int, beta: float, mean: bool):
    return ops.attention(
        c.student, c.teacher, c.mask, c.s_layout, c.t_layout, p, divergence, beta, mean
    )


def call_backward(
    ops: Any, c: Case, maps: Tensor, grad: Tensor, p: float, divergence: int, beta: float
):
    length = len(c.student)
    return ops.attention_backward(
        grad, c.tensors, c.mask, maps, [*range(length)] * 2, [0] * length + [1] * length,
        [*c.s_layout, *c.t_layout], spaces(c), p, divergence, beta,
    )  # fmt: skip


def close(got: Tensor, wanted: Tensor, bound: Tensor | float, what: str) -> None:
    got, wanted = got.detach().double().cpu(), wanted.double().cpu()
    assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
    assert torch.equal(got.isnan(), wanted.isnan()), f"{what}: NaN at other places"
    error = (got - wanted).abs().nan_to_num(0.0, 0.0, 0.0)
    worst = (error - torch.as_tensor(bound).double().cpu()).max().item() if error.numel() else -1.0
    assert worst <= 0, f"{what}: error {error.max().item():.3e}, {worst:.3e} above the bound"


def check(
    ops: Any, c: Case, p: float = 2.0, divergence: int = 0, beta: float = 0.5, depth: int = DEPTH
) -> None:
    """Run forward, with and without the mean, and backward; compare all with the definition."""
    length, n = len(c.student), c.student[0].shape[0]
    unit = depth * UNIT[torch.float64 if c.wide else torch.float32]
    weight = torch.rand(length, n, device=c.student[0].device) + 0.5
    wanted = answer(c, p, divergence, beta, weight)
    each, maps = call(ops, c, p, divergence, beta, False)
    mean, again = call(ops, c, p, divergence, beta, True)
    assert torch.equal(maps, again) or maps.isnan().any()
    flat = torch.cat([m.flatten() for m in wanted.maps])
    close(maps, flat, unit * flat + 1e-37, "maps")
    # D = Σ(q_S − q_T)²: a relative error u of the maps gives 2·√D·2u and, next to 0, (2u)². The
    # logarithms of the definition cancel next to 0, to some 1e-15 a term.
    bound = 4 * unit * wanted.distance.clamp_min(0).sqrt() + 4 * unit**2 + 1e-14
    close(each, wanted.distance, bound, "distance")
    close(mean, wanted.distance.sum(1) / max(n, 1), bound.sum(1) / max(n, 1), "mean")
    grads = call_backward(ops, c, maps, weight.to(maps.dtype), p, divergence, beta)
    for x, got, ref in zip(c.tensors, grads, wanted.gradients, strict=True):
        assert got.dtype == x.dtype
        assert got.stride() == torch.empty_like(x).stride()
        scale = ref.abs().flatten(1).amax(1).view(-1, *[1] * (ref.dim() - 1)) if ref.numel() else 0
        close(got, ref, 1.1 * UNIT[x.dtype] * ref.abs() + 8 * unit * scale + 1e-7, "gradient")
