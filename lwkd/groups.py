"""Which parameter group belongs to which layer: made for an optimizer, or found in one."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lwkd import rates
from lwkd.layers import LayerPairs
from lwkd.names import named_layers, plain_name
from lwkd.ops import checks
from lwkd.policy import is_number
from lwkd.rates import Rate


def param_groups_layerwise(
    student: nn.Module,
    pairs: LayerPairs,
    *,
    lr: Rate,
    rest_lr: Rate | None = None,
    weight_decay: float = 0.0,
    no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Sort the student's parameters into one optimizer group per (layer, weight decay).

    A parameter belongs to the pair whose student module name is its longest dotted prefix; all
    others are in the groups "rest". Parameters of one dimension or fewer, biases, and those listed
    get no weight decay. Frozen parameters are left out, and a group without parameters too.

    Args:
        student: The network to train, or a wrapper around it.
        pairs: What `pair_layers` returned for it.
        lr: The rate of every group; a floating tensor of one number is cloned per group.
        rest_lr: That of the groups "rest", where it is another one: of a new head, which learns
            faster than the body that was trained before.
        weight_decay: Of the parameters that are decayed.
        no_weight_decay_list: Names of further parameters without weight decay; what wrappers put
            in front of them does not matter.

    Returns:
        Groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``; names are unique,
        the layer's, with "/no_decay" added where its other group is decayed.

    Raises:
        ValueError: A pair without parameters or with a module that was replaced since, a pair whose
            parameters are not in ``student``, a negative rate or decay, a name that is no
            parameter's.
        TypeError: Pairs that are not from `pair_layers`, one string for the list of names, a rate
            or decay of another type.

    >>> from torch import nn
    >>> from lwkd import pair_layers
    >>> net, teacher = (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in "st")
    >>> pairs = pair_layers(net, teacher, pairs=["0"])
    >>> groups = param_groups_layerwise(net, pairs, lr=0.1, weight_decay=1e-4)
    >>> [(g["name"], g["weight_decay"]) for g in groups]
    [('0', 0.0001), ('0/no_decay', 0.0), ('rest', 0.0001), ('rest/no_decay', 0.0)]
    """
    op = "param_groups_layerwise"
    rates.check(op, "lr", lr)
    if rest_lr is not None:
        rates.check(op, "rest_lr", rest_lr)
    if not is_number(weight_decay):
        got = type(weight_decay).__name__
        raise TypeError(checks.message(op, "weight_decay", "a number >= 0", got))
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(checks.message(op, "weight_decay", "a number >= 0", weight_decay))
    owners, names = _owners(pairs, op), _names(pairs)
    _check_student(student, owners, names, op)
    listed = _listed(student, pairs, no_weight_decay_list, op)
    found: dict[tuple[str | None, float], list[nn.Parameter]] = {}
    for name, p in student.named_parameters():
        if p.requires_grad:
            name = names.get(id(p), name)
            bare = p.ndim <= 1 or name.split(".")[-1] == "bias" or id(p) in listed
            found.setdefault((owners.get(id(p)), 0.0 if bare else weight_decay), []).append(p)
    order = [(x, y) for x in (*pairs.names, None) for y in dict.fromkeys((weight_decay, 0.0))]
    groups: list[dict[str, Any]] = []
    for layer, decay in order:
        if (layer, decay) in found:
            title = "rest" if layer is None else layer
            title += "/no_decay" if decay != weight_decay else ""
            while any(group["name"] == title for group in groups):
                title += "_"
            rate = lr if layer is not None or rest_lr is None else rest_lr
            rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
            params = found[layer, decay]
            groups.append(dict(params=params, lr=rate, weight_decay=decay, name=title))
    return groups


def _names(pairs: LayerPairs) -> dict[int, str]:
    """Name the student's parameters, by identity, as the plain network does."""
    named = pairs.student.named_parameters()
    return {id(p): name.replace("_orig_mod.", "") for name, p in named}


def _listed(student: nn.Module, pairs: LayerPairs, wanted: Collection[str], op: str) -> set[int]:
    """Find the parameters that a list names, by identity; a tied one has several names."""
    argument, known = "no_weight_decay_list", dict[str, int]()
    if isinstance(wanted, str):
        raise TypeError(checks.message(op, argument, "a collection of names", "one str"))
    for network in (student, pairs.student):
        for name, p in network.named_parameters(remove_duplicate=False):
            known.update({name: id(p), name.replace("_orig_mod.", ""): id(p)})
    found = set()
    for name in wanted:
        plain = plain_name(str(name), known)
        if plain not in known:
            got = repr(name) + checks.suggest(plain, known)
            raise ValueError(checks.message(op, argument, "names of parameters", got))
        found.add(known[plain])
    return found


