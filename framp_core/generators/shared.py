"""The shared vector alone: the global model of the comparison methods."""

import torch
from torch import Tensor

from framp_core.generators.base import Generator


class Shared(Generator):
    """h(v) = theta_0 for every client; there is no personal part."""

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Nothing to fill."""

    def forward(self, descriptors: Tensor) -> Tensor:
        """Copy ``theta_0`` once per client: ``(c, d)`` to ``(c, n)``."""
        return self.theta_0.repeat(len(descriptors), 1)
