"""What graph networks read: nodes with features, edges among them, and the nodes that are asked about."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """A graph, or a part of one, on its way through a network.

    Below, ``A[t, s]`` is the number of edges from s to t.

    Attributes:
        x: features of the nodes, or what a layer made of them, float32 ``(nodes, f)``.
        edges: int64 ``(2, E)``, source and target of each edge, positions in ``x``; messages run from source to target.
        seeds: int64 ``(b,)``, positions in ``x`` of the nodes that are classified.
    """

    x: Tensor
    edges: Tensor
    seeds: Tensor
    _matrices: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(self.x.to(device), self.edges.to(device), self.seeds.to(device))

    def carrying(self, x: Tensor) -> Self:
        """The same graph with other values at its nodes; its matrices are made once for both."""
        return replace(self, x=x)

    def at_seeds(self) -> Tensor:
        """The values of the nodes that are classified, ``(b, f)``."""
        return self.x[self.seeds]

    def in_degrees(self) -> Tensor:
        """Number of edges that end at each node, float32 ``(nodes,)``."""
        target = self.edges[1]
        return self.x.new_zeros(len(self.x)).index_add_(0, target, self.x.new_ones(len(target)))

    @property
    def convolution(self) -> Tensor:
        """``D^-1/2 (A + I) D^-1/2`` with the row sums of A + I in D (Kipf and Welling 2017), CSR ``(nodes, nodes)``."""
        if "convolution" not in self._matrices:
            nodes = torch.arange(len(self.x), device=self.x.device)
            source, target = torch.cat([self.edges, nodes.expand(2, -1)], dim=1)
            scale = (1 + self.in_degrees()).rsqrt()
            self._matrices["convolution"] = _csr(source, target, scale[source] * scale[target], len(nodes))
        return self._matrices["convolution"]

    @property
    def mean(self) -> Tensor:
        """``D^-1 A`` with the row sums of A in D, a row of zeros where no edge ends; CSR ``(nodes, nodes)``."""
        if "mean" not in self._matrices:
            source, target = self.edges
            self._matrices["mean"] = _csr(source, target, self.in_degrees().reciprocal()[target], len(self.x))
        return self._matrices["mean"]


def _csr(source: Tensor, target: Tensor, weights: Tensor, nodes: int) -> Tensor:
    """Rows are targets; parallel edges add up."""
    with warnings.catch_warnings():
        # PyTorch calls its CSR tensors a beta; products with dense matrices, all that is asked of them, are tested.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_coo_tensor(torch.stack([target, source]), weights, (nodes, nodes)).to_sparse_csr()


def propagate(batch: GraphBatch, hops: int) -> Tensor:
    """Parameter-free propagation ``(D^-1/2 (A + I) D^-1/2)^hops x`` (Wu et al. 2019, SGC), ``(nodes, f)``."""
    x = batch.x
    for _ in range(hops):
        x = batch.convolution @ x
    return x


Inputs = Tensor | GraphBatch
"""What a network reads: a batch of images ``(b, C, H, W)``, or a graph with the nodes that are asked about."""
