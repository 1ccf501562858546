from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framp_core.config import FrampConfig
from framp_core.data.graph import (
    GraphData,
    LabelledNodes,
    Subgraph,
    client_data,
    graph_facts,
    load_graph_partition,
)
from framp_core.data.graph.neighbours import edges_into, edges_within, sample_around, starts_of
from framp_core.errors import DataError
from framp_core.randomness import stream

CPU = torch.device("cpu")


@st.composite
def edge_lists(draw, nodes=12):
    """Edges sorted by (target, source), without repeats, and their starts."""
    density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.8]))
    matrix = np.random.default_rng(draw(st.integers(0, 1000))).random((nodes, nodes)) < density
    np.fill_diagonal(matrix, False)
    targets, sources = np.nonzero(matrix)
    return sources, targets, starts_of(targets, nodes)


nodes_of_twelve = st.lists(st.integers(0, 11), unique=True, max_size=12).map(lambda nodes: np.array(nodes, dtype=int))


# --- edges of nodes -----------------------------------------------------------------------------------------------


@given(edge_lists(), nodes_of_twelve)
def test_edges_into_and_within_equal_slow_loops(edges, nodes):
    sources, targets, starts = edges
    numbers, rows = edges_into(starts, nodes)
    assert list(zip(numbers, rows, strict=True)) == [
        (number, row) for row, node in enumerate(nodes) for number in range(len(targets)) if targets[number] == node
    ]
    numbers, ends = edges_within(starts, sources, nodes)
    expected = [
        number
        for node in nodes
        for number in range(len(targets))
        if targets[number] == node and sources[number] in nodes
    ]
    assert numbers.tolist() == expected
    np.testing.assert_array_equal(nodes[ends], np.stack([sources[expected], targets[expected]]))


# --- sampling -----------------------------------------------------------------------------------------------------


def hops_of(sources, targets, seeds):
    """Fewest edges from each node that reaches a seed to one, by breadth-first search against the edges."""
    hops = dict.fromkeys(seeds.tolist(), 0)
    frontier = list(hops)
    while frontier:
        found = {s for s, t in zip(sources.tolist(), targets.tolist(), strict=True) if t in frontier} - set(hops)
        hops |= dict.fromkeys(found, hops[frontier[0]] + 1)
        frontier = sorted(found)
    return hops


sampling = given(
    edge_lists(),
    st.lists(st.integers(0, 11), min_size=1, max_size=6).map(np.array),
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(0, 100),
)


@sampling
def test_a_sample_has_edges_that_exist_and_no_more_than_asked(edges, seeds, fan_outs, seed):
    sources, targets, starts = edges
    nodes, drawn, positions = sample_around(starts, sources, seeds, fan_outs, np.random.default_rng(seed))
    assert len(set(nodes)) == len(nodes)
    np.testing.assert_array_equal(nodes[positions], seeds)
    assert set(nodes[: len(set(seeds))]) == set(seeds)
    existing = set(zip(sources.tolist(), targets.tolist(), strict=True))
    pairs = [tuple(pair) for pair in nodes[drawn].T.tolist()]
    assert set(pairs) <= existing
    assert len(set(pairs)) == len(pairs)
    assert set(nodes) == set(seeds) | {source for source, _ in pairs}
    # A node's edges are drawn in the hop after the one that found it in the sample itself.
    hops = hops_of(*(np.array(pairs, dtype=int).reshape(-1, 2).T), seeds)
    degrees = np.bincount(targets, minlength=12)
    taken = np.bincount(nodes[drawn[1]], minlength=12)
    for node in range(12):
        hop = hops.get(node, len(fan_outs))
        assert taken[node] == (min(degrees[node], fan_outs[hop]) if hop < len(fan_outs) else 0)


@sampling
def test_a_fan_out_above_every_degree_takes_the_whole_neighbourhood(edges, seeds, fan_outs, seed):
    sources, targets, starts = edges
    fan_outs = [12] * len(fan_outs)
    nodes, drawn, _ = sample_around(starts, sources, seeds, fan_outs, np.random.default_rng(seed))
    hops = hops_of(sources, targets, seeds)
    assert set(nodes) == {node for node, hop in hops.items() if hop <= len(fan_outs)}
    expected = {(s, t) for s, t in zip(sources, targets, strict=True) if hops.get(t, 99) < len(fan_outs)}
    assert {tuple(pair) for pair in nodes[drawn].T} == expected


