"""Several clients' networks as one program: their batches and weights are stacked, and each layer runs once for all.

A lone small network keeps neither a GPU nor a vector unit busy; a round of clients of one architecture does. Clients
keep their own masks, prototypes, batches and random streams, so that only the order in which a layer adds up its
products differs from training them one by one.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from framp_core.config import ModelConfig
from framp_core.data.examples import Examples
from framp_core.data.images import LabelledImages
from framp_core.errors import ModelError
from framp_core.local_training import Batch, LocalResult, LocalTask, Losses, Networks, Objective, train_side_by_side
from framp_core.models import FeaturesAndHead, FlatModel, FlatParameters

SMALLEST = 3
"""Networks that make a stack: from here on a client's numbers do not depend on how many are beside it, nor on which
(with fewer, oneDNN chooses other kernels)."""


def stackable(examples: Examples, model: ModelConfig) -> bool:
    """Whether networks can be stacked: for images, without dropout, which would draw for all clients alike."""
    return isinstance(examples, LabelledImages) and model.dropout == 0


class _AllExits(nn.Module):
    """The structure of a network, without memory for parameters of its own.

    ``vmap`` takes no notice of ``torch.autocast`` in convolutions, so layers cast what they read themselves.
    """

    def __init__(self, network: FeaturesAndHead) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to("meta")
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_pre_hook(_cast)

    def forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        exits, features = self.network.all_exits(inputs)
        return [logits.float() for logits in exits], features.float()


def _cast(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return inputs[0].to(layer.weight.dtype)


class StackedNetworks(Networks):
    """K networks of one architecture whose parameters are the rows of one matrix.

    Args:
        model: the architecture, and in which precision its layers run; its own parameters are left alone.
        count: K, at least :data:`SMALLEST`.
        compiled: whether ``torch.compile`` turns the forward and the backward pass into a program each, on a GPU into
            CUDA graphs; it takes a minute or two on first use, for each K.
    """

    def __init__(self, model: FlatModel, count: int, *, compiled: bool = False) -> None:
        self._layout, device = model.layout, model.flat.device
        self._precision = torch.bfloat16 if model.precision == "bfloat16" else torch.float32
        self._exits = _AllExits(model.model)
        self._layers = [
            (f"{name}.{own}", isinstance(layer, nn.Conv2d | nn.Linear))
            for name, layer in self._exits.named_modules()
            for own, _ in layer.named_parameters(recurse=False)
        ]
        self._flat = nn.Parameter(torch.zeros(count, model.layout.size, device=device))
        self._program = self._program_of(compiled)
        gradient = torch.zeros_like(self._flat)
        self._flat.grad = gradient
        self.rows = [FlatParameters(model.layout, *pair) for pair in zip(self._flat.data, gradient, strict=True)]

    def train(self, tasks: Sequence[LocalTask]) -> list[LocalResult | ModelError]:
        """Train K clients of one ``config.local``, one batch size, and all or none aligned."""
        return train_side_by_side(self, tasks)

    def losses(self, objectives: Sequence[Objective]) -> Losses:
        """See :meth:`Networks.losses`; the batches are images, equally many for all."""
        states = {name: torch.stack([each.state[name] for each in objectives]) for name in objectives[0].state}

        def of(batches: Sequence[Batch]) -> Tensor:
            images, labels = (torch.stack(parts) for parts in zip(*batches, strict=True))  # type: ignore[arg-type]
            computed: Tensor = self._program(objectives[0], self._flat, states, images, labels)
            return computed.clone()  # A CUDA graph's next step writes where this one did.

        return of

    def _program_of(self, compiled: bool) -> Callable[..., Tensor]:
        """Computes the losses ``(K,)`` of an objective, flat parameters, states of the objective, images and labels."""

        def loss(
            objective: Objective, flat: Tensor, state: dict[str, Tensor], inputs: Tensor, target: Tensor
        ) -> Tensor:
            exits, features = functional_call(self._exits, self._named(flat), (inputs,))
            return objective(state, exits, features, target)

        program: Callable[..., Tensor] = vmap(loss, in_dims=(None, 0, 0, 0, 0))
        if not compiled:
            return program
        mode = "reduce-overhead" if self._flat.device.type == "cuda" else "default"
        return torch.compile(program, mode=mode, dynamic=False)

    def training(self, tasks: Sequence[LocalTask]) -> AbstractContextManager[None]:
        """Nothing to do: networks with dropout are not stacked."""
        return nullcontext()

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        named = zip(self._layers, self._layout.split(flat), strict=True)
        return {name: value.to(self._precision) if casts else value for (name, casts), value in named}
