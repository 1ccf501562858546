"""Who holds which nodes: cutting a graph into parts for the clients (DESIGN section 5)."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import sparse

from framp_core.config import FrampConfig, PartitionConfig
from framp_core.data.cache import cached
from framp_core.data.graph.checks import NO_ROLE, UNLABELLED
from framp_core.data.graph.sources import GraphData
from framp_core.data.partition import ClientSplit, Partition, capacities, client_name
from framp_core.data.shift import concept_shifts
from framp_core.errors import DataError
from framp_core.extra import extra
from framp_core.randomness import stream
from framp_core.rounding import largest_remainder

# scipy's sparse arrays are untyped.
csr_array: Any = sparse.csr_array

_SCHEME_PACKAGES = {"metis": "pymetis", "louvain": "networkx"}


def make_graph_partition(config: FrampConfig, graph: GraphData) -> Partition:
    """Divide the nodes of a graph over ``config.partition.nodes`` clients.

    The graph, directions aside, is cut into nodes / ``overlap`` parts:

    - ``metis`` (Karypis and Kumar 1998): about equally many nodes per part, few edges between parts.
    - ``louvain`` (Blondel et al. 2008): communities of high modularity, the largest first, each onto the part that
      has the fewest nodes so far.

    The parts, in random order, go to the clients. With ``overlap`` c > 1, c consecutive clients share a part and each
    has its own random half of the part's nodes (rounded up); c divides the number of training and of unseen clients,
    so the two never share one (FedSheafHN: 6 parts with 5 clients each).

    One random split of all nodes with a label, by ``graph.train_share`` and ``graph.validation_share``, or with
    ``graph.split`` = ``file`` the graph's own, says which are training, validation and test data, so that a node which
    several clients hold has the same role at all of them. A client sees the features of all its nodes and the edges
    among them, whatever their role; those without one are its context.

    A client may lack classes, even all but one, for which the logit adjustment of local training is made, but not
    training or test nodes. Concept shift renames a client's labels as for images.

    Positions in the splits are nodes, and the splits of all clients refer to the same numbering.

    Args:
        config: sections ``partition``, ``capacity``, ``graph`` and ``data.cache`` and the seed are used.
        graph: to be divided.

    Raises:
        DataError: a client would end without training or test nodes, ``overlap`` does not divide the clients, there
            are too few nodes or communities, METIS leaves a part empty, or there are more clusters of concept shift
            than training clients.
        ConfigError: a package of the extra ``graph`` is not installed.
    """
    settings, seed = config.partition, config.seed
    _check(settings, len(graph))
    parts = stream(seed, "part-order").permutation(settings.nodes // settings.overlap)[_parts(config, graph)]
    roles = _roles(config, graph)
    fractions = capacities(config.capacity, settings, seed)
    concepts = concept_shifts(settings, graph.classes, seed)
    clients = []
    for index, nodes in enumerate(_dealt(parts, settings, seed)):
        train, validation, test = (nodes[roles[nodes] == role] for role in range(3))
        for kind, held in (("training", train), ("test", test)):
            _require(kind, held, nodes, index, config)
        role: Literal["train", "unseen"] = "train" if index < settings.clients else "unseen"
        held = (train, validation, test)
        context = nodes[roles[nodes] == NO_ROLE]
        clients.append(ClientSplit(client_name(index), role, fractions[index], *held, None, concepts[index], context))
    nested = config.to_nested()
    made_with = {key: nested[key] for key in ("partition", "capacity", "graph")}
    return Partition(tuple(clients), graph.digests, seed, made_with)


def _check(settings: PartitionConfig, nodes: int) -> None:
    for kind, count in (("clients", settings.clients), ("unseen-clients", settings.unseen_clients)):
        if count % settings.overlap:
            raise DataError(
                f"partition.overlap={settings.overlap} clients share a part of the graph and partition.{kind} is "
                f"{count}; choose a multiple of {settings.overlap}, for training and unseen clients share no part"
            )
    if settings.nodes // settings.overlap > nodes:
        raise DataError(
            f"the graph has {nodes} nodes, too few for {settings.nodes} clients; choose fewer partition.clients and "
            f"unseen-clients"
        )


def _roles(config: FrampConfig, graph: GraphData) -> np.ndarray:
    """0, 1, 2 for a training, validation, test node, or no role; shares by largest remainder; int64 ``(nodes,)``."""
    labelled = graph.labels != UNLABELLED
    if graph.split is not None:
        return np.where(labelled, graph.split, NO_ROLE)
    train, validation = config.graph.train_share, config.graph.validation_share
    counts = largest_remainder(int(labelled.sum()), np.array([train, validation, 1 - train - validation]))
    roles = np.full(len(graph), NO_ROLE)
    roles[labelled] = stream(config.seed, "node-split").permutation(np.repeat(np.arange(3), counts))
    return roles


def _dealt(parts: np.ndarray, settings: PartitionConfig, seed: int) -> list[np.ndarray]:
    """Nodes of each client, ascending, from the part of each node."""
    groups = np.split(np.argsort(parts, kind="stable"), np.bincount(parts).cumsum()[:-1])
    if settings.overlap == 1:
        return groups
    return [
        np.sort(stream(seed, "part-half", index).permutation(group)[: (len(group) + 1) // 2])
        for index, group in enumerate(group for group in groups for _ in range(settings.overlap))
    ]


def _require(kind: str, held: np.ndarray, nodes: np.ndarray, index: int, config: FrampConfig) -> None:
    if not len(held):
        graph = config.graph
        shares = f"graph.train-share is {graph.train_share:g}, validation-share {graph.validation_share:g}"
        split, other = (shares, "shares") if graph.split == "random" else ("graph.split is 'file'", "masks")
        raise DataError(
            f"{client_name(index)} has {len(nodes)} nodes, none of them {kind} data ({split}); choose fewer "
            f"partition.clients and unseen-clients, other {other}, or another seed"
        )


# --- parts --------------------------------------------------------------------------------------------------------


def _parts(config: FrampConfig, graph: GraphData) -> np.ndarray:
    """Part of each node, int64 ``(N,)``; computed once per machine, for Louvain may take minutes."""
    scheme, count = config.partition.scheme, config.partition.nodes // config.partition.overlap
    if count == 1:
        return np.zeros(len(graph), dtype=np.int64)
    package = _SCHEME_PACKAGES[scheme]
    extra(package)
    number = int(stream(config.seed, scheme).integers(2**31 - 1))

    def build(folder: Path) -> None:
        parts = (_metis if scheme == "metis" else _louvain)(_symmetric(graph), count, number)
        np.save(folder / "parts.npy", parts.astype(np.int64))

    made_of = {"edges": graph.digests["edges"], "nodes": len(graph), "scheme": scheme, "parts": count, "seed": number}
    identity = {**made_of, package: version(package)}
    folder = cached(config.data.cache, identity, build)
    try:
        parts: np.ndarray = np.load(folder / "parts.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"the cached parts in {str(folder)!r} are damaged ({error}); delete that folder") from error
    return parts


def _symmetric(graph: GraphData) -> Any:
    """Adjacency matrix, directions aside, ``(N, N)``, with sorted columns."""
    ones = np.ones(graph.edges.shape[1], dtype=np.int64)
    adjacency = csr_array((ones, graph.edges[0], graph.starts), shape=(len(graph), len(graph)))
    both = (adjacency + adjacency.T).tocsr()
    both.sort_indices()
    return both


def _metis(adjacency: Any, count: int, seed: int) -> np.ndarray:
    pymetis = extra("pymetis")
    kind = pymetis.zero_copy_dtype()
    edges = pymetis.CSRAdjacency(adjacency.indptr.astype(kind), adjacency.indices.astype(kind))
    parts = np.array(pymetis.part_graph(count, edges, options=pymetis.Options(seed=seed)).vertex_part)
    empty = count - len(np.unique(parts))
    if empty:
        raise DataError(
            f"METIS left {empty} of {count} parts of {len(parts)} nodes empty; choose fewer partition.clients and "
            f"unseen-clients, or another seed"
        )
    return parts


def _louvain(adjacency: Any, count: int, seed: int) -> np.ndarray:
    networkx = extra("networkx")
    adjacency.data[:] = 1  # An edge counts once, in one direction or in both.
    found = networkx.community.louvain_communities(networkx.from_scipy_sparse_array(adjacency), seed=seed)
    communities = sorted((sorted(community) for community in found), key=lambda nodes: (-len(nodes), nodes[0]))
    if len(communities) < count:
        raise DataError(
            f"Louvain found {len(communities)} communities, too few for {count} parts; choose partition.scheme="
            f"'metis', or fewer partition.clients and unseen-clients"
        )
    parts, sizes = np.empty(adjacency.shape[0], dtype=np.int64), np.zeros(count, dtype=np.int64)
    for community in communities:
        part = int(sizes.argmin())
        parts[community] = part
        sizes[part] += len(community)
    return parts
