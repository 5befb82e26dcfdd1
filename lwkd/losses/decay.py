"""Decay of weights as a loss: towards nothing (L2), or towards where they started (L2-SP).

Both read the network's parameters when they are called: a head that was replaced since, or layers
that train again, are no special case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lwkd.losses.terms import LossTerms
from lwkd.names import find_layers, named_layers, unwrap
from lwkd.ops.checks import message, number


class L2(nn.Module):
    """Decay of the weights of some layers: ``total = β·Σ ½‖w‖²``, every weight once.

    What L2-SP and DELTA do to a new head; an optimizer's ``weight_decay=β`` has the same gradient.
    Parameters that are frozen when the loss is called do not count.

    Args:
        model: The network; wrappers are looked through.
        layers: Names of the L modules whose parameters decay; None: the whole network, ``layers``
            being those that have trained parameters of their own.
        beta: β ≥ 0.

    Attributes:
        layers: The names, for ``pair_layers(model, teacher, loss.layers)``.

    Raises:
        ValueError: beta out of range, no or an unknown name, a layer without parameters.
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
        self._network = (network,)  # in a tuple: it is no part of this module
        self._whole = layers is None
        self.layers = _names(op, network, layers, _inside([network]))

    def forward(self) -> LossTerms:
        """Compute the loss.

        Returns:
            ``total``, and ``per_layer`` [L]: ½‖w_l‖², without β.

        Raises:
            ValueError: A layer is gone.
        """
        (network,) = self._network
        own = list(find_layers("losses.L2", "layers", network, self.layers).values())
        inside = [network] if self._whole else own
        weights = {p: p for m in inside for p in m.parameters() if p.requires_grad}
        total, d = _half_squares(network, weights, own, recurse=not self._whole)
        return LossTerms(self.beta * total, d)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"{self.layers}, beta={self.beta}"


class L2SP(nn.Module):
    """Decay of a fine-tuned network's weights towards those that it started from.

    ``total = α·½‖w − w⁰‖² + β·½‖w_head‖²``

    over the parameters that are not frozen when the loss is called: w of the body, with w⁰ their
    values in the source network, and of the new head, which has none there. Source: Li, Grandvalet
    & Davoine 2018.

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
        ValueError: alpha or beta out of range, no or an unknown name, a layer of the head or
            without parameters, a source of another architecture or with parameters of the model.
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
        self._network = (network,)  # in a tuple: it is no part of this module
        heads = find_layers(op, "head", network, head)
        _filled(op, "head", heads, _inside([network]))
        new, self._head = _inside(heads.values()), list(heads)
        body: dict[nn.Parameter, str] = {}
        for name, p in _parameters(network).items():
            if p not in new:
                body.setdefault(p, name)  # of a tied one, the first
        self._whole = layers is None
        self.layers = _names(op, network, layers, body, " outside the head")
        self._source: dict[str, Tensor] | None = None
        if source is not None:
            self._source = _starts(op, network, unwrap(source), body, self._head)
        else:
            for p, name in body.items():
                self.register_buffer(_key(name), p.detach().clone())
        self._body = list(body.values())

    def forward(self) -> LossTerms:
        """Compute the loss.

        Returns:
            ``total``, and ``per_layer`` [L]: ½‖w_l − w_l⁰‖², without α.

        Raises:
            ValueError: The source is on another device, or a parameter of the body is gone.
        """
        op, (network,) = "losses.L2SP", self._network
        starts = self._source or {name: getattr(self, _key(name)) for name in self._body}
        now, moved = _parameters(network), {}
        for name, start in starts.items():
            p = now.get(name)
            if p is None or p.shape != start.shape:
                expected = f"{name} {list(start.shape)} as when the loss was made"
                got = "none" if p is None else list(p.shape)
                raise ValueError(message(op, "model", expected, got))
            if p.device != start.device:
                expected = f"weights on {p.device}, as the model's (source.to or loss.to)"
                raise ValueError(message(op, "source", expected, start.device))
            if p.requires_grad:
                moved[p] = p - start.detach()
        own = find_layers(op, "layers", network, self.layers).values()
        total, d = _half_squares(network, moved, own, recurse=not self._whole)
        total = self.alpha * total
        new = _inside(find_layers(op, "head", network, self._head).values())
        if new:
            weights = {p: p for p in new if p.requires_grad}
            total = total + self.beta * _half_squares(network, weights)[0]
        return LossTerms(total, d)

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        return f"{self.layers}, alpha={self.alpha}, beta={self.beta}"


# --- small things --------------------------------------------------------------------------------


def _weight(op: str, argument: str, value: object) -> None:
    number(op, argument, value, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)


def _key(name: str) -> str:
    """The buffer of a parameter's start; a buffer's name must not have a dot."""
    return f"start/{name.replace('.', '/')}"


def _half_squares(
    network: nn.Module,
    weights: Mapping[nn.Parameter, Tensor],
    layers: Iterable[nn.Module] = (),
    recurse: bool = True,
) -> tuple[Tensor, Tensor]:
    """½‖·‖² of what belongs to the parameters: of all, and by layer."""
    zero = next(network.parameters()).detach().new_zeros((), dtype=torch.float32)  # for no weights
    squares = {
        p: 0.5 * w.square().sum(dtype=torch.promote_types(w.dtype, torch.float32))
        for p, w in weights.items()
    }
    inside = [[squares[p] for p in m.parameters(recurse) if p in squares] for m in layers]
    sums = [torch.stack([zero, *own]).sum() for own in (squares.values(), *inside)]
    return sums[0], torch.stack(sums)[1:]


def _inside(modules: Iterable[nn.Module]) -> dict[nn.Parameter, None]:
    """The parameters of some modules, each once."""
    return dict.fromkeys(p for m in modules for p in m.parameters())


def _parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name in the plain network; a tied one has several."""
    modules = {"": network, **{f"{name}.": m for name, m in named_layers(network).items()}}
    return {
        f"{prefix}{name}": p
        for prefix, module in modules.items()
        for name, p in module._parameters.items()
        if p is not None
    }


