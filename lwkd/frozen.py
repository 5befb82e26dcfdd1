"""Layers that do not train: fine-tuning leaves what a network learned before as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from lwkd.names import find_layers, unwrap

_OP = "freeze"


class Frozen:
    """What :func:`freeze` returns.

    Attributes:
        layers: The names.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.layers = list(modules)
        inside = dict.fromkeys(m for own in modules.values() for m in own.modules())
        trained = dict.fromkeys(p for m in inside for p in m.parameters(recurse=False))
        self._parameters = [p for p in trained if p.requires_grad]
        self._modes = {m: m.training for m in inside}
        for p in self._parameters:
            p.requires_grad_(False)
        for module in inside:
            module.eval()
            # What `train` of whatever holds it calls; it goes with copies and into pickles.
            module.train = partial(_stay, module)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Let the layers train again: parameters, modes and ``train`` are what they were."""
        for p in self._parameters:
            p.requires_grad_(True)
        for module, training in self._modes.items():
            vars(module).pop("train", None)
            module.training = training
        self._parameters, self._modes = [], {}


def freeze(model: nn.Module, layers: Sequence[str]) -> Frozen:
    """Stop the training of some layers, their BatchNorm statistics and dropout with it.

    Parameters do not require gradients, and the modules stay in eval mode whatever
    ``model.train()`` does later: without that BatchNorm would go on following the new data, and
    what the layers put out would change although their weights do not. Call it before the optimizer
    is made (:func:`lwkd.param_groups_layerwise` leaves frozen parameters out) and before DDP is put
    around.

    Args:
        model: The network; wrappers are looked through.
        layers: Names of its modules.

    Returns:
        Its ``remove()`` undoes it.

    Raises:
        TypeError: Layers that are no list of names.
        ValueError: An unknown name.

    >>> import torch
    >>> body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
    >>> model = nn.Sequential(*body, nn.Linear(144, 2))
    >>> frozen = freeze(model, ["0", "1"])
    >>> _ = model.train()(torch.rand(8, 1, 8, 8))
    >>> int(model[1].num_batches_tracked)
    0
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['3.weight', '3.bias']
    >>> frozen.remove()
    """
    return Frozen(find_layers(_OP, "layers", unwrap(model), layers))


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """``module.train`` of a frozen one."""
    return module
