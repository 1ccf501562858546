"""What graph networks read: nodes with features, edges among them, and the nodes that are asked about."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """A graph, or a part of one, on its way through a network.

    Attributes:
        x: features of the nodes, or what a layer made of them, float32 ``(nodes, f)``.
        edges: int64 ``(2, E)``, source and target of each edge, positions in ``x``; messages run from source to target.
        seeds: int64 ``(b,)``, positions in ``x`` of the nodes that are classified.
    """

    x: Tensor
    edges: Tensor
    seeds: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, x=self.x.to(device), edges=self.edges.to(device), seeds=self.seeds.to(device))

    def carrying(self, x: Tensor) -> Self:
        """The same graph with other values at its nodes."""
        return replace(self, x=x)

    def at_seeds(self) -> Tensor:
        """The values of the nodes that are classified, ``(b, f)``."""
        return self.x[self.seeds]

    def in_degrees(self) -> Tensor:
        """Number of edges that end at each node, float32 ``(nodes,)``."""
        target = self.edges[1]
        return self.x.new_zeros(len(self.x)).index_add_(0, target, self.x.new_ones(len(target)))


def propagate(batch: GraphBatch, hops: int) -> Tensor:
    """Parameter-free propagation ``(D^-1/2 (A + I) D^-1/2)^hops x`` (Wu et al. 2019, SGC), ``(nodes, f)``.

    ``A[t, s]`` is the number of edges from s to t, and D the diagonal matrix of the row sums of A + I.
    """
    source, target = batch.edges
    scale = (1 + batch.in_degrees()).rsqrt()
    weights, own = (scale[source] * scale[target])[:, None], scale[:, None] ** 2
    x = batch.x
    for _ in range(hops):
        x = (own * x).index_add(0, target, weights * x[source])
    return x


Inputs = Tensor | GraphBatch
"""What a network reads: a batch of images ``(b, C, H, W)``, or a graph with the nodes that are asked about."""
