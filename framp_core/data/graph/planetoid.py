"""The citation graphs Cora, CiteSeer and PubMed in Planetoid's files (Yang et al. 2016)."""

from pathlib import Path

import numpy as np
import torch

from framp_core.data.graph.checks import NO_ROLE, RawGraph
from framp_core.data.graph.pickles import dense, read_pickle
from framp_core.memory import require_memory

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
"""Files of a graph: features and labels of the training nodes, of the test nodes and of all but the test nodes."""
VALIDATION_NODES = 500
"""Of the public split: the nodes that follow the training nodes."""


def read_planetoid(folder: Path, name: str) -> RawGraph:
    """Read a graph and its public split as PyG's ``Planetoid`` and ``NormalizeFeatures`` do, which a test compares.

    The files are pickles, which are read as :mod:`framp_core.data.graph.pickles` says: nothing in them runs.

    Args:
        folder: holds ``ind.<name>.x`` and so on.
        name: in lower case.

    Raises:
        Exception: of almost any kind, if a file is damaged.
        DataError: an array takes more memory than is free.
    """
    contents = {part: (folder / f"ind.{name}.{part}").read_bytes() for part in PARTS}
    tests = np.array([int(line) for line in contents.pop("test.index").split()], dtype=np.int64)
    loaded = {part: read_pickle(content) for part, content in contents.items()}
    edges = _edges(loaded.pop("graph"))
    known = {part: dense(found) for part, found in loaded.items()}
    order = np.sort(tests)
    for part in ("tx", "ty") if name == "citeseer" else ():
        known[part] = _with_gaps(known[part], order)
    x, y = (np.concatenate([known[f"all{kind}"], known[f"t{kind}"]]) for kind in ("x", "y"))
    if len(np.unique(tests)) < len(tests) or order[0] < 0 or order[-1] >= min(len(x), len(y)):
        raise ValueError(f"test.index names nodes {order[0]} to {order[-1]}, not all different, of {len(x)}")
    labels = y.argmax(axis=1)
    x[tests], labels[tests] = x[order], labels[order]
    features = torch.from_numpy(x).float()
    features -= features.min()
    features /= features.sum(dim=-1, keepdim=True).clamp(min=1.0)
    split = np.full(len(labels), NO_ROLE, dtype=np.int8)
    training = len(known["y"])
    split[:training], split[training : training + VALIDATION_NODES], split[tests] = 0, 1, 2
    return RawGraph(features.numpy(), edges, labels, split=split)


def _with_gaps(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of the test nodes, with a row of zeros for each number between them that no test node has."""
    count = int(order[-1] - order[0]) + 1
    require_memory(2 * count * rows[:1].nbytes, f"test.index names nodes {order[0]} to {order[-1]}")
    filled = np.zeros((count, rows.shape[1]), rows.dtype)
    filled[order - order[0]] = rows
    return filled


def _edges(graph: object) -> np.ndarray:
    """From each node to its neighbours, int64 ``(2, E)``."""
    if not isinstance(graph, dict) or not all(isinstance(ends, list) for ends in graph.values()):
        raise ValueError("expected lists of neighbours")
    count = sum(map(len, graph.values()))  # A list may stand there under many nodes, and in the file once.
    require_memory(100 * count, f"the nodes of its graph have {count:,} neighbours in all")
    sources = np.repeat(np.array(list(graph), dtype=np.int64), [len(ends) for ends in graph.values()])
    targets = np.array([node for ends in graph.values() for node in ends], dtype=np.int64)
    return np.stack([sources, targets])
