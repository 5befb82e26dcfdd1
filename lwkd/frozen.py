"""Layers that do not train: fine-tuning leaves what a network learned before as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lwkd.names import find_layers, unwrap

_OP = "freeze"


class _Stay:
    """What a frozen module has in place of its ``train``: what ``train`` of its holder calls.

    It goes with copies and into pickles. How often the module is frozen stands here, and what it
    was before the first time.
    """

    def __init__(self, module: nn.Module, training: bool, trained: set[nn.Parameter]) -> None:
        self.module, self.times, self.training = module, 0, training
        self.parameters = [p for p in module.parameters(recurse=False) if p in trained]

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


class Frozen:
    """What :func:`freeze` returns.

    Attributes:
        layers: The names.
    """

    def __init__(self, network: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.layers = list(layers)
        self._network = network
        self._modules = list(dict.fromkeys(m for own in layers.values() for m in own.modules()))
        # What was frozen before trains, too, once nothing holds it.
        trained = {p for p in network.parameters() if p.requires_grad}
        trained.update(p for stay in _frozen(network) for p in stay.parameters)
        for module, training in {m: m.training for m in self._modules}.items():
            stay = vars(module).get("train")
            if not isinstance(stay, _Stay):
                stay = _Stay(module, training, trained)
                module.eval()
                module.train = stay  # type: ignore[method-assign]
            stay.times += 1
        for module in self._modules:
            for p in module.parameters(recurse=False):
                p.requires_grad_(False)

    def remove(self) -> None:
        """Let the layers train again, but for what another ``freeze`` holds.

        Parameters, modes and ``train`` are what they were before the first.
        """
        free: dict[nn.Parameter, None] = {}
        for module in self._modules:
            stay = vars(module)["train"]
            stay.times -= 1
            if not stay.times:
                del vars(module)["train"]
                module.training = stay.training
                free.update(dict.fromkeys(stay.parameters))
        self._modules = []
        held = {p for stay in _frozen(self._network) for p in stay.parameters}  # tied ones
        for p in free:
            if p not in held:
                p.requires_grad_(True)


def freeze(model: nn.Module, layers: Sequence[str]) -> Frozen:
    """Stop the training of some layers, their BatchNorm statistics and dropout with it.

    Parameters do not require gradients, and the modules stay in eval mode whatever
    ``model.train()`` does later: without that BatchNorm would go on following the new data, and
    what the layers put out would change although their weights do not. Call it before the optimizer
    is made (:func:`lwkd.param_groups_layerwise` leaves frozen parameters out) and before DDP is put
    around.

    A layer may be frozen several times, and trains again when all of them are removed. To unfreeze
    a network stage by stage, freeze every stage by itself and remove one after the other, each time
    with a new optimizer (and DDP): the last one does not know the parameters that come back.

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
    network = unwrap(model)
    return Frozen(network, find_layers(_OP, "layers", network, layers))


def _frozen(network: nn.Module) -> list[_Stay]:
    """What the frozen modules of a network have in place of ``train``."""
    found = (vars(module).get("train") for module in network.modules())
    return [stay for stay in found if isinstance(stay, _Stay)]
