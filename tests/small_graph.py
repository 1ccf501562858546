"""A small graph that several test files run on."""

from pathlib import Path

import numpy as np

from framp_core.config_values import Scalar

NODES, FEATURES, CLASSES = 90, 12, 3

TINY_GRAPH: dict[str, Scalar] = {
    "data.name": "graph-file",
    "partition.scheme": "metis",
    "model.name": "gcn",
    "model.widths": "8,8",
    "model.normalisation": "none",
    "model.heads": 4,
}


def save_small_graph(path: Path, seed: int = 0) -> dict[str, Scalar]:
    """Write a planted partition (classes link to themselves, features are noisy class means); settings that read it."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(NODES) % CLASSES)
    alike = labels[:, None] == labels
    edges = np.argwhere(np.triu(rng.random((NODES, NODES)) < np.where(alike, 0.15, 0.02), 1)).T
    means = rng.normal(size=(CLASSES, FEATURES))
    features = means[labels] + rng.normal(size=(NODES, FEATURES))
    np.savez(path, x=features.astype(np.float32), edge_index=edges, y=labels)
    return {**TINY_GRAPH, "data.root": str(path)}
