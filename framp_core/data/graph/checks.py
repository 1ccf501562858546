"""From the arrays that somebody saved as a graph to arrays that everything else can rely on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from framp_core.errors import DataError

# scipy's sparse arrays are untyped.
coo_array: Any = sparse.coo_array


MASKS = ("train_mask", "val_mask", "test_mask")
"""PyG's names of a graph's own split, in the order of the roles 0, 1 and 2."""
NO_ROLE = -1
UNLABELLED = -1


class RawGraph(NamedTuple):
    """A graph in PyG's terms.

    Attributes:
        x: features ``(N, F)``.
        edge_index: ``(2, E)``, rows of source and target nodes.
        y: labels ``(N,)`` or ``(N, 1)``.
        class_names: of each label; None for ``"0"``, ``"1"``, ...
        split: role of each node in the graph's own split, 0 to train, 1 to validate, 2 to test, :data:`NO_ROLE` for
            none, int8 ``(N,)``; None where it was not asked for.
        unread: names of further arrays that were there.
    """

    x: np.ndarray
    edge_index: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...] | None = None
    split: np.ndarray | None = None
    unread: tuple[str, ...] = ()


def checked(raw: RawGraph, origin: str) -> RawGraph:
    """The same graph as float32 features, int64 edges, int64 labels ``(N,)`` and class names.

    A class may have no nodes: its label is then one that nobody has. A node without a label, -1 or NaN, gets
    :data:`UNLABELLED`.

    Args:
        raw: arrays as they were found.
        origin: where, for the messages.

    Raises:
        DataError: features are not finite numbers ``(N, F)``, edges are not pairs of nodes, or labels are not N
            whole numbers in [0, C), or none, with at least two different ones and C at most N.
    """
    x = _features(raw.x, origin)
    y = _labels(raw.y, len(x), origin)
    names = _class_names(raw.class_names, y, origin)
    return raw._replace(x=x, edge_index=_edges(raw.edge_index, len(x), origin), y=y, class_names=names)


def _features(x: np.ndarray, origin: str) -> np.ndarray:
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "biuf":
        raise DataError(
            f"x of {origin} is {x.dtype} of shape {x.shape}; expected numbers of shape (nodes, features), "
            f"one row of features per node"
        )
    with np.errstate(over="ignore"):
        features: np.ndarray = x.astype(np.float32)
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        node, feature = bad[0]
        raise DataError(
            f"x of {origin} has {len(bad)} values that are not finite in float32, the first at node {node}, feature "
            f"{feature}: {x[node, feature]}; replace them, or remove the nodes"
        )
    return features


def _labels(y: np.ndarray, nodes: int, origin: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"y of {origin} has shape {y.shape}; expected one label per node, ({nodes},)")
    if len(y) != nodes:
        first = f"node {len(y)} has no label" if len(y) < nodes else f"label {nodes} belongs to no node"
        raise DataError(f"y of {origin} has {len(y)} labels and x {nodes} nodes: {first}; expected one per node")
    if y.dtype.kind not in "iuf":
        raise DataError(
            f"y of {origin} is {y.dtype}, node 0 has {y[0]}; expected whole numbers, the index of each node's class "
            f"(convert them with y.astype('int64'))"
        )
    without = np.isnan(y) | (y == UNLABELLED)
    for node in np.flatnonzero(~without & ((y < 0) | (y >= nodes) | (y != np.floor(y))))[:1]:
        raise DataError(
            f"y of {origin}: node {node} has label {y[node]}; expected whole numbers from 0 to C - 1, with no more "
            f"classes than the {nodes} nodes, or -1 for a node without a label. Renumber the classes"
        )
    labels: np.ndarray = np.where(without, UNLABELLED, y).astype(np.int64)
    _require_classes(labels, f"y of {origin}:")
    return labels


def _require_classes(labels: np.ndarray, whose: str) -> None:
    known = np.unique(labels[labels != UNLABELLED])
    if len(known) < 2:
        held = f"all nodes with a label have label {known[0]}" if len(known) else "no node has a label"
        raise DataError(f"{whose} {held}; expected two classes or more")


def split_of(masks: Mapping[str, np.ndarray], nodes: int, origin: str) -> np.ndarray:
    """The split that a graph's masks make; ``RawGraph.split``.

    Args:
        masks: bool, or 0 and 1, ``(N,)`` or ``(N, 1)``, by the names of :data:`MASKS`; ``val_mask`` may be missing.
        nodes: N.
        origin: where they were found, for the messages.

    Raises:
        DataError: a mask is missing, is none, or puts a node into two.
    """
    split = np.full(nodes, NO_ROLE, dtype=np.int8)
    for role, name in enumerate(MASKS):
        if name not in masks and name != "val_mask":
            raise DataError(
                f"graph.split='file' and {origin} holds no {name!r}; save the masks {', '.join(map(repr, MASKS))} "
                f"with it, or leave graph.split at 'random'"
            )
        chosen = _mask(masks.get(name, np.zeros(nodes, dtype=bool)), name, nodes, origin)
        for node in np.flatnonzero(chosen & (split != NO_ROLE))[:1]:
            raise DataError(
                f"{name} of {origin} holds node {node}, which {MASKS[split[node]]} holds too; expected masks without "
                f"a node in common"
            )
        split[chosen] = role
    return split


def _mask(mask: np.ndarray, name: str, nodes: int, origin: str) -> np.ndarray:
    hint = ""
    if mask.ndim == 2 and len(mask) == nodes:
        hint = f" ({mask.shape[1]} splits side by side: save one of them, such as {name}[:, 0])"
        mask = mask[:, 0] if mask.shape[1] == 1 else mask
    if mask.shape != (nodes,) or not np.isin(mask, (0, 1)).all():
        raise DataError(
            f"{name} of {origin} is {mask.dtype} of shape {mask.shape}{hint}; expected true or false for each node, "
            f"({nodes},)"
        )
    return mask.astype(bool)


def _edges(edge_index: np.ndarray, nodes: int, origin: str) -> np.ndarray:
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        hint = " (transpose it)" if edge_index.ndim == 2 and edge_index.shape[1] == 2 else ""
        raise DataError(
            f"edge_index of {origin} has shape {edge_index.shape}; expected (2, edges), a row of source nodes and "
            f"a row of target nodes{hint}"
        )
    # An empty array is often made without a type, which then is float.
    if edge_index.size and edge_index.dtype.kind not in "iu":
        raise DataError(
            f"edge_index of {origin} is {edge_index.dtype}; expected whole numbers, positions of nodes in x"
        )
    for edge in np.flatnonzero(((edge_index < 0) | (edge_index >= nodes)).any(axis=0))[:1]:
        raise DataError(
            f"edge_index of {origin}: edge {edge} runs from node {edge_index[0, edge]} to node {edge_index[1, edge]}, "
            f"and the nodes of x are 0 to {nodes - 1}; number the nodes by their rows in x"
        )
    edges: np.ndarray = edge_index.astype(np.int64)
    return edges


def _class_names(names: tuple[str, ...] | None, labels: np.ndarray, origin: str) -> tuple[str, ...]:
    needed = int(labels.max()) + 1
    if names is None:
        return tuple(str(label) for label in range(needed))
    if len(names) < needed or len(set(names)) < len(names):
        raise DataError(
            f"class_names of {origin} are {len(names)}, {len(set(names))} of them different, and y has labels up to "
            f"{needed - 1}; expected a name of its own for each class, or no class_names"
        )
    return names


def tidied(graph: RawGraph, *, undirected: bool, largest_component: bool) -> RawGraph:
    """A checked graph with its edges in one order: by target, then by source.

    Edges from a node to itself and repeated edges are dropped: what a layer adds for the node itself is its own
    matter.

    Args:
        graph: from :func:`checked`.
        undirected: add the reverse of every edge.
        largest_component: keep the nodes of the largest connected component alone, directions aside, in their order;
            among equals the one with the first node.

    Raises:
        DataError: that component has nodes of one class alone.
    """
    nodes, (source, target) = len(graph.x), graph.edge_index
    if undirected:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
    keys = np.unique(target[source != target] * nodes + source[source != target])
    edges = np.stack([keys % nodes, keys // nodes])
    if not largest_component:
        return graph._replace(edge_index=edges)
    component = component_of(edges, nodes)
    kept = component == component[np.bincount(component)[component].argmax()]
    numbers = np.cumsum(kept) - 1
    labels, split = graph.y[kept], graph.split
    _require_classes(labels, f"graph.largest-component=true leaves {len(labels)} nodes (false keeps all):")
    ends = numbers[edges[:, kept[edges[1]]]]
    return graph._replace(x=graph.x[kept], edge_index=ends, y=labels, split=None if split is None else split[kept])


def component_of(edges: np.ndarray, nodes: int) -> np.ndarray:
    """Connected component of each node, directions aside, int ``(nodes,)``."""
    adjacency = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(nodes, nodes))
    component: np.ndarray = connected_components(adjacency.tocsr(), directed=True, connection="weak")[1]
    return component
