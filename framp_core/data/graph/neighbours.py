"""Which edges run into a set of nodes, within it, or are sampled around it; vectorised, no loop over nodes.

Everywhere ``starts`` int64 ``(N + 1,)`` says that the edges into node v are number ``starts[v]`` up to, not including,
``starts[v + 1]``, as edges sorted by target have it.
"""

from collections.abc import Sequence

import numpy as np


def starts_of(targets: np.ndarray, nodes: int) -> np.ndarray:
    """``starts`` of edges whose target nodes, ascending, are given."""
    return np.searchsorted(targets, np.arange(nodes + 1))


def edges_into(starts: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges into some nodes.

    Args:
        starts: as above.
        nodes: int64 ``(n,)``.

    Returns:
        Numbers of the edges, and which of ``nodes`` (a position) each runs into, ascending; int64 ``(e,)`` both.
    """
    degrees = starts[nodes + 1] - starts[nodes]
    rows = np.repeat(np.arange(len(nodes)), degrees)
    return _ranks(degrees) + np.repeat(starts[nodes], degrees), rows


def edges_within(starts: np.ndarray, sources: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges that have both ends among some nodes.

    Args:
        starts: as above.
        sources: int64 ``(E,)``, source node of each edge.
        nodes: int64 ``(n,)``, without repeats.

    Returns:
        Numbers of the edges, ascending if ``nodes`` are, int64 ``(e,)``; and their sources and targets as positions in
        ``nodes``, int64 ``(2, e)``.
    """
    positions = np.full(len(starts) - 1, -1)
    positions[nodes] = np.arange(len(nodes))
    edges, rows = edges_into(starts, nodes)
    ends = np.stack([positions[sources[edges]], rows])
    inside = ends[0] >= 0
    return edges[inside], ends[:, inside]


def sample_around(
    starts: np.ndarray, sources: np.ndarray, seeds: np.ndarray, fan_outs: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample the neighbourhood of some nodes, hop by hop (Hamilton et al. 2017, GraphSAGE).

    Hop h looks at the nodes that hop h - 1 found for the first time (hop 1: at the seeds) and draws
    ``fan_outs[h - 1]`` of the edges into each uniformly without replacement, or takes all where there are no more. So
    each node's edges are drawn at most once. With fan-outs no smaller than any degree, the result has all edges into
    nodes less than ``len(fan_outs)`` hops away: all that as many layers need for the seeds.

    Args:
        starts: as above.
        sources: int64 ``(E,)``, source node of each edge.
        seeds: int64 ``(b,)``, may repeat.
        fan_outs: of each hop, the first nearest to the seeds.
        rng: draws the edges.

    Returns:
        Nodes, each once, the seeds first, int64 ``(n,)``; the drawn edges as positions in them, source and target,
        int64 ``(2, e)``; and the position of each seed, int64 ``(b,)``.
    """
    frontier, positions = np.unique(seeds, return_inverse=True)
    found, drawn = [frontier], [np.empty((2, 0), dtype=np.int64)]
    seen = np.zeros(len(starts) - 1, dtype=bool)
    for fan_out in fan_outs:
        seen[frontier] = True
        edges, rows = _drawn(starts, frontier, fan_out, rng)
        drawn.append(np.stack([sources[edges], frontier[rows]]))
        frontier = np.unique(sources[edges][~seen[sources[edges]]])
        found.append(frontier)
    nodes = np.concatenate(found)
    numbers = np.empty(len(starts) - 1, dtype=np.int64)
    numbers[nodes] = np.arange(len(nodes))
    return nodes, numbers[np.concatenate(drawn, axis=1)], positions


def _drawn(starts: np.ndarray, nodes: np.ndarray, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the edges into each node, as :func:`edges_into` returns them."""
    edges, rows = edges_into(starts, nodes)
    # Sorting by row, then by a random number, shuffles within rows, and each row keeps its place. Stable, so that
    # equal numbers fall alike on all machines.
    shuffled = np.argsort((rows << 32) + rng.integers(2**32, size=len(rows)), kind="stable")
    kept = _ranks(starts[nodes + 1] - starts[nodes]) < most
    return edges[shuffled[kept]], rows[kept]


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, and so on."""
    ranks: np.ndarray = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks
