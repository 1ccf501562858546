"""Several clients' networks as one program: their images and weights are stacked, and each layer runs once for all.

A lone small network keeps neither a GPU nor a vector unit busy; a round of clients of one architecture does. K networks
are one of K times the channels whose convolutions, norms and linear layers work in groups, one for each client; what
else there is works channel by channel. Clients keep their own masks, prototypes, batches and random streams, so that
only the order in which a layer adds up its products differs from training them one by one.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from framp_core.data.examples import ClientData, Examples
from framp_core.data.images import IN_CACHE_BYTES, LabelledImages
from framp_core.errors import ModelError
from framp_core.local_training import Batch, LocalResult, LocalTask, Losses, Networks, Objective, train_side_by_side
from framp_core.models import BatchStatistics, Block, FeaturesAndHead, FlatModel
from framp_core.prototypes import Prototypes, local_prototypes

SMALLEST = 2
"""Networks that make a stack."""

_IN_GROUPS = {nn.Conv2d, nn.GroupNorm, BatchStatistics, nn.Linear}
_BY_CHANNEL = {nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity}
_CONTAINERS = {FeaturesAndHead, nn.Sequential, nn.ModuleDict}


def stackable(examples: Examples, network: FeaturesAndHead) -> bool:
    """Whether such networks can be stacked: for images, without dropout, which would draw for all clients alike, and if
    all layers are known to work in groups or channel by channel; a block of layers says so by ``by_channel``.
    """
    if not isinstance(examples, LabelledImages) or network.dropout.p:
        return False
    return all(_keeps_clients_apart(layer) for layer in network.modules() if layer is not network.dropout)


def _keeps_clients_apart(layer: nn.Module) -> bool:
    if isinstance(layer, Block):
        return layer.by_channel
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in _IN_GROUPS | _BY_CHANNEL | _CONTAINERS


class _Linears(nn.Linear):
    """K linear layers side by side: ``(batch, K * inputs)`` to ``(batch, K * outputs)``."""

    def __init__(self, like: nn.Linear, count: int) -> None:
        super().__init__(like.in_features, count * like.out_features, like.bias is not None)
        self.count = count

    def forward(self, inputs: Tensor) -> Tensor:
        own = inputs.view(-1, self.count, self.in_features).transpose(0, 1)
        weights = self.weight.view(self.count, -1, self.in_features).transpose(1, 2)
        if self.bias is None:
            products = torch.bmm(own, weights)
        else:
            products = torch.baddbmm(self.bias.view(self.count, 1, -1), own, weights)
        return products.transpose(0, 1).flatten(1)


def _side_by_side(network: FeaturesAndHead, count: int) -> FeaturesAndHead:
    """K networks as one; what its parameters hold is of no use."""
    wide = copy.deepcopy(network)
    for name, layer in list(wide.named_modules()):
        if isinstance(layer, nn.Linear):
            wide.set_submodule(name, _Linears(layer, count))
            continue
        if isinstance(layer, nn.Conv2d):
            layer.groups, layer.in_channels, layer.out_channels = (
                count * each for each in (layer.groups, layer.in_channels, layer.out_channels)
            )
        elif isinstance(layer, nn.GroupNorm):
            layer.num_groups, layer.num_channels = count * layer.num_groups, count * layer.num_channels
        elif isinstance(layer, BatchStatistics):
            layer.num_features *= count
        for own, parameter in layer.named_parameters(recurse=False):
            setattr(layer, own, nn.Parameter(parameter.detach().repeat(count, *[1] * (parameter.dim() - 1))))
    return wide


class _StackedModel(FlatModel):
    """K networks side by side; their parameters lie tensor by tensor, in each client after client."""

    def __init__(self, model: FlatModel, count: int) -> None:
        super().__init__(_side_by_side(model.model, count), model.flat.device, model.precision)
        self.count, self._sizes = count, model.layout.sizes

    def arranged(self, rows: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.split(rows, self._sizes, dim=1)])

    def rows(self, arranged: Tensor) -> Tensor:
        return torch.stack([torch.cat(parts) for parts in self.places(arranged)])

    def places(self, arranged: Tensor) -> list[list[Tensor]]:
        parts = torch.split(arranged, [self.count * size for size in self._sizes])
        return [list(own) for own in zip(*(part.view(self.count, -1) for part in parts), strict=True)]

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Logits of each exit ``(K, b, C)`` and, last, features ``(K, b, f)``, of ``(b, K * channels, h, w)``."""
        exits, features = self.all_exits(inputs.contiguous(memory_format=torch.channels_last))
        return [each.view(len(inputs), self.count, -1).transpose(0, 1) for each in (*exits, features)]


