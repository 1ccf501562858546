"""The shared vector plus generated factors of low rank per layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GeneratorConfig
from framp_core.generators.base import Generator, uniform_by_fan_in
from framp_core.layout import ParameterLayout


class LowRank(Generator):
    """theta = theta_0 + U(v) V(v)^T / sqrt(fan_in) for weights, theta_0 + u(v) for biases and norm parameters.

    A weight is viewed as a matrix (out, fan_in); U is (out, r), V is (fan_in, r). ``[U; u] = W relu(A v + a)`` with W
    zero at the start, ``V = B relu(A v + a) + b`` with b ~ N(0, 1), so that U has a gradient from the first step.
    The factor 1 / sqrt(fan_in) gives U the scale of the layer's weights.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__(layout, descriptor_size, config)
        self.rank = config.rank
        self.left_sizes = [self.rank * slot.shape[0] if slot.maskable else slot.size for slot in layout.slots]
        self.right_sizes = [self.rank * slot.fan_in if slot.maskable else 0 for slot in layout.slots]
        self.hidden = nn.Linear(descriptor_size, config.hidden)
        self.left = nn.Linear(config.hidden, sum(self.left_sizes), bias=False)
        self.right = nn.Linear(config.hidden, sum(self.right_sizes))

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Hidden layer and V at random, U and u zero."""
        uniform_by_fan_in(self.hidden.weight, self.hidden.in_features, rng)
        uniform_by_fan_in(self.hidden.bias, self.hidden.in_features, rng)
        self.left.weight.zero_()
        uniform_by_fan_in(self.right.weight, self.right.in_features, rng)
        self.right.bias.normal_(generator=rng)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(c, d)`` to ``(c, n)``."""
        clients = len(descriptors)
        hidden = F.relu(self.hidden(descriptors))
        tensors = zip(
            self.layout.slots,
            self.layout.split(self.theta_0),
            torch.split(self.left(hidden), self.left_sizes, dim=1),
            torch.split(self.right(hidden), self.right_sizes, dim=1),
            strict=True,
        )
        parts = []
        for slot, theta_0, left, right in tensors:
            if slot.maskable:
                u = left.reshape(clients, slot.shape[0], self.rank)
                v = right.reshape(clients, self.rank, slot.fan_in) * slot.fan_in**-0.5
                part = torch.baddbmm(theta_0.reshape(1, slot.shape[0], slot.fan_in), u, v).flatten(1)
            else:
                part = theta_0.reshape(-1) + left
            parts.append(part)
        return torch.cat(parts, dim=1)
