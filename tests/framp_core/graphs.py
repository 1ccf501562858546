"""Small random graphs for tests, and their dense matrices."""

import torch
from hypothesis import strategies as st

from framp_core.graph_batch import GraphBatch


@st.composite
def graphs(draw: st.DrawFn, features: int = 3) -> GraphBatch:
    """Directed graphs of 1 to 7 nodes with isolated nodes, loops and repeated edges, and any nodes as seeds."""
    nodes = draw(st.integers(1, 7))
    positions = st.integers(0, nodes - 1)
    edges = draw(st.lists(st.tuples(positions, positions), max_size=14))
    seeds = draw(st.lists(positions, min_size=1, max_size=5))
    x = torch.randn(nodes, features, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return GraphBatch(x, torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T, torch.tensor(seeds))


def adjacency(batch: GraphBatch) -> torch.Tensor:
    """A[t, s], the number of edges from s to t, float64."""
    dense = torch.zeros(len(batch.x), len(batch.x), dtype=torch.float64)
    for source, target in batch.edges.T.tolist():
        dense[target, source] += 1
    return dense


def symmetrically_normalised(dense: torch.Tensor) -> torch.Tensor:
    """``D^-1/2 A D^-1/2`` with the row sums of A, none of them 0, on D's diagonal."""
    scale = torch.diag(dense.sum(dim=1) ** -0.5)
    return scale @ dense @ scale
