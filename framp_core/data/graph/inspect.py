"""Facts about a graph and its partition, for ``framp data inspect``."""

import numpy as np

from framp_core.data.graph.checks import NO_ROLE, UNLABELLED, component_of
from framp_core.data.graph.neighbours import edges_within
from framp_core.data.graph.sources import GraphData
from framp_core.data.partition import Partition


def graph_facts(graph: GraphData, partition: Partition) -> dict[str, str]:
    """What a graph is and what the partition keeps of it.

    An undirected edge counts once. Edge homophily is the share of the edges that join nodes of one class (Zhu et al.
    2020) and have a label; an edge is kept inside clients if one client at least holds both of its nodes.
    """
    (source, target), nodes = graph.edges, len(graph)
    both = bool(np.isin(source * nodes + target, target * nodes + source, assume_unique=True).all())
    degrees = np.bincount(graph.edges.ravel(), minlength=nodes)
    components = np.bincount(component_of(graph.edges, nodes))
    labelled = graph.labels != UNLABELLED
    counts = np.bincount(graph.labels[labelled], minlength=graph.classes)
    known = labelled[source] & labelled[target]
    return {
        "nodes": str(nodes),
        "edges": f"{len(source) // 2} undirected" if both else f"{len(source)} directed",
        "features": str(graph.shape[0]),
        "classes": f"{graph.classes} ({counts.min()} to {counts.max()} nodes per class)",
        "isolated nodes": str(np.count_nonzero(degrees == 0)),
        "components": f"{len(components)} (largest: {components.max()} nodes)",
        "edge homophily": _percent((graph.labels[source] == graph.labels[target])[known]),
        "edges inside clients": _percent(_kept(graph, partition)),
        **({} if graph.split is None else {"split": _own_split(np.where(labelled, graph.split, NO_ROLE))}),
        **graph.notes,
    }


def _own_split(split: np.ndarray) -> str:
    rest, train, validation, test = np.bincount(split + 1, minlength=4)
    return f"the data set's own: {train} training, {validation} validation, {test} test nodes, {rest} in none of them"


def _kept(graph: GraphData, partition: Partition) -> np.ndarray:
    """Whether a client holds both ends of each edge, bool ``(E,)``."""
    kept = np.zeros(graph.edges.shape[1], dtype=bool)
    for client in partition.clients:
        kept[edges_within(graph.starts, graph.edges[0], client.held)[0]] = True
    return kept


def _percent(chosen: np.ndarray) -> str:
    return f"{100 * chosen.mean():.1f} %" if len(chosen) else "no edges"
