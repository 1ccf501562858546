"""The interface of all generators h(v; phi)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from framp_core.config import GeneratorConfig
from framp_core.layout import ParameterLayout


class Generator(nn.Module, ABC):
    """From a client's descriptor v to a full model theta = h(v; phi) (DESIGN section 3).

    This class is an extension point. A generator is the shared vector ``theta_0`` plus a personal part that is
    exactly zero at the start for every descriptor, so that all clients begin with the same freshly initialised
    network; its gradient must not vanish there. A new one does three things:

    * ``__init__`` with this signature declares its parameters, whose contents do not matter: it runs on the meta
      device, so that the size is known before anything is allocated;
    * :meth:`initialise_personal` fills them, and buffers if it has any;
    * :meth:`forward` generates.

    One that wants to look at the first clients' descriptors overrides :meth:`fit`. It is then entered in
    ``framp_core.generators.GENERATORS`` and in the choices of ``GeneratorConfig.name``.

    Args:
        layout: description of theta.
        descriptor_size: d, floats per descriptor.
        config: hyper-parameters of the personal part.

    Attributes:
        theta_0: the shared vector ``(n,)``, which takes the place of an output bias.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.layout = layout
        self.theta_0 = nn.Parameter(torch.empty(layout.size))

    @abstractmethod
    def initialise_personal(self, rng: torch.Generator) -> None:
        """Fill every parameter but ``theta_0``, drawing from ``rng`` alone; called without gradients."""

    def fit(self, descriptors: Tensor, rng: np.random.Generator) -> None:
        """Look at the descriptors ``(c, d)`` of the clients that train; called once, before the first round."""

    @abstractmethod
    def forward(self, descriptors: Tensor) -> Tensor:
        """Generate with a graph: descriptors ``(c, d)`` to full models ``(c, n)``, in new memory."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """The shared vector, and what else moves like weights rather than like a network that makes weights."""
        return [self.theta_0]

    def personal_parameters(self) -> list[nn.Parameter]:
        """All other parameters; may be empty."""
        shared = {id(parameter) for parameter in self.shared_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in shared]

    @property
    def size(self) -> int:
        """Number of the generator's own parameters, ``theta_0`` included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def generate(self, descriptors: Tensor) -> Tensor:
        """Generate without a graph: descriptors ``(c, d)`` to full models ``(c, n)``."""
        with torch.no_grad():
            models: Tensor = self(descriptors)
        return models

    def vjp(
        self, descriptors: Tensor, cotangents: Tensor, parameters: Sequence[nn.Parameter] | None = None
    ) -> list[Tensor]:
        """Vector-Jacobian product ``sum_i J_i^T u_i`` with ``J_i = d h(v_i; phi) / d phi``.

        Args:
            descriptors: ``(c, d)``.
            cotangents: u, ``(c, n)``.
            parameters: those parts of phi that are asked for; None asks for ``list(self.parameters())``.

        Returns:
            One tensor per parameter, shaped like it.
        """
        asked = list(self.parameters() if parameters is None else parameters)
        return list(torch.autograd.grad(self(descriptors), asked, cotangents))


def uniform_by_fan_in(tensor: Tensor, fan_in: int, rng: torch.Generator) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the distribution ``nn.Linear`` starts with, from ``rng``."""
    tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)