def _names(
    op: str,
    network: nn.Module,
    layers: Sequence[str] | None,
    counted: Mapping[nn.Parameter, object],
    where: str = "",
) -> list[str]:
    """The layers that are asked for, or all that have trained parameters of their own."""
    if not counted:
        raise ValueError(message(op, "model", f"parameters{where}", "none"))
    if layers is None:
        trained = {p for p in counted if p.requires_grad}
        modules = named_layers(network).items()
        return [n for n, m in modules if not trained.isdisjoint(m.parameters(recurse=False))]
    found = find_layers(op, "layers", network, layers)
    if not found:
        raise ValueError(message(op, "layers", "one name at least", repr(layers)))
    _filled(op, "layers", found, counted, where)
    return list(found)


def _filled(
    op: str,
    argument: str,
    modules: Mapping[str, nn.Module],
    counted: Mapping[nn.Parameter, object],
    where: str = "",
) -> None:
    """Raise for a module without parameters that count."""
    for name, module in modules.items():
        if not any(p in counted for p in module.parameters()):
            expected = f"a layer with parameters{where}"
            raise ValueError(message(op, argument, expected, "none", layer=name))


def _starts(
    op: str,
    network: nn.Module,
    source: nn.Module,
    body: Mapping[nn.Parameter, str],
    head: Sequence[str],
) -> dict[str, Tensor]:
    """The source's values of the body's parameters; its other ones must be of the head."""
    own, there = _parameters(network), _parameters(source)
    expected = "a network of the model's architecture, "
    for p, name in body.items():
        if name not in there or there[name].shape != p.shape:
            got = str(list(there[name].shape)) if name in there else "none of that name"
            wanted = f"{expected}{name} {list(p.shape)} in it (what is new is named by head=)"
            raise ValueError(message(op, "source", wanted, got, layer=name.rpartition(".")[0]))
    for name, p in there.items():
        layer = name.rpartition(".")[0]
        if p in body:
            wanted = "weights of its own (copy.deepcopy(model); None: a copy is kept)"
            raise ValueError(message(op, "source", wanted, f"the model's {name}", layer=layer))
        if name not in own and not any(name.startswith(f"{new}.") for new in head):
            wanted, got = f"{expected}without {name}", str(list(p.shape))
            raise ValueError(message(op, "source", wanted, got, layer=layer))
    return {name: there[name] for name in body.values()}