def _owners(pairs: LayerPairs, op: str) -> dict[int, str]:
    """Tell the layer of each paired parameter, by identity: the innermost paired module."""
    if not isinstance(pairs, LayerPairs):
        got = type(pairs).__name__
        raise TypeError(checks.message(op, "pairs", "what pair_layers returned", got))
    now = named_layers(pairs.student)
    for name, module in pairs.student_layers:
        if now.get(name) is not module:
            expected, got = "the module that was paired", "another: replaced since pair_layers"
            raise ValueError(checks.message(op, "pairs", expected, got, layer=name))
    owners: dict[int, str] = {}
    for name, module in sorted(pairs.student_layers, key=lambda item: -item[0].count(".")):
        for p in module.parameters():
            owners.setdefault(id(p), name)
    bare = set(pairs.names) - set(owners.values())
    for name in pairs.names:
        if name in bare:
            got = f"none; the nearest that has some is {_nearest(pairs, name)!r}"
            expected = "a student module with parameters of its own"
            raise ValueError(checks.message(op, "pairs", expected, got, layer=name))
    return owners


def _check_student(
    student: nn.Module, owners: dict[int, str], names: dict[int, str], op: str
) -> None:
    there = {id(p) for p in student.parameters()}
    for key, layer in owners.items():
        if key not in there:
            expected, got = "the network that the pairs were made for", f"none with {names[key]!r}"
            raise ValueError(checks.message(op, "student", expected, got, layer=layer))


def _nearest(pairs: LayerPairs, name: str) -> str | None:
    """Return the module with parameters that is nearest in definition order, the earlier of two."""
    modules = named_layers(pairs.student)
    at = list(modules).index(name)
    has = [any(True for _ in m.parameters(recurse=False)) for m in modules.values()]
    near = [(abs(i - at), i) for i, own in enumerate(has) if own and i != at]
    return list(modules)[min(near)[1]] if near else None


def match(optimizer: Optimizer, pairs: LayerPairs) -> list[int | None]:
    """Return the index of each group's layer, None for the rest.

    The paired layers' trainable parameters must all be there. Others need not be: what another
    optimizer trains, or nobody does, is no concern of the rates.
    """
    op = "LayerwiseLR"
    if not isinstance(optimizer, Optimizer):
        got = type(optimizer).__name__
        raise TypeError(checks.message(op, "optimizer", "a torch.optim.Optimizer", got))
    owners, names = _owners(pairs, op), _names(pairs)
    rates.check_all(op, optimizer)
    layers: list[int | None] = []
    for i, group in enumerate(optimizer.param_groups):
        title = repr(group.get("name", i))
        if "lr_scale" in group:
            got = f"{group['lr_scale']} in group {title}; other schedulers would apply it again"
            raise ValueError(checks.message(op, "optimizer", "groups without 'lr_scale'", got))
        inside = {owners.get(id(p)) for p in group["params"]}
        if len(inside) > 1:
            mixed = ", ".join(sorted("the rest" if x is None else repr(x) for x in inside))
            expected = "one layer per group (see lwkd.param_groups_layerwise)"
            raise ValueError(checks.message(op, "optimizer", expected, f"{mixed} in group {title}"))
        layer = next(iter(inside), None)
        layers.append(None if layer is None else pairs.names.index(layer))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in pairs.student.parameters():
        if p.requires_grad and id(p) in owners and id(p) not in held:
            got = f"groups without {names[id(p)]!r}"
            expected = "groups that hold every trainable parameter of the pairs"
            raise ValueError(checks.message(op, "optimizer", expected, got, layer=owners[id(p)]))
    return layers


def keys(optimizer: Optimizer, names: Sequence[str], layers: Sequence[int | None]) -> list[str]:
    """Name every group, uniquely: its own name, else its layer and a number."""
    found: list[str] = []
    for group, layer in zip(optimizer.param_groups, layers, strict=True):
        key = str(group.get("name") or ("rest" if layer is None else names[layer]))
        alike = (f"{key}#{n}" if n else key for n in range(len(found) + 1))
        found.append(next(name for name in alike if name not in found))
    return found
