"""The classic hypernetwork: one linear output per parameter."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GeneratorConfig
from framp_core.generators.base import Generator, uniform_by_fan_in
from framp_core.layout import ParameterLayout


class Dense(Generator):
    """h(v) = theta_0 + W relu(A v + a), W of shape (n, hidden), as in pFedHN (Shamsian et al. 2021).

    W starts at zero. It makes the generator about ``hidden`` times as large as the model: for small models only.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__(layout, descriptor_size, config)
        self.hidden = nn.Linear(descriptor_size, config.hidden)
        self.output = nn.Linear(config.hidden, layout.size, bias=False)

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Hidden layer at random, output layer zero."""
        uniform_by_fan_in(self.hidden.weight, self.hidden.in_features, rng)
        uniform_by_fan_in(self.hidden.bias, self.hidden.in_features, rng)
        self.output.weight.zero_()

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(c, d)`` to ``(c, n)``."""
        return F.linear(F.relu(self.hidden(descriptors)), self.output.weight, self.theta_0)
