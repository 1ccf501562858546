import hashlib
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from framp_core.config import FrampConfig
from framp_core.data.graph import GraphData, graph_facts, make_graph_partition
from framp_core.data.graph.checks import RawGraph, checked, tidied
from framp_core.data.graph.sources import digests_of
from framp_core.errors import ConfigError, DataError


def graph_of(edges, nodes, labels=None, undirected=True):
    raw = RawGraph(
        np.arange(nodes, dtype=np.float32)[:, None],
        np.array(edges, dtype=np.int64).reshape(-1, 2).T,
        np.arange(nodes) % 2 if labels is None else np.array(labels),
    )
    ready = tidied(checked(raw, "here"), undirected=undirected, largest_component=False)
    return GraphData(ready.x, ready.edge_index, ready.y, ready.class_names, digests_of(ready))


def cliques(count, size, labels=None):
    """Cliques in a ring, each joined to the next by one edge."""
    inside = [(c * size + a, c * size + b) for c in range(count) for a in range(size) for b in range(a)]
    between = [(c * size, (c + 1) % count * size + 1) for c in range(count)] if count > 1 else []
    return graph_of(inside + between, count * size, labels)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache):
    def build(scheme="metis", **values):
        names = {"seed": "seed", "sizes": "capacity.sizes", "assignment": "capacity.assignment"}
        names |= {key: f"graph.{key.replace('_', '-')}" for key in ("train_share", "validation_share")}
        flat = {names.get(key, f"partition.{key.replace('_', '-')}"): value for key, value in values.items()}
        fixed = {
            "data.name": "graph-digits",
            "model.name": "gcn",
            "model.widths": "8,8",
            "partition.scheme": scheme,
            "data.cache": cache,
        }
        return FrampConfig.from_flat({"partition.unseen-clients": 0, **fixed, **flat})

    return build


def nodes_of(client):
    return np.concatenate([client.train, client.validation, client.test])


def edges_inside(partition, graph):
    held = [set(nodes_of(client)) for client in partition.clients]
    return sum(any(a in own and b in own for own in held) for a, b in graph.edges.T)


# --- who holds what -----------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    nodes = draw(st.integers(20, 60))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    edges = rng.integers(0, draw(st.integers(5, nodes)), (draw(st.integers(0, 3 * nodes)), 2))
    return graph_of(edges, nodes, undirected=draw(st.booleans()))


