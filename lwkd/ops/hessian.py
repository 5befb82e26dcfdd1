"""The Hessian kind: probes that are never stored, and how far two networks' traces are apart.

With H_l the Hessian of the loss by parameter tensor l, and v_k random signs,

    probe_dot   q[l,k] = ⟨v_k, h⟩ = Σ_e v_k[e]·h[e],  h = (H v_k)_l        E q[l,k] = tr H_l
    distance    d_l = |tr_S − tr_T| / (|tr_S| + |tr_T| + eps)              normalize=True, in [0, 1]
                d_l = |tr_S/numel_S − tr_T/numel_T|                        normalize=False

The signs are a function of (seed, layer, probe, element), lwkd.ops.philox: student and teacher see
the same ones, and whoever needs them again makes them again. Sums are in float64.
Sources: Hutchinson 1990; Yao et al. 2020 (PyHessian).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.ops import backends, operands, philox
from lwkd.ops.checks import flag, message

EPS = 1e-12
_WORD = 2**32

# --- the boundary: every argument is checked here, once ----------------------------------------


def signs(op: str, like: Tensor, seed: int, layer: int, probe: int, backend: str | None) -> Tensor:
    """Check the arguments of ops.rademacher and call the op."""
    operands.check_list(op, "like", [like])
    namespace = RADEMACHER.choose(op, backend, like.device)
    options = seed_of(op, seed), index(op, "layer", layer), index(op, "probe", probe)
    out: Tensor = RADEMACHER(namespace, like.detach(), *options)
    return out


def dot(
    op: str,
    hvps: Sequence[Tensor],
    seed: int,
    probe: int,
    backend: str | None,
    *,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Check the arguments of ops.probe_dot and call the op; ``layers``: of the signs."""
    operands.check_list(op, "hvps", hvps)
    layers = list(range(len(hvps))) if layers is None else list(layers)
    namespace = PROBE_DOT.choose(op, backend, hvps[0].device)
    first = index(op, "probe", probe)
    out: Tensor = PROBE_DOT(namespace, hvps, layers, seed_of(op, seed), first, 0)
    return out


def discrepancy(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    reduction: str,
    backend: str | None,
    *,
    seed: int = 0,
    normalize: bool = True,
) -> Tensor:
    """Check the arguments of kind="hessian" and call the op; see ops.layer_discrepancy."""
    flag(op, "normalize", normalize)
    if reduction != "mean":
        expected = "'mean' for kind='hessian': traces are means over probes"
        raise ValueError(message(op, "reduction", expected, repr(reduction)))
    sides = []
    for argument, hvps in (("student", student), ("teacher", teacher)):
        for i, shape in enumerate(operands.check_list(op, argument, hvps)):
            if not shape or shape[0] < 1:
                expected = "Hessian-vector products [K, *parameter], K ≥ 1 probes"
                raise ValueError(message(op, argument, expected, list(shape), layer=i))
            if shape[0] != hvps[0].shape[0]:
                expected = f"{hvps[0].shape[0]} probes, as layer 0"
                raise ValueError(message(op, argument, expected, shape[0], layer=i))
        namespace = PROBE_DOT.choose(op, backend, hvps[0].device)
        layers, probes = list(range(len(hvps))), hvps[0].shape[0]
        samples = PROBE_DOT(namespace, hvps, layers, seed_of(op, seed), 0, probes)
        sides.append((samples.mean(1), [h[0].numel() for h in hvps]))
    if len(student) != len(teacher):
        expected = f"{len(student)} tensors, as many as student"
        raise ValueError(message(op, "teacher", expected, len(teacher)))
    (s, s_numel), (t, t_numel) = sides
    return distance(s, t.to(s.device), s_numel, t_numel, normalize)