@given(edge_lists(), st.integers(0, 100))
def test_a_sample_follows_from_its_stream(edges, seed):
    sources, _, starts = edges
    one, two = (sample_around(starts, sources, np.arange(5), [2, 2], np.random.default_rng(seed)) for _ in range(2))
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_neighbours_are_drawn_uniformly_and_independently():
    """3 of 8 neighbours: each is drawn with probability 3/8, each pair with 3/8 * 2/7; and two nodes apart."""
    sources, targets = np.tile(np.arange(2, 10), 2), np.repeat([0, 1], 8)
    starts, rng, draws = starts_of(targets, 10), np.random.default_rng(0), 4000
    single, joint, both = np.zeros(8), np.zeros((8, 8)), np.zeros((8, 8))
    for _ in range(draws):
        nodes, drawn, _ = sample_around(starts, sources, np.array([0, 1]), [3], rng)
        taken = np.zeros((2, 8))
        taken[nodes[drawn[1]], nodes[drawn[0]] - 2] = 1
        single += taken[0]
        joint += np.outer(taken[0], taken[0])
        both += np.outer(taken[0], taken[1])

    def deviation(counts, share):
        return np.abs(counts - draws * share).max() / np.sqrt(draws * share * (1 - share))

    off_diagonal = ~np.eye(8, dtype=bool)
    assert deviation(single, 3 / 8) < 4
    assert deviation(joint[off_diagonal], 3 / 8 * 2 / 7) < 4
    assert deviation(both, 9 / 64) < 4
    assert deviation(single, 1 / 2) > 10  # What the test would say of another share.


def mean_aggregation(x, edges, layers):
    """h <- (h + mean of the in-neighbours' h) / 2, the mean of none being 0: a GraphSAGE without weights."""
    for _ in range(layers):
        degrees = torch.zeros(len(x)).index_add_(0, edges[1], torch.ones(edges.shape[1]))
        total = torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])
        x = torch.tanh((x + total / degrees.clamp(min=1)[:, None]) / 2)
    return x


def random_subgraph(nodes=60, seed=0, degree=4):
    rng = np.random.default_rng(seed)
    matrix = rng.random((nodes, nodes)) < degree / nodes
    np.fill_diagonal(matrix, False)
    edges = torch.from_numpy(np.stack(np.nonzero(matrix)[::-1]))
    features = torch.from_numpy(rng.standard_normal((nodes, 3)).astype(np.float32))
    return Subgraph(np.arange(nodes) * 2, features, edges, rng.integers(0, 3, nodes))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_with_all_neighbours_as_many_layers_give_what_the_whole_graph_gives(layers):
    own = random_subgraph()
    seeds = np.array([3, 17, 3, 40])
    exact = mean_aggregation(own.features, own.edges, layers)[seeds]
    batch = own.sampled(seeds, [60] * layers, np.random.default_rng(0))
    sampled = mean_aggregation(batch.x, batch.edges, layers)[batch.seeds]
    torch.testing.assert_close(sampled, exact)
    short = own.sampled(seeds, [60] * (layers - 1), np.random.default_rng(0))
    assert not torch.allclose(mean_aggregation(short.x, short.edges, layers)[short.seeds], exact)


# --- selections ---------------------------------------------------------------------------------------------------


def configured(**values):
    fixed = {"data.name": "graph-digits", "model.name": "sage", "partition.scheme": "metis", "model.widths": "8,8"}
    return FrampConfig.from_flat({**fixed, **values})


def selection(own, positions, batch_nodes=100):
    return LabelledNodes((own,), np.zeros(len(positions), dtype=int), np.array(positions, dtype=int), batch_nodes)


def test_a_small_subgraph_is_every_batch():
    own, config = random_subgraph(), configured()
    rng = np.random.default_rng(0)
    batches = list(selection(own, [5, 1, 9]).training_batches(config, 3, rng, CPU))
    assert len(batches) == 3
    for batch, labels in batches:
        assert batch is batches[0][0]
        assert batch.x is own.features
        assert batch.edges is own.edges
        assert batch.seeds.tolist() == [5, 1, 9]
        assert labels.tolist() == own.labels[[5, 1, 9]].tolist()
    assert rng.random() == np.random.default_rng(0).random()