@given(graphs(), st.sampled_from(["metis", "louvain"]), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
def test_clients_are_disjoint_complete_and_never_empty(cache, graph, scheme, clients, unseen, seed):
    asked = FrampConfig.from_flat(
        {
            "data.name": "graph-digits",
            "data.cache": cache,
            "model.name": "gcn",
            "model.widths": "8,8",
            "partition.scheme": scheme,
            "partition.clients": clients,
            "partition.unseen-clients": unseen,
            "seed": seed,
        }
    )
    try:
        partition = make_graph_partition(asked, graph)
    except DataError:
        reject()
    assert [client.role for client in partition.clients] == ["train"] * clients + ["unseen"] * unseen
    held = np.concatenate([nodes_of(client) for client in partition.clients])
    np.testing.assert_array_equal(np.sort(held), np.arange(len(graph)))
    for client in partition.clients:
        assert len(client.train)
        assert len(client.test)
        for nodes in (client.train, client.validation, client.test):
            assert nodes.dtype == np.int64
            np.testing.assert_array_equal(nodes, np.sort(nodes))
    assert make_graph_partition(asked, graph).digest == partition.digest


@pytest.mark.parametrize("scheme", ["metis", "louvain"])
def test_cliques_stay_together(config, scheme):
    graph = cliques(6, 10)
    partition = make_graph_partition(config(scheme, clients=4, unseen_clients=2), graph)
    for client in partition.clients:
        assert len(set(nodes_of(client) // 10)) == 1
    assert edges_inside(partition, graph) == 2 * 6 * 45
    assert graph_facts(graph, partition) == {
        "nodes": "60",
        "edges": f"{6 * 45 + 6} undirected",
        "features": "1",
        "classes": "2 (30 to 30 nodes per class)",
        "isolated nodes": "0",
        "components": "1 (largest: 60 nodes)",
        # Of the 45 edges of a clique, 2 * 10 join equals; those between cliques do not.
        "edge homophily": f"{100 * 6 * 20 / 276:.1f} %",
        "edges inside clients": f"{100 * 270 / 276:.1f} %",
    }


def test_the_parts_go_to_the_clients_in_random_order(config):
    """METIS numbers neighbouring parts alike, and capacities go by the index of the client."""
    graph = cliques(6, 30)
    orders = set()
    for seed in range(8):
        partition = make_graph_partition(config("louvain", clients=6, seed=seed), graph)
        orders.add(tuple(int(client.train[0]) // 30 for client in partition.clients))
    assert len(orders) > 4


def test_metis_parts_are_about_equal_and_cut_few_edges(config):
    rng = np.random.default_rng(0)
    side = 30
    grid = [(r * side + c, r * side + c + 1) for r in range(side) for c in range(side - 1)]
    grid += [(r * side + c, (r + 1) * side + c) for r in range(side - 1) for c in range(side)]
    numbers = rng.permutation(side**2)
    graph = graph_of(numbers[np.array(grid)], side**2)
    partition = make_graph_partition(config(clients=9), graph)
    sizes = [len(nodes_of(client)) for client in partition.clients]
    assert max(sizes) <= 1.1 * side**2 / 9
    # Nine squares of ten by ten would cut 2 * 2 * 30 edges of the grid; parts at random would cut 8/9 of 1740.
    assert graph.edges.shape[1] - edges_inside(partition, graph) < 2 * 2 * 120


def test_directed_edges_and_isolated_nodes_are_cut_as_well(config):
    directed = cliques(4, 10).edges
    one_way = directed[:, directed[0] < directed[1]].T
    graph = graph_of(one_way, 60, undirected=False)
    for scheme in ("metis", "louvain"):
        partition = make_graph_partition(config(scheme, clients=4), graph)
        assert sum(len(nodes_of(client)) for client in partition.clients) == 60
        assert edges_inside(partition, graph) == 4 * 45
    facts = graph_facts(graph, partition)
    assert facts["edges"] == f"{4 * 45 + 4} directed"
    assert facts["isolated nodes"] == "20"
    assert facts["components"] == "21 (largest: 40 nodes)"


@pytest.mark.parametrize("scheme", ["metis", "louvain"])
def test_one_client_holds_everything(config, scheme):
    graph = graph_of([], 20)
    (client,) = make_graph_partition(config(scheme, clients=1), graph).clients
    np.testing.assert_array_equal(np.sort(nodes_of(client)), np.arange(20))
    assert graph_facts(graph, make_graph_partition(config(scheme, clients=1), graph))["edge homophily"] == "no edges"


def test_louvain_fills_the_smallest_part_first(config):
    """Cliques of 12, 8, 7, 5 and 4 nodes onto two parts: 12 | 8, then 8 + 7 = 15, 12 + 5 = 17, 15 + 4 = 19."""
    edges, start = [], 0
    for size in (12, 8, 7, 5, 4):
        edges += [(start + a, start + b) for a in range(size) for b in range(a)]
        start += size
    partition = make_graph_partition(config("louvain", clients=2), graph_of(edges, start))
    assert {frozenset(nodes_of(client)) for client in partition.clients} == {
        frozenset([*range(12), *range(27, 32)]),
        frozenset([*range(12, 27), *range(32, 36)]),
    }


# --- overlap ------------------------------------------------------------------------------------------------------


def test_clients_that_overlap_have_random_halves_of_one_part(config):
    graph = cliques(6, 21)
    partition = make_graph_partition(config(clients=25, unseen_clients=5, overlap=5), graph)
    groups = [partition.clients[first : first + 5] for first in range(0, 30, 5)]
    parts = []
    for group in groups:
        halves = [frozenset(nodes_of(client)) for client in group]
        assert {len(half) for half in halves} == {11}
        assert len(set(halves)) == 5
        (part,) = {node // 21 for half in halves for node in half}
        parts.append(part)
    assert sorted(parts) == list(range(6))
    assert {client.role for client in groups[-1]} == {"unseen"}


def test_a_node_has_one_role_at_all_clients(config):
    graph = cliques(4, 40)
    partition = make_graph_partition(config(clients=12, unseen_clients=4, overlap=4), graph)
    roles = {
        role: {node for client in partition.clients for node in getattr(client, role)}
        for role in ("train", "validation", "test")
    }
    assert sum(map(len, roles.values())) == len(set().union(*roles.values()))
    held = [len(nodes_of(client)) for client in partition.clients]
    assert sum(held) == 16 * 20 > len(set().union(*roles.values()))


@pytest.mark.parametrize(("clients", "unseen", "key"), [(7, 3, "clients is 7"), (9, 2, "unseen-clients is 2")])
def test_overlap_divides_both_kinds_of_clients(config, clients, unseen, key):
    with pytest.raises(DataError, match=rf"partition\.overlap=3 .* partition\.{key}; choose a multiple of 3"):
        make_graph_partition(config(clients=clients, unseen_clients=unseen, overlap=3), cliques(4, 20))


# --- roles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "validation"), [(0.4, 0.3), (0.6, 0.0), (0.1, 0.2)])
def test_shares_of_the_nodes_have_each_role(config, train, validation):
    graph = cliques(4, 50)
    partition = make_graph_partition(config(clients=4, train_share=train, validation_share=validation), graph)
    counts = [
        sum(len(getattr(client, role)) for client in partition.clients) for role in ("train", "validation", "test")
    ]
    assert counts == [round(200 * share) for share in (train, validation, 1 - train - validation)]


def test_roles_follow_the_seed_alone(config):
    graph = cliques(4, 50)
    tests = [
        np.sort(np.concatenate([client.test for client in make_graph_partition(asked, graph).clients]))
        for asked in (config(clients=4), config("louvain", clients=2), config(clients=4, seed=1))
    ]
    np.testing.assert_array_equal(tests[0], tests[1])
    assert not np.array_equal(tests[0], tests[2])


def test_a_client_without_training_or_test_nodes_is_named(config):
    graph = cliques(10, 3)
    with pytest.raises(
        DataError, match=r"client-\d{4} has \d+ nodes, none of them (training|test) data .*choose fewer"
    ):
        make_graph_partition(config(clients=10), graph)
    with pytest.raises(DataError, match="has 30 nodes, none of them training data"):
        make_graph_partition(config(clients=1, train_share=0.01), graph)
    with pytest.raises(DataError, match="has 30 nodes, none of them test data"):
        make_graph_partition(config(clients=1, train_share=0.99, validation_share=0.0), graph)


def test_a_client_may_have_one_class_alone(config):
    graph = cliques(4, 20, np.repeat(np.arange(4), 20))
    for client in make_graph_partition(config(clients=4), graph).clients:
        assert len(set(graph.labels[nodes_of(client)])) == 1


# --- refusals and the rest ----------------------------------------------------------------------------------------


def test_too_few_nodes_and_communities_are_counted(config):
    with pytest.raises(DataError, match="the graph has 20 nodes, too few for 21 clients"):
        make_graph_partition(config(clients=21), cliques(2, 10))
    with pytest.raises(DataError, match=r"Louvain found 2 communities, too few for 3 parts; choose .*'metis'"):
        make_graph_partition(config("louvain", clients=3), cliques(2, 10))


def test_an_empty_part_of_metis_is_refused(config, monkeypatch):
    pymetis = pytest.importorskip("pymetis")
    answer = pymetis.GraphPartition(0, [0] * 20 + [2] * 20)
    monkeypatch.setattr(pymetis, "part_graph", lambda *args, **options: answer)
    with pytest.raises(DataError, match="METIS left 1 of 3 parts of 40 nodes empty"):
        make_graph_partition(config(clients=3, seed=77), cliques(2, 20))


@pytest.mark.parametrize(("scheme", "package"), [("metis", "pymetis"), ("louvain", "networkx")])
def test_what_is_not_installed_is_named(config, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package} .*pip install 'framp\[graph\]'"):
        make_graph_partition(config(scheme, clients=2), cliques(2, 20))


def test_concept_shift_renames_labels_and_moves_no_node(config):
    graph = cliques(4, 20, np.arange(80) % 4)
    plain = make_graph_partition(config(clients=4), graph)
    shifted = make_graph_partition(config(clients=4, concept_shift_clusters=2), graph)
    assert plain.digest != shifted.digest
    assert {client.concept_shift.cluster for client in shifted.clients} == {0, 1}
    for ours, theirs in zip(plain.clients, shifted.clients, strict=True):
        assert ours.concept_shift is None
        np.testing.assert_array_equal(nodes_of(ours), nodes_of(theirs))


def test_capacities_are_shared_out_as_for_images(config):
    partition = make_graph_partition(config(clients=4, unseen_clients=2, sizes="1/2,1"), cliques(6, 20))
    half, whole = Fraction(1, 2), Fraction(1)
    assert [client.capacity for client in partition.clients] == [half, half, whole, whole, half, whole]


def test_the_digest_covers_edges_labels_features_and_splits(config):
    graph = cliques(2, 20)
    partition = make_graph_partition(config(clients=2), graph)
    edges = b"".join(np.ascontiguousarray(row, "<i8").tobytes() for row in graph.edges)
    parts = {
        "class names": b'["0", "1"]',
        "edges": f"<i8(2, {graph.edges.shape[1]})".encode() + edges,
        "features": b"<f4(40, 1)" + graph.features.astype("<f4").tobytes(),
        "labels": b"<i8(40,)" + graph.labels.astype("<i8").tobytes(),
    }
    assert partition.data_digests == {part: hashlib.sha256(content).hexdigest() for part, content in parts.items()}
    manifest = partition.manifest()
    assert {"partition", "capacity", "graph"} <= set(manifest)
    assert manifest["clients"][0]["train"] == partition.clients[0].train.tolist()
    other = cliques(2, 20, 1 - np.arange(40) % 2)
    assert make_graph_partition(config(clients=2), other).digest != partition.digest
    renamed = replace(graph, digests={**graph.digests, "class names": "x"})
    assert make_graph_partition(config(clients=2), renamed).digest != partition.digest


@pytest.mark.parametrize("scheme", ["metis", "louvain"])
def test_parts_are_computed_once(config, scheme, monkeypatch):
    module = sys.modules[make_graph_partition.__module__]
    calls = []
    real = getattr(module, f"_{scheme}")
    monkeypatch.setattr(module, f"_{scheme}", lambda *given_: calls.append(1) or real(*given_))
    graph = cliques(5, 13)
    first = make_graph_partition(config(scheme, clients=3, seed=4), graph)
    assert make_graph_partition(config(scheme, clients=3, seed=4), graph).digest == first.digest
    assert len(calls) == 1
    make_graph_partition(config(scheme, clients=3, seed=5), graph)
    make_graph_partition(config(scheme, clients=2, seed=4), graph)
    assert len(calls) == 3
