"""Names of the modules inside a network, as ``named_modules()`` of the plain network has them.

What ``DistributedDataParallel`` (``module.``) and ``torch.compile`` (``_orig_mod.``) put in front
of them is stripped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lwkd.ops.checks import message, suggest

_WRAPPERS = ("module", "_orig_mod")


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return what a DDP, torch.compile or averaging wrapper holds, or None for other modules."""
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    return module.module if isinstance(module, wrappers) else None


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside DDP, torch.compile or averaging wrappers.

    >>> plain = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(plain)) is plain
    True
    """
    while (inner := _wrapped(network)) is not None:
        network = inner
    return network


def named_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return every module inside a network by its name, wrappers looked through.

    Args:
        network: The network.

    Returns:
        name -> module in definition order, without the network itself; a module that has two names
        is there twice.

    >>> list(named_layers(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(2, 2))))
    ['0', '0.0', '1']
    """
    layers: dict[str, nn.Module] = {}
    for name, child in unwrap(network)._modules.items():
        if child is not None:
            layers[name] = unwrap(child)
            layers.update((f"{name}.{k}", m) for k, m in named_layers(child).items())
    return layers


def find_layers(op: str, argument: str, network: nn.Module, names: object) -> dict[str, nn.Module]:
    """Return modules by the names that somebody has given, wrappers stripped.

    Args:
        op: The public name of the caller, for errors.
        argument: Likewise.
        network: The network.
        names: What is to be a list of names of its modules.

    Raises:
        TypeError: No list.
        ValueError: An unknown name.

    >>> list(find_layers("example", "layers", nn.Sequential(nn.ReLU()), ["module.0"]))
    ['0']
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(message(op, argument, "a list of names of modules", repr(names)))
    known, found = named_layers(network), {}
    for name in names:
        plain = plain_name(name, known) if isinstance(name, str) else name
        if plain not in known:
            hint = suggest(plain, known) if isinstance(plain, str) else ""
            raise ValueError(message(op, argument, "names of modules", f"{name!r}{hint}"))
        found[plain] = known[plain]
    return found


def plain_name(name: str, layers: Iterable[str]) -> str:
    """Strip ``module.`` and ``_orig_mod.`` from a name, unless a layer is really called so.

    Args:
        name: The name of a module or parameter.
        layers: The names that exist.

    Returns:
        The name as the plain network has it.

    >>> plain_name("module._orig_mod.layer1.0", ["layer1.0"])
    'layer1.0'
    """
    known = set(layers)
    parts = name.split(".")
    while ".".join(parts) not in known and parts[0] in _WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    if ".".join(parts) in known:
        return ".".join(parts)
    return ".".join(p for p in parts if p not in _WRAPPERS)