def test_a_large_subgraph_is_sampled():
    own = random_subgraph()
    config = configured(**{"graph.full-batch-nodes": 59, "local.batch-size": 4, "graph.neighbours": "2,1,7"})
    chosen = selection(own, np.arange(10, 20))

    def batches(seed, steps=6):
        return list(chosen.training_batches(config, steps, np.random.default_rng(seed), CPU))

    existing = set(map(tuple, own.edges.T.tolist()))
    seen = []
    for batch, labels in batches(0):
        assert (batch.x.dtype, batch.edges.dtype, batch.seeds.dtype, labels.dtype) == (
            torch.float32,
            *[torch.int64] * 3,
        )
        # Features tell which node a row is.
        nodes = (batch.x[:, None] == own.features[None]).all(dim=2).int().argmax(dim=1)
        assert torch.equal(own.features[nodes], batch.x)
        assert set(map(tuple, nodes[batch.edges].T.tolist())) <= existing
        assert len(batch.x) <= 4 + 4 * 2 + 4 * 2
        assert len(batch.seeds) == 4
        np.testing.assert_array_equal(labels, own.labels[nodes[batch.seeds]])
        seen += nodes[batch.seeds].tolist()
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10, 20))
    for (one, ours), (two, theirs) in zip(batches(1), batches(1), strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.edges, two.edges)
        assert torch.equal(ours, theirs)
    assert not torch.equal(batches(1)[0][1], batches(2)[0][1]) or not torch.equal(
        batches(1)[0][0].x, batches(2)[0][0].x
    )


def joint_selection(sizes, batch_nodes, seed=0, share=0.5):
    """Subgraphs of the given sizes and a random selection from them, in a random order."""
    rng = np.random.default_rng(seed)
    subgraphs = tuple(random_subgraph(size, seed=index) for index, size in enumerate(sizes))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    order = rng.permutation(len(owners))[: int(share * len(owners))]
    return LabelledNodes(subgraphs, owners[order], positions[order], batch_nodes)


@given(st.lists(st.integers(2, 15), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 50))
def test_ordered_batches_hold_every_example_once_in_its_own_subgraph(sizes, batch_nodes, seed):
    chosen = joint_selection(sizes, batch_nodes, seed)
    expected = [
        (mean_aggregation(own.features, own.edges, 2)[position].tolist(), int(own.labels[position]))
        for index, own in enumerate(chosen.subgraphs)
        for owner, position in zip(chosen.owners, chosen.positions, strict=True)
        if owner == index
    ]
    got = []
    for batch, labels in chosen.ordered_batches(1, CPU):
        held = [size for size in sizes if size <= batch_nodes]
        assert len(batch.x) <= max(batch_nodes, max(sizes) if len(held) < len(sizes) else 0)
        assert len(labels)
        values = mean_aggregation(batch.x, batch.edges, 2)[batch.seeds]
        got += list(zip(values.tolist(), labels.tolist(), strict=True))
    assert [label for _, label in got] == [label for _, label in expected]
    np.testing.assert_allclose(
        np.array([value for value, _ in got]), np.array([value for value, _ in expected]), rtol=1e-5, atol=1e-6
    )


def test_subgraphs_are_packed_up_to_the_limit_and_those_without_examples_left_out():
    subgraphs = tuple(random_subgraph(size, seed=size) for size in (10, 20, 30, 50, 5))
    everywhere = LabelledNodes(subgraphs, np.arange(5), np.zeros(5, dtype=int), 40)
    assert [len(batch.x) for batch, _ in everywhere.ordered_batches(1, CPU)] == [30, 30, 50, 5]
    somewhere = replace(everywhere, owners=np.array([0, 4, 2]), positions=np.array([1, 2, 3]))
    (first, labels), (second, _) = somewhere.ordered_batches(1, CPU)
    assert (len(first.x), len(second.x)) == (40, 5)
    assert first.seeds.tolist() == [1, 10 + 3]
    assert labels.tolist() == [subgraphs[0].labels[1], subgraphs[2].labels[3]]
    assert (
        list(replace(everywhere, owners=np.array([], int), positions=np.array([], int)).ordered_batches(1, CPU)) == []
    )


def test_a_lone_subgraph_is_not_copied():
    own = random_subgraph()
    ((batch, _),) = selection(own, [3, 4]).ordered_batches(1, CPU)
    assert batch.x is own.features
    assert batch.edges is own.edges


