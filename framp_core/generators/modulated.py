"""The shared vector, scaled and shifted per output channel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GeneratorConfig
from framp_core.generators.base import Generator, uniform_by_fan_in
from framp_core.layout import ParameterLayout


class Modulated(Generator):
    """theta = theta_0 * (1 + s) + t / sqrt(fan_in), with s and t per output channel.

    ``[s; t] = W relu(A v + a)`` has 2 entries per channel; every element of a bias or norm parameter is a channel of
    its own. Counting t in units of 1 / sqrt(fan_in) gives it the scale of the layer's weights. W starts at zero.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__(layout, descriptor_size, config)
        self.channels = [slot.shape[0] for slot in layout.slots]
        self.hidden = nn.Linear(descriptor_size, config.hidden)
        self.output = nn.Linear(config.hidden, 2 * sum(self.channels), bias=False)

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Hidden layer at random, output layer zero."""
        uniform_by_fan_in(self.hidden.weight, self.hidden.in_features, rng)
        uniform_by_fan_in(self.hidden.bias, self.hidden.in_features, rng)
        self.output.weight.zero_()

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(c, d)`` to ``(c, n)``."""
        scales, shifts = self.output(F.relu(self.hidden(descriptors))).chunk(2, dim=1)
        tensors = zip(
            self.layout.slots,
            self.layout.split(self.theta_0),
            torch.split(1 + scales, self.channels, dim=1),
            torch.split(shifts, self.channels, dim=1),
            strict=True,
        )
        parts = []
        for slot, theta_0, scale, shift in tensors:
            per_channel = (len(descriptors), slot.shape[0], *(1 for _ in slot.shape[1:]))
            unit = slot.fan_in**-0.5
            part = torch.addcmul(unit * shift.reshape(per_channel), theta_0, scale.reshape(per_channel))
            parts.append(part.flatten(1))
        return torch.cat(parts, dim=1)
