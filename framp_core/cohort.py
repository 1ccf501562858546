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
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from framp_core.data.examples import ClientData, Examples
from framp_core.data.images import IN_CACHE_BYTES, LabelledImages
from framp_core.errors import ModelError
from framp_core.local_training import Batch, LocalResult, LocalTask, Losses, Networks, Objective, train_side_by_side
from framp_core.models import BatchStatistics, Block, FeaturesAndHead, FlatModel, FlatParameters
from framp_core.prototypes import Prototypes, local_prototypes

SMALLEST = 2
"""Networks that make a stack."""

_IN_GROUPS = {nn.Conv2d, nn.GroupNorm, BatchStatistics, nn.Linear}
_BY_CHANNEL = {nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity}
_CONTAINERS = {FeaturesAndHead, nn.Sequential, nn.ModuleDict}


def stackable(examples: Examples, network: FeaturesAndHead) -> bool:
    """Whether such networks can be stacked: for images, without dropout, which would draw for all clients alike, and if
    all layers are known to work in groups or channel by channel; a block of layers says so by ``by_channel``.
    """
    if not isinstance(examples, LabelledImages) or network.dropout.p:
        return False
    parts = (layer for layer in network.modules() if layer is not network.dropout)
    return all(
        layer.by_channel if isinstance(layer, Block) else type(layer) in _IN_GROUPS | _BY_CHANNEL | _CONTAINERS
        for layer in parts
    )


class _Linears(nn.Linear):
    """K linear layers side by side: ``(batch, K * inputs)`` to ``(batch, K * outputs)``."""

    def __init__(self, like: nn.Linear, count: int) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None, like.weight.device)
        self.count = count

    def forward(self, inputs: Tensor) -> Tensor:
        own = inputs.view(-1, self.count, self.in_features).transpose(0, 1)
        weights = self.weight.view(self.count, self.out_features, self.in_features).transpose(1, 2)
        if self.bias is None:
            return torch.bmm(own, weights).transpose(0, 1).flatten(1)
        bias = self.bias.view(self.count, 1, self.out_features)
        return torch.baddbmm(bias, own, weights).transpose(0, 1).flatten(1)


class _AllExits(nn.Module):
    """The structure of K networks side by side, without memory for parameters of its own."""

    def __init__(self, network: FeaturesAndHead, count: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to("meta")
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, nn.Conv2d):
                layer.groups *= count
            elif isinstance(layer, nn.GroupNorm):
                layer.num_groups *= count
            elif isinstance(layer, nn.Linear):
                self.network.set_submodule(name, _Linears(layer, count))

    def forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.network.all_exits(inputs)


class StackedNetworks(Networks):
    """K networks of one architecture whose parameters are the rows of one matrix.

    Args:
        model: the architecture, and in which precision its layers run; its own parameters are left alone.
        count: K, at least :data:`SMALLEST`.
        compiled: whether ``torch.compile`` turns the forward and the backward pass into a program each, on a GPU into
            CUDA graphs; it takes a minute or two on first use, for each K.
    """

    def __init__(self, model: FlatModel, count: int, *, compiled: bool = False) -> None:
        self._autocast = model.autocast
        self._exits = _AllExits(model.model, count)
        self._names = [name for name, _ in self._exits.named_parameters()]
        zeros = torch.zeros(count, model.layout.size, device=model.flat.device)
        self.parameters = FlatParameters(model.layout, zeros, torch.zeros_like(zeros))
        self._program = self._program_of(compiled)

    def train(self, tasks: Sequence[LocalTask]) -> list[LocalResult | ModelError]:
        """Train K clients of one ``config.local``, one batch size, and all or none aligned."""
        return train_side_by_side(self, tasks)

    def losses(self, objectives: Sequence[Objective]) -> Losses:
        """See :meth:`Networks.losses`; the batches are images, equally many for all."""
        states = {name: torch.stack([each.state[name] for each in objectives]) for name in objectives[0].state}

        def of(batches: Sequence[Batch]) -> Tensor:
            images, labels = zip(*batches, strict=True)
            inputs, flat = torch.cat(images, dim=1), self.parameters.flat
            computed: Tensor = self._program(objectives[0], flat, states, inputs, torch.stack(labels))
            return computed.clone()  # A CUDA graph's next step writes where this one did.

        return of

    @torch.inference_mode()
    def prototypes(self, clients: Sequence[ClientData]) -> list[Prototypes]:
        """Local prototypes under the weights of the last training, of the same clients in the same order.

        As :func:`framp_core.local_training.client_prototypes`, up to the order of additions. Not for networks with
        batch statistics: batches of fewer images than others are filled up with black ones.
        """
        shape, device = clients[0].shape, self.parameters.flat.device
        size = max(8, IN_CACHE_BYTES // (4 * len(clients) * math.prod(shape)))
        nothing = torch.empty(0, *shape, device=device), torch.empty(0, dtype=torch.int64, device=device)
        batches = [client.train.ordered_batches(size, device) for client in clients]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in clients]
        for own in zip_longest(*batches, fillvalue=nothing):
            inputs = pad_sequence([images for images, _ in own]).flatten(1, 2)  # type: ignore[misc]
            with self._autocast():
                *_, features = self._outputs(self.parameters.flat, inputs)
            for kept, rows, (_, labels) in zip(found, features, own, strict=True):
                kept.append((rows[: len(labels)], labels))
        merged = [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in found]
        return [local_prototypes(features, labels, clients[0].classes) for features, labels in merged]

    def _program_of(self, compiled: bool) -> Callable[..., Tensor]:
        """Computes the losses ``(K,)`` of an objective, flat parameters, its states, inputs and labels ``(K, b)``."""

        def losses(
            objective: Objective, flat: Tensor, states: dict[str, Tensor], inputs: Tensor, labels: Tensor
        ) -> Tensor:
            with self._autocast():
                *exits, features = self._outputs(flat, inputs)
            return objective(states, exits, features, labels)

        if not compiled:
            return losses
        mode = "reduce-overhead" if self.parameters.flat.device.type == "cuda" else "default"
        return torch.compile(losses, mode=mode, dynamic=False)

    def _outputs(self, flat: Tensor, inputs: Tensor) -> list[Tensor]:
        """Logits of each exit ``(K, b, C)`` and, last, features ``(K, b, f)``, of ``(b, K * channels, h, w)``."""
        channels_last = inputs.contiguous(memory_format=torch.channels_last)
        stacked = (each.flatten(0, 1) for each in self.parameters.layout.split(flat))
        parameters = dict(zip(self._names, stacked, strict=True))
        exits, features = functional_call(self._exits, parameters, (channels_last,), tie_weights=False)
        return [each.float().view(len(each), len(flat), -1).transpose(0, 1) for each in (*exits, features)]

    def training(self, tasks: Sequence[LocalTask]) -> AbstractContextManager[None]:
        """Nothing to do: networks with dropout are not stacked."""
        return nullcontext()