class StackedNetworks(Networks):
    """K networks of one architecture as one.

    Args:
        model: the architecture, and in which precision its layers run; its own parameters are left alone.
        count: K, at least :data:`SMALLEST`.
        compiled: whether ``torch.compile`` turns the forward and the backward pass into a program each, on a GPU into
            CUDA graphs; it takes a minute or two on first use, for each K.
    """

    parameters: _StackedModel

    def __init__(self, model: FlatModel, count: int, *, compiled: bool = False) -> None:
        self.layout = model.layout
        self.parameters = _StackedModel(model, count)
        self._program = self._program_of(compiled)

    def train(self, tasks: Sequence[LocalTask]) -> list[LocalResult | ModelError]:
        """Train K clients of one ``config.local``, one batch size, and all or none aligned."""
        return train_side_by_side(self, tasks)

    def losses(self, objectives: Sequence[Objective]) -> Losses:
        """See :meth:`Networks.losses`; the batches are images, equally many for all."""
        states = {name: torch.stack([each.state[name] for each in objectives]) for name in objectives[0].state}

        def of(batches: Sequence[Batch]) -> Tensor:
            images, labels = zip(*batches, strict=True)
            computed: Tensor = self._program(objectives[0], states, torch.cat(images, dim=1), torch.stack(labels))
            return computed.clone()  # A CUDA graph's next step writes where this one did.

        return of

    @torch.inference_mode()
    def prototypes(self, clients: Sequence[ClientData]) -> list[Prototypes]:
        """Local prototypes under the weights of the last training, of the same clients in the same order.

        As :func:`framp_core.local_training.client_prototypes`, up to the order of additions. Not for networks with
        batch statistics: batches of fewer images than others are filled up with zeros.
        """
        shape, device = clients[0].shape, self.parameters.flat.device
        size = max(8, IN_CACHE_BYTES // (4 * len(clients) * math.prod(shape)))
        nothing = torch.empty(0, *shape, device=device), torch.empty(0, dtype=torch.int64, device=device)
        batches = [client.train.ordered_batches(size, device) for client in clients]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in clients]
        for own in zip_longest(*batches, fillvalue=nothing):
            inputs = pad_sequence([images for images, _ in own]).flatten(1, 2)  # type: ignore[misc]
            *_, features = self.parameters.outputs(inputs)
            for kept, rows, (_, labels) in zip(found, features, own, strict=True):
                kept.append((rows[: len(labels)], labels))
        merged = [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in found]
        return [local_prototypes(features, labels, clients[0].classes) for features, labels in merged]

    def _program_of(self, compiled: bool) -> Callable[..., Tensor]:
        """Computes the losses ``(K,)`` of an objective, its states, inputs and labels ``(K, b)``."""

        def losses(objective: Objective, states: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            *exits, features = self.parameters.outputs(inputs)
            return objective(states, exits, features, labels)

        if not compiled:
            return losses
        mode = "reduce-overhead" if self.parameters.flat.device.type == "cuda" else "default"
        return torch.compile(losses, mode=mode, dynamic=False)

    def training(self, tasks: Sequence[LocalTask]) -> AbstractContextManager[None]:
        """Nothing to do: networks with dropout are not stacked."""
        return nullcontext()
