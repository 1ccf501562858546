"""The shared vector plus chunks that one network generates from descriptor and chunk embedding."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GeneratorConfig
from framp_core.generators.base import Generator, uniform_by_fan_in
from framp_core.layout import ParameterLayout


class Chunked(Generator):
    """h(v) = theta_0 + [W relu(A [v; e_j] + a)] over chunks j = 1 .. ceil(n / chunk_size), cut to n.

    One head W of shape (chunk_size, hidden) serves all chunks; the learned embedding e_j says which chunk is meant
    (von Oswald et al. 2020). W starts at zero.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__(layout, descriptor_size, config)
        chunks = math.ceil(layout.size / config.chunk_size)
        self.embeddings = nn.Parameter(torch.empty(chunks, config.chunk_embedding))
        # A [v; e_j] = A_v v + A_e e_j: the descriptor's part is computed once for all chunks.
        self.from_descriptor = nn.Linear(descriptor_size, config.hidden)
        self.from_embedding = nn.Linear(config.chunk_embedding, config.hidden, bias=False)
        self.head = nn.Linear(config.hidden, config.chunk_size, bias=False)

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Embeddings of about unit norm, as descriptors have; hidden layer at random; head zero."""
        width = self.from_embedding.in_features
        self.embeddings.normal_(0, width**-0.5, generator=rng)
        inputs = self.from_descriptor.in_features + width
        uniform_by_fan_in(self.from_descriptor.weight, inputs, rng)
        uniform_by_fan_in(self.from_descriptor.bias, inputs, rng)
        uniform_by_fan_in(self.from_embedding.weight, inputs, rng)
        self.head.weight.zero_()

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(c, d)`` to ``(c, n)``."""
        hidden = F.relu(self.from_descriptor(descriptors)[:, None] + self.from_embedding(self.embeddings))
        chunks: Tensor = self.head(hidden)
        return chunks.flatten(1)[:, : self.layout.size] + self.theta_0
