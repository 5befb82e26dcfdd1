"""Decay of weights as a loss: towards nothing (L2), or towards where they started (L2-SP)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lwkd.losses.terms import LossTerms
from lwkd.names import find_layers, named_layers, unwrap
from lwkd.ops.checks import message, number


class L2(nn.Module):
    """Decay of the weights of some layers: ``total = β·Σ_l ½‖w_l‖²``.

    What L2-SP and DELTA do to a new head; an optimizer's ``weight_decay=β`` has the same gradient.

    Args:
        model: The network; wrappers are looked through.
        layers: Names of the L modules whose trained parameters decay; None: the whole network.
        beta: β ≥ 0.

    Attributes:
        layers: The names.

    Raises:
        ValueError: beta out of range, an unknown name, a layer without trained parameters.
        TypeError: beta is no number, layers no list of names.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> terms = L2(model, ["2"], beta=0.01)()
    >>> terms.total.backward()
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | None = None, *, beta: float = 0.01
    ) -> None:
        super().__init__()
        op = "losses.L2"
        _weight(op, "beta", beta)
        self.beta = float(beta)
        network = unwrap(model)
        own = {"": network}
        if layers is not None:
            own = find_layers(op, "layers", network, layers)
        self.layers = list(own)
        self._weights = [_trained(op, "layers", *item) for item in own.items()]

    def forward(self) -> LossTerms:
        """Compute the loss.

        Returns:
            ``total``, and ``per_layer`` [L]: ½‖w_l‖², without β.
        """
        d = torch.stack([_half_square(own) for own in self._weights])
        return LossTerms(self.beta * d.sum(), d)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"{self.layers}, beta={self.beta}"


class L2SP(nn.Module):
    """Decay of a fine-tuned network's weights towards those that it started from.

    ``total = α·½‖w − w⁰‖² + β·½‖w_head‖²``

    over the trained parameters: w of the body, with w⁰ their values in the source network, and of
    the new head, which has none there. Source: Li, Grandvalet & Davoine 2018.

    Args:
        model: The network that is fine-tuned; wrappers are looked through.
        source: The network that it started from, which must not change any more; None: ``model`` as
            it is now, of which a copy is kept, in the loss's ``state_dict`` too.
        head: Names of the modules that are new.
        layers: Names of the L modules of the body that ``per_layer`` is of; None: all that have
            trained parameters of their own.
        alpha: α ≥ 0.
        beta: β ≥ 0.

    Attributes:
        layers: The names, for ``pair_layers(model, source, loss.layers)``.

    Raises:
        ValueError: alpha or beta out of range, an unknown name, a layer of the head or without
            trained parameters, a source of another architecture.
        TypeError: alpha or beta is no number, head or layers no list of names.

    >>> source = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model[0].load_state_dict(source[0].state_dict())
    <All keys matched successfully>
    >>> loss = L2SP(model, source, head=["2"])
    >>> loss().per_layer.tolist(), loss.layers
    ([0.0], ['0'])
    """

    def __init__(
        self,
        model: nn.Module,
        source: nn.Module | None = None,
        *,
        head: Sequence[str] = (),
        layers: Sequence[str] | None = None,
        alpha: float = 0.01,
        beta: float = 0.01,
    ) -> None:
        super().__init__()
        op = "losses.L2SP"
        _weight(op, "alpha", alpha)
        _weight(op, "beta", beta)
        self.alpha, self.beta = float(alpha), float(beta)
        network = unwrap(model)
        new = find_layers(op, "head", network, head)
        heads = {id(p): p for item in new.items() for p in _trained(op, "head", *item)}
        self._head = list(heads.values())
        body = {n: p for n, p in network.named_parameters()
                if p.requires_grad and id(p) not in heads}  # fmt: skip
        if not body:
            raise ValueError(message(op, "model", "trained parameters outside the head", "none"))
        self._weights = list(body.values())
        self._source: list[Tensor] | None = None
        if source is not None:
            there = dict(unwrap(source).named_parameters())
            self._source = [_partner(op, name, p, there) for name, p in body.items()]
        else:
            for i, p in enumerate(self._weights):
                self.register_buffer(f"start_{i}", p.detach().clone())
        places = {id(p): i for i, p in enumerate(self._weights)}
        inside = {n: [places[id(p)] for p in m.parameters(recurse=layers is not None)
                      if id(p) in places] for n, m in named_layers(network).items()}  # fmt: skip
        if layers is None:
            layers = [n for n, own in inside.items() if own]
        self.layers = list(find_layers(op, "layers", network, layers))
        for name in self.layers:
            if not inside[name]:
                expected = "a layer with trained parameters outside the head"
                raise ValueError(message(op, "layers", expected, "none", layer=name))
        self._inside = [inside[name] for name in self.layers]

    def forward(self) -> LossTerms:
        """Compute the loss.

        Returns:
            ``total``, and ``per_layer`` [L]: ½‖w_l − w_l⁰‖², without α.

        Raises:
            ValueError: The source is on another device.
        """
        starts = self._source or [getattr(self, f"start_{i}") for i in range(len(self._weights))]
        squares = []
        for p, start in zip(self._weights, starts, strict=True):
            if p.device != start.device:
                expected = f"weights on {p.device}, as the model's (source.to or loss.to)"
                raise ValueError(message("losses.L2SP", "source", expected, start.device))
            squares.append(_half_square([p - start.detach()]))
        per_layer = [torch.stack([squares[i] for i in own]).sum() for own in self._inside]
        total = self.alpha * torch.stack(squares).sum()
        if self._head:
            total = total + self.beta * _half_square(self._head)
        return LossTerms(total, torch.stack(per_layer))

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"{self.layers}, alpha={self.alpha}, beta={self.beta}"


# --- small things --------------------------------------------------------------------------------


def _weight(op: str, argument: str, value: object) -> None:
    number(op, argument, value, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)


def _half_square(weights: Iterable[Tensor]) -> Tensor:
    parts = [w.square().sum(dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    return 0.5 * torch.stack(parts).sum()


def _trained(op: str, argument: str, name: str, module: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a module."""
    own = [p for p in module.parameters() if p.requires_grad]
    if not own:
        expected = "a layer with trained parameters"
        raise ValueError(message(op, argument, expected, "none", layer=name))
    return own


def _partner(op: str, name: str, p: Tensor, source: Mapping[str, Tensor]) -> Tensor:
    """The source's parameter of this name and shape."""
    if name not in source or source[name].shape != p.shape:
        expected = f"a network of the model's architecture, {name} {list(p.shape)} in it (what is "
        expected += "new is named by head=)"
        got = list(source[name].shape) if name in source else "none of that name"
        raise ValueError(message(op, "source", expected, got, layer=name.rpartition(".")[0]))
    return source[name]
