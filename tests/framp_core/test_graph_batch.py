import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.graph_batch import GraphBatch, propagate
from tests.framp_core.graphs import adjacency, graphs, symmetrically_normalised


@settings(derandomize=True, deadline=None)
@given(batch=graphs(), hops=st.integers(0, 3))
def test_propagation_is_a_power_of_the_normalised_matrix(batch, hops):
    matrix = symmetrically_normalised(adjacency(batch) + torch.eye(len(batch.x), dtype=torch.float64))
    expected = torch.linalg.matrix_power(matrix, hops) @ batch.x.double()
    torch.testing.assert_close(propagate(batch, hops), expected.float(), rtol=1e-5, atol=1e-5)


def test_propagation_by_hand():
    """One edge from node 0 to node 1; node 2 is isolated. Degrees with loops are 1, 2 and 1."""
    batch = GraphBatch(torch.tensor([[8.0], [2.0], [5.0]]), torch.tensor([[0], [1]]), torch.tensor([1]))
    expected = torch.tensor([[8.0], [8 / 2**0.5 + 2 / 2], [5.0]])
    torch.testing.assert_close(propagate(batch, 1), expected)
    assert torch.equal(propagate(batch, 0), batch.x)


@given(batch=graphs())
def test_matrices_are_those_of_the_edges(batch):
    dense = adjacency(batch)
    torch.testing.assert_close(batch.in_degrees().double(), dense.sum(dim=1))
    mean = torch.stack([row / row.sum() if row.any() else row for row in dense])
    torch.testing.assert_close(batch.mean.to_dense(), mean.float())
    assert batch.carrying(batch.x + 1).mean is batch.mean
    assert batch.to(torch.device("cpu")).mean is not batch.mean


def test_values_are_replaced_and_picked_on_the_same_graph():
    batch = GraphBatch(torch.zeros(3, 2), torch.tensor([[0], [1]]), torch.tensor([2, 0, 2]))
    values = torch.arange(3.0)[:, None]
    carried = batch.carrying(values)
    assert carried.edges is batch.edges
    assert carried.at_seeds().tolist() == [[2.0], [0.0], [2.0]]
    moved = carried.to(torch.device("meta"))
    assert [tensor.device.type for tensor in (moved.x, moved.edges, moved.seeds)] == ["meta"] * 3