def traces(
    op: str, tr_s: Tensor, tr_t: Tensor, numel_s: Any, numel_t: Any, normalize: bool
) -> Tensor:
    """Check the arguments of ops.trace_discrepancy and compute it."""
    flag(op, "normalize", normalize)
    for argument, x in (("tr_s", tr_s), ("tr_t", tr_t)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(message(op, argument, "a floating tensor [L]", got))
        if x.dim() != 1 or x.shape != tr_s.shape or x.device != tr_s.device:
            expected = f"[L], as tr_s, on {tr_s.device}"
            raise ValueError(message(op, argument, expected, f"{list(x.shape)} on {x.device}"))
    counts: list[Sequence[int]] = []
    for argument, numel in (("numel_s", numel_s), ("numel_t", numel_t)):
        values = numel.tolist() if isinstance(numel, Tensor) else numel
        good = isinstance(values, (list, tuple)) and len(values) == len(tr_s)
        if not good or not all(type(v) is int and v > 0 for v in values):
            expected = f"{len(tr_s)} whole numbers > 0, how many parameters a layer has"
            raise ValueError(message(op, argument, expected, repr(numel)))
        counts.append(values)
    return distance(tr_s, tr_t, counts[0], counts[1], normalize)


def distance(
    s: Tensor, t: Tensor, s_numel: Sequence[int], t_numel: Sequence[int], normalize: bool
) -> Tensor:
    """Distances [L] of traces [L]."""
    if normalize:
        return (s - t).abs() / (s.abs() + t.abs() + EPS)
    sizes = [torch.tensor(n, dtype=s.dtype, device=s.device) for n in (s_numel, t_numel)]
    return (s / sizes[0] - t / sizes[1]).abs()


def seed_of(op: str, seed: object) -> int:
    """A seed of 64 bits as the ops take it, in two's complement."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ValueError(message(op, "seed", "an int of 64 bits", repr(seed)))
    return seed - 2**64 if seed >= 2**63 else seed


def index(op: str, argument: str, value: object) -> int:
    """A word of the counter."""
    if type(value) is not int or not 0 <= value < _WORD:
        raise ValueError(message(op, argument, "an int in [0, 2³²)", repr(value)))
    return value


# --- reference, fake, autograd -------------------------------------------------------------------


def _signs(like: Tensor, seed: int, layer: int, probe: int) -> Tensor:
    return torch.empty_like(like).copy_(philox.signs(like, seed, layer, probe))


def _probe_dot(
    hvps: Sequence[Tensor], layers: list[int], seed: int, probe: int, probes: int
) -> Tensor:
    dtype = operands.compute_dtype(hvps)
    out = []
    for h, layer in zip(hvps, layers, strict=True):
        parts = h.unbind() if probes else [h]
        out += [
            (philox.signs(part, seed, layer, probe + k).double() * part.double()).sum()
            for k, part in enumerate(parts)
        ]
    shape = (len(hvps), probes) if probes else (len(hvps),)
    return torch.stack(out).to(dtype).reshape(shape)


def _fake_signs(like: Tensor, seed: int, layer: int, probe: int) -> Tensor:
    return torch.empty_like(like)


def _fake_probe_dot(
    hvps: Sequence[Tensor], layers: list[int], seed: int, probe: int, probes: int
) -> Tensor:
    shape = (len(hvps), probes) if probes else (len(hvps),)
    return hvps[0].new_empty(shape, dtype=operands.compute_dtype(hvps))


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    hvps, layers, *ctx.options = args
    chosen = [i for i, h in enumerate(hvps) if h.requires_grad]
    ctx.layers, ctx.chosen = [layers[i] for i in chosen], chosen
    ctx.save_for_backward(*(hvps[i].detach() for i in chosen))


def _backward(ctx: Any, namespace: str, grad: Tensor) -> Sequence[Tensor | None]:
    """g·v, linear in g: derivatives of any order."""
    seed, probe, probes = ctx.options
    grads: list[Tensor | None] = []
    for h, layer, i in zip(ctx.saved_tensors, ctx.layers, ctx.chosen, strict=True):
        if not probes:
            grads.append((RADEMACHER(namespace, h, seed, layer, probe) * grad[i]).to(h.dtype))
            continue
        rows = [RADEMACHER(namespace, h[k], seed, layer, probe + k) for k in range(probes)]
        weight = grad[i].reshape(-1, *[1] * (h.dim() - 1))
        grads.append((torch.stack(rows) * weight).to(h.dtype))
    return grads


def _nothing(*_: Any) -> list[Tensor]:
    return []


RADEMACHER = backends.Op(
    backends.Formula(
        "rademacher(Tensor like, int seed, int layer, int probe) -> Tensor",
        _signs, _fake_signs, "hessian.rademacher", _nothing, lambda *_: None, _nothing,
    )
)  # fmt: skip
PROBE_DOT = backends.Op(
    backends.Formula(
        "probe_dot(Tensor[] hvps, int[] layers, int seed, int probe, int probes) -> Tensor",
        _probe_dot, _fake_probe_dot, "hessian.probe_dot", lambda hvps, *_: list(hvps), _save,
        _backward,
    )
)  # fmt: skip