def test_the_first_ones_are_the_first_ones():
    chosen = joint_selection([10, 20], 100)
    first = chosen.first(4)
    assert len(first) == 4
    np.testing.assert_array_equal(first.selected_labels, chosen.selected_labels[:4])
    assert len(chosen.first(99)) == len(chosen) == 15


def test_training_reads_one_client():
    with pytest.raises(DataError, match="nodes of one client, and these are of 2"):
        next(joint_selection([10, 20], 100).training_batches(configured(), 1, np.random.default_rng(0), CPU))


# --- clients ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configured(
        **{
            "data.cache": str(tmp_path_factory.mktemp("cache")),
            "partition.clients": 6,
            "partition.unseen-clients": 3,
            "partition.overlap": 3,
            "partition.concept-shift-clusters": 2,
            "seed": 3,
        }
    )


def slow_induced(graph: GraphData, nodes):
    numbers = {node: number for number, node in enumerate(sorted(nodes))}
    return {(numbers[a], numbers[b]) for a, b in graph.edges.T.tolist() if a in numbers and b in numbers}


def test_clients_hold_their_nodes_and_the_edges_among_them(config):
    graph, partition = load_graph_partition(config, 9)
    for index, split in enumerate(partition.clients):
        client = client_data(config, index, 9)
        assert (client.name, client.role, client.capacity) == (split.name, split.role, split.capacity)
        assert (client.classes, client.shape, client.partition_digest) == (10, (64,), partition.digest)
        nodes = np.sort(np.concatenate([split.train, split.validation, split.test]))
        ((batch, known),) = client.known.ordered_batches(1, CPU)
        assert torch.equal(batch.x, torch.from_numpy(graph.features[nodes]))
        assert set(map(tuple, batch.edges.T.tolist())) == slow_induced(graph, nodes.tolist())
        assert batch.seeds.tolist() == list(range(len(nodes)))
        names = np.array(split.concept_shift.labels)
        np.testing.assert_array_equal(known, names[graph.labels[nodes]])
        for kind in ("train", "validation", "test"):
            ((batch, labels),) = getattr(client, kind).ordered_batches(1, CPU)
            np.testing.assert_array_equal(nodes[batch.seeds], getattr(split, kind))
            np.testing.assert_array_equal(labels, names[graph.labels[getattr(split, kind)]])
        assert client.class_counts().sum() == len(split.train)


def test_the_union_is_the_test_data_of_the_training_clients_in_random_order(config):
    _, partition = load_graph_partition(config, 9)
    clients = [client_data(config, index, 9) for index in range(9)]
    union = clients[0].union_test
    assert all(client.union_test is union for client in clients)
    assert len(union.subgraphs) == 6
    for owner in range(6):
        assert union.subgraphs[owner] is clients[owner].test.subgraphs[0]
        own = np.sort(union.positions[union.owners == owner])
        np.testing.assert_array_equal(own, clients[owner].test.positions)
    sizes = [len(split.test) for split in partition.clients[:6]]
    order = stream(3, "union-order").permutation(sum(sizes))
    np.testing.assert_array_equal(union.owners, np.repeat(np.arange(6), sizes)[order])
    assert set(union.first(60).owners) == set(range(6))
    labels = np.concatenate([labels for _, labels in union.ordered_batches(1, CPU)])
    np.testing.assert_array_equal(np.sort(labels), np.sort(union.selected_labels))
    for own, client in zip(np.split(labels, np.cumsum(sizes)[:-1]), clients[:6], strict=True):
        np.testing.assert_array_equal(np.sort(own), np.sort(client.test.selected_labels))


def test_another_number_of_nodes_keeps_the_ratio_of_unseen_clients(config):
    roles = [client_data(config, index, 18).role for index in range(18)]
    assert roles == ["train"] * 12 + ["unseen"] * 6


def test_the_facts_count_each_edge_once_under_overlap(config):
    graph, partition = load_graph_partition(config, 9)
    held = [set(np.concatenate([c.train, c.validation, c.test]).tolist()) for c in partition.clients]
    kept = np.mean([any(a in own and b in own for own in held) for a, b in graph.edges.T.tolist()])
    facts = graph_facts(graph, partition)
    assert facts["edges inside clients"] == f"{100 * kept:.1f} %"
    assert facts["features"] == "64"
